//! Getting to θ of a round: from one's own θ by the merge, or whole from whoever has it.

use std::collections::BTreeSet;
use std::sync::Arc;

use manyhands_gradient::{Layout, OuterUpdate, initial_theta, vector};
use manyhands_network::data::{Access, FetchError, FetchRequest, StoreError};
use manyhands_proto::message::{Merge, Possession, Source, Sync};
use manyhands_proto::{Digest, Round};
use manyhands_rules::reward::layout;

use crate::context::{Context, WorkerEvent};
use crate::disk::{DiskError, RoundState, ThetaState};
use crate::metrics;

/// Why θ could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SyncError {
    #[error("cannot fetch the parameters: {0}")]
    Fetch(#[from] FetchError),
    #[error("cannot keep the parameters: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("what was fetched as θ is not one: {0}")]
    Parse(#[from] vector::ParseVectorError),
    #[error("expected θ of round {round} to be {expected:?}, the run's seed gives {got:?}")]
    Seed { round: Round, expected: Digest, got: Digest },
}

/// The parameters that this node holds.
#[derive(Debug, Clone)]
pub(crate) struct Theta {
    pub(crate) round: Round,
    pub(crate) digest: Digest,
    pub(crate) values: Arc<Vec<f32>>,
}

/// What was on disk when the process started, if it still is what it was.
pub(crate) fn restore(context: &Context) -> Option<Theta> {
    let ThetaState { round, theta } = context.disk.theta().ok()??;
    let bytes = std::fs::read(context.store.path(theta)?).ok()?;
    if Digest::of(&bytes) != theta {
        return None;
    }
    let values = vector::from_bytes(&bytes, &layout(&context.spec.model)).ok()?;
    Some(Theta { round, digest: theta, values: Arc::new(values) })
}

/// Gets to the θ that is asked for, writes it to disk and proves it.
pub(crate) async fn sync(
    context: &Context,
    wanted: &Sync,
    held: Option<Theta>,
) -> Result<(Theta, Possession), SyncError> {
    let layout = layout(&context.spec.model);
    let bytes = match near(context, wanted, held.as_ref(), &layout).await? {
        Some(bytes) => bytes,
        None => fetch_theta(context, wanted.theta, wanted.theta_bytes, &wanted.sources).await?,
    };
    let values = Arc::new(vector::from_bytes(&bytes, &layout)?);
    let theta = Theta { round: wanted.round, digest: wanted.theta, values };
    keep(context, &theta, &bytes, wanted.merge.map(|merge| merge.aggregate))?;
    let possession = Possession::prove(wanted.round, context.key.node_id(), &bytes);
    metrics::holds_theta(wanted.round.0);
    context.tell(WorkerEvent::Synced { round: wanted.round, theta: wanted.theta });
    Ok((theta, possession))
}

/// θ from what is at hand: the same one, the seed's, or the one before and the merge.
async fn near(
    context: &Context,
    wanted: &Sync,
    held: Option<&Theta>,
    layout: &Layout,
) -> Result<Option<Vec<u8>>, SyncError> {
    if let Some(held) = held.filter(|held| held.digest == wanted.theta) {
        return Ok(Some(vector::to_bytes(&held.values)));
    }
    if wanted.theta == context.spec.data.theta && !context.spec.data.theta_is_given {
        let theta = initial_theta(layout, &context.spec.model, context.spec.run.seed);
        let bytes = vector::to_bytes(&theta);
        let got = Digest::of(&bytes);
        if got != wanted.theta {
            let (round, expected) = (wanted.round, wanted.theta);
            return Err(SyncError::Seed { round, expected, got });
        }
        return Ok(Some(bytes));
    }
    let Some((merge, held)) = wanted.merge.zip(held) else { return Ok(None) };
    if held.round.next() != wanted.round {
        return Ok(None);
    }
    Ok(step(context, wanted, merge, held, layout).await)
}

/// One outer step. If anything is wrong with it, the whole θ is fetched instead.
async fn step(
    context: &Context,
    wanted: &Sync,
    merge: Merge,
    held: &Theta,
    layout: &Layout,
) -> Option<Vec<u8>> {
    let sources = context.sources(&wanted.sources);
    let request = FetchRequest::new(merge.aggregate, sources, merge.aggregate_bytes);
    let fetched = context.data.fetch_to_memory(request).await;
    let update = match fetched {
        Ok((bytes, _)) => {
            let _ = context.store.insert(&bytes, Access::Everyone);
            OuterUpdate::parse(&bytes, layout).map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
    };
    match update {
        Ok(update) => {
            let mut values = held.values.to_vec();
            update.apply(&mut values);
            let bytes = vector::to_bytes(&values);
            (Digest::of(&bytes) == wanted.theta).then_some(bytes)
        }
        Err(reason) => {
            context.trouble(format!("cannot step to round {}: {reason}", wanted.round));
            None
        }
    }
}

pub(crate) async fn fetch_theta(
    context: &Context,
    digest: Digest,
    bytes_max: u64,
    sources: &[Source],
) -> Result<Vec<u8>, SyncError> {
    let request = FetchRequest::new(digest, context.sources(sources), bytes_max);
    let (bytes, _) = context.data.fetch_to_memory(request).await?;
    Ok(bytes.to_vec())
}

/// θ is on disk before the coordinator is told that we have it; what nobody can ask for any more goes.
fn keep(
    context: &Context,
    theta: &Theta,
    bytes: &[u8],
    aggregate: Option<Digest>,
) -> Result<(), SyncError> {
    context.store.insert(bytes, Access::Everyone)?;
    context.disk.keep_theta(ThetaState { round: theta.round, theta: theta.digest })?;
    let rounds = context.disk.rounds()?;
    let mut used: BTreeSet<Digest> = rounds.iter().flat_map(RoundState::blobs).collect();
    used.insert(theta.digest);
    used.extend(aggregate);
    for (digest, _) in context.store.blobs() {
        if !used.contains(&digest) {
            context.store.remove(digest)?;
        }
    }
    Ok(())
}
