//! The control plane: requests, announcements, finding a run, limits, blocking.

use std::time::Duration;

use manyhands_network::Multiaddr;
use manyhands_network::control::{
    AnnounceError, Announcement, Control, ControlConfig, ControlEvent, ControlEvents,
    ControlHandle, ControlLimits, DialError, FindError, RequestError, Role, StartControlError,
};
use manyhands_proto::{NodeId, RunId};
use tokio::sync::mpsc;

use crate::{key, within};

pub(crate) struct Node {
    id: NodeId,
    pub(crate) handle: ControlHandle,
    pub(crate) events: ControlEvents,
    pub(crate) addresses: Vec<Multiaddr>,
}

impl Node {
    pub(crate) fn id(&self) -> NodeId {
        self.id
    }

    async fn dial(&self, other: &Self) {
        within("a dial", self.handle.dial(other.id(), &other.addresses)).await.expect("reachable");
    }

    /// The next request, past other events.
    pub(crate) async fn next_request(
        &mut self,
    ) -> (NodeId, Vec<u8>, manyhands_network::control::Responder) {
        loop {
            let event = within("a request", self.events.next()).await.expect("running");
            if let ControlEvent::Request { peer, bytes, reply } = event {
                return (peer, bytes, reply);
            }
        }
    }

    async fn next_announcement(&mut self) -> Announcement {
        loop {
            let event = within("an announcement", self.events.next()).await.expect("running");
            if let ControlEvent::Announcement(announcement) = event {
                return announcement;
            }
        }
    }
}

pub(crate) async fn start(config: ControlConfig) -> Node {
    let id = config.key.node_id();
    let (handle, events) = Control::start(config).await.expect("start");
    let addresses = handle.addresses().await;
    Node { id, handle, events, addresses }
}

pub(crate) fn config(seed: u8, role: Role) -> ControlConfig {
    let listen = ["/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/127.0.0.1/tcp/0"]
        .map(|address| address.parse().expect("multiaddr"));
    ControlConfig::new(key(seed), listen.to_vec(), role)
}

#[tokio::test]
async fn a_request_is_answered_both_ways_over_one_connection() {
    let mut coordinator = start(config(1, Role::Coordinator)).await;
    let mut worker = start(config(2, Role::Worker)).await;
    assert_eq!(coordinator.addresses.len(), 2);

    let (asker, addresses) = (worker.handle.clone(), coordinator.addresses.clone());
    let id = coordinator.id();
    let asked = tokio::spawn(async move { asker.request(id, &addresses, b"join".to_vec()).await });
    let (peer, bytes, reply) = coordinator.next_request().await;
    assert_eq!((peer, &bytes[..]), (worker.id(), &b"join"[..]));
    reply.respond(b"welcome".to_vec()).await.expect("asker is there");
    assert_eq!(within("the answer", asked).await.expect("task"), Ok(b"welcome".to_vec()));

    // The worker told nobody where it listens: the answer goes over its own connection.
    let (asker, id) = (coordinator.handle.clone(), worker.id());
    let asked = tokio::spawn(async move { asker.request(id, &[], b"state?".to_vec()).await });
    let (_, _, reply) = worker.next_request().await;
    reply.respond(vec![7; 4 << 20]).await.expect("exactly the limit");
    assert_eq!(within("the answer", asked).await.expect("task"), Ok(vec![7; 4 << 20]));
}

#[tokio::test]
async fn tcp_serves_where_quic_does_not() {
    let mut coordinator = start(config(3, Role::Coordinator)).await;
    let worker = start(config(4, Role::Worker)).await;
    let tcp: Vec<_> = coordinator
        .addresses
        .iter()
        .filter(|address| address.to_string().contains("/tcp/"))
        .cloned()
        .collect();
    let id = coordinator.id();
    let asked =
        tokio::spawn(async move { worker.handle.request(id, &tcp, b"hello".to_vec()).await });
    let (_, _, reply) = coordinator.next_request().await;
    reply.respond(b"yes".to_vec()).await.expect("asker is there");
    assert_eq!(within("the answer", asked).await.expect("task"), Ok(b"yes".to_vec()));
}

