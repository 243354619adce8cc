//! What is on disk: blocks, and the nodes of every state trie there ever was.
//!
//! Nodes are keyed by their hash and only ever added, so the state under any old root stays
//! readable and provable. A block is one database transaction: after a kill at any moment the
//! file holds the last whole block.

use std::io;
use std::path::Path;

use codec::{Decode, Encode};
use hash_db::Prefix;
use redb::{Database, ReadOnlyTable, ReadTransaction, ReadableDatabase, TableDefinition};
use sp_core::H256;
use sp_state_machine::{DBValue, Storage};

use crate::execution::{Hashing, Header, TrieNode};

/// Trie node by its hash.
const NODES: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("nodes");
/// SCALE of the header by block number.
const HEADERS: TableDefinition<u32, &[u8]> = TableDefinition::new("headers");
/// SCALE of `Vec<Vec<u8>>`, the encoded extrinsics, by block number.
const BODIES: TableDefinition<u32, &[u8]> = TableDefinition::new("bodies");
/// Block number by the header's hash.
const NUMBERS: TableDefinition<&[u8; 32], u32> = TableDefinition::new("numbers");

/// Why the database did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the disk is full")]
    DiskFull,
    #[error("another process has the database open")]
    InUse,
    #[error("the database was closed")]
    Closed,
    #[error("the database holds {what} that does not decode")]
    Undecodable { what: &'static str },
    #[error("the database failed: {0}")]
    Database(#[source] Box<redb::Error>),
}

impl StoreError {
    fn new(error: impl Into<redb::Error>) -> Self {
        let error = error.into();
        if let redb::Error::Io(io_error) = &error
            && is_disk_full(io_error)
        {
            return Self::DiskFull;
        }
        if matches!(error, redb::Error::DatabaseAlreadyOpen) {
            return Self::InUse;
        }
        Self::Database(Box::new(error))
    }
}

/// Whether an operation failed for want of space.
pub(crate) fn is_disk_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// A block and the state nodes that it added.
pub(crate) struct NewBlock<'a> {
    pub(crate) header: &'a Header,
    pub(crate) hash: H256,
    /// Each as `UncheckedExtrinsic` encodes, length prefix included.
    pub(crate) extrinsics: &'a [Vec<u8>],
    pub(crate) nodes: &'a [TrieNode],
}

/// The database, until it is closed.
pub(crate) struct Store {
    database: parking_lot::RwLock<Option<Database>>,
}

impl Store {
    /// Opens the database file, or makes it.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        Self::over(Database::create(path).map_err(StoreError::new)?)
    }

    fn over(database: Database) -> Result<Self, StoreError> {
        // Readers may come before the first block: every table has to be there.
        let transaction = database.begin_write().map_err(StoreError::new)?;
        transaction.open_table(NODES).map_err(StoreError::new)?;
        transaction.open_table(HEADERS).map_err(StoreError::new)?;
        transaction.open_table(BODIES).map_err(StoreError::new)?;
        transaction.open_table(NUMBERS).map_err(StoreError::new)?;
        transaction.commit().map_err(StoreError::new)?;
        Ok(Self { database: parking_lot::RwLock::new(Some(database)) })
    }

    /// Releases the file. Whoever reads later gets [`StoreError::Closed`].
    pub(crate) fn close(&self) {
        drop(self.database.write().take());
    }

    /// Writes the block, its hash and its nodes, all or nothing, and waits for the disk.
    pub(crate) fn append(&self, block: &NewBlock<'_>) -> Result<(), StoreError> {
        let guard = self.database.read();
        let database = guard.as_ref().ok_or(StoreError::Closed)?;
        let number = block.header.number;
        let transaction = database.begin_write().map_err(StoreError::new)?;
        {
            let mut nodes = transaction.open_table(NODES).map_err(StoreError::new)?;
            for node in block.nodes {
                nodes
                    .insert(node.hash.as_fixed_bytes(), node.bytes.as_slice())
                    .map_err(StoreError::new)?;
            }
            let mut headers = transaction.open_table(HEADERS).map_err(StoreError::new)?;
            headers.insert(number, block.header.encode().as_slice()).map_err(StoreError::new)?;
            let mut bodies = transaction.open_table(BODIES).map_err(StoreError::new)?;
            bodies.insert(number, block.extrinsics.encode().as_slice()).map_err(StoreError::new)?;
            let mut numbers = transaction.open_table(NUMBERS).map_err(StoreError::new)?;
            numbers.insert(block.hash.as_fixed_bytes(), number).map_err(StoreError::new)?;
        }
        transaction.commit().map_err(StoreError::new)
    }

    /// The newest block's header; nothing before genesis.
    pub(crate) fn head(&self) -> Result<Option<Header>, StoreError> {
        let headers = self.read()?.open_table(HEADERS).map_err(StoreError::new)?;
        let newest = headers.range::<u32>(..).map_err(StoreError::new)?.next_back();
        let Some(entry) = newest else { return Ok(None) };
        let (_, header) = entry.map_err(StoreError::new)?;
        decode("a header", header.value()).map(Some)
    }

    pub(crate) fn header(&self, number: u32) -> Result<Option<Header>, StoreError> {
        let headers = self.read()?.open_table(HEADERS).map_err(StoreError::new)?;
        let header = headers.get(number).map_err(StoreError::new)?;
        header.map(|bytes| decode("a header", bytes.value())).transpose()
    }

    /// The block's extrinsics, each as `UncheckedExtrinsic` encodes.
    pub(crate) fn body(&self, number: u32) -> Result<Option<Vec<Vec<u8>>>, StoreError> {
        let bodies = self.read()?.open_table(BODIES).map_err(StoreError::new)?;
        let body = bodies.get(number).map_err(StoreError::new)?;
        body.map(|bytes| decode("a block body", bytes.value())).transpose()
    }

    pub(crate) fn number(&self, hash: &H256) -> Result<Option<u32>, StoreError> {
        let numbers = self.read()?.open_table(NUMBERS).map_err(StoreError::new)?;
        let number = numbers.get(hash.as_fixed_bytes()).map_err(StoreError::new)?;
        Ok(number.map(|number| number.value()))
    }

    /// The state nodes as they are now; nodes of later blocks are not seen, and not needed.
    pub(crate) fn nodes(&self) -> Result<Nodes, StoreError> {
        Ok(Nodes(self.read()?.open_table(NODES).map_err(StoreError::new)?))
    }

    fn read(&self) -> Result<ReadTransaction, StoreError> {
        let guard = self.database.read();
        let database = guard.as_ref().ok_or(StoreError::Closed)?;
        database.begin_read().map_err(StoreError::new)
    }
}

