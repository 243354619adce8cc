//! What each update of a round does to held-out loss, alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use manyhands_gradient::codec::{Update, payload_bytes_max};
use manyhands_gradient::vector;
use manyhands_network::data::FetchRequest;
use manyhands_proto::NodeId;
use manyhands_proto::message::{LossEffect, Weigh, Weighing};
use manyhands_rules::reward::layout;

use super::loss;
use crate::context::{Context, WorkerEvent};
use crate::data::{RunData, progress};
use crate::sync::borrow_theta;
use crate::train::Reins;

/// Measures θ_t, then θ_t less each update, until the reins say that nobody waits for it any more.
pub(crate) async fn weigh(
    context: Arc<Context>,
    data: Arc<RunData>,
    task: Weigh,
    reins: Arc<Reins>,
) -> Result<Weighing, String> {
    let round = task.round;
    let weighed = weigh_all(&context, &data, task, &reins).await;
    weighed.map_err(|error| {
        if reins.stop.load(Ordering::Relaxed) {
            format!("round {round} went on before all of its updates were weighed")
        } else {
            error
        }
    })
}

/// One payload at a time is in memory, none on disk: until the round is merged they are shown to verifiers only.
async fn weigh_all(
    context: &Arc<Context>,
    data: &RunData,
    task: Weigh,
    reins: &Arc<Reins>,
) -> Result<Weighing, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let layout = layout(&context.spec.model);
    let theta = borrow_theta(context, task.theta).await.map_err(|error| text(&error))?;
    let theta = vector::from_bytes(&theta, &layout).map_err(|error| text(&error))?;
    let before = loss(context, data, theta.clone(), reins).await?;
    let profile = context.spec.codec.profile;
    let bytes_max = payload_bytes_max(&layout, profile) as u64;
    let mut effects: Vec<(NodeId, LossEffect)> = Vec::with_capacity(task.updates.len());
    for &(worker, payload) in &task.updates {
        let mut request = FetchRequest::new(payload, context.sources(&[]), bytes_max);
        request.progress = Some(progress(context, "an update"));
        let fetched = context.data.fetch_to_memory(request).await;
        let (bytes, _) =
            fetched.map_err(|error| format!("the update of {}: {error}", worker.short()))?;
        let update = Update::parse(&bytes, &layout, profile)
            .map_err(|error| format!("the update of {}: {error}", worker.short()))?;
        let mut moved = theta.clone();
        update.subtract_from(&layout, &mut moved);
        let after = loss(context, data, moved, reins).await?;
        effects.push((worker, LossEffect::between(before, after)));
    }
    context.tell(WorkerEvent::Weighed { round: task.round, updates: effects.len() });
    Ok(Weighing { round: task.round, effects })
}
