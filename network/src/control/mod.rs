//! The control plane: finding a run, asking a peer, announcing to all. One libp2p swarm on a task of
//! its own; QUIC is tried first, TCP with noise and yamux second.
//!
//! Messages are byte strings here; `proto` gives them meaning. Every queue is bounded: what the owner
//! does not take in time is dropped and counted, so a flood costs bounded memory. A peer that asks too
//! fast is not answered, and one that goes on, or sends nonsense, is blocked for a while.

mod behaviour;
mod codec;
mod conduct;
mod finding;
mod gate;
mod messages;
mod service;
mod swarm;

use std::io;
use std::time::Duration;

use libp2p::Multiaddr;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::{NodeId, RunId};
use tokio::sync::{mpsc, oneshot};

pub use messages::{
    AnnounceError, Announcement, ControlEvent, ControlEvents, DialError, FindError, Located,
    RequestError, RespondError, Responder,
};

use messages::Command;

/// What a node is in the search for runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Answers searches and keeps who coordinates which run (Kademlia server).
    Coordinator,
    /// Only searches (Kademlia client).
    Worker,
}

/// How to run the control plane.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    pub key: NodeKey,
    /// Where to listen, for example `/ip4/0.0.0.0/udp/4001/quic-v1` and `/ip4/0.0.0.0/tcp/4001`.
    pub listen: Vec<Multiaddr>,
    pub role: Role,
    /// Reachable from everywhere at the addresses it listens on: relays signalling for others and
    /// tells them whether they are reachable.
    pub public: bool,
    /// Announces itself on the local network.
    pub mdns: bool,
    pub limits: ControlLimits,
    /// From sending a request to its answer, either side.
    pub request_timeout: Duration,
}

impl ControlConfig {
    /// Default limits, 30 s per request, neither public nor on mDNS.
    pub fn new(key: NodeKey, listen: Vec<Multiaddr>, role: Role) -> Self {
        Self {
            key,
            listen,
            role,
            public: false,
            mdns: false,
            limits: ControlLimits::default(),
            request_timeout: Duration::from_secs(30),
        }
    }
}

/// Bounds on what peers can cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlLimits {
    pub request_bytes: usize,
    /// Requests of one peer that are taken, in the long run and at once; further ones are dropped.
    pub requests_per_s: u32,
    pub request_burst: u32,
    /// How long a peer that sent nonsense is refused.
    pub penalty: Duration,
    pub response_bytes: usize,
    pub announcement_bytes: usize,
    /// Events that wait for the owner.
    pub event_queue: usize,
    /// Commands of the owner that wait for the swarm.
    pub command_queue: usize,
    /// Requests of one peer that wait for the owner's answer; further ones are dropped.
    pub unanswered_per_peer: usize,
    /// Requests of the owner that wait for answers.
    pub requests_in_flight: usize,
    pub streams_per_connection: usize,
    /// Established connections; others may open seven eighths of them.
    pub connections: u32,
    pub connections_per_peer: u32,
    /// Opened by others from one IPv4 address, or one IPv6 network of 64 bits.
    pub connections_per_ip: usize,
    pub pending_connections: u32,
    /// Gossip messages that wait for a slow peer.
    pub gossip_queue: usize,
}

impl Default for ControlLimits {
    fn default() -> Self {
        Self {
            // The largest that means anything is a few KiB.
            request_bytes: 64 << 10,
            // A worker's beat is a second apart; the rest is room for tests in a hurry.
            requests_per_s: 50,
            request_burst: 200,
            penalty: Duration::from_secs(300),
            response_bytes: 5 << 20,
            announcement_bytes: 64 << 10,
            event_queue: 1024,
            command_queue: 256,
            unanswered_per_peer: 16,
            requests_in_flight: 1024,
            streams_per_connection: 32,
            connections: 1024,
            // QUIC and TCP, each way.
            connections_per_peer: 4,
            // A laboratory behind one address.
            connections_per_ip: 64,
            pending_connections: 128,
            gossip_queue: 256,
        }
    }
}

/// Why the control plane could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartControlError {
    #[error("cannot listen on {address}: {reason}; choose another port or stop what uses it")]
    Listen { address: Multiaddr, reason: String },
    #[error("cannot set up the transports: {0}")]
    Transport(io::Error),
    #[error("cannot set up announcements: {0}")]
    Gossip(String),
    #[error("cannot join the local network's mDNS group: {0}")]
    Mdns(io::Error),
}

/// The control plane's service.
#[derive(Debug)]
pub struct Control;

