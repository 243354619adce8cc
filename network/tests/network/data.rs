//! The data plane among honest nodes: fetching, resuming, access, quotas, openings, punching.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use manyhands_network::data::{
    Access, BlobStore, Data, DataConfig, DataHandle, DataLimits, FetchError, FetchRequest,
    FileStore, NoStore, Progress, Quotas, Refusal, Source, SourceError, Timeouts,
};
use manyhands_proto::{Digest, NodeId};
use tempfile::TempDir;
use tokio::sync::Notify;

use crate::{key, within};

pub(crate) const MIB: usize = 1 << 20;
pub(crate) const LENGTH_MAX: u64 = 64 << 20;

pub(crate) fn blob(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i / 7 + i / MIB) as u8).collect()
}

pub(crate) fn config(seed: u8, store: Arc<dyn BlobStore>) -> DataConfig {
    DataConfig::new(key(seed), SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), store)
}

/// A node that only fetches.
pub(crate) fn fetcher(seed: u8) -> DataHandle {
    Data::start(config(seed, Arc::new(NoStore))).expect("start")
}

pub(crate) struct Server {
    pub(crate) handle: DataHandle,
    pub(crate) store: Arc<FileStore>,
    pub(crate) source: Source,
    _folder: TempDir,
}

pub(crate) fn server_with(seed: u8, change: impl FnOnce(&mut DataConfig)) -> Server {
    let folder = tempfile::tempdir().expect("folder");
    let store = Arc::new(FileStore::open(folder.path(), 1 << 30).expect("open"));
    let mut config = config(seed, store.clone());
    change(&mut config);
    let handle = Data::start(config).expect("start");
    let source = source(seed, &handle);
    Server { handle, store, source, _folder: folder }
}

pub(crate) fn source(seed: u8, handle: &DataHandle) -> Source {
    Source { peer: key(seed).node_id(), addresses: vec![handle.local_addr()] }
}

pub(crate) fn server(seed: u8) -> Server {
    server_with(seed, |_| {})
}

pub(crate) fn request(digest: Digest, sources: &[&Source]) -> FetchRequest {
    let sources = sources.iter().map(|source| (*source).clone()).collect();
    FetchRequest::new(digest, sources, LENGTH_MAX)
}

#[tokio::test]
async fn blobs_of_every_shape_arrive_whole() {
    let server = server(1);
    let fetcher = fetcher(2);
    for length in [0, 1, MIB, MIB + 1, 5 * MIB - 3] {
        let bytes = blob(length);
        let digest = server.store.insert(&bytes, Access::Everyone).expect("insert");
        let fetched = fetcher.fetch_to_memory(request(digest, &[&server.source]));
        let (fetched, report) = within("a fetch", fetched).await.expect("served");
        assert!(fetched == bytes, "{length} bytes");
        assert_eq!(report.length, length as u64);
        assert!(report.failures.is_empty());
    }
    fetcher.shutdown().await;
}

#[tokio::test]
async fn the_side_that_was_dialled_can_ask_too() {
    let coordinator = fetcher(3);
    let worker = server(4);
    let bytes = blob(2 * MIB);
    let digest = worker.store.insert(&bytes, Access::Nobody).expect("insert");
    let own = key(3).node_id();
    let source = Source::connected(worker.source.peer);

    let unreachable =
        within("a fetch", coordinator.fetch_to_memory(request(digest, &[&source]))).await;
    assert!(matches!(unreachable, Err(FetchError::NoSource { .. })));
    worker.handle.connect(own, &[coordinator.local_addr()]).await.expect("connect");
    let observed = worker.handle.observed_addr(own).await.expect("observed");
    assert_eq!(observed, worker.handle.local_addr());

    // The payload is shown to nobody until its commitments are fixed, then to the coordinator.
    let fetch = || within("a fetch", coordinator.fetch_to_memory(request(digest, &[&source])));
    assert_eq!(only_failure(fetch().await.err()), SourceError::Refused(Refusal::NotYet));
    worker.store.set_access(digest, Access::Only([NodeId::new([0; 32])].into())).expect("known");
    assert_eq!(only_failure(fetch().await.err()), SourceError::Refused(Refusal::Forbidden));
    worker.store.set_access(digest, Access::Only([own].into())).expect("known");
    assert!(fetch().await.expect("served").0 == bytes);

    let unknown = coordinator.fetch_to_memory(request(Digest::of(b"no such blob"), &[&source]));
    let error = only_failure(within("a fetch", unknown).await.err());
    assert_eq!(error, SourceError::Refused(Refusal::Unknown));
}

pub(crate) fn only_failure(error: Option<FetchError>) -> SourceError {
    match error {
        Some(FetchError::NoSource { mut failures, .. }) if failures.len() == 1 => {
            failures.remove(0).error
        }
        other => panic!("expected one source to fail, got {other:?}"),
    }
}

