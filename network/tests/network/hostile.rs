//! Peers that lie, stall, pretend and send nonsense.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use manyhands_network::control::Role;
use manyhands_network::data::{
    Access, Blame, BlobInfo, BlobStore, ConnectError, Data, DataHandle, DataLimits, FetchError,
    NoStore, Refusal, Source, SourceError, Timeouts,
};
use manyhands_network::identity::peer_id;
use manyhands_proto::tree::ChunkList;
use manyhands_proto::{Digest, NodeId};
use quinn::crypto::rustls::QuicClientConfig;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::data::{MIB, blob, config, fetcher, only_failure, request, server, source};
use crate::{control, key, within};

/// Serves `bytes` under any chunk list, with the given chunk changed.
struct Liar {
    list: ChunkList,
    bytes: Vec<u8>,
    wrong_chunk: Option<u64>,
}

impl BlobStore for Liar {
    fn stat(&self, _: Digest, _: NodeId) -> Result<BlobInfo, Refusal> {
        Ok(BlobInfo { chunks: Arc::new(self.list.clone()) })
    }

    fn read(&self, _: Digest, offset: u64, length: u64) -> Result<Vec<u8>, Refusal> {
        let mut bytes = self.bytes[offset as usize..(offset + length) as usize].to_vec();
        if self.wrong_chunk == Some(offset >> 20) {
            bytes[1234] ^= 1;
        }
        Ok(bytes)
    }
}

#[tokio::test]
async fn a_lying_source_is_blamed_and_the_chunk_comes_from_another() {
    let bytes = blob(5 * MIB);
    let list = ChunkList::of(&bytes);
    let digest = list.digest();
    let liar = Liar { list, bytes: bytes.clone(), wrong_chunk: Some(1) };
    let liar = Data::start(config(101, Arc::new(liar))).expect("start");
    let honest = server(102);
    honest.store.insert(&bytes, Access::Everyone).expect("insert");
    let fetcher = fetcher(103);
    // Alone, the liar is found out.
    let fetched = fetcher.fetch_to_memory(request(digest, &[&source(101, &liar)]));
    let error = only_failure(within("a fetch", fetched).await.err());
    assert!(matches!(error, SourceError::Blame(Blame::Chunk { index: 1, .. })), "{error}");

    // Beside an honest source the blob arrives, whoever is asked for which chunk.
    let fetched = fetcher.fetch_to_memory(request(digest, &[&source(101, &liar), &honest.source]));
    let (fetched, report) = within("a fetch", fetched).await.expect("the honest source has it");
    assert!(fetched == bytes);
    for failure in &report.failures {
        assert_eq!(failure.peer, key(101).node_id());
        assert!(matches!(failure.error, SourceError::Blame(Blame::Chunk { index: 1, .. })));
    }
}

#[tokio::test]
async fn a_chunk_list_that_merges_but_is_not_the_leaves_brings_blame_on_its_author_only() {
    let bytes = blob(4 * MIB);
    let honest_list = ChunkList::of(&bytes);
    let digest = honest_list.digest();
    // The level above the leaves merges to the same digest as a blob of half the length.
    let pair = |left: usize| {
        let values = honest_list.values();
        let mode = blake3::hazmat::Mode::Hash;
        blake3::hazmat::merge_subtrees_non_root(&values[left], &values[left + 1], mode)
    };
    let list = ChunkList::parse(digest, 2 << 20, vec![pair(0), pair(2)]).expect("merges");
    let liar = Liar { list, bytes: bytes.clone(), wrong_chunk: None };
    let liar = Data::start(config(104, Arc::new(liar))).expect("start");
    let honest = server(105);
    honest.store.insert(&bytes, Access::Everyone).expect("insert");
    let fetcher = fetcher(106);
    // The liar's list comes first.
    fetcher.connect(key(104).node_id(), &[liar.local_addr()]).await.expect("connect");
    let sources = [&source(104, &liar), &honest.source];
    let fetched = fetcher.fetch_to_memory(request(digest, &sources));
    let (fetched, report) = within("a fetch", fetched).await.expect("the honest source has it");
    assert!(fetched == bytes);
    assert!(report.failures.iter().all(|failure| failure.peer == key(104).node_id()));
}

