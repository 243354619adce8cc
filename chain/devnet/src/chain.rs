//! The chain: genesis, the head, the pool, and what may be asked of any block.

use std::path::Path;
use std::sync::Arc;

use codec::{Decode, DecodeLimit, Encode};
use manyhands_chain_runtime::UncheckedExtrinsic;
use parking_lot::Mutex;
use sp_core::H256;
use sp_runtime::traits::{Hash as _, Header as _};
use sp_runtime::transaction_validity::{
    TransactionSource, TransactionValidity, TransactionValidityError,
};
use sp_state_machine::Storage;
use tokio::sync::{Notify, watch};

use crate::execution::{CallError, Execution, Hashing, Header, STATE_VERSION, State, state_at};
use crate::metrics;
use crate::pool::{BlockOutcome, Pool, PoolRefusal, TransactionStatus};
use crate::store::{NewBlock, Store, StoreError};

/// Bytes of one transaction: the largest call is a batch of claims with their proofs.
pub(crate) const EXTRINSIC_BYTES_MAX: usize = 1 << 20;
/// Calls within calls (batches) of one transaction; deeper ones would exhaust the stack.
const EXTRINSIC_DEPTH_MAX: u32 = 256;
/// The preset of `GenesisBuilder` that this chain starts from.
const GENESIS_PRESET: &str = "development";

/// Why a chain could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenChainError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the runtime has no genesis: {0}")]
    Genesis(String),
    #[error("the folder holds the chain with genesis {found:#x}, expected {expected:#x}")]
    OtherGenesis { expected: H256, found: H256 },
}

/// Why a question about a block has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueryError {
    #[error("no block {0:#x} on this chain")]
    UnknownBlock(H256),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the state cannot be read: {0}")]
    State(String),
}

/// Why a transaction was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SubmitError {
    #[error("expected a transaction of at most {EXTRINSIC_BYTES_MAX} bytes, got {0}")]
    TooLong(usize),
    #[error("the bytes are no transaction of this runtime")]
    Undecodable,
    #[error("the transaction is invalid: {0:?}")]
    Invalid(TransactionValidityError),
    #[error(transparent)]
    Refused(#[from] PoolRefusal),
    #[error(transparent)]
    Query(#[from] QueryError),
}

/// The newest block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) number: u32,
    pub(crate) hash: H256,
    pub(crate) state_root: H256,
}

impl Head {
    pub(crate) fn of(header: &Header) -> Self {
        Self { number: header.number, hash: header.hash(), state_root: header.state_root }
    }
}

pub(crate) struct Chain {
    store: Store,
    genesis_hash: H256,
    /// Changes only while `pool` is locked, so that whoever holds the pool sees the two agree.
    head: watch::Sender<Head>,
    pool: Mutex<Pool>,
    /// Wakes the sealer when a transaction is ready.
    pub(crate) transaction_ready: Notify,
}

impl Chain {
    /// Opens the database file at `path`, or makes it with the runtime's genesis.
    pub(crate) fn open(path: &Path) -> Result<Self, OpenChainError> {
        let store = Store::open(path)?;
        let (genesis, change) = build_genesis(&store)?;
        let genesis_hash = genesis.hash();
        match store.header(0)? {
            Some(found) if found.hash() != genesis_hash => {
                return Err(OpenChainError::OtherGenesis {
                    expected: genesis_hash,
                    found: found.hash(),
                });
            }
            Some(_) => {}
            None => store.append(&NewBlock {
                header: &genesis,
                hash: genesis_hash,
                extrinsics: &[],
                nodes: &change.nodes,
            })?,
        }
        let head = Head::of(&store.head()?.unwrap_or(genesis));
        Ok(Self {
            store,
            genesis_hash,
            head: watch::Sender::new(head),
            pool: Mutex::new(Pool::default()),
            transaction_ready: Notify::new(),
        })
    }

    pub(crate) fn close(&self) {
        self.store.close();
    }

    pub(crate) fn genesis_hash(&self) -> H256 {
        self.genesis_hash
    }

    pub(crate) fn head(&self) -> Head {
        *self.head.borrow()
    }

    /// Follows the head. Blocks in between may be missed: read them by number.
    pub(crate) fn watch_head(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }

