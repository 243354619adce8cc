//! The shard file: 16 bytes of header, then tokens, little-endian, 2 or 4 bytes each.
//!
//! ```text
//! 0   6  "MHTOK1"
//! 6   1  width of a token in bytes: 2 or 4
//! 7   1  zero
//! 8   8  number of tokens, u64
//! 16  …  tokens
//! ```

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use manyhands_proto::Digest;

const MAGIC: &[u8; 6] = b"MHTOK1";

/// Bytes before the first token.
pub(super) const HEADER_BYTES: u64 = 16;

/// How many bytes a token takes in a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenWidth {
    Two,
    Four,
}

impl TokenWidth {
    /// The smallest width that holds every token of a vocabulary of this size.
    pub const fn for_vocabulary(vocabulary_size: u32) -> Self {
        if vocabulary_size <= 1 << 16 { Self::Two } else { Self::Four }
    }

    pub const fn bytes(self) -> u64 {
        match self {
            Self::Two => 2,
            Self::Four => 4,
        }
    }

    /// Size of a shard file of `tokens` tokens, in bytes.
    pub const fn file_bytes(self, tokens: u64) -> u64 {
        HEADER_BYTES + tokens * self.bytes()
    }
}

/// Why a shard file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    #[error("cannot read shard {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error(
        "shard {path}: expected a header of {expected_tokens} tokens of {expected_width} bytes, got {got}"
    )]
    Header { path: PathBuf, expected_tokens: u64, expected_width: u64, got: String },
    #[error("shard {path}: expected digest {expected}, its bytes hash to {got}")]
    Digest { path: PathBuf, expected: Digest, got: Digest },
    #[error(
        "shard {path}: token {token} at position {position} is outside the vocabulary of {vocabulary_size}"
    )]
    Token { path: PathBuf, token: u32, position: u64, vocabulary_size: u32 },
}

/// The bytes of a shard file holding `tokens`.
pub(super) fn encode(tokens: &[u32], width: TokenWidth) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(width.file_bytes(tokens.len() as u64) as usize);
    bytes.extend_from_slice(MAGIC);
    bytes.push(width.bytes() as u8);
    bytes.push(0);
    bytes.extend_from_slice(&(tokens.len() as u64).to_le_bytes());
    for &token in tokens {
        match width {
            TokenWidth::Two => {
                let token = u16::try_from(token).expect("the width follows from the vocabulary");
                bytes.extend_from_slice(&token.to_le_bytes());
            }
            TokenWidth::Four => bytes.extend_from_slice(&token.to_le_bytes()),
        }
    }
    bytes
}

/// A shard file whose digest and header were checked when it was opened.
#[derive(Debug)]
pub(super) struct ShardFile {
    path: PathBuf,
    file: File,
    width: TokenWidth,
    tokens: u64,
}

impl ShardFile {
    /// Opens `path` and hashes it once, in bounded memory.
    pub(super) fn open(
        path: &Path,
        digest: &Digest,
        tokens: u64,
        width: TokenWidth,
    ) -> Result<Self, ShardError> {
        let read = |source| ShardError::Read { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(read)?;
        let size = file.metadata().map_err(read)?.len();
        let mut header = [0; HEADER_BYTES as usize];
        if size != width.file_bytes(tokens) {
            return Err(ShardError::Header {
                path: path.to_owned(),
                expected_tokens: tokens,
                expected_width: width.bytes(),
                got: format!("a file of {size} bytes"),
            });
        }
        file.read_exact(&mut header).map_err(read)?;
        if header[..]
            != encode(&[], width)[..8]
                .iter()
                .copied()
                .chain(tokens.to_le_bytes())
                .collect::<Vec<_>>()
        {
            return Err(ShardError::Header {
                path: path.to_owned(),
                expected_tokens: tokens,
                expected_width: width.bytes(),
                got: format!("the header bytes {header:02x?}"),
            });
        }
        file.seek(SeekFrom::Start(0)).map_err(read)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&mut file).map_err(read)?;
        let got = Digest::new(*hasher.finalize().as_bytes());
        if got != *digest {
            return Err(ShardError::Digest { path: path.to_owned(), expected: *digest, got });
        }
        Ok(Self { path: path.to_owned(), file, width, tokens })
    }

    /// Tokens `first .. first + count`, each below `vocabulary_size`.
    pub(super) fn read(
        &mut self,
        first: u64,
        count: u64,
        vocabulary_size: u32,
    ) -> Result<Vec<u32>, ShardError> {
        assert!(first + count <= self.tokens, "sequence bounds follow from the manifest");
        let path = &self.path;
        let read = |source| ShardError::Read { path: path.clone(), source };
        let mut bytes = vec![0; (count * self.width.bytes()) as usize];
        self.file.seek(SeekFrom::Start(self.width.file_bytes(first))).map_err(read)?;
        self.file.read_exact(&mut bytes).map_err(read)?;
        let tokens: Vec<u32> = match self.width {
            TokenWidth::Two => bytes
                .as_chunks()
                .0
                .iter()
                .map(|pair| u32::from(u16::from_le_bytes(*pair)))
                .collect(),
            TokenWidth::Four => {
                bytes.as_chunks().0.iter().map(|four| u32::from_le_bytes(*four)).collect()
            }
        };
        match tokens.iter().position(|&token| token >= vocabulary_size) {
            Some(at) => Err(ShardError::Token {
                path: path.clone(),
                token: tokens[at],
                position: first + at as u64,
                vocabulary_size,
            }),
            None => Ok(tokens),
        }
    }
}
