//! Anchoring a set and learning randomness that is later.

use std::sync::Arc;

use manyhands_chain_client::{ChainClient, ReadError, SubmitError, types};
use manyhands_proto::{Digest, Round};
use manyhands_rules::coordinator::{Input, Stage};
use manyhands_rules::record::Entropy;

use crate::context::Context;
use crate::retry::Backoff;

/// The hash of the block this many after the anchor's is the randomness. It is one certain block, so
/// the coordinator has no choice; the one right after could be influenced by whoever sees the anchor.
const BLOCKS_AFTER: u32 = 2;

/// A set to be anchored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Anchored {
    pub(super) round: Round,
    pub(super) stage: Stage,
    pub(super) digest: Digest,
}

/// Why the randomness is not known yet.
#[derive(Debug, thiserror::Error)]
enum AnchorError {
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the chain holds another digest for the {stage:?} of round {round}: {held:?}")]
    Another { round: Round, stage: Stage, held: Digest },
    #[error("the node does not show the anchor yet")]
    NotShown,
}

pub(super) const fn stage_on_chain(stage: Stage) -> types::Stage {
    match stage {
        Stage::Commitments => types::Stage::Commit,
        Stage::Admitted => types::Stage::Admitted,
    }
}

pub(super) async fn anchor(context: &Arc<Context>, set: Anchored) -> Input {
    let Anchored { round, stage, digest } = set;
    let Some(chain) = &context.chain else {
        let entropy = Entropy { value: own_entropy(context, digest), block: None };
        return Input::Entropy { round, stage, entropy };
    };
    let what = format!("anchoring the {stage:?} of round {round}");
    let mut backoff = Backoff::for_chain();
    let entropy = loop {
        match anchored_entropy(context, chain, set).await {
            Ok(entropy) => break entropy,
            Err(error) => {
                tracing::warn!(%round, ?stage, %error, "a set is not anchored yet; trying again");
                context.notes.report(&what, error.to_string());
            }
        }
        backoff.wait().await;
    };
    context.notes.clear(&what);
    Input::Entropy { round, stage, entropy }
}

/// Without a chain: what nobody but the coordinator can compute, and the coordinator cannot choose, as
/// an ed25519 signature of a message by a key is always the same.
fn own_entropy(context: &Context, digest: Digest) -> Digest {
    let message = Digest::derive("manyhands 2026 entropy without a chain", digest.as_bytes());
    Digest::of(&context.key.sign(message.as_bytes()))
}

async fn anchored_entropy(
    context: &Context,
    chain: &ChainClient,
    set: Anchored,
) -> Result<Entropy, AnchorError> {
    let Anchored { round, stage, digest } = set;
    let (run, on_chain) = (&context.run, stage_on_chain(stage));
    let anchor = match chain.state().await?.anchor(run, round, on_chain).await? {
        Some(anchor) => anchor,
        None => {
            chain.anchor_commitments(&context.key, run, (round, on_chain), digest).await?;
            let anchor = chain.state().await?.anchor(run, round, on_chain).await?;
            anchor.ok_or(AnchorError::NotShown)?
        }
    };
    if anchor.digest != digest {
        return Err(AnchorError::Another { round, stage, held: anchor.digest });
    }
    let number = anchor.block + BLOCKS_AFTER;
    let block = chain.watch_finalized_from(number).next().await?;
    Ok(Entropy { value: block.hash, block: Some(block.number) })
}