#[tokio::test]
async fn an_oversized_message_is_refused_by_the_sender_and_by_the_receiver() {
    let small = ControlLimits { request_bytes: 1000, response_bytes: 1000, ..Default::default() };
    let limited = ControlConfig { limits: small, ..config(5, Role::Coordinator) };
    let mut coordinator = start(limited).await;
    let worker = start(config(6, Role::Worker)).await;
    let id = coordinator.id();

    let too_large = worker.handle.request(id, &coordinator.addresses, vec![0; 65_537]).await;
    assert_eq!(too_large, Err(RequestError::TooLarge { limit: 65_536, got: 65_537 }));
    // This sender's limit allows it, the receiver's does not.
    let request = worker.handle.request(id, &coordinator.addresses, vec![0; 1001]);
    let refused = within("the refusal", request).await;
    assert!(matches!(refused, Err(RequestError::Unanswered { .. })), "{refused:?}");

    let (asker, addresses) = (worker.handle.clone(), coordinator.addresses.clone());
    let asked = tokio::spawn(async move { asker.request(id, &addresses, vec![0; 1000]).await });
    let (_, bytes, reply) = coordinator.next_request().await;
    assert_eq!(bytes.len(), 1000);
    assert!(reply.respond(vec![0; 1001]).await.is_err());
    let unanswered = within("the failure", asked).await.expect("task");
    assert!(matches!(unanswered, Err(RequestError::Unanswered { .. })), "{unanswered:?}");
}

#[tokio::test]
async fn an_owner_that_does_not_answer_costs_the_asker_only_the_request() {
    let limits = ControlLimits { unanswered_per_peer: 2, ..Default::default() };
    let mut coordinator = start(ControlConfig { limits, ..config(7, Role::Coordinator) }).await;
    let worker = start(config(8, Role::Worker)).await;
    worker.dial(&coordinator).await;
    let id = coordinator.id();
    let ask = |text: &[u8]| {
        let (handle, text) = (worker.handle.clone(), text.to_vec());
        tokio::spawn(async move { handle.request(id, &[], text).await })
    };
    let (first, second) = (ask(b"1"), ask(b"2"));
    let held = (coordinator.next_request().await, coordinator.next_request().await);
    let third = within("the refusal", ask(b"3")).await.expect("task");
    assert!(matches!(third, Err(RequestError::Unanswered { .. })), "{third:?}");
    drop(held);
    for dropped in [first, second] {
        let result = within("the refusal", dropped).await.expect("task");
        assert!(matches!(result, Err(RequestError::Unanswered { .. })), "{result:?}");
    }
    // Room again.
    let fourth = ask(b"4");
    let (_, _, reply) = coordinator.next_request().await;
    reply.respond(vec![]).await.expect("asker is there");
    assert_eq!(within("the answer", fourth).await.expect("task"), Ok(vec![]));
}

#[tokio::test]
async fn an_announcement_travels_on_only_when_it_is_accepted() {
    let run = RunId::new([9; 32]);
    let coordinator = start(config(9, Role::Coordinator)).await;
    let mut middle = start(config(10, Role::Worker)).await;
    let mut far = start(config(11, Role::Worker)).await;
    assert_eq!(
        coordinator.handle.announce(run, b"alone".to_vec()).await,
        Err(AnnounceError::NobodyListens)
    );
    for node in [&coordinator, &middle, &far] {
        assert!(node.handle.subscribe(run).await);
    }
    middle.dial(&coordinator).await;
    far.dial(&middle).await;

    announce(&coordinator, run, b"forged").await;
    let announcement = middle.next_announcement().await;
    assert_eq!((announcement.peer, announcement.run), (coordinator.id(), run));
    assert_eq!(announcement.bytes, b"forged");
    announcement.reject("not signed by the run's owner");

    // Whatever the far node hears first shows what the middle one let through.
    announce(&coordinator, run, b"round 4").await;
    middle.next_announcement().await.accept();
    let announcement = far.next_announcement().await;
    assert_eq!((announcement.peer, &announcement.bytes[..]), (coordinator.id(), &b"round 4"[..]));
    announcement.ignore();
}

