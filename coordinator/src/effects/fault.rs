//! Carrying a fault through on chain: report, wait for the verifiers' quorum or the end of the contest
//! window, execute.

use std::sync::Arc;
use std::time::Duration;

use manyhands_chain_client::types::{self, FaultState};
use manyhands_chain_client::{
    ChainClient, ChainState, FaultReport, ReadError, SubmitError, VerifierReport,
};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use manyhands_rules::record::{FalseEnd, FaultKind};

use crate::context::Context;
use crate::retry::Backoff;

/// Between looks at a fault whose window is open.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The chain's refusals that no repetition changes: the accused has nothing at stake in this run.
const OUT_OF_REACH: [&str; 7] = [
    "NotMember",
    "WorkerUnknown",
    "JoinedLater",
    "RunOver",
    "SelfReport",
    "VerifierUnknown",
    "VerifierUnreachable",
];

/// What is reported, of whom.
#[derive(Debug, Clone, Copy)]
pub(super) enum Accusation {
    Worker { round: Round, worker: NodeId, kind: FaultKind, evidence: Digest },
    Verifier { end: FalseEnd, evidence: Digest },
}

impl Accusation {
    fn name(&self) -> String {
        match self {
            Self::Worker { round, worker, .. } => {
                format!("the fault of {} in round {round}", worker.short())
            }
            Self::Verifier { end: FalseEnd { round, verifier, .. }, .. } => {
                format!("what verifier {} said of round {round}", verifier.short())
            }
        }
    }

    async fn state(
        &self,
        state: &ChainState,
        run: &RunId,
    ) -> Result<Option<FaultState>, ReadError> {
        match self {
            Self::Worker { round, worker, .. } => {
                Ok(state.fault(run, worker, *round).await?.map(|fault| fault.state))
            }
            Self::Verifier { end: FalseEnd { round, worker, verifier }, .. } => {
                let fault = state.verifier_fault(run, verifier, worker, *round).await?;
                Ok(fault.map(|fault| fault.state))
            }
        }
    }

    async fn report(&self, chain: &ChainClient, context: &Context) -> Result<(), SubmitError> {
        let (key, run) = (&context.key, context.run);
        match *self {
            Self::Worker { round, worker, kind, evidence: evidence_digest } => {
                let kind = kind_on_chain(kind);
                let report = FaultReport { run, worker, round, kind, evidence_digest };
                chain.report_fault(key, report).await?;
            }
            Self::Verifier { end, evidence: evidence_digest } => {
                let FalseEnd { round, worker, verifier } = end;
                let report = VerifierReport { run, verifier, worker, round, evidence_digest };
                chain.report_verifier(key, report).await?;
            }
        }
        Ok(())
    }

    async fn execute(&self, chain: &ChainClient, context: &Context) -> Result<(), SubmitError> {
        let (key, run) = (&context.key, &context.run);
        match self {
            Self::Worker { round, worker, .. } => {
                chain.execute_fault(key, run, worker, *round).await?;
            }
            Self::Verifier { end: FalseEnd { round, worker, verifier }, .. } => {
                chain.execute_verifier_fault(key, run, verifier, (worker, *round)).await?;
            }
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum FaultError {
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// On chain there is no kind of its own for a payload that does not parse: like a chunk that does not
/// encode to it, it is bytes that the codec cannot have written.
const fn kind_on_chain(kind: FaultKind) -> types::FaultKind {
    match kind {
        FaultKind::Malformed | FaultKind::Codec => types::FaultKind::Codec,
        FaultKind::Replay => types::FaultKind::Replay,
        FaultKind::Withheld => types::FaultKind::Withheld,
    }
}

/// Ends when the chain has decided, with what it took from the stake or bond.
pub(super) async fn carry_through(context: &Arc<Context>, accusation: Accusation) -> Balance {
    let Some(chain) = &context.chain else { return Balance(0) };
    let what = accusation.name();
    let mut backoff = Backoff::for_chain();
    let slashed = loop {
        match decided(context, chain, &accusation).await {
            Ok(slashed) => break slashed,
            Err(FaultError::Submit(SubmitError::Failed { error, .. }))
                if OUT_OF_REACH.contains(&error.as_str()) =>
            {
                tracing::warn!(what, error, "the chain cannot slash for it");
                break Balance(0);
            }
            Err(error) => {
                tracing::warn!(what, %error, "not carried through yet");
                context.notes.report(&what, error.to_string());
            }
        }
        backoff.wait().await;
    };
    context.notes.clear(&what);
    slashed
}

async fn decided(
    context: &Context,
    chain: &ChainClient,
    accusation: &Accusation,
) -> Result<Balance, FaultError> {
    loop {
        let state = chain.state().await?;
        let now = state.block().number;
        // A call is executed in a later block than the one whose state is read here.
        let over = |block: u32| now.saturating_add(1) >= block;
        match accusation.state(&state, &context.run).await? {
            None => accusation.report(chain, context).await?,
            Some(FaultState::Executed { slashed }) => return Ok(slashed),
            Some(FaultState::Dismissed) => return Ok(Balance(0)),
            Some(
                FaultState::Reported { executable_at: at }
                | FaultState::Contested { resolves_at: at, .. },
            ) if over(at) => accusation.execute(chain, context).await?,
            Some(FaultState::Reported { .. } | FaultState::Contested { .. }) => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    }
}