    pub(crate) fn header_at(&self, number: u32) -> Result<Option<Header>, StoreError> {
        self.store.header(number)
    }

    /// The header with this hash; the head's if none is given.
    pub(crate) fn header(&self, hash: Option<H256>) -> Result<Header, QueryError> {
        let hash = hash.unwrap_or_else(|| self.head().hash);
        let number = self.store.number(&hash)?.ok_or(QueryError::UnknownBlock(hash))?;
        self.store.header(number)?.ok_or(QueryError::UnknownBlock(hash))
    }

    pub(crate) fn body(&self, number: u32) -> Result<Option<Vec<Vec<u8>>>, StoreError> {
        self.store.body(number)
    }

    /// The state after the block with this hash; after the head if none is given.
    pub(crate) fn state(&self, hash: Option<H256>) -> Result<State, QueryError> {
        let root = self.header(hash)?.state_root;
        Ok(self.state_under(root)?)
    }

    pub(crate) fn state_under(&self, root: H256) -> Result<State, StoreError> {
        let nodes: Arc<dyn Storage<Hashing>> = Arc::new(self.store.nodes()?);
        Ok(state_at(nodes, root))
    }

    /// Calls the runtime on a block's state; what the call writes is forgotten.
    pub(crate) fn call(
        &self,
        method: &str,
        arguments: &[u8],
        hash: Option<H256>,
    ) -> Result<Vec<u8>, QueryError> {
        let state = self.state(hash)?;
        Ok(Execution::new(&state).call(method, arguments)?)
    }

    /// [`Self::call`] with the arguments encoded and the result decoded.
    pub(crate) fn typed_call<T: Decode>(
        &self,
        method: &str,
        arguments: &impl Encode,
        hash: Option<H256>,
    ) -> Result<T, QueryError> {
        let state = self.state(hash)?;
        Ok(Execution::new(&state).typed(method, arguments)?)
    }

    /// Checks the transaction on the newest state and puts it into the pool.
    pub(crate) fn submit(
        &self,
        bytes: Vec<u8>,
    ) -> Result<(H256, watch::Receiver<TransactionStatus>), SubmitError> {
        let result = self.try_submit(bytes);
        metrics::transaction_submitted(result.is_ok());
        result
    }

    fn try_submit(
        &self,
        bytes: Vec<u8>,
    ) -> Result<(H256, watch::Receiver<TransactionStatus>), SubmitError> {
        if bytes.len() > EXTRINSIC_BYTES_MAX {
            return Err(SubmitError::TooLong(bytes.len()));
        }
        UncheckedExtrinsic::decode_all_with_depth_limit(EXTRINSIC_DEPTH_MAX, &mut bytes.as_slice())
            .map_err(|_| SubmitError::Undecodable)?;
        let hash = Hashing::hash(&bytes);
        loop {
            let head = self.head();
            let state = self.state_under(head.state_root).map_err(QueryError::from)?;
            let mut arguments = TransactionSource::External.encode();
            arguments.extend_from_slice(&bytes);
            head.hash.encode_to(&mut arguments);
            let validity: TransactionValidity = Execution::new(&state)
                .attempt("TaggedTransactionQueue_validate_transaction", &arguments, |_| false)
                .map_err(QueryError::from)?;
            let validity = validity.map_err(SubmitError::Invalid)?;

            let mut pool = self.pool.lock();
            if self.head() != head {
                // A block came between the check and the lock: what it required may be gone.
                continue;
            }
            let watcher = pool.insert(hash, bytes, validity, head.number)?;
            metrics::pool_size(pool.len());
            drop(pool);
            if *watcher.borrow() == TransactionStatus::Ready {
                self.transaction_ready.notify_one();
            }
            return Ok((hash, watcher));
        }
    }

    /// What the pool would put into the next block.
    pub(crate) fn ready(&self) -> Vec<Arc<crate::pool::Transaction>> {
        self.pool.lock().ready()
    }

    /// Everything that waits, in the order it came.
    pub(crate) fn pending(&self) -> Vec<Arc<crate::pool::Transaction>> {
        self.pool.lock().pending()
    }

