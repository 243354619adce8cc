//! The control plane: requests, announcements, finding a run, blocking.

use manyhands_network::Multiaddr;
use manyhands_network::control::{
    AnnounceError, Announcement, Control, ControlConfig, ControlEvent, ControlEvents,
    ControlHandle, ControlLimits, DialError, RequestError, Role, StartControlError,
};
use manyhands_proto::{NodeId, RunId};

use crate::{key, within};

pub(crate) struct Node {
    pub(crate) handle: ControlHandle,
    pub(crate) events: ControlEvents,
    pub(crate) addresses: Vec<Multiaddr>,
}

impl Node {
    pub(crate) fn id(&self) -> NodeId {
        self.handle.node_id()
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
    let (handle, events) = Control::start(config).await.expect("start");
    let addresses = handle.addresses().await;
    Node { handle, events, addresses }
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

    let too_large = worker.handle.request(id, &coordinator.addresses, vec![0; (1 << 20) + 1]).await;
    assert_eq!(too_large, Err(RequestError::TooLarge { limit: 1 << 20, got: (1 << 20) + 1 }));
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
    assert!(worker.handle.find(run).await.is_err(), "it knows nobody");
    coordinator.dial(&bootstrap).await;
    worker.dial(&bootstrap).await;

    let found = within("the run to be found", async {
        loop {
            coordinator.handle.provide(run).await.expect("kept");
            match worker.handle.find(run).await {
                Ok(found) if !found.is_empty() && !found[0].addresses.is_empty() => break found,
                // The record is not there yet, or the nodes have not introduced themselves.
                Ok(_) | Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].node, coordinator.id());
    within("a dial", worker.handle.dial(found[0].node, &found[0].addresses))
        .await
        .expect("reachable where it says");
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

#[tokio::test]
async fn a_blocked_peer_is_disconnected_and_stays_out() {
    let mut coordinator = start(config(17, Role::Coordinator)).await;
    let worker = start(config(18, Role::Worker)).await;
    worker.dial(&coordinator).await;
    // The dialling side is done first: a block before the other side has the connection refuses it.
    within("the connection", async {
        while let Some(event) = coordinator.events.next().await {
            if let ControlEvent::Connected { peer, .. } = event {
                assert_eq!(peer, worker.id());
                break;
            }
        }
    })
    .await;
    assert!(coordinator.handle.block(worker.id(), "it cheated").await);
    within("the disconnection", async {
        loop {
            let event = coordinator.events.next().await.expect("running");
            if let ControlEvent::Disconnected { peer } = event {
                assert_eq!(peer, worker.id());
                break;
            }
        }
    })
    .await;
    let refused = worker.handle.request(coordinator.id(), &coordinator.addresses, vec![1]);
    assert!(within("the refusal", refused).await.is_err());
    assert!(coordinator.handle.unblock(worker.id()).await);
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
