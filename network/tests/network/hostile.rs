//! Peers that lie, stall, pretend and send nonsense.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use manyhands_network::control::Role;
use manyhands_network::data::{
    Access, Blame, BlobInfo, BlobStore, ConnectError, Data, DropReason, Refusal, Source,
    SourceError, Timeouts,
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
    let mut hasty = config(109, Arc::new(manyhands_network::data::NoStore));
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
    let incidents = server.handle.take_incidents();
    assert_eq!(incidents.len(), 1);
    assert_eq!(incidents[0].peer, key(113).node_id());
    assert!(matches!(incidents[0].reason, DropReason::Malformed(_)));

    // It is not let in again for a while; everybody else is.
    let again = raw_connection(&keypair, server.source.peer, server.handle.local_addr()).await;
    let closed = within("the end", again.closed()).await.to_string();
    assert!(closed.contains("blocked"), "{closed}");
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
    let mut tls = libp2p_tls::make_client_config(keypair, Some(peer_id(&peer))).expect("tls");
    tls.alpn_protocols = vec![b"/manyhands/data/1".to_vec()];
    let crypto = QuicClientConfig::try_from(tls).expect("tls 1.3");
    let endpoint = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).expect("socket");
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let connecting = endpoint.connect_with(config, to, "raw").expect("config");
    within("a handshake", connecting).await.expect("a node's certificate")
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
