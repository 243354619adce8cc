//! `dataset.json`: what a dataset consists of. The digest of its bytes is the dataset's digest.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use manyhands_proto::Digest;
use serde::{Deserialize, Serialize};

use super::SequenceId;
use super::shard_file::TokenWidth;
use super::shard_set::ShardSet;

/// Limits on a manifest that arrives from somebody else.
const MANIFEST_BYTES_MAX: usize = 64 << 20;
const SHARDS_MAX: usize = 1 << 18;
const SHARD_TOKENS_MAX: u64 = 1 << 28;
const VOCABULARY_SIZE_MAX: u32 = 1 << 20;
const FORMAT: u32 = 1;

/// Which part of a dataset a shard belongs to; documents are divided by the hash of their text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    Train,
    HeldOut,
}

/// The tokenizer that made a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerEntry {
    /// Digest of `tokenizer.json`.
    pub digest: Digest,
    pub vocabulary_size: u32,
    /// The token that ends each document.
    pub end_of_text: u32,
}

/// One shard file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Digest of the file's bytes, header included; also its name.
    pub digest: Digest,
    pub split: Split,
    pub tokens: u64,
}

/// A validated dataset manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    tokenizer: TokenizerEntry,
    documents: u64,
    /// Held-out loss in 10⁻⁶ nats per token of a model that knows nothing but how often each token
    /// occurs in the training split (an integer, so that the digest is the same everywhere).
    unigram_loss_micronats: u64,
    shards: Vec<ShardEntry>,
}

/// Why a manifest was refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("expected a manifest of at most {MANIFEST_BYTES_MAX} bytes, got {got}")]
    TooLong { got: u64 },
    #[error("expected a dataset manifest: {0}")]
    Json(#[from] serde_json::Error),
    #[error("expected the manifest in its canonical form, got other bytes with the same meaning")]
    NotCanonical,
    #[error("expected manifest format {FORMAT}, got {got}")]
    Format { got: u32 },
    #[error(
        "expected a vocabulary of 2 to {VOCABULARY_SIZE_MAX} tokens that contains the end-of-text token, got {size} and {end_of_text}"
    )]
    Vocabulary { size: u32, end_of_text: u32 },
    #[error("expected 1 to {SHARDS_MAX} shards, got {got}")]
    ShardCount { got: usize },
    #[error("shard {digest}: expected 2 to {SHARD_TOKENS_MAX} tokens, got {tokens}")]
    ShardTokens { digest: Digest, tokens: u64 },
    #[error("expected digest {expected}, the manifest's is {got}")]
    Digest { expected: Digest, got: Digest },
}

impl Manifest {
    /// A manifest of freshly written shards, valid by the same rules as a parsed one.
    pub(super) fn new(
        tokenizer: TokenizerEntry,
        documents: u64,
        unigram_loss_micronats: u64,
        shards: Vec<ShardEntry>,
    ) -> Result<Self, ManifestError> {
        Self { format: FORMAT, tokenizer, documents, unigram_loss_micronats, shards }.validated()
    }

    /// Parses and validates the bytes of a `dataset.json`.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLong { got: bytes.len() as u64 });
        }
        let manifest = serde_json::from_slice::<Self>(bytes)?.validated()?;
        if manifest.to_bytes() != bytes {
            return Err(ManifestError::NotCanonical);
        }
        Ok(manifest)
    }

    fn validated(self) -> Result<Self, ManifestError> {
        if self.format != FORMAT {
            return Err(ManifestError::Format { got: self.format });
        }
        let TokenizerEntry { vocabulary_size, end_of_text, .. } = self.tokenizer;
        if !(2..=VOCABULARY_SIZE_MAX).contains(&vocabulary_size) || end_of_text >= vocabulary_size {
            return Err(ManifestError::Vocabulary { size: vocabulary_size, end_of_text });
        }
        if self.shards.is_empty() || self.shards.len() > SHARDS_MAX {
            return Err(ManifestError::ShardCount { got: self.shards.len() });
        }
        match self.shards.iter().find(|shard| !(2..=SHARD_TOKENS_MAX).contains(&shard.tokens)) {
            Some(shard) => {
                Err(ManifestError::ShardTokens { digest: shard.digest, tokens: shard.tokens })
            }
            None => Ok(self),
        }
    }

    /// The canonical bytes: JSON without white space, fields in the order of the type.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest has only integers and strings")
    }

    /// The dataset's digest.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.to_bytes())
    }

    pub fn tokenizer(&self) -> &TokenizerEntry {
        &self.tokenizer
    }

    /// All shards, in the order that numbers the sequences.
    pub fn shards(&self) -> &[ShardEntry] {
        &self.shards
    }

    pub fn documents(&self) -> u64 {
        self.documents
    }

    /// Tokens of a split.
    pub fn tokens(&self, split: Split) -> u64 {
        self.shards.iter().filter(|shard| shard.split == split).map(|shard| shard.tokens).sum()
    }

    /// Held-out loss that token frequencies alone give, in nats per token.
    pub fn unigram_loss(&self) -> f64 {
        self.unigram_loss_micronats as f64 / 1e6
    }

    pub fn token_width(&self) -> TokenWidth {
        TokenWidth::for_vocabulary(self.tokenizer.vocabulary_size)
    }

    /// Size of a shard's file in bytes.
    pub fn shard_bytes(&self, shard: &ShardEntry) -> u64 {
        self.token_width().file_bytes(shard.tokens)
    }

    /// Sequences of `context_length` targets in a split.
    pub fn sequence_count(&self, split: Split, context_length: u32) -> u64 {
        SequenceIndex::new(self, split, context_length).count()
    }
}

