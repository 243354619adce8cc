//! Byte-level BPE: training, loading, encoding, decoding.

use std::path::{Path, PathBuf};

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use manyhands_proto::Digest;

/// The special token that ends each document; number 0 in a tokenizer trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// A `tokenizer.json` above this is not one.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Names that published tokenizers give to the token that ends a document.
const END_OF_TEXT_NAMES: [&str; 4] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>"];

/// Why a tokenizer could not be had, or could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("cannot read tokenizer {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("expected a tokenizer file of at most {FILE_BYTES_MAX} bytes, got {got}")]
    TooLong { got: u64 },
    #[error("expected a tokenizer.json: {0}")]
    Parse(String),
    #[error(
        "expected a tokenizer with one of the tokens {END_OF_TEXT_NAMES:?} to end documents, got none"
    )]
    NoEndOfText,
    #[error(
        "expected a vocabulary of at least {least} tokens (256 bytes and one special), got {got}"
    )]
    VocabularyTooSmall { least: usize, got: usize },
    #[error("the tokenizer could not be trained: {0}")]
    Train(String),
    #[error("the tokenizer failed on a text: {0}")]
    Apply(String),
}

/// A tokenizer and the bytes of its file.
#[derive(Clone)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    end_of_text: u32,
    bytes: Vec<u8>,
}

impl TextTokenizer {
    /// Trains a byte-level BPE tokenizer of exactly `vocabulary_size` tokens, or fewer if the texts have
    /// fewer pairs to merge. The same texts in any order give the same bytes.
    pub fn train(
        vocabulary_size: usize,
        texts: impl Iterator<Item = String> + Send,
    ) -> Result<Self, TokenizerError> {
        let least = ByteLevel::alphabet().len() + 1;
        if vocabulary_size < least {
            return Err(TokenizerError::VocabularyTooSmall { least, got: vocabulary_size });
        }
        let mut tokenizer = Tokenizer::new(BPE::default());
        let byte_level = ByteLevel::new(false, false, true);
        tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
        let mut trainer = tokenizers::models::TrainerWrapper::from(
            BpeTrainer::builder()
                .show_progress(false)
                .vocab_size(vocabulary_size)
                .min_frequency(2)
                .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
                .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
                .build(),
        );
        tokenizer
            .train(&mut trainer, texts)
            .map_err(|error| TokenizerError::Train(error.to_string()))?;
        let text =
            tokenizer.to_string(false).map_err(|error| TokenizerError::Train(error.to_string()))?;
        Self::parse(text.into_bytes())
    }

    /// Reads a `tokenizer.json`.
    pub fn open(path: &Path) -> Result<Self, TokenizerError> {
        let read = |source| TokenizerError::Read { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(read)?.len();
        if size > FILE_BYTES_MAX {
            return Err(TokenizerError::TooLong { got: size });
        }
        Self::parse(std::fs::read(path).map_err(read)?)
    }

    /// Parses the bytes of a `tokenizer.json`.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, TokenizerError> {
        let mut tokenizer = Tokenizer::from_bytes(&bytes)
            .map_err(|error| TokenizerError::Parse(error.to_string()))?;
        // A document that contains the text of a special token must not end there.
        tokenizer.set_encode_special_tokens(true);
        let end_of_text = END_OF_TEXT_NAMES
            .iter()
            .find_map(|name| tokenizer.token_to_id(name))
            .ok_or(TokenizerError::NoEndOfText)?;
        Ok(Self { tokenizer, end_of_text, bytes })
    }

    /// The bytes of its `tokenizer.json`.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    /// Tokens, special ones included: one more than the largest number.
    pub fn vocabulary_size(&self) -> u32 {
        let largest = self.tokenizer.get_vocab(true).into_values().max();
        largest.map_or(0, |largest| largest + 1)
    }

    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// How the token that ends a document is written.
    pub fn end_of_text_name(&self) -> String {
        self.tokenizer.id_to_token(self.end_of_text).expect("the number was found by the name")
    }

    /// The tokens of a text, without special ones added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(|error| TokenizerError::Apply(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of many texts, in their order, on all cores.
    pub fn encode_all(&self, texts: Vec<String>) -> Result<Vec<Vec<u32>>, TokenizerError> {
        let encodings = self
            .tokenizer
            .encode_batch_fast(texts, false)
            .map_err(|error| TokenizerError::Apply(error.to_string()))?;
        Ok(encodings.into_iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// The text of `tokens`, special ones left out; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.tokenizer
            .decode(tokens, true)
            .map_err(|error| TokenizerError::Apply(error.to_string()))
    }
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer")
            .field("digest", &self.digest())
            .field("vocabulary_size", &self.vocabulary_size())
            .finish()
    }
}
