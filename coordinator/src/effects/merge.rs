//! Merging the admitted updates into θ_{t+1}.

use std::sync::Arc;

use manyhands_gradient::aggregate::Member;
use manyhands_gradient::codec::Update;
use manyhands_gradient::{Admitted, Merged, OuterState, Revoked, vector};
use manyhands_network::data::Access;
use manyhands_proto::message::Merge;
use manyhands_rules::coordinator::{Contribution, Input, MergeOrder, MergeResult};

use super::{Done, EffectError, blocking};
use crate::context::Context;
use crate::journal::{BlobKind, BlobNote};

/// Merges, and stores θ_{t+1}, the broadcast that leads to it, and what that leaves out. Whoever holds θ_t
/// and has the broadcast gets the same θ_{t+1}.
pub(super) async fn merge(context: Arc<Context>, order: MergeOrder) -> Result<Done, EffectError> {
    blocking(move || merge_now(&context, &order)).await?
}

fn merge_now(context: &Context, order: &MergeOrder) -> Result<Done, EffectError> {
    let round = order.round;
    let failed = |reason: String| EffectError::Merge { round, reason };
    let admitted = load(context, order, &order.contributions)?;
    let merged_then = order
        .revocations
        .iter()
        .map(|revocation| load(context, order, &revocation.contributions))
        .collect::<Result<Vec<_>, _>>()?;

    let admitted = members(&order.contributions, &admitted);
    let merged_then: Vec<_> = order
        .revocations
        .iter()
        .zip(&merged_then)
        .map(|(revocation, updates)| members(&revocation.contributions, updates))
        .collect();
    let revoked: Vec<Revoked<'_>> = order
        .revocations
        .iter()
        .zip(&merged_then)
        .map(|(revocation, members)| Revoked {
            workers: &revocation.workers,
            earlier: &revocation.earlier,
            from: Admitted { members, alpha: revocation.outer_learning_rate },
        })
        .collect();
    let own = Admitted { members: &admitted, alpha: order.outer_learning_rate };
    let layout = &context.layout;
    let theta = context.store.theta(order.theta)?;
    let mut theta =
        vector::from_bytes(&theta, layout).map_err(|error| failed(error.to_string()))?;
    let mut residual = match order.residual {
        None => vec![0.0; layout.vector_len()],
        Some(digest) => vector::from_bytes(&context.store.get(digest)?, layout)
            .map_err(|error| failed(error.to_string()))?,
    };
    let state = OuterState { theta: &mut theta, residual: &mut residual };
    let Merged { broadcast, flagged } =
        manyhands_gradient::merge(layout, &context.spec.aggregation, own, &revoked, state)
            .map_err(|error| failed(error.to_string()))?;
    let broadcast = broadcast.into_bytes();
    let keep = |bytes: &[u8]| context.store.insert(bytes, Access::Everyone);
    let aggregate = keep(&broadcast)?;
    let theta = keep(&vector::to_bytes(&theta))?;
    let residual = keep(&vector::to_bytes(&residual))?;
    metrics::counter!(crate::metrics::AGGREGATE_BYTES).increment(broadcast.len() as u64);

    let merge = Merge {
        aggregate,
        aggregate_bytes: broadcast.len() as u64,
        residual,
        outer_learning_rate: order.outer_learning_rate,
    };
    let blobs = vec![
        BlobNote { digest: aggregate, kind: BlobKind::Aggregate, round },
        BlobNote { digest: theta, kind: BlobKind::Theta, round: round.next() },
        BlobNote { digest: residual, kind: BlobKind::Residual, round: round.next() },
    ];
    Ok(Done {
        input: Input::Merged { round, result: MergeResult { merge, theta, flagged } },
        blobs,
    })
}

/// The updates of a set, in its order. They were parsed when they came, so a failure is the disk's.
fn load(
    context: &Context,
    order: &MergeOrder,
    contributions: &[Contribution],
) -> Result<Vec<Update>, EffectError> {
    contributions
        .iter()
        .map(|contribution| {
            let bytes = context.store.get(contribution.payload)?;
            Update::parse(&bytes, &context.layout, context.spec.codec.profile).map_err(|error| {
                let reason = format!("the stored update of {}: {error}", contribution.worker);
                EffectError::Merge { round: order.round, reason }
            })
        })
        .collect()
}

fn members<'a>(contributions: &[Contribution], updates: &'a [Update]) -> Vec<Member<'a>> {
    contributions
        .iter()
        .zip(updates)
        .map(|(&Contribution { worker, tokens, loss_effect, .. }, update)| Member {
            worker,
            tokens,
            update,
            loss_effect,
        })
        .collect()
}
