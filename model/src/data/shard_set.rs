//! Sequences of one split, read from shards on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use manyhands_proto::Digest;

use super::shard_file::{ShardError, ShardFile};
use super::{Manifest, SequenceId, SequenceIndex, Split};

/// Open files kept at a time; a batch rarely touches more shards.
const OPEN_SHARDS_MAX: usize = 64;

/// Why a sequence could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SequenceError {
    #[error("expected a sequence below {count}, got {got}")]
    OutOfRange { count: u64, got: u64 },
    #[error(transparent)]
    Shard(#[from] ShardError),
}

/// Whatever hands out sequences of tokens by number.
pub trait SequenceSource: Send + Sync {
    /// The `context_length + 1` tokens of a sequence, each below the vocabulary's size.
    fn sequence(&self, id: SequenceId) -> Result<Vec<u32>, SequenceError>;

    /// Number of sequences; valid numbers are below it.
    fn sequence_count(&self) -> u64;

    /// Targets in a sequence.
    fn context_length(&self) -> u32;
}

/// Where the file of a shard lies.
type Locate = Box<dyn Fn(&Digest) -> PathBuf + Send + Sync>;

/// The sequences of one split. A shard is opened, and its digest checked, when it is first needed.
pub struct ShardSet {
    manifest: Manifest,
    index: SequenceIndex,
    context_length: u32,
    locate: Locate,
    open: Mutex<BTreeMap<usize, ShardFile>>,
}

impl ShardSet {
    /// Sequences of `split`; `locate` says where a shard's file lies. Nothing is opened yet.
    pub fn new(
        manifest: Manifest,
        split: Split,
        context_length: u32,
        locate: impl Fn(&Digest) -> PathBuf + Send + Sync + 'static,
    ) -> Self {
        let index = SequenceIndex::new(&manifest, split, context_length);
        Self { manifest, index, context_length, locate: Box::new(locate), open: Mutex::default() }
    }

    /// Digests of the shards that hold `sequences`.
    pub fn shards_for(&self, sequences: &[SequenceId]) -> BTreeSet<Digest> {
        self.index.shards_for(sequences)
    }
}

impl SequenceSource for ShardSet {
    fn sequence(&self, id: SequenceId) -> Result<Vec<u32>, SequenceError> {
        let location = self
            .index
            .locate(id)
            .ok_or(SequenceError::OutOfRange { count: self.index.count(), got: id.0 })?;
        // A panic while holding the lock leaves at worst an unread file position, which is set before each read.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if !open.contains_key(&location.shard) {
            if open.len() >= OPEN_SHARDS_MAX {
                open.pop_first();
            }
            let entry = &self.manifest.shards()[location.shard];
            let path = (self.locate)(&entry.digest);
            let file =
                ShardFile::open(&path, &entry.digest, entry.tokens, self.manifest.token_width())?;
            open.insert(location.shard, file);
        }
        let file = open.get_mut(&location.shard).expect("inserted above");
        let count = u64::from(self.context_length) + 1;
        Ok(file.read(location.first_token, count, self.manifest.tokenizer().vocabulary_size)?)
    }

    fn sequence_count(&self) -> u64 {
        self.index.count()
    }

    fn context_length(&self) -> u32 {
        self.context_length
    }
}
