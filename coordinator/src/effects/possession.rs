//! Whether a member holds θ.

use std::sync::Arc;

use manyhands_proto::message::Possession;
use manyhands_proto::{Digest, NodeId, Round};
use manyhands_rules::coordinator::Input;

use super::{Done, EffectError, blocking};
use crate::context::Context;

/// "I hold this θ."
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    pub(super) round: Round,
    pub(super) worker: NodeId,
    pub(super) theta: Digest,
    pub(super) proof: Digest,
}

pub(super) async fn check(context: Arc<Context>, claim: Claim) -> Result<Done, EffectError> {
    let Claim { round, worker, theta, proof } = claim;
    let holds = blocking(move || {
        let theta = context.store.theta(theta)?;
        Ok::<_, EffectError>(Possession::prove(round, worker, &theta).proof == proof)
    })
    .await??;
    Ok(Input::PossessionChecked { round, worker, proof, holds }.into())
}
