//! What one peer may cost: bytes per second, concurrent requests, memory. Nothing in libp2p or quinn
//! bounds these per peer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use manyhands_proto::NodeId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::wire::Refusal;

/// Limits on what is served. All are per process of this endpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Quotas {
    /// Blob bytes a peer is sent per second, in the long run.
    pub peer_bytes_per_s: u64,
    /// What a peer may take at once after a pause. At least one chunk (1 MiB), or it could not be
    /// served at all; smaller values are raised to it.
    pub peer_burst_bytes: u64,
    /// Blob bytes all peers together are sent per second: the upload budget.
    pub total_bytes_per_s: u64,
    /// How long a request may wait for bytes before it is refused as `Busy`.
    pub patience: Duration,
    /// Requests of one peer that are served at the same time; further ones are refused as `Busy`.
    pub peer_requests: usize,
    /// Chunks in memory for all peers together, in MiB.
    pub memory_mib: usize,
    /// Peers whose quota and byte counts are remembered.
    pub peers_remembered: usize,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            peer_bytes_per_s: 64 << 20,
            // One full window of chunks.
            peer_burst_bytes: 32 << 20,
            total_bytes_per_s: 1 << 30,
            patience: Duration::from_secs(2),
            // Twice the 16 chunks that a fetch keeps in flight.
            peer_requests: 32,
            memory_mib: 256,
            peers_remembered: 4096,
        }
    }
}

/// Bytes moved between this node and one peer, over all connections since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerTraffic {
    pub sent_bytes: u64,
    pub received_bytes: u64,
}

/// Refills at a steady rate up to a burst; a taker may run it into debt and waits the debt out.
#[derive(Debug)]
struct TokenBucket {
    bytes_per_s: f64,
    burst_bytes: f64,
    available: f64,
    refilled: Instant,
}

impl TokenBucket {
    fn new(bytes_per_s: u64, burst_bytes: u64, now: Instant) -> Self {
        let bytes_per_s = bytes_per_s.max(1) as f64;
        let burst_bytes = burst_bytes.max(manyhands_proto::tree::CHUNK_BYTES) as f64;
        Self { bytes_per_s, burst_bytes, available: burst_bytes, refilled: now }
    }

    /// How long to wait before sending `bytes`, which are taken; or, if that is longer than
    /// `patience`, takes nothing and says when to come back.
    fn take(&mut self, bytes: u64, patience: Duration, now: Instant) -> Result<Duration, Duration> {
        let refill = now.duration_since(self.refilled).as_secs_f64() * self.bytes_per_s;
        self.available = (self.available + refill).min(self.burst_bytes);
        self.refilled = now;
        let left = self.available - bytes as f64;
        let wait = Duration::from_secs_f64((-left / self.bytes_per_s).max(0.0));
        if wait > patience {
            return Err(wait - patience);
        }
        self.available = left;
        Ok(wait)
    }

    fn give_back(&mut self, bytes: u64) {
        self.available = (self.available + bytes as f64).min(self.burst_bytes);
    }
}

/// What is remembered of one peer.
#[derive(Debug)]
pub(super) struct Ledger {
    bucket: Mutex<TokenBucket>,
    requests: Arc<Semaphore>,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    last_used: Mutex<Instant>,
    /// One dial to a peer at a time: the second caller finds the first one's connection.
    pub(super) dialing: tokio::sync::Mutex<()>,
}

impl Ledger {
    pub(super) fn count_sent(&self, bytes: u64) {
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        metrics::counter!(crate::metrics::DATA_BYTES_SENT).increment(bytes);
    }

    pub(super) fn count_received(&self, bytes: u64) {
        self.received_bytes.fetch_add(bytes, Ordering::Relaxed);
        metrics::counter!(crate::metrics::DATA_BYTES_RECEIVED).increment(bytes);
    }

    fn traffic(&self) -> PeerTraffic {
        PeerTraffic {
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
        }
    }
}

/// Held while a request is served.
#[derive(Debug)]
pub(super) struct RequestPermit {
    _request: OwnedSemaphorePermit,
}

/// Every peer's ledger, and the budgets that all share.
#[derive(Debug)]
pub(super) struct Ledgers {
    quotas: Quotas,
    peers: Mutex<HashMap<NodeId, Arc<Ledger>>>,
    total: Mutex<TokenBucket>,
    memory: Arc<Semaphore>,
}

impl Ledgers {
    pub(super) fn new(quotas: Quotas) -> Self {
        let burst = quotas.total_bytes_per_s / 4;
        let total = TokenBucket::new(quotas.total_bytes_per_s, burst, Instant::now());
        let memory = Arc::new(Semaphore::new(quotas.memory_mib.max(1)));
        Self { quotas, peers: Mutex::default(), total: Mutex::new(total), memory }
    }