/// Announces as soon as a peer is known to follow the run.
async fn announce(node: &Node, run: RunId, bytes: &[u8]) {
    within("a listener", async {
        while let Err(error) = node.handle.announce(run, bytes.to_vec()).await {
            assert_eq!(error, AnnounceError::NobodyListens);
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_run_is_found_by_its_id() {
    let run = RunId::new([12; 32]);
    let bootstrap = start(config(12, Role::Coordinator)).await;
    let coordinator = start(config(13, Role::Coordinator)).await;
    let worker = start(config(14, Role::Worker)).await;
    let id = coordinator.id();
    assert_eq!(worker.handle.find(run, id).await, Err(FindError::NobodyToAsk));
    coordinator.dial(&bootstrap).await;
    worker.dial(&bootstrap).await;

    let searched = key(99).node_id();
    let found = within("the run to be found", async {
        loop {
            coordinator.handle.provide(run).await.expect("kept");
            // Whoever searches for another coordinator finds this one by the run's id.
            match worker.handle.find(run, searched).await {
                Ok(found) => break found,
                // The record is not there yet, or the nodes have not introduced themselves.
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].node, id);
    within("a dial", worker.handle.dial(id, &found[0].addresses))
        .await
        .expect("reachable where it says");
}

#[tokio::test]
async fn a_coordinator_is_found_even_if_its_record_is_crowded_out() {
    let run = RunId::new([24; 32]);
    let bootstrap = start(config(24, Role::Coordinator)).await;
    let coordinator = start(config(25, Role::Coordinator)).await;
    let worker = start(config(26, Role::Worker)).await;
    coordinator.dial(&bootstrap).await;
    worker.dial(&bootstrap).await;
    let found = within("the coordinator to be found", async {
        loop {
            // Nobody keeps its record: it publishes none.
            match worker.handle.find(run, coordinator.id()).await {
                Ok(found) => break found,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].node, coordinator.id());
}

#[tokio::test]
async fn a_peer_is_who_was_dialled_or_it_is_not_reached() {
    let coordinator = start(config(15, Role::Coordinator)).await;
    let worker = start(config(16, Role::Worker)).await;
    let addresses: Vec<Multiaddr> = coordinator
        .addresses
        .iter()
        .cloned()
        .map(|mut address| {
            address.pop();
            address
        })
        .collect();
    let impostor = key(99).node_id();
    let refused = within("the refusal", worker.handle.dial(impostor, &addresses)).await;
    assert!(matches!(refused, Err(DialError::Unreachable { peer, .. }) if peer == impostor));
    let refused = within("the refusal", worker.handle.request(impostor, &addresses, vec![])).await;
    assert!(matches!(refused, Err(RequestError::Unreachable { peer, .. }) if peer == impostor));
}

/// A worker whose own limits let it send what the coordinator's do not let in.
fn reckless(seed: u8) -> ControlConfig {
    let limits = ControlLimits { request_bytes: 1 << 20, ..Default::default() };
    ControlConfig { limits, ..config(seed, Role::Worker) }
}

/// A coordinator that answers everything, and blames whoever sends "nonsense".
struct Echo {
    id: NodeId,
    addresses: Vec<Multiaddr>,
    disconnected: mpsc::Receiver<NodeId>,
    /// The service ends with its last handle.
    _handle: ControlHandle,
}

impl Echo {
    async fn start(config: ControlConfig) -> Self {
        let mut node = start(config).await;
        let (id, addresses) = (node.id(), node.addresses.clone());
        let _handle = node.handle.clone();
        let (sender, disconnected) = mpsc::channel(64);
        tokio::spawn(async move {
            while let Some(event) = node.events.next().await {
                match event {
                    ControlEvent::Request { bytes, reply, .. } => {
                        if bytes == b"nonsense" {
                            reply.blame("it is not an envelope");
                        }
                        // The asker may be blocked by now.
                        let _ = reply.respond(bytes).await;
                    }
                    ControlEvent::Disconnected { peer } => {
                        // The test may not care.
                        let _ = sender.try_send(peer);
                    }
                    ControlEvent::Connected { .. } | ControlEvent::Announcement(_) => {}
                }
            }
        });
        Self { id, addresses, disconnected, _handle }
    }

    async fn hear(&self, node: &Node, bytes: &[u8]) -> Result<Vec<u8>, RequestError> {
        let asked = node.handle.request(self.id, &self.addresses, bytes.to_vec());
        within("an outcome", asked).await
    }

    /// Sends nonsense until the connection is closed for it.
    async fn block(&mut self, node: &Node, nonsense: &[u8]) {
        assert_eq!(self.hear(node, b"join").await, Ok(b"join".to_vec()));
        for _ in 0..9 {
            assert!(self.disconnected.try_recv().is_err(), "it was blocked too soon");
            // The ninth is not answered, even if it is whole.
            let _ = self.hear(node, nonsense).await;
        }
        let gone = within("the disconnection", self.disconnected.recv()).await;
        assert_eq!(gone, Some(node.id()));
    }
}

#[tokio::test]
async fn a_peer_that_sends_nonsense_is_blocked() {
    let mut coordinator = Echo::start(config(17, Role::Coordinator)).await;
    let honest = start(config(27, Role::Worker)).await;
    for (seed, nonsense) in [(18, &[0; 100_000][..]), (28, &b"nonsense"[..])] {
        let worker = start(reckless(seed)).await;
        coordinator.block(&worker, nonsense).await;
        let refused = coordinator.hear(&worker, b"beat").await;
        assert!(refused.is_err(), "{refused:?}");
        assert_eq!(coordinator.hear(&honest, b"beat").await, Ok(b"beat".to_vec()));
    }
}

#[tokio::test]
async fn a_blocked_peer_is_let_in_again_in_time() {
    let limits = ControlLimits { penalty: Duration::from_millis(100), ..Default::default() };
    let config_with = ControlConfig { limits, ..config(36, Role::Coordinator) };
    let mut coordinator = Echo::start(config_with).await;
    let worker = start(reckless(37)).await;
    coordinator.block(&worker, b"nonsense").await;
    within("the pardon", async {
        while coordinator.hear(&worker, b"beat").await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_asks_too_fast_is_not_answered() {
    let limits = ControlLimits { requests_per_s: 1, request_burst: 2, ..Default::default() };
    let config_with = ControlConfig { limits, ..config(29, Role::Coordinator) };
    let coordinator = Echo::start(config_with).await;
    let hasty = start(config(30, Role::Worker)).await;
    let asked = (0..8).map(|_| coordinator.hear(&hasty, b"beat"));
    let answers = futures::future::join_all(asked).await;
    let answered = answers.iter().filter(|answer| answer.is_ok()).count();
    assert!((2..8).contains(&answered), "{answers:?}");
    for refused in answers.iter().filter(|answer| answer.is_err()) {
        assert!(matches!(refused, Err(RequestError::Unanswered { .. })), "{refused:?}");
    }
    let calm = start(config(31, Role::Worker)).await;
    assert_eq!(coordinator.hear(&calm, b"beat").await, Ok(b"beat".to_vec()));
}

#[tokio::test]
async fn one_address_does_not_take_all_connections() {
    let limits = ControlLimits { connections_per_ip: 2, ..Default::default() };
    let config_with = ControlConfig { limits, ..config(32, Role::Coordinator) };
    let mut coordinator = Echo::start(config_with).await;
    // A second transport would be tried beside the first, and take a place for a moment.
    coordinator.addresses.retain(|address| address.to_string().contains("/quic-v1"));
    let first = start(config(33, Role::Worker)).await;
    let second = start(config(34, Role::Worker)).await;
    for worker in [&first, &second] {
        assert_eq!(coordinator.hear(worker, b"beat").await, Ok(b"beat".to_vec()));
    }
    let third = start(config(35, Role::Worker)).await;
    let refused = coordinator.hear(&third, b"beat").await;
    assert!(refused.is_err(), "{refused:?}");
    first.handle.shutdown().await;
    within("a place", async {
        while coordinator.hear(&third, b"beat").await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_busy_port_is_named_and_an_ended_service_says_so() {
    let node = start(config(19, Role::Coordinator)).await;
    // UDP: libp2p's TCP sockets share their port on purpose.
    let taken = node.addresses.iter().find(|address| address.to_string().contains("/udp/"));
    let taken = taken.expect("a QUIC address").clone();
    let listen = vec![taken.iter().take(3).collect()];
    let second = ControlConfig { listen, ..config(20, Role::Coordinator) };
    let error = Control::start(second).await.expect_err("the port is taken");
    assert!(matches!(error, StartControlError::Listen { .. }), "{error}");

    node.handle.shutdown().await;
    let run = RunId::new([0; 32]);
    assert_eq!(node.handle.announce(run, vec![]).await, Err(AnnounceError::ShutDown));
    assert!(!node.handle.subscribe(run).await);
}

#[tokio::test]
async fn a_node_without_an_address_of_its_own_is_asked_through_a_relay() {
    let public = ControlConfig { public: true, ..config(21, Role::Coordinator) };
    let relay = start(public).await;
    let mut hidden = start(ControlConfig { listen: vec![], ..config(22, Role::Worker) }).await;
    let asker = start(config(23, Role::Worker)).await;
    let circuit: Multiaddr =
        format!("{}/p2p-circuit", relay.addresses[0]).parse().expect("multiaddr");
    hidden.handle.listen(circuit).await.expect("a reservation is asked for");
    let reachable = within("the reservation", async {
        loop {
            let addresses = hidden.handle.addresses().await;
            if !addresses.is_empty() {
                break addresses;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(reachable[0].to_string().contains("/p2p-circuit/"), "{reachable:?}");

    let id = hidden.id();
    let asked = tokio::spawn(async move {
        asker.handle.request(id, &reachable, b"where is your data port?".to_vec()).await
    });
    let (_, _, reply) = hidden.next_request().await;
    reply.respond(b"here".to_vec()).await.expect("asker is there");
    assert_eq!(within("the answer", asked).await.expect("task"), Ok(b"here".to_vec()));
}