impl Control {
    /// Listens on every address of the configuration, then runs until [`ControlHandle::shutdown`] or
    /// until every handle is dropped.
    ///
    /// # Errors
    /// [`StartControlError`]; nothing is left running then.
    pub async fn start(
        config: ControlConfig,
    ) -> Result<(ControlHandle, ControlEvents), StartControlError> {
        service::start(config).await
    }
}

/// Talks to the service. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ControlHandle {
    commands: mpsc::Sender<Command>,
    request_bytes_max: usize,
    announcement_bytes_max: usize,
}

impl ControlHandle {
    /// Asks `peer` and waits for its answer. `addresses` are used if no connection is up.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request(
        &self,
        peer: NodeId,
        addresses: &[Multiaddr],
        bytes: Vec<u8>,
    ) -> Result<Vec<u8>, RequestError> {
        let limit = self.request_bytes_max;
        if bytes.len() > limit {
            return Err(RequestError::TooLarge { limit, got: bytes.len() });
        }
        let addresses = addresses.to_vec();
        self.ask(|reply| Command::Request { peer, addresses, bytes, reply })
            .await
            .unwrap_or(Err(RequestError::ShutDown))
    }

    /// Sends `bytes` to everybody who follows `run`.
    ///
    /// # Errors
    /// [`AnnounceError`].
    pub async fn announce(&self, run: RunId, bytes: Vec<u8>) -> Result<(), AnnounceError> {
        let limit = self.announcement_bytes_max;
        if bytes.len() > limit {
            return Err(AnnounceError::TooLarge { limit, got: bytes.len() });
        }
        self.ask(|reply| Command::Announce { run, bytes, reply })
            .await
            .unwrap_or(Err(AnnounceError::ShutDown))
    }

    /// Follows the announcements of `run`; twice is once. False if the service has ended.
    pub async fn subscribe(&self, run: RunId) -> bool {
        self.ask(|reply| Command::Subscribe { run, reply }).await.is_some()
    }

    /// Makes this node findable as a coordinator of `run`; renewed until the node stops.
    ///
    /// # Errors
    /// [`FindError`] if no record could be kept. With no peer to tell yet it succeeds: the record
    /// is published when peers appear.
    pub async fn provide(&self, run: RunId) -> Result<(), FindError> {
        self.ask(|reply| Command::Provide { run, reply }).await.unwrap_or(Err(FindError::ShutDown))
    }

    /// Looks for `coordinator`, and for whoever else says it coordinates `run`, among all nodes
    /// reachable through the connected ones. Anybody can say so: only the coordinator's own place in
    /// the result is worth a message, and it is there even if impostors crowd out its record.
    ///
    /// # Errors
    /// [`FindError`]; the result is not empty, and everybody in it has an address.
    pub async fn find(&self, run: RunId, coordinator: NodeId) -> Result<Vec<Located>, FindError> {
        self.ask(|reply| Command::Find { run, coordinator, reply })
            .await
            .unwrap_or(Err(FindError::ShutDown))
    }

    /// Connects to `peer`; returns at once if a connection is up.
    ///
    /// # Errors
    /// [`DialError`].
    pub async fn dial(&self, peer: NodeId, addresses: &[Multiaddr]) -> Result<(), DialError> {
        let addresses = addresses.to_vec();
        self.ask(|reply| Command::Dial { peer, addresses, reply })
            .await
            .unwrap_or(Err(DialError::ShutDown))
    }

    /// Listens on one more address: a relay's circuit (`…/p2p/<relay>/p2p-circuit`) makes a node behind a NAT
    /// reachable for signalling.
    ///
    /// # Errors
    /// [`StartControlError::Listen`].
    pub async fn listen(&self, address: Multiaddr) -> Result<(), StartControlError> {
        let asked = address.clone();
        self.ask(|reply| Command::Listen { address, reply }).await.unwrap_or_else(|| {
            let reason = "the control plane has been shut down".to_owned();
            Err(StartControlError::Listen { address: asked, reason })
        })
    }

    /// Where this node can be reached, each ending in `/p2p/<its peer id>`: listening addresses and
    /// those confirmed from outside.
    pub async fn addresses(&self) -> Vec<Multiaddr> {
        self.ask(|reply| Command::Addresses { reply }).await.unwrap_or_default()
    }

    /// Closes every connection and ends the service; pending requests fail.
    pub async fn shutdown(&self) {
        // Already ended is as good.
        let _ = self.ask(|reply| Command::Shutdown { reply }).await;
    }

    /// Sends a command and waits for its reply; `None` if the service has ended.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}