    /// The nonce for an account's next transaction: what the chain has, and what waits.
    pub(crate) fn next_nonce(&self, account: &[u8; 32]) -> Result<u32, QueryError> {
        let mut nonce: u32 = self.typed_call("AccountNonceApi_account_nonce", account, None)?;
        let pool = self.pool.lock();
        // As `frame_system::CheckNonce` tags its transactions.
        while pool.provides(&(account, nonce).encode()) {
            nonce += 1;
        }
        Ok(nonce)
    }

    /// Writes a sealed block, moves the head to it and settles the pool.
    pub(crate) fn append(
        &self,
        block: &NewBlock<'_>,
        outcome: &BlockOutcome,
    ) -> Result<(), StoreError> {
        self.store.append(block)?;
        let mut pool = self.pool.lock();
        self.head.send_replace(Head::of(block.header));
        pool.advance(block.header.number, block.hash, outcome);
        metrics::pool_size(pool.len());
        metrics::block_sealed(block.header.number, outcome.included.len());
        Ok(())
    }

    /// Throws transactions out that no block can hold.
    pub(crate) fn discard(&self, transactions: Vec<H256>) {
        let head = self.head();
        let outcome = BlockOutcome { included: Vec::new(), invalid: transactions };
        let mut pool = self.pool.lock();
        pool.advance(head.number, head.hash, &outcome);
        metrics::pool_size(pool.len());
    }
}

/// The genesis header and state, computed anew: from nothing but the runtime.
fn build_genesis(store: &Store) -> Result<(Header, crate::execution::StateChange), OpenChainError> {
    let reason = |error: CallError| OpenChainError::Genesis(error.to_string());
    let nodes: Arc<dyn Storage<Hashing>> = Arc::new(store.nodes()?);
    let state = state_at(nodes, sp_trie::empty_trie_root::<sp_trie::LayoutV1<Hashing>>());
    let mut execution = Execution::new(&state);
    let mut preset = |id: Option<&str>| -> Result<serde_json::Value, OpenChainError> {
        let preset: Option<Vec<u8>> =
            execution.typed("GenesisBuilder_get_preset", &id).map_err(reason)?;
        let preset =
            preset.ok_or_else(|| OpenChainError::Genesis(format!("it knows no preset {id:?}")))?;
        serde_json::from_slice(&preset)
            .map_err(|error| OpenChainError::Genesis(format!("preset {id:?} is not JSON: {error}")))
    };
    // A named preset says only what differs from the runtime's own default.
    let mut config = preset(None)?;
    apply_patch(&mut config, preset(Some(GENESIS_PRESET))?);
    let preset = config.to_string().into_bytes();
    let built: Result<(), String> =
        execution.typed("GenesisBuilder_build_state", &preset).map_err(reason)?;
    built.map_err(OpenChainError::Genesis)?;
    let change = execution.finish();
    let no_extrinsics = Hashing::ordered_trie_root(Vec::new(), STATE_VERSION);
    let header =
        Header::new(0, no_extrinsics, change.root, H256::zero(), sp_runtime::Digest::default());
    Ok((header, change))
}

/// Replaces in `config` what `patch` names (JSON merge patch, RFC 7396, without deletion).
fn apply_patch(config: &mut serde_json::Value, patch: serde_json::Value) {
    match (config, patch) {
        (serde_json::Value::Object(config), serde_json::Value::Object(patch)) => {
            for (key, value) in patch {
                apply_patch(config.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        (config, patch) => *config = patch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_another_genesis_is_refused_and_left_as_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("chain.redb");
        let foreign = Header::new(
            0,
            H256::zero(),
            H256::repeat_byte(1),
            H256::zero(),
            sp_runtime::Digest::default(),
        );
        let store = Store::open(&path).expect("a new database");
        let block =
            NewBlock { header: &foreign, hash: foreign.hash(), extrinsics: &[], nodes: &[] };
        store.append(&block).expect("written");
        store.close();

        let refusal = Chain::open(&path).err().expect("refused");
        let OpenChainError::OtherGenesis { found, .. } = refusal else {
            panic!("expected another genesis, got {refusal}");
        };
        assert_eq!(found, foreign.hash());
        let store = Store::open(&path).expect("the database");
        assert_eq!(store.head().expect("readable"), Some(foreign));
    }
}
