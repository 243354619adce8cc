//! Carrying a fault through on chain: report, wait for the verifiers' quorum or the end of the contest
//! window, execute.

use std::sync::Arc;
use std::time::Duration;

use manyhands_chain_client::types::{self, FaultState};
use manyhands_chain_client::{ChainClient, FaultReport, ReadError, SubmitError};
use manyhands_proto::{Balance, Digest, NodeId, Round};
use manyhands_rules::coordinator::Input;
use manyhands_rules::record::FaultKind;

use crate::context::Context;
use crate::retry::Backoff;

/// Between looks at a fault whose window is open.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The chain's refusals that no repetition changes: the worker has nothing at stake in this run.
const OUT_OF_REACH: [&str; 5] =
    ["NotMember", "WorkerUnknown", "JoinedLater", "RunOver", "SelfReport"];

/// What is reported.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    pub(super) round: Round,
    pub(super) worker: NodeId,
    pub(super) kind: FaultKind,
    pub(super) evidence: Digest,
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

/// Ends when the chain has decided, with what it took from the worker's stake.
pub(super) async fn carry_through(context: &Arc<Context>, fault: Fault) -> Input {
    let Fault { round, worker, .. } = fault;
    let settled = |slashed| Input::FaultSettled { round, worker, slashed };
    let Some(chain) = &context.chain else { return settled(Balance(0)) };
    let what = format!("the fault of {} in round {round}", worker.short());
    let mut backoff = Backoff::for_chain();
    let slashed = loop {
        match decided(context, chain, fault).await {
            Ok(slashed) => break slashed,
            Err(FaultError::Submit(SubmitError::Failed { error, .. }))
                if OUT_OF_REACH.contains(&error.as_str()) =>
            {
                tracing::warn!(%worker, %round, error, "the chain cannot slash this worker");
                break Balance(0);
            }
            Err(error) => {
                tracing::warn!(%worker, %round, %error, "a fault is not carried through yet");
                context.notes.report(&what, error.to_string());
            }
        }
        backoff.wait().await;
    };
    context.notes.clear(&what);
    settled(slashed)
}

async fn decided(
    context: &Context,
    chain: &ChainClient,
    fault: Fault,
) -> Result<Balance, FaultError> {
    let Fault { round, worker, kind, evidence } = fault;
    let (key, run) = (&context.key, &context.run);
    loop {
        let state = chain.state().await?;
        let now = state.block().number;
        // A call is executed in a later block than the one whose state is read here.
        let over = |block: u32| now.saturating_add(1) >= block;
        match state.fault(run, &worker, round).await?.map(|fault| fault.state) {
            None => {
                let kind = kind_on_chain(kind);
                let report =
                    FaultReport { run: *run, worker, round, kind, evidence_digest: evidence };
                chain.report_fault(key, report).await?;
            }
            Some(FaultState::Executed { slashed }) => return Ok(slashed),
            Some(FaultState::Dismissed) => return Ok(Balance(0)),
            Some(
                FaultState::Reported { executable_at: at }
                | FaultState::Contested { resolves_at: at, .. },
            ) if over(at) => {
                chain.execute_fault(key, run, &worker, round).await?;
            }
            Some(FaultState::Reported { .. } | FaultState::Contested { .. }) => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    }
}
