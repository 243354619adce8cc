//! Which connections are up, and who is not welcome.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::time::Duration;

use manyhands_proto::NodeId;
use quinn::Connection;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::DataLimits;
use super::quota::lock;
use crate::metrics::{DATA_CONNECTIONS, DATA_PEERS_DROPPED};
use crate::origin::Origin;

/// Peers under a penalty that are remembered: beyond it the penalty that ends first is forgotten.
const PENALTIES_MAX: usize = 4096;
/// How long a peer that was asked something is wanted: a member is asked every round, and a round has
/// quiet minutes.
const WANTED_FOR: Duration = Duration::from_secs(600);

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

/// A peer that is refused for a while.
#[derive(Debug, Clone)]
struct Penalty {
    until: Instant,
    reason: String,
}

/// Which side opened a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opener {
    We,
    Peer,
}

/// A connection that is up, or was a moment ago.
#[derive(Debug)]
struct Link {
    connection: Connection,
    opener: Opener,
    /// When the peer last asked for something.
    heard: Instant,
    /// When this node last had a use for the peer.
    wanted: Option<Instant>,
}

impl Link {
    fn is_up(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    /// Whether it may be closed to make room for a peer that is wanted.
    fn is_dispensable(&self, now: Instant) -> bool {
        let wanted = self.wanted.is_some_and(|at| now.duration_since(at) < WANTED_FOR);
        self.opener == Opener::Peer && !wanted
    }
}

type Links = HashMap<NodeId, Vec<Link>>;

#[derive(Debug)]
pub(super) struct Peers {
    limits: DataLimits,
    links: Mutex<Links>,
    penalties: Mutex<HashMap<NodeId, Penalty>>,
    /// Told of every new connection.
    pub(super) arrived: Notify,
}

impl Peers {
    pub(super) fn new(limits: DataLimits) -> Self {
        Self {
            limits,
            links: Mutex::default(),
            penalties: Mutex::default(),
            arrived: Notify::new(),
        }
    }

    /// The connection to `peer` that was opened, or asked over, last, to ask it something: from now on it is
    /// wanted. One to a process that was killed looks up for a while, and the new process has opened another.
    pub(super) fn connection(&self, peer: NodeId) -> Option<Connection> {
        let mut links = lock(&self.links);
        let up = links.get_mut(&peer)?.iter_mut().filter(|link| link.is_up());
        let link = up.max_by_key(|link| link.heard)?;
        link.wanted = Some(Instant::now());
        Some(link.connection.clone())
    }

    /// Notes that the peer asked for something over this connection.
    pub(super) fn heard(&self, peer: NodeId, connection: &Connection) {
        let mut links = lock(&self.links);
        let own = links.get_mut(&peer).into_iter().flatten();
        for link in own.filter(|link| link.connection.stable_id() == connection.stable_id()) {
            link.heard = Instant::now();
        }
    }

    /// Whether one more dial fits, perhaps in the place of a connection that nobody wants.
    pub(super) fn room(&self) -> Result<(), ConnectError> {
        let links = lock(&self.links);
        let limit = self.limits.connections;
        let fits = count(&links) < limit || idle_longest(&links, Instant::now()).is_some();
        if fits { Ok(()) } else { Err(ConnectError::TooMany { limit }) }
    }

    /// Whether one more connection from this address is refused.
    pub(super) fn is_crowded(&self, address: IpAddr) -> bool {
        count_from(&lock(&self.links), address) >= self.limits.connections_per_ip
    }

    /// Registers a connection whose peer is proven; closes it and says why if it may not stay.
    pub(super) fn register(
        &self,
        peer: NodeId,
        connection: &Connection,
        opener: Opener,
    ) -> Result<(), ConnectError> {
        let refused = self.check_welcome(peer).and_then(|()| self.admit(peer, connection, opener));
        match &refused {
            Ok(()) => self.arrived.notify_waiters(),
            Err(error) => connection.close(CLOSE_REFUSED.into(), error.to_string().as_bytes()),
        }
        refused
    }