/// Accepts requests and never answers, until the test ends.
struct Staller {
    list: ChunkList,
    never: Mutex<Receiver<()>>,
}

impl BlobStore for Staller {
    fn stat(&self, _: Digest, _: NodeId) -> Result<BlobInfo, Refusal> {
        Ok(BlobInfo { chunks: Arc::new(self.list.clone()) })
    }

    fn read(&self, _: Digest, _: u64, _: u64) -> Result<Vec<u8>, Refusal> {
        // Returns when the sender is dropped.
        let _ = self.never.lock().map(|never| never.recv());
        Err(Refusal::Storage)
    }
}

fn staller(list: ChunkList) -> (Staller, Sender<()>) {
    let (hold, never) = channel();
    (Staller { list, never: Mutex::new(never) }, hold)
}

#[tokio::test]
async fn a_stalling_source_is_left_for_another() {
    let bytes = blob(6 * MIB);
    let list = ChunkList::of(&bytes);
    let digest = list.digest();
    let (store, hold) = staller(list);
    let stalling = Data::start(config(107, Arc::new(store))).expect("start");
    let honest = server(108);
    honest.store.insert(&bytes, Access::Everyone).expect("insert");
    let mut hasty = config(109, Arc::new(NoStore));
    hasty.timeouts = Timeouts { stall: Duration::from_millis(500), ..Timeouts::default() };
    let hasty = Data::start(hasty).expect("start");

    let alone = hasty.fetch_to_memory(request(digest, &[&source(107, &stalling)]));
    let error = only_failure(within("a fetch", alone).await.err());
    assert!(matches!(error, SourceError::Stalled { .. }), "{error}");
    let sources = [&source(107, &stalling), &honest.source];
    let fetched = hasty.fetch_to_memory(request(digest, &sources));
    assert!(within("a fetch", fetched).await.expect("the honest source has it").0 == bytes);
    drop(hold);
}

#[tokio::test]
async fn a_wrong_peer_fails_the_handshake() {
    let server = server(110);
    let fetcher = fetcher(111);
    let impostor = key(99).node_id();
    let error = fetcher.connect(impostor, &[server.handle.local_addr()]).await;
    assert!(matches!(error, Err(ConnectError::Failed { peer, .. }) if peer == impostor));
    let nobody = fetcher.connect(impostor, &[]).await;
    assert_eq!(nobody, Err(ConnectError::NoAddress { peer: impostor }));
}

#[tokio::test]
async fn a_peer_that_sends_nonsense_is_dropped_with_a_reason() {
    let server = server(112);
    let digest = server.store.insert(&blob(10), Access::Everyone).expect("insert");
    let keypair = Keypair::ed25519_from_bytes(key(113).seed()).expect("seed");
    let connection = raw_connection(&keypair, server.source.peer, server.handle.local_addr()).await;
    let (mut send, _receive) = connection.open_bi().await.expect("stream");
    send.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("write");
    send.finish().expect("finish");
    let closed = within("the end", connection.closed()).await.to_string();
    assert!(closed.contains("malformed request"), "{closed}");
    // It is not let in again for a while; everybody else is.
    let again = raw_connection(&keypair, server.source.peer, server.handle.local_addr()).await;
    let closed = within("the end", again.closed()).await.to_string();
    assert!(closed.contains("blocked"), "{closed}");
    let dialled = server.handle.connect(key(113).node_id(), &[server.handle.local_addr()]).await;
    assert!(matches!(dialled, Err(ConnectError::Blocked { .. })), "{dialled:?}");
    let fetched = fetcher(114);
    within("a fetch", fetched.fetch_to_memory(request(digest, &[&server.source])))
        .await
        .expect("served");
}

#[tokio::test]
async fn an_endless_request_is_cut_off() {
    let server = server(115);
    let keypair = Keypair::ed25519_from_bytes(key(116).seed()).expect("seed");
    let connection = raw_connection(&keypair, server.source.peer, server.handle.local_addr()).await;
    let (mut send, _receive) = connection.open_bi().await.expect("stream");
    let flood = within("the cut", async {
        loop {
            if let Err(error) = send.write_all(&[1; 65536]).await {
                break error.to_string();
            }
        }
    })
    .await;
    assert!(!flood.is_empty());
    let closed = within("the end", connection.closed()).await.to_string();
    assert!(closed.contains("more than"), "{closed}");
}

