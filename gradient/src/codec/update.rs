//! An update as a validated value, and the one door through which bytes become one.
//!
//! ```text
//! version (1 byte) · profile (1) · number of chunks (4, little-endian) · body
//! sparse body: length of each group of 64 chunks (2 each, little-endian), then the groups
//! dense body:  one zstd frame
//! ```
//! A validated update keeps its bytes, and whoever merges reads them a second time: a sparse update takes
//! less room so than as lists of indices, and reading it is faster than fetching those from memory.

use manyhands_proto::run_file::Profile;
use manyhands_proto::{ChunkIndex, Digest};
use rayon::prelude::*;

use super::dense::{self, DenseBody};
use super::flat12::{self, ListedBody};
use super::sparse::{ChunkError, ReadValues, SparseShape};
use super::symbols::{ChunkScratch, ChunkSymbols, Symbols};
use super::{Coding, GROUP, GROUP_CHUNKS, coding, profile_number};
use crate::aggregate::{TensorNorms, squared};
use crate::bits::BitReader;
use crate::ieee::assert_ieee;
use crate::layout::{CHUNK, ChunkPlace, Layout};

/// 1 had two magnitudes per chunk.
pub(crate) const VERSION: u8 = 2;
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
pub struct Payload(pub(crate) Vec<u8>);

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
    Sparse { shape: SparseShape, groups: Groups },
    Dense(DenseBody),
    Listed(ListedBody),
}

/// A sparse update's bytes, and where its groups lie in them.
#[derive(Debug, Clone, PartialEq)]
struct Groups {
    bytes: Vec<u8>,
    /// One more than there are groups.
    starts: Vec<usize>,
}

impl Groups {
    fn group(&self, group: usize) -> &[u8] {
        &self.bytes[self.starts[group]..self.starts[group + 1]]
    }
}