    /// The ledger of `peer`, made if there is none. When too many are remembered, the one unused
    /// for longest goes.
    pub(super) fn of(&self, peer: NodeId) -> Arc<Ledger> {
        let now = Instant::now();
        let mut peers = lock(&self.peers);
        if let Some(ledger) = peers.get(&peer) {
            *lock(&ledger.last_used) = now;
            return ledger.clone();
        }
        if peers.len() >= self.quotas.peers_remembered {
            let unused = peers
                .iter()
                .filter(|(_, ledger)| Arc::strong_count(ledger) == 1)
                .min_by_key(|(_, ledger)| *lock(&ledger.last_used))
                .map(|(peer, _)| *peer);
            if let Some(unused) = unused {
                peers.remove(&unused);
            }
        }
        let bucket =
            TokenBucket::new(self.quotas.peer_bytes_per_s, self.quotas.peer_burst_bytes, now);
        let ledger = Arc::new(Ledger {
            bucket: Mutex::new(bucket),
            requests: Arc::new(Semaphore::new(self.quotas.peer_requests.max(1))),
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            last_used: Mutex::new(now),
            dialing: tokio::sync::Mutex::default(),
        });
        peers.insert(peer, ledger.clone());
        ledger
    }

    pub(super) fn traffic(&self) -> Vec<(NodeId, PeerTraffic)> {
        let mut traffic: Vec<_> =
            lock(&self.peers).iter().map(|(peer, ledger)| (*peer, ledger.traffic())).collect();
        traffic.sort_by_key(|(peer, _)| *peer);
        traffic
    }

    /// Admits a request of the peer with this ledger.
    pub(super) fn admit(&self, ledger: &Ledger) -> Result<RequestPermit, Refusal> {
        let busy = Refusal::Busy { retry_after: RETRY_SLOT };
        let request = ledger.requests.clone().try_acquire_owned().map_err(|_| busy)?;
        Ok(RequestPermit { _request: request })
    }

    /// Room for one chunk (1 MiB) in memory, until the permit is dropped.
    pub(super) fn chunk_memory(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        let busy = Refusal::Busy { retry_after: RETRY_SLOT };
        self.memory.clone().try_acquire_owned().map_err(|_| busy)
    }

    /// Waits until `bytes` may be sent to the peer, or refuses if that would take too long.
    pub(super) async fn spend(&self, ledger: &Ledger, bytes: u64) -> Result<(), Refusal> {
        let wait = {
            let now = Instant::now();
            let mut bucket = lock(&ledger.bucket);
            let own = bucket.take(bytes, self.quotas.patience, now).map_err(busy)?;
            match lock(&self.total).take(bytes, self.quotas.patience, now) {
                Ok(all) => own.max(all),
                Err(wait) => {
                    bucket.give_back(bytes);
                    return Err(busy(wait));
                }
            }
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }
}

/// When to ask again for a slot that another request holds: about one chunk's time.
const RETRY_SLOT: Duration = Duration::from_millis(100);

fn busy(wait: Duration) -> Refusal {
    Refusal::Busy { retry_after: wait.max(Duration::from_millis(1)) }
}

/// No code panics while it holds one of these locks, so a poisoned one is still consistent.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_bucket_gives_its_burst_then_its_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(MIB, 2 * MIB, start);
        let patience = Duration::from_millis(600);
        assert_eq!(bucket.take(2 * MIB, patience, start), Ok(Duration::ZERO));
        let half = Duration::from_millis(500);
        assert_eq!(bucket.take(MIB / 2, patience, start), Ok(half));
        assert_eq!(bucket.take(MIB / 2, patience, start), Err(Duration::from_millis(400)));
        let later = start + Duration::from_secs(1);
        assert_eq!(bucket.take(MIB / 2, patience, later), Ok(Duration::ZERO));
        let much_later = start + Duration::from_secs(100);
        assert_eq!(bucket.take(2 * MIB, patience, much_later), Ok(Duration::ZERO));
        assert!(bucket.take(2 * MIB, patience, much_later).is_err());
    }

    #[test]
    fn a_small_burst_still_lets_a_chunk_through() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(1, 1, start);
        assert_eq!(bucket.take(MIB, Duration::ZERO, start), Ok(Duration::ZERO));
    }

    #[test]
    fn forgotten_peers_are_the_ones_unused_for_longest() {
        let ledgers = Ledgers::new(Quotas { peers_remembered: 2, ..Quotas::default() });
        let held = ledgers.of(NodeId::new([1; 32]));
        ledgers.of(NodeId::new([2; 32])).count_sent(10);
        ledgers.of(NodeId::new([3; 32]));
        held.count_received(7);
        let traffic = ledgers.traffic();
        assert_eq!(traffic.len(), 2);
        assert_eq!(traffic[0].1, PeerTraffic { sent_bytes: 0, received_bytes: 7 });
        assert_eq!(traffic[1].0, NodeId::new([3; 32]));
    }
}