/// A QUIC connection with a node's identity and none of its manners.
async fn raw_connection(keypair: &Keypair, peer: NodeId, to: SocketAddr) -> quinn::Connection {
    raw_connection_with(keypair, peer, to, quinn::TransportConfig::default()).await
}

async fn raw_connection_with(
    keypair: &Keypair,
    peer: NodeId,
    to: SocketAddr,
    transport: quinn::TransportConfig,
) -> quinn::Connection {
    let mut tls = libp2p_tls::make_client_config(keypair, Some(peer_id(&peer))).expect("tls");
    tls.alpn_protocols = vec![b"/manyhands/data/1".to_vec()];
    let crypto = QuicClientConfig::try_from(tls).expect("tls 1.3");
    let endpoint = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).expect("socket");
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    let connecting = endpoint.connect_with(config, to, "raw").expect("config");
    within("a handshake", connecting).await.expect("a node's certificate")
}

/// A peer that answers requests as the test says.
struct Hostile {
    source: Source,
    connection: quinn::Connection,
}

impl Hostile {
    /// Connects to a node, and returns when that node can ask over the connection.
    async fn connect(seed: u8, node: (u8, &DataHandle), transport: quinn::TransportConfig) -> Self {
        let keypair = Keypair::ed25519_from_bytes(key(seed).seed()).expect("seed");
        let (peer, to) = (key(node.0).node_id(), node.1.local_addr());
        let connection = raw_connection_with(&keypair, peer, to, transport).await;
        let hostile = Self { source: Source::connected(key(seed).node_id()), connection };
        // Where are we? Whoever answers has registered the connection.
        assert!(!hostile.ask(&[4]).await.is_empty());
        hostile
    }

    /// The answer to a request; empty if the stream was reset.
    async fn ask(&self, request: &[u8]) -> Vec<u8> {
        let (mut send, mut receive) = self.connection.open_bi().await.expect("stream");
        send.write_all(request).await.expect("write");
        send.finish().expect("finish");
        within("an answer", receive.read_to_end(1 << 20)).await.unwrap_or_default()
    }

    /// From now on begins every answer with these bytes; ends it there if `finish`, and otherwise
    /// never.
    fn answer(&self, bytes: &[u8], finish: bool) {
        let (connection, bytes) = (self.connection.clone(), bytes.to_vec());
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut send, mut receive)) = connection.accept_bi().await {
                // Requests that are given up are answered too.
                let _ = receive.read_to_end(4096).await;
                let _ = send.write_all(&bytes).await;
                if finish {
                    let _ = send.finish();
                } else {
                    open.push((send, receive));
                }
            }
        });
    }
}

const BUSY_FOR_49_DAYS: [u8; 5] = [4, 255, 255, 255, 255];

/// Time-outs so long that only the one under test can end something.
const HOUR: Duration = Duration::from_secs(3600);

fn fetcher_with(seed: u8, timeouts: Timeouts, limits: DataLimits) -> DataHandle {
    let mut config = config(seed, Arc::new(NoStore));
    (config.timeouts, config.limits) = (timeouts, limits);
    Data::start(config).expect("start")
}

#[tokio::test]
async fn a_source_that_is_busy_for_weeks_is_given_up_in_time() {
    let timeouts = Timeouts { busy: Duration::from_millis(100), ..Timeouts::default() };
    let fetcher = fetcher_with(123, timeouts, DataLimits::default());
    let hostile = Hostile::connect(124, (123, &fetcher), quinn::TransportConfig::default()).await;
    hostile.answer(&BUSY_FOR_49_DAYS, true);
    let fetched = fetcher.fetch_to_memory(request(Digest::of(b"x"), &[&hostile.source]));
    let error = only_failure(within("the end of patience", fetched).await.err());
    assert!(matches!(error, SourceError::Refused(Refusal::Busy { .. })), "{error}");
}