#[tokio::test]
async fn a_killed_fetch_goes_on_where_it_was() {
    let server = server(5);
    let bytes = blob(5 * MIB);
    let digest = server.store.insert(&bytes, Access::Everyone).expect("insert");
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("deep/checkpoint");
    let mut slow = config(6, Arc::new(NoStore));
    // One at a time, so that three are certainly missing when the second has arrived.
    slow.limits.chunks_in_flight = 1;
    let fetcher = Data::start(slow).expect("start");

    let second = Arc::new(Notify::new());
    let mut killed = request(digest, &[&server.source]);
    let arrived = second.clone();
    killed.progress = Some(Arc::new(move |progress: Progress| {
        assert_eq!((progress.chunks_total, progress.length), (5, 5 << 20));
        if progress.chunks_done == 2 {
            arrived.notify_one();
        }
    }));
    tokio::select! {
        biased;
        () = second.notified() => {}
        result = fetcher.fetch_to_file(killed, &path) => panic!("it was to be killed: {result:?}"),
    }
    assert!(!path.exists(), "a half blob must not have the blob's name");

    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut resumed = request(digest, &[&server.source]);
    let record = seen.clone();
    resumed.progress = Some(Arc::new(move |progress: Progress| {
        record.lock().expect("not poisoned").push(progress.chunks_done);
    }));
    let fetched = fetcher.fetch_to_file(resumed, &path);
    let report = within("the rest", fetched).await.expect("served");
    assert_eq!((report.chunks_resumed, &report.chunks_fetched[..]), (2, &[3][..]));
    assert_eq!(*seen.lock().expect("not poisoned"), [2, 3, 4, 5]);
    assert!(std::fs::read(&path).expect("whole") == bytes);
    let left: Vec<_> = std::fs::read_dir(path.parent().expect("folder")).expect("list").collect();
    assert_eq!(left.len(), 1, "the partial file became the blob");
}

#[tokio::test]
async fn two_fetches_do_not_fill_the_same_file() {
    let server = server(7);
    let digest = server.store.insert(&blob(100), Access::Everyone).expect("insert");
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("blob");
    let fetcher = fetcher(8);
    let mut first = Box::pin(fetcher.fetch_to_file(request(digest, &[&server.source]), &path));
    assert!(futures::poll!(&mut first).is_pending());
    let second = fetcher.fetch_to_file(request(digest, &[&server.source]), &path).await;
    assert!(matches!(second, Err(FetchError::UnderWay { .. })), "{second:?}");
    within("the first", first).await.expect("served");
}

#[tokio::test]
async fn several_sources_share_the_work() {
    let servers = [server(9), server(10), server(11)];
    let bytes = blob(12 * MIB);
    let digest = Digest::of(&bytes);
    for server in &servers {
        server.store.insert(&bytes, Access::Everyone).expect("insert");
    }
    let fetcher = fetcher(12);
    let sources: Vec<_> = servers.iter().map(|server| &server.source).collect();
    for source in &sources {
        fetcher.connect(source.peer, &source.addresses).await.expect("connect");
    }
    let fetched = fetcher.fetch_to_memory(request(digest, &sources));
    let (fetched, report) = within("a fetch", fetched).await.expect("served");
    assert!(fetched == bytes);
    assert_eq!(report.chunks_fetched.iter().sum::<u64>(), 12);
    let shares = report.chunks_fetched.iter().filter(|chunks| **chunks > 0).count();
    assert!(shares > 1, "{:?}", report.chunks_fetched);
}

#[tokio::test]
async fn groups_open_against_the_digest() {
    let server = server(13);
    let bytes = blob(3 * MIB + 20_000);
    let digest = server.store.insert(&bytes, Access::Everyone).expect("insert");
    let fetcher = fetcher(14);
    // In any order and with repetitions; what is asked of the source ascends.
    let groups = [193, 0, 64, 65, 192, 64];
    let opened = fetcher.open_groups(&server.source, digest, &groups);
    let opened = within("the openings", opened).await.expect("served");
    assert_eq!(opened.length, bytes.len() as u64);
    let length = opened.length;
    for (group, opened) in groups.iter().zip(&opened.groups) {
        let start = *group as usize * 16_384;
        assert_eq!(opened.opening.group, *group);
        assert_eq!(opened.bytes, bytes[start..bytes.len().min(start + 16_384)]);
        assert_eq!(opened.opening.verify(digest, length, &opened.bytes), Ok(()));
    }
    let outside = fetcher.open_groups(&server.source, digest, &[194]).await;
    assert_eq!(outside, Err(SourceError::Refused(Refusal::OutOfRange)));
    let none = fetcher.open_groups(&server.source, digest, &[]).await;
    assert_eq!(none, Err(SourceError::GroupCount { got: 0 }));
}

