//! What each update of a round does to held-out loss, alone.

use std::sync::Arc;

use manyhands_gradient::codec::{Update, payload_bytes_max};
use manyhands_gradient::vector;
use manyhands_network::data::FetchRequest;
use manyhands_proto::NodeId;
use manyhands_proto::message::{LossEffect, Weigh, Weighing};
use manyhands_rules::reward::layout;
use manyhands_rules::sampling::weighed_sequences;

use super::loss;
use crate::context::{Context, WorkerEvent};
use crate::data::{RunData, progress};
use crate::sync::borrow_theta;
use crate::train::Reins;

/// Measures θ_t, then θ_t less each update. One payload at a time is in memory, none on disk: until the round
/// is merged they are shown to verifiers only.
pub(crate) async fn weigh(
    context: Arc<Context>,
    data: Arc<RunData>,
    task: Weigh,
    reins: Arc<Reins>,
) -> Result<Weighing, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let layout = layout(&context.spec.model);
    let theta = borrow_theta(&context, task.theta).await.map_err(|error| text(&error))?;
    let theta = vector::from_bytes(&theta, &layout).map_err(|error| text(&error))?;
    let there = data.held_out_sequences(&context).await.map_err(|error| text(&error))?;
    let sequences: Vec<_> = weighed_sequences(&task, there.len() as u64)
        .into_iter()
        .map(|at| there[at as usize])
        .collect();
    let before = loss(&context, &data, theta.clone(), sequences.clone(), &reins).await?;
    let profile = context.spec.codec.profile;
    let bytes_max = payload_bytes_max(&layout, profile) as u64;
    let mut effects: Vec<(NodeId, LossEffect)> = Vec::with_capacity(task.updates.len());
    for &(worker, payload) in &task.updates {
        let mut request = FetchRequest::new(payload, context.sources(&[]), bytes_max);
        request.progress = Some(progress(&context, "an update"));
        let fetched = context.data.fetch_to_memory(request).await;
        let (bytes, _) =
            fetched.map_err(|error| format!("the update of {}: {error}", worker.short()))?;
        let update = Update::parse(&bytes, &layout, profile)
            .map_err(|error| format!("the update of {}: {error}", worker.short()))?;
        let mut moved = theta.clone();
        update.subtract_from(&layout, &mut moved);
        let after = loss(&context, &data, moved, sequences.clone(), &reins).await?;
        effects.push((worker, LossEffect::between(before, after)));
    }
    context.tell(WorkerEvent::Weighed { round: task.round, updates: effects.len() });
    Ok(Weighing { round: task.round, effects })
}