#[tokio::test]
async fn a_busy_source_gives_its_place_to_another() {
    let timeouts = Timeouts { busy: HOUR, ..Timeouts::default() };
    let limits = DataLimits { sources_in_use: 1, ..DataLimits::default() };
    let fetcher = fetcher_with(125, timeouts, limits);
    let hostile = Hostile::connect(126, (125, &fetcher), quinn::TransportConfig::default()).await;
    hostile.answer(&BUSY_FOR_49_DAYS, true);
    let honest = server(127);
    let bytes = blob(2 * MIB);
    let digest = honest.store.insert(&bytes, Access::Everyone).expect("insert");
    let fetched = fetcher.fetch_to_memory(request(digest, &[&hostile.source, &honest.source]));
    assert!(within("a fetch", fetched).await.expect("the honest source has it").0 == bytes);
}

#[tokio::test]
async fn an_answer_that_never_ends_ends_with_the_request() {
    let timeouts =
        Timeouts { stall: HOUR, request: Duration::from_millis(200), ..Timeouts::default() };
    let fetcher = fetcher_with(128, timeouts, DataLimits::default());
    let hostile = Hostile::connect(129, (128, &fetcher), quinn::TransportConfig::default()).await;
    // A status and half a length, or half an opening: the next byte could always come.
    hostile.answer(&[0, 1, 0, 0], false);
    let digest = Digest::of(b"x");
    let fetched = fetcher.fetch_to_memory(request(digest, &[&hostile.source]));
    let error = only_failure(within("the end of the request", fetched).await.err());
    assert!(matches!(error, SourceError::TooSlow { .. }), "{error}");
    let opened = fetcher.open_groups(&hostile.source, digest, &[0]);
    let error = within("the end of the request", opened).await;
    assert!(matches!(error, Err(SourceError::TooSlow { .. })), "{error:?}");
}

#[tokio::test]
async fn a_fetch_ends_at_its_deadline() {
    let timeouts = Timeouts { stall: HOUR, request: HOUR, busy: HOUR, ..Timeouts::default() };
    let fetcher = fetcher_with(130, timeouts, DataLimits::default());
    let hostile = Hostile::connect(131, (130, &fetcher), quinn::TransportConfig::default()).await;
    hostile.answer(&[0], false);
    let mut request = request(Digest::of(b"x"), &[&hostile.source]);
    request.deadline = Some(tokio::time::Instant::now() + Duration::from_millis(200));
    let late = within("the deadline", fetcher.fetch_to_memory(request)).await;
    assert!(matches!(late, Err(FetchError::TooLate { .. })), "{late:?}");
}

#[tokio::test]
async fn a_request_that_is_given_up_is_withdrawn_and_not_sent_by_halves() {
    let timeouts = Timeouts { stall: Duration::from_millis(500), ..Timeouts::default() };
    let fetcher = fetcher_with(132, timeouts, DataLimits::default());
    // It lets in one byte of every stream, so that the request is not sent in time.
    let mut stingy = quinn::TransportConfig::default();
    stingy.stream_receive_window(1_u32.into());
    let hostile = Hostile::connect(133, (132, &fetcher), stingy).await;
    let opened = fetcher.open_groups(&hostile.source, Digest::of(b"x"), &[0]);
    let stalled = within("the end of patience", opened).await;
    assert!(matches!(stalled, Err(SourceError::Stalled { .. })), "{stalled:?}");
    let (_send, mut receive) =
        within("the stream", hostile.connection.accept_bi()).await.expect("a stream");
    let read = within("its end", receive.read_to_end(4096)).await;
    assert!(
        matches!(read, Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(_)))),
        "{read:?}"
    );
}

#[tokio::test]
async fn a_request_cut_short_is_nobodys_fault() {
    let server = server(134);
    let node = (134, &server.handle);
    let honest = Hostile::connect(135, node, quinn::TransportConfig::default()).await;
    for cut in [&[][..], &[1], &[2; 40], &[3; 33]] {
        assert!(honest.ask(cut).await.is_empty());
    }
    assert!(!honest.ask(&[4]).await.is_empty(), "it is still welcome");
    assert!(honest.connection.close_reason().is_none());
}

