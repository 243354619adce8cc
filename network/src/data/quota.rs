//! What one peer may cost: bytes per second, concurrent requests, memory. Nothing in libp2p or quinn
//! bounds these per peer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use manyhands_proto::NodeId;
use manyhands_proto::tree::CHUNK_BYTES;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::wire::Refusal;
use crate::bucket::{Rate, TokenBucket};

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
    /// Peers whose quota is remembered.
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

/// What is remembered of one peer.
#[derive(Debug)]
pub(super) struct Ledger {
    bucket: Mutex<TokenBucket>,
    requests: Arc<Semaphore>,
    last_used: Mutex<Instant>,
    /// One dial to a peer at a time: the second caller finds the first one's connection.
    pub(super) dialing: tokio::sync::Mutex<()>,
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
        let per_s = quotas.total_bytes_per_s;
        let rate = Rate { per_s, burst: (per_s / 4).max(CHUNK_BYTES) };
        let total = TokenBucket::new(rate, Instant::now());
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
        let burst = self.quotas.peer_burst_bytes.max(CHUNK_BYTES);
        let rate = Rate { per_s: self.quotas.peer_bytes_per_s, burst };
        let ledger = Arc::new(Ledger {
            bucket: Mutex::new(TokenBucket::new(rate, now)),
            requests: Arc::new(Semaphore::new(self.quotas.peer_requests.max(1))),
            last_used: Mutex::new(now),
            dialing: tokio::sync::Mutex::default(),
        });
        peers.insert(peer, ledger.clone());
        ledger
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

    /// As [`Self::chunk_memory`], for an answer that has begun and can no longer be refused.
    pub(super) async fn wait_for_chunk_memory(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        // Never closed.
        self.memory.clone().acquire_owned().await.map_err(|_| Refusal::Storage)
    }

    /// Waits until `bytes` may be sent to the peer, or refuses if that would take too long.
    pub(super) async fn spend(&self, ledger: &Ledger, bytes: u64) -> Result<(), Refusal> {
        let wait = self
            .reserve(ledger, bytes)
            .map_err(|wait| Refusal::Busy { retry_after: wait.max(Duration::from_millis(1)) })?;
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    /// As [`Self::spend`], for an answer that has begun and can no longer be refused: what it waits
    /// is bounded by the request's own deadline.
    pub(super) async fn wait_and_spend(&self, ledger: &Ledger, bytes: u64) {
        loop {
            match self.reserve(ledger, bytes) {
                Ok(wait) => return tokio::time::sleep(wait).await,
                Err(wait) => tokio::time::sleep(wait).await,
            }
        }
    }

    /// Takes `bytes` and says how long to wait before sending them, or takes nothing and says when
    /// to try again.
    fn reserve(&self, ledger: &Ledger, bytes: u64) -> Result<Duration, Duration> {
        let now = Instant::now();
        let mut bucket = lock(&ledger.bucket);
        let own = bucket.take(bytes, self.quotas.patience, now)?;
        match lock(&self.total).take(bytes, self.quotas.patience, now) {
            Ok(all) => Ok(own.max(all)),
            Err(wait) => {
                bucket.give_back(bytes);
                Err(wait)
            }
        }
    }
}

/// When to ask again for a slot that another request holds: about one chunk's time.
const RETRY_SLOT: Duration = Duration::from_millis(100);

/// No code panics while it holds one of these locks, so a poisoned one is still consistent.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_small_burst_still_lets_a_chunk_through() {
        let quotas = Quotas { peer_bytes_per_s: 1, peer_burst_bytes: 1, ..Quotas::default() };
        let ledgers = Ledgers::new(quotas);
        let ledger = ledgers.of(NodeId::new([1; 32]));
        assert_eq!(ledgers.spend(&ledger, CHUNK_BYTES).await, Ok(()));
        let refused = ledgers.spend(&ledger, CHUNK_BYTES).await;
        assert!(matches!(refused, Err(Refusal::Busy { .. })), "{refused:?}");
    }

    #[test]
    fn forgotten_peers_are_the_ones_unused_for_longest() {
        let ledgers = Ledgers::new(Quotas { peers_remembered: 2, ..Quotas::default() });
        let held = ledgers.of(NodeId::new([1; 32]));
        let forgotten = Arc::downgrade(&ledgers.of(NodeId::new([2; 32])));
        let kept = Arc::downgrade(&ledgers.of(NodeId::new([3; 32])));
        assert!(forgotten.upgrade().is_none());
        assert!(kept.upgrade().is_some());
        assert!(Arc::ptr_eq(&held, &ledgers.of(NodeId::new([1; 32]))));
    }
}
