//! Transactions that wait for a block: a bounded set, ordered by what they require of each other
//! and by priority. No I/O, no clock: blocks are the time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sp_core::H256;
use sp_runtime::transaction_validity::ValidTransaction;
use tokio::sync::watch;

/// A tag as the runtime gives them: for an account's transaction, (account, nonce).
pub(crate) type Tag = Vec<u8>;

/// How many transactions may wait.
pub(crate) const TRANSACTIONS_MAX: usize = 4_096;
/// How many bytes of transactions may wait.
pub(crate) const BYTES_MAX: usize = 16 << 20;
/// A transaction that no block took for so long is dropped, whatever its own lifetime: it waits
/// for one that may never come, and keeps a place.
const WAIT_BLOCKS_MAX: u32 = 256;

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TransactionStatus {
    /// It waits for a transaction before it.
    Future,
    /// The next block may take it.
    Ready,
    /// A block holds it; blocks are final at once.
    Included(H256),
    /// Another transaction with the same nonce and a higher priority took its place.
    Usurped(H256),
    /// It became invalid before a block took it.
    Invalid,
    /// It waited too long.
    Dropped,
}

impl TransactionStatus {
    pub(crate) fn is_final(&self) -> bool {
        !matches!(self, Self::Future | Self::Ready)
    }
}

/// Why a valid transaction was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PoolRefusal {
    #[error("the transaction is in the pool already")]
    AlreadyKnown,
    #[error("a transaction of priority {held} waits in its place, and this one has {offered}")]
    PriorityTooLow { held: u64, offered: u64 },
    #[error("the pool is full: {transactions} transactions of {bytes} bytes wait")]
    Full { transactions: usize, bytes: usize },
}

/// A transaction that the runtime found valid.
pub(crate) struct Transaction {
    pub(crate) hash: H256,
    /// As `UncheckedExtrinsic` encodes, length prefix included.
    pub(crate) bytes: Vec<u8>,
    validity: ValidTransaction,
    arrival: u64,
    last_block: u32,
}

struct Entry {
    transaction: Arc<Transaction>,
    /// Tags that neither the chain nor this transaction provides yet.
    requires: BTreeSet<Tag>,
    status: watch::Sender<TransactionStatus>,
}

/// What a new block did to transactions of the pool.
#[derive(Default)]
pub(crate) struct BlockOutcome {
    pub(crate) included: Vec<H256>,
    pub(crate) invalid: Vec<H256>,
}

#[derive(Default)]
pub(crate) struct Pool {
    entries: BTreeMap<H256, Entry>,
    providers: BTreeMap<Tag, H256>,
    arrivals: u64,
    bytes: usize,
}

impl Pool {
    /// Takes a transaction that was found valid on the block `best`.
    pub(crate) fn insert(
        &mut self,
        hash: H256,
        bytes: Vec<u8>,
        validity: ValidTransaction,
        best: u32,
    ) -> Result<watch::Receiver<TransactionStatus>, PoolRefusal> {
        if self.entries.contains_key(&hash) {
            return Err(PoolRefusal::AlreadyKnown);
        }
        let rivals: BTreeSet<H256> =
            validity.provides.iter().filter_map(|tag| self.providers.get(tag)).copied().collect();
        let held = rivals.iter().map(|rival| self.priority(rival)).max();
        if let Some(held) = held
            && validity.priority <= held
        {
            return Err(PoolRefusal::PriorityTooLow { held, offered: validity.priority });
        }
        let over = self.entries.len() - rivals.len() >= TRANSACTIONS_MAX
            || self.bytes + bytes.len() > BYTES_MAX;
        if over {
            return Err(PoolRefusal::Full { transactions: self.entries.len(), bytes: self.bytes });
        }
        for rival in &rivals {
            self.remove(rival, TransactionStatus::Usurped(hash));
        }

        let lifetime = u32::try_from(validity.longevity).unwrap_or(u32::MAX).min(WAIT_BLOCKS_MAX);
        for tag in &validity.provides {
            self.providers.insert(tag.clone(), hash);
        }
        self.bytes += bytes.len();
        self.arrivals += 1;
        let (status, watcher) = watch::channel(TransactionStatus::Future);
        let requires = validity.requires.iter().cloned().collect();
        let transaction = Arc::new(Transaction {
            hash,
            bytes,
            validity,
            arrival: self.arrivals,
            last_block: best.saturating_add(lifetime),
        });
        self.entries.insert(hash, Entry { transaction, requires, status });
        self.announce_ready();
        Ok(watcher)
    }

    /// Transactions whose requirements are met, those of higher priority first, each after what
    /// it requires.
    pub(crate) fn ready(&self) -> Vec<Arc<Transaction>> {
        let mut provided = BTreeSet::<&Tag>::new();
        let mut waiting: Vec<&Entry> = self.entries.values().collect();
        waiting.sort_by_key(|entry| {
            (std::cmp::Reverse(entry.transaction.validity.priority), entry.transaction.arrival)
        });
        let mut ready = Vec::with_capacity(waiting.len());
        loop {
            let before = ready.len();
            waiting.retain(|entry| {
                if !entry.requires.iter().all(|tag| provided.contains(tag)) {
                    return true;
                }
                provided.extend(&entry.transaction.validity.provides);
                ready.push(entry.transaction.clone());
                false
            });
            if ready.len() == before {
                return ready;
            }
        }
    }

    /// Whether a waiting transaction provides this tag.
    pub(crate) fn provides(&self, tag: &Tag) -> bool {
        self.providers.contains_key(tag)
    }

