//! Carrying an accusation through on chain: report, wait until the verifiers have voted or a window is over,
//! have it decided.

use std::sync::Arc;
use std::time::Duration;

use manyhands_chain_client::types::{self, FaultState};
use manyhands_chain_client::{Accusation, ChainClient, ReadError, SubmitError};
use manyhands_network::data::Access;
use manyhands_proto::{Balance, Digest, Round};
use manyhands_rules::record::FaultKind;

use super::EffectError;
use crate::context::Context;
use crate::journal::{BlobKind, BlobNote};
use crate::retry::Backoff;

/// Between looks at a dispute whose window is open.
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

#[derive(Debug, thiserror::Error)]
enum FaultError {
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// On chain there is no kind of its own for a payload that does not parse: like a chunk that does not
/// encode to it, it is bytes that the codec cannot have written.
pub(super) const fn kind_on_chain(kind: FaultKind) -> types::FaultKind {
    match kind {
        FaultKind::Malformed | FaultKind::Codec => types::FaultKind::Codec,
        FaultKind::Replay => types::FaultKind::Replay,
        FaultKind::Withheld => types::FaultKind::Withheld,
    }
}

/// Shows everybody what an accusation follows from: whoever votes on it looks at it first.
pub(super) fn show(context: &Context, round: Round, shown: &[u8]) -> Result<BlobNote, EffectError> {
    let digest = context.store.insert(shown, Access::Everyone)?;
    Ok(BlobNote { digest, kind: BlobKind::Evidence, round })
}

/// Ends when the chain has decided, with what it took from the stake or bond.
pub(super) async fn carry_through(
    context: &Arc<Context>,
    accusation: Accusation,
    evidence: Digest,
) -> Balance {
    let Some(chain) = &context.chain else { return Balance(0) };
    let (round, who) = (accusation.round(), accusation.node().short());
    let what = match accusation {
        Accusation::Worker { .. } => format!("the fault of {who} in round {round}"),
        Accusation::Verifier { .. } => format!("what verifier {who} said of round {round}"),
    };
    let mut backoff = Backoff::for_chain();
    let slashed = loop {
        match decided(context, chain, &accusation, evidence).await {
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
    evidence: Digest,
) -> Result<Balance, FaultError> {
    let (key, run) = (&context.key, &context.run);
    loop {
        let state = chain.state().await?;
        // A call is executed in a later block than the one whose state is read here.
        let next = state.block().number.saturating_add(1);
        match state.dispute(run, accusation).await?.map(|dispute| dispute.state) {
            None => _ = chain.report(key, run, accusation, evidence).await?,
            Some(FaultState::Executed { slashed }) => return Ok(slashed),
            Some(FaultState::Dismissed) => return Ok(Balance(0)),
            Some(
                FaultState::Reported { executable_at: at }
                | FaultState::Contested { resolves_at: at, .. },
            ) if next >= at => _ = chain.decide(key, run, accusation).await?,
            Some(FaultState::Reported { .. } | FaultState::Contested { .. }) => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    }
}