fn decode<T: Decode>(what: &'static str, mut bytes: &[u8]) -> Result<T, StoreError> {
    T::decode(&mut bytes).map_err(|_| StoreError::Undecodable { what })
}

/// Trie nodes by hash, for the state machine.
pub(crate) struct Nodes(ReadOnlyTable<&'static [u8; 32], &'static [u8]>);

impl Storage<Hashing> for Nodes {
    fn get(&self, key: &H256, _prefix: Prefix<'_>) -> Result<Option<DBValue>, String> {
        match self.0.get(key.as_fixed_bytes()) {
            Ok(node) => Ok(node.map(|bytes| bytes.value().to_vec())),
            Err(error) => Err(StoreError::new(error).to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use redb::StorageBackend;
    use redb::backends::InMemoryBackend;
    use sp_runtime::traits::Header as _;

    use super::*;

    /// A disk with so many bytes left.
    #[derive(Debug)]
    struct SmallDisk {
        bytes_max: Arc<AtomicU64>,
        memory: InMemoryBackend,
    }

    impl StorageBackend for SmallDisk {
        fn len(&self) -> Result<u64, io::Error> {
            self.memory.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
            self.memory.read(offset, out)
        }

        fn set_len(&self, len: u64) -> Result<(), io::Error> {
            if len > self.bytes_max.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.memory.set_len(len)
        }

        fn sync_data(&self) -> Result<(), io::Error> {
            self.memory.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
            self.memory.write(offset, data)
        }
    }

    fn header(number: u32, parent: H256) -> Header {
        Header::new(number, H256::zero(), H256::zero(), parent, Default::default())
    }

    #[test]
    fn a_full_disk_is_named_and_a_block_is_whole_or_absent() {
        let bytes_max = Arc::new(AtomicU64::new(u64::MAX));
        let disk = SmallDisk { bytes_max: bytes_max.clone(), memory: InMemoryBackend::new() };
        let database = Database::builder().create_with_backend(disk).expect("an empty disk");
        let store = Store::over(database).expect("tables are made");
        let genesis = header(0, H256::zero());
        let block =
            NewBlock { header: &genesis, hash: genesis.hash(), extrinsics: &[], nodes: &[] };
        store.append(&block).expect("there is room");

        bytes_max.store(0, Ordering::SeqCst);
        let next = header(1, genesis.hash());
        let big = vec![vec![7; 16 << 20]];
        let block = NewBlock { header: &next, hash: next.hash(), extrinsics: &big, nodes: &[] };
        let refusal = store.append(&block).expect_err("no room for 16 MiB");
        assert!(matches!(refusal, StoreError::DiskFull), "{refusal}");
    }

    #[test]
    fn a_closed_store_says_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("chain.redb")).expect("a new database");
        let second = Store::open(&folder.path().join("chain.redb"));
        assert!(matches!(second, Err(StoreError::InUse)));
        store.close();
        assert!(matches!(store.head(), Err(StoreError::Closed)));
        Store::open(&folder.path().join("chain.redb")).expect("the file was released");
    }
}
