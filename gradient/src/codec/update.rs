//! An update as a validated value, and the one door through which bytes become one.
//!
//! ```text
//! version (1 byte) · profile (1) · number of chunks (4, little-endian) · body
//! sparse body: length of each group of 64 chunks (2 each, little-endian), then the groups
//! dense body:  one zstd frame
//! ```

use manyhands_proto::run_file::Profile;
use manyhands_proto::{ChunkIndex, Digest};
use rayon::prelude::*;

use super::dense::{self, DenseBody};
use super::sparse::{ChunkError, SparseGroup};
use super::symbols::{ChunkSymbols, Symbols};
use super::{Coding, GROUP_CHUNKS, coding, profile_number};
use crate::layout::{CHUNK, Layout};

pub(crate) const VERSION: u8 = 1;
pub(crate) const HEADER_BYTES: usize = 6;

/// Why bytes are not an update for this layout and profile.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ParseUpdateError {
    #[error("expected at most {bytes_max} bytes for this model, got {got}")]
    TooLong { bytes_max: usize, got: usize },
    #[error("expected {expected} bytes, got {got}")]
    Length { expected: usize, got: usize },
    #[error("expected update version {VERSION}, got {got}")]
    Version { got: u8 },
    #[error("expected profile {expected:?}, got profile number {got}")]
    Profile { expected: Profile, got: u8 },
    #[error("expected {expected} chunks, got {got}")]
    ChunkCount { expected: usize, got: usize },
    #[error("chunk {chunk}: {reason}")]
    Chunk { chunk: usize, reason: ChunkError },
    #[error("expected one zstd frame of known length, got: {reason}")]
    Compression { reason: String },
    #[error("expected the zstd frame that this version makes of its content, got another")]
    CompressionNotCanonical,
}

/// The bytes of an update, as they travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload(pub(super) Vec<u8>);

impl Payload {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Plain BLAKE3 of the bytes.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.0)
    }

    /// 8 × bytes / real parameters: what everything in the payload costs.
    pub fn bits_per_parameter(&self, layout: &Layout) -> f64 {
        self.0.len() as f64 * 8.0 / layout.parameter_count().0 as f64
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Body {
    Sparse(Vec<SparseGroup>),
    Dense(DenseBody),
}

/// A worker's update, parsed and checked against the layout: indices in bounds, values finite.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    profile: Profile,
    chunks: usize,
    body: Body,
}

impl Update {
    /// Reads an update. What it allocates is bounded by the layout and by the bytes that came.
    ///
    /// # Errors
    /// When the bytes are anything but what [`super::UpdateCodec::encode`] writes for some update: another
    /// version, profile or model, a bad length, indices out of bounds, a coding longer than it must be.
    pub fn parse(
        bytes: &[u8],
        layout: &Layout,
        profile: Profile,
    ) -> Result<Self, ParseUpdateError> {
        let bytes_max = payload_bytes_max(layout, profile);
        if bytes.len() > bytes_max {
            return Err(ParseUpdateError::TooLong { bytes_max, got: bytes.len() });
        }
        let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(ParseUpdateError::Length { expected: HEADER_BYTES, got: bytes.len() });
        };
        let [version, number, a, b, c, d] = *header;
        if version != VERSION {
            return Err(ParseUpdateError::Version { got: version });
        }
        if number != profile_number(profile) {
            return Err(ParseUpdateError::Profile { expected: profile, got: number });
        }
        let got = u32::from_le_bytes([a, b, c, d]) as usize;
        let chunks = layout.chunk_count();
        if got != chunks {
            return Err(ParseUpdateError::ChunkCount { expected: chunks, got });
        }
        let body = match coding(profile) {
            Coding::Sparse(shape) => {
                let groups = split_groups(body, chunks)?;
                groups
                    .par_iter()
                    .zip(layout.places().par_chunks(GROUP_CHUNKS))
                    .enumerate()
                    .map(|(index, (bytes, places))| {
                        shape.read_group(bytes, places).map_err(|(chunk, reason)| {
                            ParseUpdateError::Chunk { chunk: index * GROUP_CHUNKS + chunk, reason }
                        })
                    })
                    // Collected in order first, so that of several faults the first is named.
                    .collect::<Vec<_>>()
                    .into_iter()
                    .collect::<Result<_, _>>()
                    .map(Body::Sparse)?
            }
            Coding::Dense(kind) => Body::Dense(DenseBody::parse(kind, body, layout)?),
        };
        Ok(Self { profile, chunks, body })
    }

    pub fn profile(&self) -> Profile {
        self.profile
    }

    pub fn chunk_count(&self) -> usize {
        self.chunks
    }

    /// What one chunk says; `None` past the end.
    pub fn chunk(&self, chunk: ChunkIndex) -> Option<ChunkSymbols<'_>> {
        let chunk = chunk.0 as usize;
        (chunk < self.chunks).then(|| ChunkSymbols(self.symbols(chunk)))
    }

    /// Writes the values that one chunk sends, and 0 elsewhere. Returns false past the end.
    pub fn dequantised_chunk(&self, chunk: ChunkIndex, values: &mut [f32; CHUNK]) -> bool {
        let Some(symbols) = self.chunk(chunk) else { return false };
        values.fill(0.0);
        symbols.for_each(|index, value| values[index] = value);
        true
    }

    /// How many values the whole update sends.
    pub fn sent_count(&self) -> usize {
        (0..self.chunks).map(|chunk| ChunkSymbols(self.symbols(chunk)).count()).sum()
    }

    /// The bytes this update came from: parsing what it returns gives this update again.
    ///
    /// # Panics
    /// When `layout` is not the one it was parsed with, or zstd cannot allocate.
    pub fn to_payload(&self, layout: &Layout) -> Payload {
        assert_eq!(layout.chunk_count(), self.chunks, "an update belongs to one layout");
        let pieces = match coding(self.profile) {
            Coding::Sparse(shape) => layout
                .places()
                .chunks(GROUP_CHUNKS)
                .enumerate()
                .map(|(group, places)| {
                    let mut writer = crate::bits::BitWriter::default();
                    for (index, place) in places.iter().enumerate() {
                        let symbols = self.symbols(group * GROUP_CHUNKS + index);
                        shape.write_symbols(&mut writer, place.real, symbols);
                    }
                    writer.finish()
                })
                .collect(),
            Coding::Dense(_) => (0..self.chunks)
                .map(|chunk| {
                    let mut raw = Vec::new();
                    dense::write_chunk(&mut raw, self.symbols(chunk));
                    raw
                })
                .collect(),
        };
        frame(self.profile, self.chunks, pieces).expect("zstd compresses what it was allocated for")
    }

    pub(crate) fn symbols(&self, chunk: usize) -> Symbols<'_> {
        match &self.body {
            Body::Sparse(groups) => groups[chunk / GROUP_CHUNKS].chunk(chunk % GROUP_CHUNKS),
            Body::Dense(body) => body.chunk(chunk),
        }
    }
}

