//! Training data: from text to content-addressed token shards, and from shards to sequences.
//!
//! A *document* is a piece of text of at most 1 MiB. A *shard* is a file of tokens named by its
//! digest. A *sequence* is `context_length + 1` consecutive tokens of one shard: the inputs and,
//! shifted by one, the targets. Sequences of a split are numbered from 0 in the order of the
//! manifest, so a number means the same tokens to everybody who holds the same manifest.

mod documents;
mod manifest;
mod prepare;
mod shard_file;
mod shard_set;
mod tokenizer;

pub use documents::{DocumentError, SourceSet};
pub use manifest::{
    Dataset, Manifest, ManifestError, SequenceIndex, ShardEntry, Split, TokenizerEntry,
};
pub use prepare::{
    PrepareError, PrepareOptions, PrepareProgress, Prepared, TokenizerChoice, prepare,
};
pub use shard_file::{ShardError, TokenWidth};
pub use shard_set::{SequenceError, SequenceSource, ShardSet};
pub use tokenizer::{END_OF_TEXT, TextTokenizer, TokenizerError};

/// Number of a sequence within its split, from 0.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct SequenceId(pub u64);
