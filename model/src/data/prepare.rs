//! `prepare`: text in, a dataset's folder out.
//!
//! Everything is written into `<folder>.partial`, which becomes `<folder>` by one rename at the end.
//! After a kill the next start removes the partial folder and begins again.

use std::path::{Path, PathBuf};

use manyhands_proto::Digest;

use super::documents::{DocumentError, SourceSet};
use super::manifest::{Dataset, Manifest, ManifestError, ShardEntry, Split, TokenizerEntry};
use super::shard_file::{self, TokenWidth};
use super::tokenizer::{TextTokenizer, TokenizerError};

/// Texts are tokenised this many bytes at a time: enough to keep all cores busy.
const BATCH_BYTES: usize = 4 << 20;

/// Sets the hash that divides documents apart from every other hash of them.
const SPLIT_CONTEXT: &str = "manyhands 2026 division of documents into train and held-out";

/// Which tokenizer a dataset gets.
#[derive(Debug, Clone)]
pub enum TokenizerChoice {
    /// Byte-level BPE, trained on a sample of at most `sample_bytes_max` of the documents.
    Train { vocabulary_size: u32, sample_bytes_max: u64 },
    /// A `tokenizer.json`.
    Load(PathBuf),
}

/// What to prepare.
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    pub sources: SourceSet,
    pub tokenizer: TokenizerChoice,
    /// Must not exist yet.
    pub folder: PathBuf,
    /// Of a thousand documents, about so many are held out.
    pub held_out_per_mille: u32,
    /// A full shard's tokens; the last of a split has fewer.
    pub shard_tokens: u32,
    /// Use about so much of the text, chosen by the documents' hashes; none: all of it.
    pub text_bytes_max: Option<u64>,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrepareProgress {
    /// Reading the tokenizer's training sample.
    Sampling { bytes: u64, bytes_total: u64 },
    /// The tokenizer is being trained on what was read.
    TrainingTokenizer,
    /// Writing shards; `bytes` of text so far.
    Tokenizing { bytes: u64, bytes_total: u64, tokens: u64 },
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Prepared {
    pub dataset: Dataset,
    /// Bytes of text that went in.
    pub text_bytes: u64,
    /// Files left out, from the first place that is not UTF-8.
    pub files_not_utf8: u64,
}

/// Why a dataset could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error("{0} exists already: remove it or choose another folder")]
    FolderExists(PathBuf),
    #[error("expected {field} between {least} and {most}, got {got}")]
    Option { field: &'static str, least: u64, most: u64, got: u64 },
    #[error(transparent)]
    Document(#[from] DocumentError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error(
        "the {split:?} part got {tokens} tokens of {documents} documents, at least 2 are needed: give more text"
    )]
    TooLittleText { split: Split, tokens: u64, documents: u64 },
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// Prepares a dataset. The same files, options and library versions give the same digest.
///
/// # Errors
/// When the options contradict each other, a source cannot be read, or the disk refuses. The target
/// folder then does not exist.
pub fn prepare(
    options: &PrepareOptions,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<Prepared, PrepareError> {
    check(options)?;
    let partial = partial_of(&options.folder);
    remove_if_there(&partial)?;
    create(&partial.join("shards"))?;

    let selection = Selection::new(options);
    let tokenizer = match &options.tokenizer {
        TokenizerChoice::Load(path) => TextTokenizer::open(path)?,
        TokenizerChoice::Train { vocabulary_size, sample_bytes_max } => {
            let sample = selection.at_most(*sample_bytes_max);
            train_tokenizer(&options.sources, sample, *vocabulary_size, progress)?
        }
    };
    write(&Dataset::tokenizer_path_in(&partial), tokenizer.bytes())?;

    let written = write_shards(options, &tokenizer, &selection, &partial, progress)?;
    let manifest = Manifest::new(
        TokenizerEntry {
            digest: tokenizer.digest(),
            vocabulary_size: tokenizer.vocabulary_size(),
            end_of_text: tokenizer.end_of_text(),
        },
        written.documents,
        unigram_loss_micronats(&written.train_counts, &written.held_out_counts),
        written.shards,
    )?;
    write(&Dataset::manifest_path(&partial), &manifest.to_bytes())?;
    std::fs::rename(&partial, &options.folder)
        .map_err(|source| PrepareError::Write { path: options.folder.clone(), source })?;
    Ok(Prepared {
        dataset: Dataset::open(options.folder.clone())?,
        text_bytes: written.text_bytes,
        files_not_utf8: written.files_not_utf8,
    })
}

fn check(options: &PrepareOptions) -> Result<(), PrepareError> {
    if options.folder.exists() {
        return Err(PrepareError::FolderExists(options.folder.clone()));
    }
    let within = |field, got: u64, least, most| {
        if (least..=most).contains(&got) {
            Ok(())
        } else {
            Err(PrepareError::Option { field, least, most, got })
        }
    };
    within("held_out_per_mille", options.held_out_per_mille.into(), 1, 500)?;
    within("shard_tokens", options.shard_tokens.into(), 1 << 10, 1 << 26)
}

fn partial_of(folder: &Path) -> PathBuf {
    let mut name = folder.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    folder.with_file_name(name)
}

/// Which documents are used and where they go, by their hash alone.
#[derive(Debug, Clone, Copy)]
struct Selection {
    text_bytes: u64,
    text_bytes_max: u64,
    held_out_per_mille: u32,
}

impl Selection {
    fn new(options: &PrepareOptions) -> Self {
        Self {
            text_bytes: options.sources.bytes().max(1),
            text_bytes_max: options.text_bytes_max.unwrap_or(u64::MAX),
            held_out_per_mille: options.held_out_per_mille,
        }
    }

    fn at_most(self, bytes_max: u64) -> Self {
        Self { text_bytes_max: self.text_bytes_max.min(bytes_max), ..self }
    }

    fn bytes_expected(self) -> u64 {
        self.text_bytes.min(self.text_bytes_max)
    }

    /// Where a document goes; none if it is left out.
    fn split(self, document: &str) -> Option<Split> {
        let hash = blake3::derive_key(SPLIT_CONTEXT, document.as_bytes());
        let [use_it, hold_out]: [u64; 2] =
            [0, 8].map(|at| u64::from_le_bytes(hash[at..at + 8].try_into().expect("eight bytes")));
        // A document is used with probability text_bytes_max / text_bytes.
        if u128::from(use_it) * u128::from(self.text_bytes) >= u128::from(self.text_bytes_max) << 64
        {
            return None;
        }
        let held_out = u128::from(hold_out) * 1_000 < u128::from(self.held_out_per_mille) << 64;
        Some(if held_out { Split::HeldOut } else { Split::Train })
    }
}

fn train_tokenizer(
    sources: &SourceSet,
    sample: Selection,
    vocabulary_size: u32,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<TextTokenizer, PrepareError> {
    let mut texts = Vec::new();
    let mut bytes = 0;
    for document in sources.documents() {
        let document = document?;
        if sample.split(&document) == Some(Split::Train) {
            bytes += document.len() as u64;
            texts.push(document);
            progress(PrepareProgress::Sampling { bytes, bytes_total: sample.bytes_expected() });
        }
    }
    progress(PrepareProgress::TrainingTokenizer);
    Ok(TextTokenizer::train(vocabulary_size as usize, texts.into_iter())?)
}

struct Written {
    shards: Vec<ShardEntry>,
    documents: u64,
    text_bytes: u64,
    files_not_utf8: u64,
    train_counts: Vec<u64>,
    held_out_counts: Vec<u64>,
}

fn write_shards(
    options: &PrepareOptions,
    tokenizer: &TextTokenizer,
    selection: &Selection,
    partial: &Path,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<Written, PrepareError> {
    let mut train = SplitWriter::new(Split::Train, options, tokenizer, partial);
    let mut held_out = SplitWriter::new(Split::HeldOut, options, tokenizer, partial);
    let mut text_bytes = 0;
    let mut documents = options.sources.documents();
    loop {
        let (splits, texts, bytes) = next_batch(&mut documents, selection)?;
        if texts.is_empty() {
            break;
        }
        for (split, tokens) in splits.into_iter().zip(tokenizer.encode_all(texts)?) {
            match split {
                Split::Train => train.add_document(tokens)?,
                Split::HeldOut => held_out.add_document(tokens)?,
            }
        }
        text_bytes += bytes;
        progress(PrepareProgress::Tokenizing {
            bytes: text_bytes,
            bytes_total: selection.bytes_expected().max(text_bytes),
            tokens: train.tokens + held_out.tokens,
        });
    }
    let documents_used = train.documents + held_out.documents;
    let (mut shards, train_counts) = train.finish(documents_used)?;
    let (held_out_shards, held_out_counts) = held_out.finish(documents_used)?;
    shards.extend(held_out_shards);
    Ok(Written {
        shards,
        documents: documents_used,
        text_bytes,
        files_not_utf8: documents.not_utf8(),
        train_counts,
        held_out_counts,
    })
}

type Batch = (Vec<Split>, Vec<String>, u64);

fn next_batch(
    documents: &mut impl Iterator<Item = Result<String, DocumentError>>,
    selection: &Selection,
) -> Result<Batch, DocumentError> {
    let (mut splits, mut texts, mut bytes) = (Vec::new(), Vec::new(), 0);
    for document in documents {
        let document = document?;
        if let Some(split) = selection.split(&document) {
            bytes += document.len();
            splits.push(split);
            texts.push(document);
            if bytes >= BATCH_BYTES {
                break;
            }
        }
    }
    Ok((splits, texts, bytes as u64))
}

/// Writes the shards of one split.
struct SplitWriter<'a> {
    split: Split,
    folder: &'a Path,
    width: TokenWidth,
    shard_tokens: usize,
    end_of_text: u32,
    pending: Vec<u32>,
    counts: Vec<u64>,
    shards: Vec<ShardEntry>,
    tokens: u64,
    documents: u64,
}

impl<'a> SplitWriter<'a> {
    fn new(
        split: Split,
        options: &PrepareOptions,
        tokenizer: &TextTokenizer,
        folder: &'a Path,
    ) -> Self {
        let vocabulary_size = tokenizer.vocabulary_size();
        Self {
            split,
            folder,
            width: TokenWidth::for_vocabulary(vocabulary_size),
            shard_tokens: options.shard_tokens as usize,
            end_of_text: tokenizer.end_of_text(),
            pending: Vec::new(),
            counts: vec![0; vocabulary_size as usize],
            shards: Vec::new(),
            tokens: 0,
            documents: 0,
        }
    }

    fn add_document(&mut self, tokens: Vec<u32>) -> Result<(), PrepareError> {
        self.documents += 1;
        for token in tokens.into_iter().chain([self.end_of_text]) {
            self.counts[token as usize] += 1;
            self.tokens += 1;
            self.pending.push(token);
            if self.pending.len() == self.shard_tokens {
                self.write_shard()?;
            }
        }
        Ok(())
    }

    fn write_shard(&mut self) -> Result<(), PrepareError> {
        let bytes = shard_file::encode(&self.pending, self.width);
        let digest = Digest::of(&bytes);
        write(&Dataset::shard_path_in(self.folder, &digest), &bytes)?;
        self.shards.push(ShardEntry {
            digest,
            split: self.split,
            tokens: self.pending.len() as u64,
        });
        self.pending.clear();
        Ok(())
    }

    fn finish(mut self, documents: u64) -> Result<(Vec<ShardEntry>, Vec<u64>), PrepareError> {
        // A last shard of one token would hold no sequence.
        if self.pending.len() >= 2 {
            self.write_shard()?;
        }
        if self.shards.is_empty() {
            return Err(PrepareError::TooLittleText {
                split: self.split,
                tokens: self.tokens,
                documents,
            });
        }
        Ok((self.shards, self.counts))
    }
}

/// Cross-entropy of the held-out tokens under the training split's frequencies, each count raised by
/// one so that an unseen token costs a finite amount. Rounded to 10⁻⁶ nats: logarithms differ in their
/// last digits between machines, and the number is part of a digest.
fn unigram_loss_micronats(train: &[u64], held_out: &[u64]) -> u64 {
    let total: u64 = train.iter().map(|count| count + 1).sum();
    let tokens: u64 = held_out.iter().sum();
    let nats: f64 = train
        .iter()
        .zip(held_out)
        .map(|(&seen, &count)| count as f64 * (total as f64 / (seen + 1) as f64).ln())
        .sum();
    (nats / tokens.max(1) as f64 * 1e6).round() as u64
}

fn create(folder: &Path) -> Result<(), PrepareError> {
    std::fs::create_dir_all(folder)
        .map_err(|source| PrepareError::Write { path: folder.to_owned(), source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), PrepareError> {
    std::fs::write(path, bytes)
        .map_err(|source| PrepareError::Write { path: path.to_owned(), source })
}

fn remove_if_there(folder: &Path) -> Result<(), PrepareError> {
    match std::fs::remove_dir_all(folder) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(PrepareError::Write { path: folder.to_owned(), source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_frequencies_cost_the_logarithm_of_the_vocabulary() {
        assert_eq!(unigram_loss_micronats(&[9, 9, 9, 9], &[1, 0, 5, 2]), 1_386_294);
    }

    #[test]
    fn a_document_always_goes_to_the_same_side() {
        let selection = Selection { text_bytes: 100, text_bytes_max: 50, held_out_per_mille: 100 };
        let sides: Vec<_> = (0..4_000).map(|n| selection.split(&format!("document {n}"))).collect();
        let used = sides.iter().flatten().count();
        let held_out = sides.iter().filter(|side| **side == Some(Split::HeldOut)).count();
        assert!(
            (1_850..2_150).contains(&used),
            "half of the text was asked for, {used} of 4000 used"
        );
        assert!((140..270).contains(&held_out), "a tenth of it is held out, got {held_out}");
    }
}