/// A worker's update, parsed and checked against the layout: indices in bounds, values finite.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    profile: Profile,
    chunks: usize,
    norms: TensorNorms,
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
        let mut norms = TensorNorms::of_chunks(layout, 0, []);
        let body = match coding(profile) {
            Coding::Sparse(shape) => {
                let starts = group_starts(body, chunks)?;
                let groups = Groups { bytes: bytes.to_vec(), starts };
                norms = validate(shape, &groups, layout)?;
                Body::Sparse { shape, groups }
            }
            Coding::Dense(kind) => Body::Dense(DenseBody::parse(kind, body, layout)?),
            Coding::Flat12 => Body::Listed(ListedBody::parse(body, layout)?),
        };
        let mut update = Self { profile, chunks, norms, body };
        if !matches!(update.body, Body::Sparse { .. }) {
            update.norms = TensorNorms::of_chunks(layout, 0, update.map_chunks(layout, squared));
        }
        Ok(update)
    }

    pub fn profile(&self) -> Profile {
        self.profile
    }

    pub fn chunk_count(&self) -> usize {
        self.chunks
    }

    /// The squared norms of what it sends, per tensor.
    pub fn norms(&self) -> &TensorNorms {
        &self.norms
    }

    /// What one chunk says; `None` past the end.
    pub fn chunk<'s>(
        &'s self,
        layout: &'s Layout,
        chunk: ChunkIndex,
        scratch: &'s mut ChunkScratch,
    ) -> Option<ChunkSymbols<'s>> {
        let chunk = chunk.0 as usize;
        let mut reader = (chunk < self.chunks).then(|| self.reader(layout, chunk))?;
        Some(ChunkSymbols(reader.next(scratch)))
    }

    /// Writes the values that one chunk sends, and 0 elsewhere. Returns false past the end.
    pub fn dequantised_chunk(
        &self,
        layout: &Layout,
        chunk: ChunkIndex,
        values: &mut [f32; CHUNK],
    ) -> bool {
        let mut scratch = ChunkScratch::default();
        let Some(symbols) = self.chunk(layout, chunk, &mut scratch) else { return false };
        values.fill(0.0);
        symbols.for_each(|index, value| values[index] = value);
        true
    }

    /// How many values the whole update sends.
    pub fn sent_count(&self, layout: &Layout) -> usize {
        self.map_chunks(layout, |symbols| ChunkSymbols(symbols).count()).iter().sum()
    }

    /// Takes what is sent off a canonical vector, each difference rounded once: how a broadcast leads from
    /// θ_t to θ_{t+1}. The same bits for any number of threads.
    ///
    /// # Panics
    /// When the vector has not the layout's length, or this thread flushes subnormals to zero.
    pub fn subtract_from(&self, layout: &Layout, vector: &mut [f32]) {
        self.for_each_chunk(layout, vector, |symbols, values| {
            symbols.for_each(|index, value| values[index] -= value);
        });
    }

    /// Calls `visit` for every chunk and its values of a canonical vector, in parallel.
    pub(crate) fn for_each_chunk(
        &self,
        layout: &Layout,
        vector: &mut [f32],
        visit: impl Fn(Symbols<'_>, &mut [f32]) + Sync,
    ) {
        layout.assert_covers(vector, "the vector");
        vector.par_chunks_mut(GROUP).enumerate().for_each_init(
            ChunkScratch::default,
            |scratch, (group, values)| {
                assert_ieee();
                let mut reader = self.reader(layout, group * GROUP_CHUNKS);
                for values in values.chunks_exact_mut(CHUNK) {
                    visit(reader.next(scratch), values);
                }
            },
        );
    }

    /// Calls `map` for every chunk, in parallel; its answers in the order of the chunks.
    pub(crate) fn map_chunks<T: Send>(
        &self,
        layout: &Layout,
        map: impl Fn(Symbols<'_>) -> T + Sync,
    ) -> Vec<T> {
        let groups: Vec<Vec<T>> = (0..self.chunks.div_ceil(GROUP_CHUNKS))
            .into_par_iter()
            .map_init(ChunkScratch::default, |scratch, group| {
                assert_ieee();
                let first = group * GROUP_CHUNKS;
                let mut reader = self.reader(layout, first);
                let chunks = first..(first + GROUP_CHUNKS).min(self.chunks);
                chunks.map(|_| map(reader.next(scratch))).collect()
            })
            .collect();
        groups.into_iter().flatten().collect()
    }

    /// Reads one chunk after another, from `first` on.
    ///
    /// # Panics
    /// When `layout` is not the one the update was parsed with.
    pub(crate) fn reader<'a>(&'a self, layout: &'a Layout, first: usize) -> ChunkReader<'a> {
        assert_eq!(layout.chunk_count(), self.chunks, "an update belongs to one layout");
        let mut reader = ChunkReader {
            update: self,
            places: layout.places(),
            next: first,
            bits: BitReader::new(&[]),
        };
        if let Body::Sparse { groups, .. } = &self.body {
            if first < self.chunks {
                reader.bits = BitReader::new(groups.group(first / GROUP_CHUNKS));
            }
            // A chunk's bits begin where those before it in the group end.
            reader.next = first - first % GROUP_CHUNKS;
            let mut scratch = ChunkScratch::default();
            while reader.next < first {
                reader.next(&mut scratch);
            }
        }
        reader
    }
}

/// Reads an update's chunks in order.
#[derive(Debug, Clone)]
pub(crate) struct ChunkReader<'a> {
    update: &'a Update,
    places: &'a [ChunkPlace],
    next: usize,
    bits: BitReader<'a>,
}

impl<'a> ChunkReader<'a> {
    /// What the next chunk says.
    ///
    /// # Panics
    /// Past the last chunk.
    pub(crate) fn next<'s>(&mut self, scratch: &'s mut ChunkScratch) -> Symbols<'s>
    where
        'a: 's,
    {
        let chunk = self.next;
        self.next += 1;
        match &self.update.body {
            Body::Dense(body) => body.chunk(chunk),
            Body::Listed(body) => body.chunk(chunk),
            Body::Sparse { shape, groups } => {
                if chunk.is_multiple_of(GROUP_CHUNKS) {
                    self.bits = BitReader::new(groups.group(chunk / GROUP_CHUNKS));
                }
                let real = self.places[chunk].real;
                let scale = shape.read_again(&mut self.bits, real, &mut scratch.read);
                Symbols::Sparse { scale, signs: scratch.read.signs() }
            }
        }
    }
}