    fn admit(
        &self,
        peer: NodeId,
        connection: &Connection,
        opener: Opener,
    ) -> Result<(), ConnectError> {
        let mut links = lock(&self.links);
        let limit = self.limits.connections_per_peer;
        let own = links.get(&peer).into_iter().flatten();
        if own.filter(|link| link.is_up()).count() >= limit {
            return Err(ConnectError::TooMany { limit });
        }
        let limit = self.limits.connections_per_ip;
        let address = connection.remote_address().ip();
        // Asked again: many handshakes from one place may have been under way.
        if opener == Opener::Peer && count_from(&links, address) >= limit {
            return Err(ConnectError::TooMany { limit });
        }
        let (limit, now) = (self.limits.connections, Instant::now());
        if count(&links) >= limit && (opener == Opener::Peer || !evict(&mut links, now)) {
            return Err(ConnectError::TooMany { limit });
        }
        let link = Link { connection: connection.clone(), opener, heard: now, wanted: None };
        links.entry(peer).or_default().push(link);
        metrics::gauge!(DATA_CONNECTIONS).increment(1.0);
        Ok(())
    }

    pub(super) fn unregister(&self, peer: NodeId, connection: &Connection) {
        remove(&mut lock(&self.links), peer, connection.stable_id());
    }

    pub(super) fn check_welcome(&self, peer: NodeId) -> Result<(), ConnectError> {
        let mut penalties = lock(&self.penalties);
        let Some(penalty) = penalties.get(&peer) else { return Ok(()) };
        if penalty.until <= Instant::now() {
            penalties.remove(&peer);
            return Ok(());
        }
        Err(ConnectError::Blocked { peer, reason: penalty.reason.clone() })
    }

    /// Closes the connections of a peer that sent a malformed request, and refuses new ones for a
    /// while.
    pub(super) fn drop_peer(&self, peer: NodeId, reason: String) {
        tracing::warn!(%peer, reason, "dropped a peer");
        metrics::counter!(DATA_PEERS_DROPPED, "reason" => "malformed").increment(1);
        for link in lock(&self.links).get(&peer).into_iter().flatten() {
            link.connection.close(CLOSE_MISBEHAVED.into(), reason.as_bytes());
        }
        let until = Instant::now() + self.limits.penalty;
        let mut penalties = lock(&self.penalties);
        if penalties.len() >= PENALTIES_MAX {
            let first = penalties.iter().map(|(peer, penalty)| (penalty.until, *peer)).min();
            if let Some((_, first)) = first {
                penalties.remove(&first);
            }
        }
        penalties.insert(peer, Penalty { until, reason });
    }
}

fn count(links: &Links) -> usize {
    links.values().map(Vec::len).sum()
}

fn count_from(links: &Links, address: IpAddr) -> usize {
    let origin = Origin::of(address);
    let from = |link: &&Link| Origin::of(link.connection.remote_address().ip()) == origin;
    links.values().flatten().filter(from).count()
}

/// Of the connections that can be dispensed with, the one that was silent longest.
fn idle_longest(links: &Links, now: Instant) -> Option<(NodeId, usize)> {
    links
        .iter()
        .flat_map(|(peer, own)| own.iter().map(|link| (*peer, link)))
        .filter(|(_, link)| link.is_dispensable(now))
        .min_by_key(|(peer, link)| (link.heard, *peer))
        .map(|(peer, link)| (peer, link.connection.stable_id()))
}

/// Makes room for a peer that this node dialled: strangers must not keep it from those it needs.
fn evict(links: &mut Links, now: Instant) -> bool {
    let Some((peer, stable_id)) = idle_longest(links, now) else { return false };
    tracing::debug!(%peer, "closed the connection that was idle longest");
    for link in remove(links, peer, stable_id) {
        link.connection.close(CLOSE_REFUSED.into(), b"idle longest, and its place was needed");
    }
    true
}

fn remove(links: &mut Links, peer: NodeId, stable_id: usize) -> Vec<Link> {
    let Some(own) = links.get_mut(&peer) else { return Vec::new() };
    let gone: Vec<Link> =
        own.extract_if(.., |link| link.connection.stable_id() == stable_id).collect();
    metrics::gauge!(DATA_CONNECTIONS).decrement(gone.len() as f64);
    if own.is_empty() {
        links.remove(&peer);
    }
    gone
}
