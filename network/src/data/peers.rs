//! Which connections are up, and who is not welcome.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use manyhands_proto::NodeId;
use quinn::Connection;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::DataLimits;
use super::quota::lock;
use crate::metrics::{DATA_CONNECTIONS, DATA_PEERS_DROPPED};

const INCIDENTS_MAX: usize = 256;
/// Peers under a penalty that are remembered: beyond it the penalty that ends first is forgotten.
const PENALTIES_MAX: usize = 4096;

/// Application close codes of the data plane.
pub(super) const CLOSE_SHUTDOWN: u32 = 0;
pub(super) const CLOSE_REFUSED: u32 = 1;
pub(super) const CLOSE_MISBEHAVED: u32 = 2;

/// Why no connection could be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    #[error("no address of node {peer} is known and it is not connected")]
    NoAddress { peer: NodeId },
    #[error("node {peer} could not be reached: {attempts}")]
    Failed { peer: NodeId, attempts: Attempts },
    #[error("node {peer} is blocked: {reason}")]
    Blocked { peer: NodeId, reason: String },
    #[error("{limit} connections are open already")]
    TooMany { limit: usize },
    #[error("the data plane has been shut down")]
    ShutDown,
}

/// What every address said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempts(pub Vec<(SocketAddr, String)>);

impl std::fmt::Display for Attempts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, (address, reason)) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{address}: {reason}")?;
        }
        Ok(())
    }
}

/// Why a peer's connections were closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DropReason {
    #[error("it sent a malformed request: {0}")]
    Malformed(String),
    #[error("it was blocked: {0}")]
    Blocked(String),
}

impl DropReason {
    fn name(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::Blocked(_) => "blocked",
        }
    }
}

/// A peer that was dropped, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incident {
    pub peer: NodeId,
    pub reason: DropReason,
}

/// A peer that is refused, until a time or for good.
#[derive(Debug, Clone)]
struct Penalty {
    until: Option<Instant>,
    reason: DropReason,
}

#[derive(Debug)]
pub(super) struct Peers {
    limits: DataLimits,
    connections: Mutex<HashMap<NodeId, Vec<Connection>>>,
    penalties: Mutex<HashMap<NodeId, Penalty>>,
    incidents: Mutex<VecDeque<Incident>>,
    /// Told of every new connection.
    pub(super) arrived: Notify,
}

impl Peers {
    pub(super) fn new(limits: DataLimits) -> Self {
        Self {
            limits,
            connections: Mutex::default(),
            penalties: Mutex::default(),
            incidents: Mutex::default(),
            arrived: Notify::new(),
        }
    }

    /// The oldest connection to `peer` that is still up.
    pub(super) fn connection(&self, peer: NodeId) -> Option<Connection> {
        let connections = lock(&self.connections);
        let open = |connection: &&Connection| connection.close_reason().is_none();
        connections.get(&peer)?.iter().find(open).cloned()
    }

    /// Whether one more dial fits.
    pub(super) fn room(&self) -> Result<(), ConnectError> {
        let open: usize = lock(&self.connections).values().map(Vec::len).sum();
        let limit = self.limits.connections;
        if open < limit { Ok(()) } else { Err(ConnectError::TooMany { limit }) }
    }

    pub(super) fn connections_from(&self, address: SocketAddr) -> usize {
        let connections = lock(&self.connections);
        let from = |connection: &&Connection| connection.remote_address().ip() == address.ip();
        connections.values().flatten().filter(from).count()
    }

    /// Registers a connection whose peer is proven; closes it and says why if it may not stay.
    pub(super) fn register(
        &self,
        peer: NodeId,
        connection: &Connection,
    ) -> Result<(), ConnectError> {
        let refused = self.check_welcome(peer).and_then(|()| self.room()).and_then(|()| {
            let mut connections = lock(&self.connections);
            let own = connections.entry(peer).or_default();
            let limit = self.limits.connections_per_peer;
            if own.iter().filter(|own| own.close_reason().is_none()).count() >= limit {
                return Err(ConnectError::TooMany { limit });
            }
            own.push(connection.clone());
            metrics::gauge!(DATA_CONNECTIONS).increment(1.0);
            Ok(())
        });
        match &refused {
            Ok(()) => self.arrived.notify_waiters(),
            Err(error) => connection.close(CLOSE_REFUSED.into(), error.to_string().as_bytes()),
        }
        refused
    }

    pub(super) fn unregister(&self, peer: NodeId, connection: &Connection) {
        let mut connections = lock(&self.connections);
        if let Some(own) = connections.get_mut(&peer) {
            let before = own.len();
            own.retain(|other| other.stable_id() != connection.stable_id());
            metrics::gauge!(DATA_CONNECTIONS).decrement((before - own.len()) as f64);
            if own.is_empty() {
                connections.remove(&peer);
            }
        }
    }

    pub(super) fn check_welcome(&self, peer: NodeId) -> Result<(), ConnectError> {
        let mut penalties = lock(&self.penalties);
        let Some(penalty) = penalties.get(&peer) else { return Ok(()) };
        if penalty.until.is_some_and(|until| until <= Instant::now()) {
            penalties.remove(&peer);
            return Ok(());
        }
        Err(ConnectError::Blocked { peer, reason: penalty.reason.to_string() })
    }

    /// Closes the peer's connections and refuses new ones: for a time, or (`None`) for good.
    pub(super) fn drop_peer(&self, peer: NodeId, reason: DropReason, penalty: Option<Duration>) {
        tracing::warn!(%peer, %reason, "dropped a peer");
        metrics::counter!(DATA_PEERS_DROPPED, "reason" => reason.name()).increment(1);
        let until = penalty.map(|penalty| Instant::now() + penalty);
        self.remember_penalty(peer, Penalty { until, reason: reason.clone() });
        for connection in lock(&self.connections).get(&peer).into_iter().flatten() {
            connection.close(CLOSE_MISBEHAVED.into(), reason.to_string().as_bytes());
        }
        let mut incidents = lock(&self.incidents);
        if incidents.len() == INCIDENTS_MAX {
            incidents.pop_front();
        }
        incidents.push_back(Incident { peer, reason });
    }

    fn remember_penalty(&self, peer: NodeId, penalty: Penalty) {
        let mut penalties = lock(&self.penalties);
        // A block by the owner outlasts a penalty that runs out.
        if penalties.get(&peer).is_some_and(|old| old.until.is_none()) {
            return;
        }
        if penalties.len() >= PENALTIES_MAX {
            let first = penalties
                .iter()
                .filter_map(|(peer, penalty)| Some((penalty.until?, *peer)))
                .min()
                .map(|(_, peer)| peer);
            if let Some(first) = first {
                penalties.remove(&first);
            }
        }
        penalties.insert(peer, penalty);
    }

    pub(super) fn unblock(&self, peer: NodeId) {
        lock(&self.penalties).remove(&peer);
    }

    pub(super) fn take_incidents(&self) -> Vec<Incident> {
        lock(&self.incidents).drain(..).collect()
    }
}