#[tokio::test]
async fn a_peer_over_its_quota_is_told_to_come_back_and_does() {
    let bytes = blob(3 * MIB);
    let server = server_with(15, |config| {
        config.quotas = Quotas {
            peer_bytes_per_s: 8 << 20,
            peer_burst_bytes: 1 << 20,
            patience: Duration::ZERO,
            ..Quotas::default()
        };
    });
    let digest = server.store.insert(&bytes, Access::Everyone).expect("insert");
    let fetched = fetcher(16);
    let fetched = fetched.fetch_to_memory(request(digest, &[&server.source]));
    let (fetched, report) = within("a fetch", fetched).await.expect("served in the end");
    assert!(fetched == bytes && report.failures.is_empty());

    // At this rate the second chunk is a week away: the fetcher's patience ends first.
    let server = server_with(17, |config| {
        config.quotas = Quotas { peer_bytes_per_s: 1, peer_burst_bytes: 1, ..Quotas::default() };
    });
    server.store.insert(&bytes, Access::Everyone).expect("insert");
    let mut hasty = config(18, Arc::new(NoStore));
    hasty.timeouts = Timeouts { busy: Duration::ZERO, ..Timeouts::default() };
    let hasty = Data::start(hasty).expect("start");
    let refused = hasty.fetch_to_memory(request(digest, &[&server.source]));
    let error = only_failure(within("a fetch", refused).await.err());
    assert!(matches!(error, SourceError::Refused(Refusal::Busy { .. })), "{error}");
}

#[tokio::test]
async fn a_blob_larger_than_expected_is_not_fetched() {
    let server = server(19);
    let digest = server.store.insert(&blob(2 * MIB), Access::Everyone).expect("insert");
    let fetcher = fetcher(20);
    let mut request = request(digest, &[&server.source]);
    request.length_max = MIB as u64;
    let error = only_failure(within("a fetch", fetcher.fetch_to_memory(request)).await.err());
    assert_eq!(error, SourceError::TooLarge { length: 2 << 20, limit: 1 << 20 });
}

#[tokio::test]
async fn both_may_open_at_the_same_time() {
    let (left, right) = (server(21), server(22));
    let bytes = blob(1000);
    let digest = left.store.insert(&bytes, Access::Everyone).expect("insert");
    right.store.insert(&bytes, Access::Everyone).expect("insert");
    let (one, other) = within("a connection", async {
        tokio::join!(
            left.handle.punch(right.source.peer, right.handle.local_addr()),
            right.handle.punch(left.source.peer, left.handle.local_addr()),
        )
    })
    .await;
    one.expect("left sees right");
    other.expect("right sees left");
    for (asker, asked) in [(&left, &right), (&right, &left)] {
        let source = Source::connected(asked.source.peer);
        let fetched = asker.handle.fetch_to_memory(request(digest, &[&source]));
        assert!(within("a fetch", fetched).await.expect("served").0 == bytes);
    }
}

#[tokio::test]
async fn a_stranger_does_not_get_in_when_all_connections_are_taken() {
    let server = server_with(23, |config| {
        config.limits = DataLimits { connections: 1, ..DataLimits::default() };
    });
    let digest = server.store.insert(&blob(10), Access::Everyone).expect("insert");
    let (first, second) = (fetcher(24), fetcher(25));
    let fetch = |fetcher: &DataHandle| {
        let (fetcher, request) = (fetcher.clone(), request(digest, &[&server.source]));
        async move { within("a fetch", fetcher.fetch_to_memory(request)).await }
    };
    fetch(&first).await.expect("the only connection");
    assert!(fetch(&second).await.is_err(), "one connection is the limit");
    fetch(&first).await.expect("still up");
}

#[tokio::test]
async fn one_address_does_not_take_all_connections() {
    let server = server_with(28, |config| {
        config.limits = DataLimits { connections_per_ip: 1, ..DataLimits::default() };
    });
    let digest = server.store.insert(&blob(10), Access::Everyone).expect("insert");
    let first = fetcher(29);
    within("a fetch", first.fetch_to_memory(request(digest, &[&server.source])))
        .await
        .expect("the first from here");
    let second = fetcher(30).fetch_to_memory(request(digest, &[&server.source])).await;
    assert!(second.is_err(), "one connection from an address is the limit");
}

#[tokio::test]
async fn opening_groups_costs_the_quota_the_chunks_that_are_read() {
    let server = server_with(31, |config| {
        // The second chunk is a week away.
        config.quotas = Quotas { peer_bytes_per_s: 1, peer_burst_bytes: 1, ..Quotas::default() };
    });
    let digest = server.store.insert(&blob(3 * MIB), Access::Everyone).expect("insert");
    let fetcher = fetcher(32);
    let opened = fetcher.open_groups(&server.source, digest, &[0]);
    assert!(within("an opening", opened).await.is_ok());
    let second = fetcher.open_groups(&server.source, digest, &[64]);
    let second = within("a refusal", second).await;
    assert!(matches!(second, Err(SourceError::Refused(Refusal::Busy { .. }))), "{second:?}");
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let node = fetcher(26);
    let mut second = config(27, Arc::new(NoStore));
    second.listen = node.local_addr();
    let error = Data::start(second).expect_err("taken");
    assert!(error.to_string().contains(&node.local_addr().to_string()), "{error}");
}
