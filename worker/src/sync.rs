//! Getting to θ of a round: from one's own θ by the merge, or whole from whoever has it.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use manyhands_gradient::codec::{ParseUpdateError, Update, payload_bytes_max};
use manyhands_gradient::{Layout, initial_theta, vector};
use manyhands_network::data::{Access, FetchError, FetchRequest, FileStore, StoreError};
use manyhands_proto::message::{Merge, Possession, Source, Sync};
use manyhands_proto::{Digest, Round};
use manyhands_rules::reward::layout;

use crate::context::{Context, WorkerEvent};
use crate::data::progress;
use crate::disk::{DiskError, RoundState, ThetaState};
use crate::metrics;

/// Why θ could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SyncError {
    #[error("expected θ of this model's {expected} bytes, the coordinator announces {got}")]
    ThetaBytes { expected: u64, got: u64 },
    #[error("cannot get the parameters: {0}")]
    Blob(#[from] FetchBlobError),
    #[error("cannot keep the parameters: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("what was fetched as θ is not one: {0}")]
    Parse(#[from] vector::ParseVectorError),
    #[error("expected θ of round {round} to be {expected:?}, the run's seed gives {got:?}")]
    Seed { round: Round, expected: Digest, got: Digest },
}

/// Why a merge did not lead to θ.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error("expected a merge of at most {limit} bytes, got {got}")]
    TooLarge { limit: u64, got: u64 },
    #[error("cannot get the merge: {0}")]
    Blob(#[from] FetchBlobError),
    #[error("what was fetched as the merge is not one: {0}")]
    Parse(#[from] ParseUpdateError),
    #[error("expected the merge to lead to θ {expected:?}, it leads to {got:?}")]
    Theta { expected: Digest, got: Digest },
}

/// Why a blob could not be fetched into the store.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchBlobError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
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
    let bytes = stored(&context.store, theta)?;
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
    let (expected, got) = (theta_bytes(&layout), wanted.theta_bytes);
    if got != expected {
        return Err(SyncError::ThetaBytes { expected, got });
    }
    let bytes = match near(context, wanted, held.as_ref(), &layout).await? {
        Some(bytes) => bytes,
        None => fetch_theta(context, wanted.theta, &wanted.sources).await?,
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
    match step(context, wanted, merge, held, layout).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) => {
            let round = wanted.round;
            context.trouble(format!("fetching the parameters of round {round} whole: {error}"));
            Ok(None)
        }
    }
}

/// One outer step. If anything is wrong with it, the whole θ is fetched instead.
async fn step(
    context: &Context,
    wanted: &Sync,
    merge: Merge,
    held: &Theta,
    layout: &Layout,
) -> Result<Vec<u8>, StepError> {
    let profile = context.spec.aggregation.broadcast;
    let (limit, got) = (payload_bytes_max(layout, profile) as u64, merge.aggregate_bytes);
    if got > limit {
        return Err(StepError::TooLarge { limit, got });
    }
    let blob = Blob { what: "merge", digest: merge.aggregate, bytes_max: limit };
    let bytes = fetch_blob(context, blob, &wanted.sources).await?;
    let update = Update::parse(&bytes, layout, profile)?;
    let mut values = held.values.to_vec();
    update.subtract_from(layout, &mut values);
    let bytes = vector::to_bytes(&values);
    let (expected, got) = (wanted.theta, Digest::of(&bytes));
    if got == expected { Ok(bytes) } else { Err(StepError::Theta { expected, got }) }
}

/// θ's bytes are those of the model: no message sizes this node's memory.
fn theta_bytes(layout: &Layout) -> u64 {
    layout.vector_len() as u64 * 4
}

/// A whole θ, into the store. It may be there already.
pub(crate) async fn fetch_theta(
    context: &Context,
    digest: Digest,
    sources: &[Source],
) -> Result<Vec<u8>, FetchBlobError> {
    let bytes_max = theta_bytes(&layout(&context.spec.model));
    fetch_blob(context, Blob { what: "parameters", digest, bytes_max }, sources).await
}

/// θ for a check, in the place of everything that this node does not need: a store of θs of many
/// rounds would fill any disk.
pub(crate) async fn borrow_theta(
    context: &Context,
    digest: Digest,
) -> Result<Vec<u8>, BorrowThetaError> {
    let held = context.disk.theta()?.map(|state| state.theta);
    sweep(context, &BTreeSet::from_iter(held.into_iter().chain([digest])))?;
    Ok(fetch_theta(context, digest, &[]).await?)
}

