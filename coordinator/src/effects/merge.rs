//! Merging the admitted updates into θ_{t+1}.

use std::sync::Arc;

use manyhands_gradient::aggregate::WorkerUpdate;
use manyhands_gradient::codec::Update;
use manyhands_gradient::{Admitted, Revoked, vector};
use manyhands_network::data::Access;
use manyhands_proto::TokenCount;
use manyhands_proto::message::Merge;
use manyhands_rules::coordinator::{Contribution, Input, MergeOrder, MergeResult};

use super::{Done, EffectError, blocking};
use crate::context::Context;
use crate::journal::{BlobKind, BlobNote};

/// Merges, and stores θ_{t+1} and the [`manyhands_gradient::OuterUpdate`] that leads to it. Whoever
/// holds θ_t and has that blob gets the same θ_{t+1}.
pub(super) async fn merge(context: Arc<Context>, order: MergeOrder) -> Result<Done, EffectError> {
    blocking(move || merge_now(&context, &order)).await?
}

fn merge_now(context: &Context, order: &MergeOrder) -> Result<Done, EffectError> {
    let round = order.round;
    let failed = |reason: String| EffectError::Merge { round, reason };
    let admitted = load(context, order, &order.contributions)?;
    let revoked = order
        .revocations
        .iter()
        .map(|revocation| load(context, order, &revocation.contributions))
        .collect::<Result<Vec<_>, _>>()?;

    let admitted = with_tokens(&order.contributions, &admitted);
    let revoked: Vec<_> = order
        .revocations
        .iter()
        .zip(&revoked)
        .map(|(revocation, updates)| with_tokens(&revocation.contributions, updates))
        .collect();
    let revoked: Vec<Revoked<'_>> = order
        .revocations
        .iter()
        .zip(&revoked)
        .map(|(order, updates)| Revoked {
            worker: order.revocation.worker,
            from: Admitted { updates, alpha: order.outer_learning_rate },
        })
        .collect();
    let own = Admitted { updates: &admitted, alpha: order.outer_learning_rate };
    let layout = &context.layout;
    let update = manyhands_gradient::merge(layout, &context.spec.aggregation, own, &revoked)
        .map_err(|error| failed(error.to_string()))?;

    let theta = context.store.theta(order.theta)?;
    let mut theta =
        vector::from_bytes(&theta, layout).map_err(|error| failed(error.to_string()))?;
    update.apply(&mut theta);
    let update = update.to_bytes();
    let aggregate = context.store.insert(&update, Access::Everyone)?;
    let theta = context.store.insert(&vector::to_bytes(&theta), Access::Everyone)?;
    metrics::counter!(crate::metrics::AGGREGATE_BYTES).increment(update.len() as u64);

    let merge = Merge {
        aggregate,
        aggregate_bytes: update.len() as u64,
        outer_learning_rate: order.outer_learning_rate,
    };
    let blobs = vec![
        BlobNote { digest: aggregate, kind: BlobKind::Aggregate, round },
        BlobNote { digest: theta, kind: BlobKind::Theta, round: round.next() },
    ];
    Ok(Done { input: Input::Merged { round, result: MergeResult { merge, theta } }, blobs })
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

fn with_tokens<'a>(
    contributions: &[Contribution],
    updates: &'a [Update],
) -> Vec<(WorkerUpdate<'a>, TokenCount)> {
    contributions
        .iter()
        .zip(updates)
        .map(|(contribution, update)| {
            (WorkerUpdate { worker: contribution.worker, update }, contribution.tokens)
        })
        .collect()
}