/// Refuses a sparse body that says what the codec does not write; of several faults the first is named.
/// Its norms come out on the way.
fn validate(
    shape: SparseShape,
    groups: &Groups,
    layout: &Layout,
) -> Result<TensorNorms, ParseUpdateError> {
    let squares: Vec<Result<Vec<u128>, ParseUpdateError>> = layout
        .places()
        .par_chunks(GROUP_CHUNKS)
        .enumerate()
        .map_init(ReadValues::default, |scratch, (group, places)| {
            assert_ieee();
            let mut bits = BitReader::new(groups.group(group));
            let chunks = group * GROUP_CHUNKS..;
            let mut squares = Vec::with_capacity(places.len());
            let refused = |chunk, reason| ParseUpdateError::Chunk { chunk, reason };
            for (chunk, place) in chunks.zip(places) {
                let scale = shape
                    .validate(&mut bits, place.real, scratch)
                    .map_err(|reason| refused(chunk, reason))?;
                squares.push(squared(Symbols::Sparse { scale, signs: scratch.signs() }));
            }
            if bits.is_finished() {
                Ok(squares)
            } else {
                let last = group * GROUP_CHUNKS + places.len() - 1;
                Err(refused(last, ChunkError::Trailing))
            }
        })
        .collect();
    let squares: Vec<Vec<u128>> = squares.into_iter().collect::<Result<_, _>>()?;
    Ok(TensorNorms::of_chunks(layout, 0, squares.into_iter().flatten()))
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
        Coding::Flat12 => flat12::body_bytes(layout),
    };
    HEADER_BYTES + body
}

/// Puts a header and the groups' bytes together.
pub(crate) fn frame(
    profile: Profile,
    chunks: usize,
    pieces: &[Vec<u8>],
) -> Result<Payload, std::io::Error> {
    let total: usize = pieces.iter().map(|piece| piece.len() + 2).sum();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + total);
    bytes.extend([VERSION, profile_number(profile)]);
    let chunk_count = u32::try_from(chunks).expect("a layout has at most 2^32 chunks");
    bytes.extend(chunk_count.to_le_bytes());
    match coding(profile) {
        Coding::Sparse(_) => {
            for group in pieces {
                let length = u16::try_from(group.len()).expect("64 sparse chunks fit 64 KiB");
                bytes.extend(length.to_le_bytes());
            }
            for group in pieces {
                bytes.extend(group);
            }
        }
        Coding::Dense(_) => bytes.extend(dense::compress(&pieces.concat())?),
        Coding::Flat12 => pieces.iter().for_each(|piece| bytes.extend(piece)),
    }
    Ok(Payload(bytes))
}

/// Where the groups of a sparse body begin, counted from the update's first byte, and where the last ends.
fn group_starts(body: &[u8], chunks: usize) -> Result<Vec<usize>, ParseUpdateError> {
    let groups = chunks.div_ceil(GROUP_CHUNKS);
    let table_bytes = groups * 2;
    let got = HEADER_BYTES + body.len();
    let Some((table, _)) = body.split_at_checked(table_bytes) else {
        return Err(ParseUpdateError::Length { expected: HEADER_BYTES + table_bytes, got });
    };
    let mut starts = Vec::with_capacity(groups + 1);
    let mut start = HEADER_BYTES + table_bytes;
    starts.push(start);
    for length in table.chunks_exact(2) {
        start += usize::from(u16::from_le_bytes([length[0], length[1]]));
        starts.push(start);
    }
    if start == got { Ok(starts) } else { Err(ParseUpdateError::Length { expected: start, got }) }
}