    /// Every waiting transaction's bytes, in the order they came.
    pub(crate) fn pending(&self) -> Vec<Arc<Transaction>> {
        let mut pending: Vec<_> =
            self.entries.values().map(|entry| entry.transaction.clone()).collect();
        pending.sort_by_key(|transaction| transaction.arrival);
        pending
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Follows the chain to a new block.
    pub(crate) fn advance(&mut self, number: u32, block: H256, outcome: &BlockOutcome) {
        let mut provided = BTreeSet::new();
        for hash in &outcome.included {
            if let Some(transaction) = self.remove(hash, TransactionStatus::Included(block)) {
                provided.extend(transaction.validity.provides.iter().cloned());
            }
        }
        for hash in &outcome.invalid {
            self.remove(hash, TransactionStatus::Invalid);
        }
        for entry in self.entries.values_mut() {
            entry.requires.retain(|tag| !provided.contains(tag));
        }
        let expired: Vec<H256> = self
            .entries
            .values()
            .filter(|entry| entry.transaction.last_block <= number)
            .map(|entry| entry.transaction.hash)
            .collect();
        for hash in expired {
            self.remove(&hash, TransactionStatus::Dropped);
        }
        self.announce_ready();
    }

    fn priority(&self, hash: &H256) -> u64 {
        self.entries.get(hash).map_or(0, |entry| entry.transaction.validity.priority)
    }

    fn remove(&mut self, hash: &H256, status: TransactionStatus) -> Option<Arc<Transaction>> {
        let entry = self.entries.remove(hash)?;
        self.bytes -= entry.transaction.bytes.len();
        for tag in &entry.transaction.validity.provides {
            self.providers.remove(tag);
        }
        entry.status.send_replace(status);
        Some(entry.transaction)
    }

    fn announce_ready(&self) {
        for transaction in self.ready() {
            if let Some(entry) = self.entries.get(&transaction.hash) {
                entry.status.send_if_modified(|status| {
                    let changed = *status == TransactionStatus::Future;
                    *status = TransactionStatus::Ready;
                    changed
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nonce `nonce` of account `account`, as the runtime would tag it on a chain at nonce 0.
    fn validity(account: u8, nonce: u8, priority: u64) -> ValidTransaction {
        let requires = if nonce == 0 { Vec::new() } else { vec![vec![account, nonce - 1]] };
        ValidTransaction {
            priority,
            requires,
            provides: vec![vec![account, nonce]],
            longevity: u64::MAX,
            propagate: true,
        }
    }

    fn hash(account: u8, nonce: u8, priority: u64) -> H256 {
        H256::from_low_u64_be(u64::from(account) << 32 | u64::from(nonce) << 16 | priority)
    }

    fn put(
        pool: &mut Pool,
        account: u8,
        nonce: u8,
        priority: u64,
    ) -> Result<watch::Receiver<TransactionStatus>, PoolRefusal> {
        let bytes = vec![0; 100];
        pool.insert(hash(account, nonce, priority), bytes, validity(account, nonce, priority), 0)
    }

    fn order(pool: &Pool) -> Vec<H256> {
        pool.ready().iter().map(|transaction| transaction.hash).collect()
    }

    #[test]
    fn a_later_nonce_waits_for_the_earlier_and_both_keep_their_order() {
        let mut pool = Pool::default();
        let second = put(&mut pool, 1, 1, 9).expect("taken as a future transaction");
        assert_eq!(*second.borrow(), TransactionStatus::Future);
        assert!(order(&pool).is_empty());

        put(&mut pool, 2, 0, 5).expect("another account");
        put(&mut pool, 1, 0, 1).expect("the missing one");
        assert_eq!(*second.borrow(), TransactionStatus::Ready);
        assert_eq!(order(&pool), [hash(2, 0, 5), hash(1, 0, 1), hash(1, 1, 9)]);
    }

    #[test]
    fn a_requirement_met_by_a_block_is_met_for_good() {
        let mut pool = Pool::default();
        let first = put(&mut pool, 1, 0, 1).expect("taken");
        put(&mut pool, 1, 1, 1).expect("taken");
        let block = H256::repeat_byte(9);
        let outcome = BlockOutcome { included: vec![hash(1, 0, 1)], invalid: Vec::new() };
        pool.advance(1, block, &outcome);
        assert_eq!(*first.borrow(), TransactionStatus::Included(block));
        assert_eq!(order(&pool), [hash(1, 1, 1)]);
    }

    #[test]
    fn the_same_nonce_again_needs_a_higher_priority() {
        let mut pool = Pool::default();
        let cheap = put(&mut pool, 1, 0, 3).expect("taken");
        assert_eq!(put(&mut pool, 1, 0, 3).map(drop), Err(PoolRefusal::AlreadyKnown));
        let refusal = put(&mut pool, 1, 0, 2).map(drop);
        assert_eq!(refusal, Err(PoolRefusal::PriorityTooLow { held: 3, offered: 2 }));
        put(&mut pool, 1, 0, 4).expect("a better offer");
        assert_eq!(*cheap.borrow(), TransactionStatus::Usurped(hash(1, 0, 4)));
        assert_eq!((pool.len(), pool.bytes), (1, 100));
    }

    #[test]
    fn the_pool_has_an_end_and_nobody_waits_in_it_for_ever() {
        let mut pool = Pool::default();
        for place in 0..TRANSACTIONS_MAX {
            let [account, nonce] = u16::try_from(place).expect("fits").to_be_bytes();
            // All are futures but the nonces 0.
            put(&mut pool, account, nonce, 0).expect("there is room");
        }
        let refusal = put(&mut pool, 200, 0, 0).map(drop);
        assert!(matches!(refusal, Err(PoolRefusal::Full { .. })), "{refusal:?}");
        pool.advance(WAIT_BLOCKS_MAX, H256::zero(), &BlockOutcome::default());
        assert_eq!((pool.len(), pool.bytes), (0, 0));
    }
}