/// Which shard holds which sequence of one split.
#[derive(Debug, Clone)]
pub struct SequenceIndex {
    /// For each shard of the split that holds a sequence: its place in the manifest, its digest, and
    /// the number of the first sequence after it.
    shards: Vec<(usize, Digest, u64)>,
    context_length: u64,
}

/// Where a sequence lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Location {
    /// Index into [`Manifest::shards`].
    pub(super) shard: usize,
    pub(super) first_token: u64,
}

impl SequenceIndex {
    /// # Panics
    /// If `context_length` is 0.
    pub fn new(manifest: &Manifest, split: Split, context_length: u32) -> Self {
        let context_length = u64::from(context_length);
        assert!(context_length > 0, "a sequence has at least one target");
        let mut end = 0;
        let mut shards = Vec::new();
        for (index, shard) in
            manifest.shards.iter().enumerate().filter(|(_, shard)| shard.split == split)
        {
            // The last target is the token after the last input, so one token is shared.
            let sequences = (shard.tokens - 1) / context_length;
            if sequences > 0 {
                end += sequences;
                shards.push((index, shard.digest, end));
            }
        }
        Self { shards, context_length }
    }

    /// Number of sequences.
    pub fn count(&self) -> u64 {
        self.shards.last().map_or(0, |&(_, _, end)| end)
    }

    /// Digests of the shards that hold `sequences`; numbers past the end are ignored.
    pub fn shards_for(&self, sequences: &[SequenceId]) -> BTreeSet<Digest> {
        sequences
            .iter()
            .filter_map(|&id| self.place(id))
            .map(|place| self.shards[place].1)
            .collect()
    }

    pub(super) fn locate(&self, id: SequenceId) -> Option<Location> {
        let place = self.place(id)?;
        let before = place.checked_sub(1).map_or(0, |previous| self.shards[previous].2);
        Some(Location {
            shard: self.shards[place].0,
            first_token: (id.0 - before) * self.context_length,
        })
    }

    fn place(&self, id: SequenceId) -> Option<usize> {
        let place = self.shards.partition_point(|&(_, _, end)| end <= id.0);
        (place < self.shards.len()).then_some(place)
    }
}

/// A dataset's folder: `dataset.json`, `tokenizer.json`, `shards/<digest>.tokens`.
#[derive(Debug, Clone)]
pub struct Dataset {
    folder: PathBuf,
    manifest: Manifest,
}

impl Dataset {
    /// Reads the manifest of a folder; the shards are checked when they are opened.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, ManifestError> {
        let folder = folder.into();
        let path = Self::manifest_path(&folder);
        let read = |source| ManifestError::Read { path: path.clone(), source };
        let size = std::fs::metadata(&path).map_err(read)?.len();
        if size > MANIFEST_BYTES_MAX as u64 {
            return Err(ManifestError::TooLong { got: size });
        }
        let manifest = Manifest::parse(&std::fs::read(&path).map_err(read)?)?;
        Ok(Self { folder, manifest })
    }

    /// The same, for a dataset whose digest is known.
    pub fn open_expecting(
        folder: impl Into<PathBuf>,
        expected: Digest,
    ) -> Result<Self, ManifestError> {
        let dataset = Self::open(folder)?;
        let got = dataset.manifest.digest();
        if got == expected { Ok(dataset) } else { Err(ManifestError::Digest { expected, got }) }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The sequences of a split, read from the folder when they are asked for.
    pub fn sequences(&self, split: Split, context_length: u32) -> ShardSet {
        let folder = self.folder.clone();
        let locate = move |digest: &Digest| Self::shard_path_in(&folder, digest);
        ShardSet::new(self.manifest.clone(), split, context_length, locate)
    }

    pub fn shard_path(&self, digest: &Digest) -> PathBuf {
        Self::shard_path_in(&self.folder, digest)
    }

    pub fn tokenizer_path(&self) -> PathBuf {
        Self::tokenizer_path_in(&self.folder)
    }

    /// Where a dataset's folder keeps a shard.
    pub fn shard_path_in(folder: &Path, digest: &Digest) -> PathBuf {
        folder.join("shards").join(format!("{digest}.tokens"))
    }

    /// Where a dataset's folder keeps its tokenizer.
    pub fn tokenizer_path_in(folder: &Path) -> PathBuf {
        folder.join("tokenizer.json")
    }

    /// Where a dataset's folder keeps its manifest.
    pub fn manifest_path(folder: &Path) -> PathBuf {
        folder.join("dataset.json")
    }
}
