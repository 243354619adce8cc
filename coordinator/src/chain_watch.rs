//! What happens on chain beside the machine: new blocks are shown, and rounds whose window is over are
//! made final (anybody may; the coordinator does it for its own).

use std::sync::Arc;
use std::time::Duration;

use manyhands_chain_client::types::RoundState;
use manyhands_chain_client::{ChainClient, ReadError, SubmitError};

use crate::context::Context;

/// Between looks at the oldest commit that waits.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A subscription that ended is made again after this.
const RESUBSCRIBE_DELAY: Duration = Duration::from_secs(1);

const BLOCKS: &str = "watching the chain's blocks";
const FINALITY: &str = "making rounds final";

#[derive(Debug, thiserror::Error)]
enum FinalizeError {
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Notes every finalised block.
pub(crate) async fn watch_blocks(context: Arc<Context>, chain: ChainClient) {
    loop {
        let outcome = async {
            let mut blocks = chain.watch_finalized().await?;
            loop {
                context.notes.saw(blocks.next().await?);
                context.notes.clear(BLOCKS);
            }
        };
        let ended: Result<(), ReadError> = outcome.await;
        if let Err(error) = ended {
            context.notes.report(BLOCKS, error.to_string());
        }
        tokio::time::sleep(RESUBSCRIBE_DELAY).await;
    }
}

/// Makes rounds final as their windows end.
pub(crate) async fn finalize_rounds(context: Arc<Context>, chain: ChainClient) {
    loop {
        match finalize_oldest(&context, &chain).await {
            Ok(true) => continue,
            Ok(false) => context.notes.clear(FINALITY),
            Err(error) => {
                tracing::warn!(%error, "a round is not made final yet; trying again");
                context.notes.report(FINALITY, error.to_string());
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Whether something was done.
async fn finalize_oldest(context: &Context, chain: &ChainClient) -> Result<bool, FinalizeError> {
    let run = &context.run;
    let state = chain.state().await?;
    let Some(on_chain) = state.run(run).await? else { return Ok(false) };
    let Some(&round) = on_chain.pending.first() else { return Ok(false) };
    let Some(record) = state.round(run, round).await? else { return Ok(false) };
    // A call is executed in a later block than the one whose state is read here.
    let next = state.block().number.saturating_add(1);
    match record.state {
        RoundState::Committed if next >= record.finalizable_at => {
            let attested = record.attestations.len() >= on_chain.terms.attestation_quorum as usize;
            let patience = on_chain.terms.resolution_window;
            if !attested && next < record.finalizable_at.saturating_add(patience) {
                return Ok(false);
            }
            chain.finalize_round(&context.key, run, round).await?;
            Ok(true)
        }
        RoundState::Challenged => match state.challenge(run, round).await? {
            Some(challenge) if next >= challenge.resolves_at => {
                chain.expire_challenge(&context.key, run, round).await?;
                Ok(true)
            }
            Some(_) | None => Ok(false),
        },
        RoundState::Committed | RoundState::Finalized | RoundState::Rejected(_) => Ok(false),
    }
}

/// Waits until no commit of the run waits to become final any more.
pub(crate) async fn all_final(context: &Context, chain: &ChainClient) -> Result<(), ReadError> {
    loop {
        let on_chain = chain.state().await?.run(&context.run).await?;
        if on_chain.is_none_or(|run| run.pending.is_empty()) {
            return Ok(());
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