/// No update for this layout and profile is longer, in bytes: a limit for whoever receives one.
pub fn payload_bytes_max(layout: &Layout, profile: Profile) -> usize {
    let body = match coding(profile) {
        Coding::Sparse(shape) => layout
            .places()
            .chunks(GROUP_CHUNKS)
            .map(|places| {
                let bits: usize = places.iter().map(|place| shape.chunk_bits_max(place.real)).sum();
                2 + bits.div_ceil(8)
            })
            .sum(),
        Coding::Dense(kind) => kind.compressed_bytes_max(layout),
    };
    HEADER_BYTES + body
}

/// Puts a header and the groups' bytes (sparse) or chunks' bytes (dense) together.
pub(super) fn frame(
    profile: Profile,
    chunks: usize,
    pieces: Vec<Vec<u8>>,
) -> Result<Payload, std::io::Error> {
    let mut bytes = vec![VERSION, profile_number(profile)];
    let chunk_count = u32::try_from(chunks).expect("a layout has at most 2^32 chunks");
    bytes.extend(chunk_count.to_le_bytes());
    match coding(profile) {
        Coding::Sparse(_) => {
            for group in &pieces {
                let length = u16::try_from(group.len()).expect("64 sparse chunks fit 64 KiB");
                bytes.extend(length.to_le_bytes());
            }
            bytes.extend(pieces.concat());
        }
        Coding::Dense(_) => bytes.extend(dense::compress(&pieces.concat())?),
    }
    Ok(Payload(bytes))
}

/// Cuts a sparse body into its groups.
fn split_groups(body: &[u8], chunks: usize) -> Result<Vec<&[u8]>, ParseUpdateError> {
    let table_bytes = chunks.div_ceil(GROUP_CHUNKS) * 2;
    let Some((table, mut rest)) = body.split_at_checked(table_bytes) else {
        let expected = HEADER_BYTES + table_bytes;
        return Err(ParseUpdateError::Length { expected, got: HEADER_BYTES + body.len() });
    };
    let lengths =
        || table.chunks_exact(2).map(|pair| usize::from(u16::from_le_bytes([pair[0], pair[1]])));
    let expected = HEADER_BYTES + table_bytes + lengths().sum::<usize>();
    let got = HEADER_BYTES + body.len();
    if expected != got {
        return Err(ParseUpdateError::Length { expected, got });
    }
    Ok(lengths()
        .map(|length| {
            let (group, after) = rest.split_at(length);
            rest = after;
            group
        })
        .collect())
}