#[tokio::test]
async fn groups_that_do_not_ascend_are_nonsense() {
    let server = server(136);
    let digest = server.store.insert(&blob(3 * MIB), Access::Everyone).expect("insert");
    let node = (136, &server.handle);
    let hostile = Hostile::connect(137, node, quinn::TransportConfig::default()).await;
    // Alternating between two chunks would have a MiB read for every 16 KiB.
    let groups = [0_u64, 64, 1].map(u64::to_le_bytes);
    let asked = [&[3], &digest.as_bytes()[..], groups.as_flattened()].concat();
    hostile.ask(&asked).await;
    let closed = within("the end", hostile.connection.closed()).await.to_string();
    assert!(closed.contains("ascending"), "{closed}");
}

#[tokio::test]
async fn a_dial_of_our_own_takes_the_place_of_who_was_idle_longest() {
    let limits = DataLimits { connections: 2, ..DataLimits::default() };
    let node = fetcher_with(138, Timeouts::default(), limits);
    let connect = |seed| Hostile::connect(seed, (138, &node), quinn::TransportConfig::default());
    let (silent, busy) = (connect(139).await, connect(140).await);
    assert!(!busy.ask(&[4]).await.is_empty());
    let wanted = server(141);
    let digest = wanted.store.insert(&blob(10), Access::Everyone).expect("insert");
    within("a fetch", node.fetch_to_memory(request(digest, &[&wanted.source])))
        .await
        .expect("strangers do not keep it away");
    let closed = within("the end", silent.connection.closed()).await.to_string();
    assert!(closed.contains("idle longest"), "{closed}");
    assert!(!busy.ask(&[4]).await.is_empty());
}

#[tokio::test]
async fn noise_on_the_sockets_disturbs_nobody() {
    let data = server(117);
    let digest = data.store.insert(&blob(10), Access::Everyone).expect("insert");
    let mut coordinator = control::start(control::config(118, Role::Coordinator)).await;
    let noise = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("socket");
    let ports: Vec<u16> = coordinator.addresses.iter().filter_map(port).collect();
    for index in 0..200_u32 {
        let packet: Vec<u8> = (0..1200).map(|i| (i * index + index) as u8).collect();
        noise.send_to(&packet, data.handle.local_addr()).expect("send");
        for port in &ports {
            noise.send_to(&packet, (Ipv4Addr::LOCALHOST, *port)).expect("send");
        }
    }
    for port in &ports {
        // One of the two is the QUIC port, where nobody listens on TCP.
        if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).await {
            // The listener may hang up at any byte.
            let _ = stream.write_all(&[0xff; 4096]).await;
        }
    }
    let fetched = fetcher(119);
    within("a fetch", fetched.fetch_to_memory(request(digest, &[&data.source])))
        .await
        .expect("served");
    let worker = control::start(control::config(120, Role::Worker)).await;
    let (id, addresses) = (coordinator.id(), coordinator.addresses.clone());
    let asked = tokio::spawn(async move { worker.handle.request(id, &addresses, vec![1]).await });
    let (_, _, reply) = coordinator.next_request().await;
    reply.respond(vec![2]).await.expect("asker is there");
    assert_eq!(within("the answer", asked).await.expect("task"), Ok(vec![2]));
}

fn port(address: &manyhands_network::Multiaddr) -> Option<u16> {
    address.iter().find_map(|part| {
        if let Protocol::Udp(port) | Protocol::Tcp(port) = part { Some(port) } else { None }
    })
}

#[tokio::test]
async fn a_source_nobody_can_reach_does_not_hold_up_the_others() {
    let honest = server(121);
    let bytes = blob(2 * MIB);
    let digest = honest.store.insert(&bytes, Access::Everyone).expect("insert");
    // A socket that never answers.
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("socket");
    let address = silent.local_addr().expect("address");
    let silent = Source { peer: key(98).node_id(), addresses: vec![address] };
    let fetcher = fetcher(122);
    let fetched = fetcher.fetch_to_memory(request(digest, &[&silent, &honest.source]));
    let (fetched, report) = within("a fetch", fetched).await.expect("served");
    assert!(fetched == bytes);
    assert_eq!(report.chunks_fetched, [0, 2]);
}