/// Why θ could not be had for a check.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BorrowThetaError {
    #[error("cannot get the parameters: {0}")]
    Blob(#[from] FetchBlobError),
    #[error(transparent)]
    Sweep(#[from] SweepError),
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What is fetched into the store.
struct Blob {
    /// For people.
    what: &'static str,
    digest: Digest,
    bytes_max: u64,
}

/// A public blob: from the store, or else fetched into it. A download that was interrupted, by a kill
/// too, goes on where it was.
async fn fetch_blob(
    context: &Context,
    blob: Blob,
    sources: &[Source],
) -> Result<Vec<u8>, FetchBlobError> {
    let Blob { what, digest, bytes_max } = blob;
    let store = Arc::clone(&context.store);
    let there = tokio::task::spawn_blocking(move || stored(&store, digest));
    if let Some(bytes) = there.await.expect("reading a blob does not panic") {
        context.store.set_access(digest, Access::Everyone)?;
        return Ok(bytes);
    }
    let mut request = FetchRequest::new(digest, context.sources(sources), bytes_max);
    request.progress = Some(progress(context, what));
    let path = incoming(context).join(digest.to_string());
    context.data.fetch_to_file(request, &path).await?;
    let store = Arc::clone(&context.store);
    let keeping = tokio::task::spawn_blocking(move || {
        let got = store.insert_file(&path, Access::Everyone)?;
        let kept = store.path(got).unwrap_or(path);
        if got != digest {
            return Err(StoreError::Digest { path: kept, expected: digest, got }.into());
        }
        std::fs::read(&kept).map_err(|source| FetchBlobError::Read { path: kept, source })
    });
    keeping.await.expect("storing a blob does not panic")
}

/// A blob's bytes, if the store has it undamaged; a damaged one is removed.
fn stored(store: &FileStore, digest: Digest) -> Option<Vec<u8>> {
    let bytes = std::fs::read(store.path(digest)?).ok();
    let whole = bytes.filter(|bytes| Digest::of(bytes) == digest);
    if whole.is_none()
        && let Err(error) = store.remove(digest)
    {
        tracing::warn!(%error, "a damaged blob was not removed");
    }
    whole
}

/// Where downloads are until they are whole.
pub(crate) fn incoming(context: &Context) -> PathBuf {
    context.folder.join("incoming")
}

/// θ is on disk before the coordinator is told that we have it; what nobody can ask for any more goes.
fn keep(
    context: &Context,
    theta: &Theta,
    bytes: &[u8],
    aggregate: Option<Digest>,
) -> Result<(), SyncError> {
    if context.store.set_access(theta.digest, Access::Everyone).is_err() {
        context.store.insert(bytes, Access::Everyone)?;
    }
    context.disk.keep_theta(ThetaState { round: theta.round, theta: theta.digest })?;
    let used = BTreeSet::from_iter(aggregate.into_iter().chain([theta.digest]));
    sweep(context, &used).map_err(|error| match error {
        SweepError::Store(error) => error.into(),
        SweepError::Disk(error) => error.into(),
    })
}

/// Why the store could not be swept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SweepError {
    #[error("cannot remove old blobs: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Removes all blobs, and downloads begun, but the end states of this node's last rounds and replays, and `used`.
fn sweep(context: &Context, used: &BTreeSet<Digest>) -> Result<(), SweepError> {
    let rounds = context.disk.rounds()?;
    let mut used = used.clone();
    used.extend(rounds.iter().flat_map(RoundState::blobs));
    used.extend(context.disk.replays()?.into_iter().flat_map(|end| [end.theta, end.moments]));
    for (digest, _) in context.store.blobs() {
        if !used.contains(&digest) {
            context.store.remove(digest)?;
        }
    }
    // The folder is only there while something is downloaded.
    for entry in std::fs::read_dir(incoming(context)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !used.iter().any(|digest| name.starts_with(&digest.to_string()))
            && let Err(error) = std::fs::remove_file(entry.path())
        {
            tracing::warn!(%error, %name, "a download that was begun was not removed");
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod testing {
    //! A worker on loopback, without its loop, and a node that it fetches from.

    use std::net::{Ipv4Addr, SocketAddr};
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex};

    use manyhands_model::Device;
    use manyhands_network::control::{Control, ControlConfig, ControlEvents, Role};
    use manyhands_network::data::{BlobStore, Data, DataConfig, DataHandle, FileStore, Source};
    use manyhands_proto::keys::NodeKey;
    use manyhands_proto::message::{DeviceKind, NumericClass};
    use manyhands_proto::run_file::{DataSet, RunFile, RunSpec};
    use manyhands_proto::{Digest, RunId};
    use tempfile::TempDir;

    use crate::context::{Context, WorkerEvent};
    use crate::disk::WorkerDisk;

    pub(crate) struct Place {
        pub(crate) context: Context,
        /// What the coordinator serves.
        pub(crate) source: Arc<FileStore>,
        pub(crate) events: Arc<Mutex<Vec<WorkerEvent>>>,
        _coordinator: DataHandle,
        _control: ControlEvents,
        _folder: TempDir,
    }

    pub(crate) fn key(seed: u8) -> NodeKey {
        NodeKey::from_seed([seed; 32])
    }

    pub(crate) fn store(folder: PathBuf) -> Arc<FileStore> {
        Arc::new(FileStore::open(folder, 1 << 30).expect("store"))
    }

    /// A data plane on loopback, and how to reach it.
    pub(crate) fn data(seed: u8, store: Arc<dyn BlobStore>) -> (DataHandle, Source) {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut config = DataConfig::new(key(seed), loopback, store);
        // So that a test can say how many chunks have arrived.
        config.limits.chunks_in_flight = 1;
        let handle = Data::start(config).expect("start");
        let addresses = vec![handle.local_addr()];
        (handle, Source { peer: key(seed).node_id(), addresses })
    }

    impl Place {
        /// `seed`: another one for every test.
        pub(crate) async fn new(seed: u8) -> Self {
            let folder = tempfile::tempdir().expect("folder");
            let source = self::store(folder.path().join("coordinator"));
            let (_coordinator, coordinator) = self::data(100 + seed, Arc::clone(&source) as _);
            let store = self::store(folder.path().join("blobs"));
            let (data, _) = self::data(seed, Arc::clone(&store) as _);
            let control = ControlConfig::new(key(seed), Vec::new(), Role::Worker);
            let (control, _control) = Control::start(control).await.expect("start");
            let events = Arc::new(Mutex::new(Vec::new()));
            let told = Arc::clone(&events);
            let context = Context {
                key: key(seed),
                run: RunId::new([seed; 32]),
                spec: spec(),
                coordinator,
                control,
                data,
                store,
                disk: WorkerDisk::open(folder.path()).expect("disk"),
                folder: folder.path().to_owned(),
                device: Device::Cpu,
                threads: 1,
                class: NumericClass::unknown(DeviceKind::Cpu),
                load_max: 1.0,
                trainers: None,
                chain: None,
                on_event: Arc::new(move |event| told.lock().expect("no panic").push(event)),
            };
            Self { context, source, events, _coordinator, _control, _folder: folder }
        }
    }

    fn spec() -> RunSpec {
        let file = RunFile::parse(
            r#"
            [run]
            name = "tiny"
            rounds = 3
            [model]
            vocabulary_size = 512
            hidden_size = 32
            layers = 2
            heads = 4
            key_value_heads = 2
            feed_forward_size = 64
            context_length = 32
            [training]
            steps_per_round = 4
            batch_sequences = 4
            micro_batch_sequences = 2
            learning_rate = 1e-3
            [data]
            dataset = "data"
            "#,
        );
        file.expect("a run's file").resolve(DataSet {
            manifest: Digest::of(b"manifest"),
            train_sequences: 10,
            held_out_sequences: 2,
            theta: Digest::of(b"theta"),
            theta_is_given: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Notify;

    use super::testing::Place;
    use super::*;

    const MIB: usize = 1 << 20;

    fn blob(seed: usize) -> Vec<u8> {
        (0..4 * MIB).map(|i| (i / 7 + i / MIB + seed) as u8).collect()
    }

    fn fetching(bytes: &[u8]) -> Blob {
        Blob { what: "parameters", digest: Digest::of(bytes), bytes_max: bytes.len() as u64 }
    }

    #[tokio::test]
    async fn a_killed_download_goes_on_and_ends_in_the_store() {
        let mut place = Place::new(3).await;
        let bytes = blob(0);
        let digest = place.source.insert(&bytes, Access::Everyone).expect("insert");
        let second = Arc::new(Notify::new());
        let arrived = Arc::clone(&second);
        let tell = Arc::clone(&place.context.on_event);
        place.context.on_event = Arc::new(move |event| {
            if matches!(event, WorkerEvent::Fetching { done: 2, .. }) {
                arrived.notify_one();
            }
            tell(event);
        });
        tokio::select! {
            biased;
            () = second.notified() => {}
            result = fetch_blob(&place.context, fetching(&bytes), &[]) => {
                panic!("it was to be killed: {result:?}");
            }
        }
        assert!(!place.context.store.contains(digest));
        place.events.lock().expect("no panic").clear();

        let fetched = fetch_blob(&place.context, fetching(&bytes), &[]).await.expect("served");
        assert!(fetched == bytes);
        assert!(place.context.store.contains(digest));
        let first = place.events.lock().expect("no panic").first().cloned();
        let resumed = WorkerEvent::Fetching { what: "parameters".to_owned(), done: 2, total: 4 };
        assert_eq!(first, Some(resumed));

        // From now on it is read from the store.
        place.source.remove(digest).expect("remove");
        let read = fetch_blob(&place.context, fetching(&bytes), &[]).await.expect("is there");
        assert!(read == bytes);
    }

    #[tokio::test]
    async fn a_damaged_blob_is_fetched_again() {
        let place = Place::new(4).await;
        let bytes = blob(1);
        place.source.insert(&bytes, Access::Everyone).expect("insert");
        let digest = place.context.store.insert(&bytes, Access::Everyone).expect("insert");
        let path = place.context.store.path(digest).expect("is there");
        std::fs::write(path, b"damage").expect("write");
        let fetched = fetch_blob(&place.context, fetching(&bytes), &[]).await.expect("served");
        assert!(fetched == bytes);
    }

    #[tokio::test]
    async fn the_model_and_not_a_message_says_how_long_theta_is() {
        let place = Place::new(5).await;
        let expected = theta_bytes(&layout(&place.context.spec.model));
        let wanted = |theta_bytes| Sync {
            round: Round(1),
            theta: Digest::of(b"another"),
            theta_bytes,
            merge: None,
            sources: Vec::new(),
        };
        let refused = sync(&place.context, &wanted(1 << 40), None).await;
        assert!(
            matches!(refused, Err(SyncError::ThetaBytes { got, .. }) if got == 1 << 40),
            "{refused:?}"
        );
        // Of the right size nobody has it.
        let missing = sync(&place.context, &wanted(expected), None).await;
        assert!(matches!(missing, Err(SyncError::Blob(_))), "{missing:?}");
    }

    #[tokio::test]
    async fn a_merge_larger_than_any_is_not_fetched() {
        let place = Place::new(6).await;
        let layout = layout(&place.context.spec.model);
        let values = Arc::new(vec![0.0; layout.vector_len()]);
        let held = Theta { round: Round(0), digest: Digest::of(b"held"), values };
        let (aggregate, residual) = (Digest::of(b"aggregate"), Digest::of(b"residual"));
        let (aggregate_bytes, outer_learning_rate) = (1 << 40, 1.0);
        let merge = Merge { aggregate, aggregate_bytes, residual, outer_learning_rate };
        let wanted = Sync {
            round: Round(1),
            theta: Digest::of(b"another"),
            theta_bytes: theta_bytes(&layout),
            merge: Some(merge),
            sources: Vec::new(),
        };
        let refused = step(&place.context, &wanted, merge, &held, &layout).await;
        assert!(matches!(refused, Err(StepError::TooLarge { .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn a_verifier_keeps_one_theta_and_no_downloads_of_others() {
        let place = Place::new(7).await;
        let old = place.context.store.insert(b"an older one", Access::Everyone).expect("insert");
        let begun = incoming(&place.context).join(format!("{old}.partial"));
        std::fs::create_dir_all(incoming(&place.context)).expect("folder");
        std::fs::write(&begun, b"half").expect("write");
        let wanted = place.source.insert(b"parameters", Access::Everyone).expect("insert");
        let bytes = borrow_theta(&place.context, wanted).await.expect("served");
        assert_eq!(bytes, b"parameters");
        let kept: Vec<Digest> =
            place.context.store.blobs().into_iter().map(|(digest, _)| digest).collect();
        assert_eq!(kept, [wanted]);
        assert!(!begun.exists());
    }
}
