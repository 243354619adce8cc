//! The merged update: sparse values over an interval of chunks, and its bytes.
//!
//! ```text
//! version (1 byte) · first chunk (4, little-endian) · number of chunks (4)
//! · length of each group of 64 chunks (4 each), then the groups
//! chunk: count (13 bits); of none nothing follows; Rice parameter (3), then for each value
//!        the gap to the one before as a Rice code and the 32 bits of an f32
//! ```
//! Lossless, and canonical: the Rice parameter is the best one, zeros are not written.

use std::ops::Range;

use manyhands_proto::Digest;
use rayon::prelude::*;

use crate::bits::{BitError, BitReader, BitWriter, Quotients, RICE_WIDTH};
use crate::codec::GROUP_CHUNKS;
use crate::layout::{CHUNK, ChunkPlace, Layout};

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 9;
const COUNT_WIDTH: u32 = 13;

/// No merged value is larger: a mean of values of at most 16, or the difference of two such.
pub const AGGREGATE_MAGNITUDE_MAX: f32 = 64.0;

/// Why bytes are not an aggregate of the layout.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ParseAggregateError {
    #[error("expected at most {bytes_max} bytes for this slice, got {got}")]
    TooLong { bytes_max: usize, got: usize },
    #[error("expected {expected} bytes, got {got}")]
    Length { expected: usize, got: usize },
    #[error("expected aggregate version {VERSION}, got {got}")]
    Version { got: u8 },
    #[error("expected chunks {expected:?}, got {got:?}")]
    Slice { expected: Range<usize>, got: Range<usize> },
    #[error("chunk {chunk}: {reason}")]
    Chunk { chunk: usize, reason: AggregateChunkError },
}

/// Why a chunk of an aggregate was refused.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum AggregateChunkError {
    #[error("expected more bits, the group ended")]
    Ended,
    #[error("expected the group to end with this chunk, got more bits")]
    Trailing,
    #[error("expected indices below {real}, got one past it")]
    Index { real: usize },
    #[error("expected the shortest coding of its values, got a longer one")]
    NotShortest,
    #[error(
        "expected values other than 0 of magnitude at most {AGGREGATE_MAGNITUDE_MAX}, got {got}"
    )]
    Value { got: f32 },
}

/// Merged values of an interval of chunks: the whole vector, or a slice.
#[derive(Debug, Clone, PartialEq)]
pub struct Aggregate {
    first: usize,
    /// Where each chunk's values end.
    ends: Vec<usize>,
    indices: Vec<u16>,
    values: Vec<f32>,
}

impl Aggregate {
    pub(super) fn empty(first: usize) -> Self {
        Self { first, ends: Vec::new(), indices: Vec::new(), values: Vec::new() }
    }

    /// Appends the next chunk's values other than 0, by rising index.
    pub(super) fn push_chunk(&mut self, values: impl Iterator<Item = (usize, f32)>) {
        for (index, value) in values {
            if value != 0.0 {
                self.indices.push(index as u16);
                self.values.push(value);
            }
        }
        self.ends.push(self.indices.len());
    }

    /// Appends the slice that follows this one.
    ///
    /// # Panics
    /// When it does not begin where this one ends.
    pub fn append(&mut self, next: &Self) {
        assert_eq!(next.first, self.chunks().end, "slices are joined in order");
        let offset = self.indices.len();
        self.ends.extend(next.ends.iter().map(|end| offset + end));
        self.indices.extend_from_slice(&next.indices);
        self.values.extend_from_slice(&next.values);
    }

    /// The chunks it covers.
    pub fn chunks(&self) -> Range<usize> {
        self.first..self.first + self.ends.len()
    }

    /// How many values are not 0.
    pub fn value_count(&self) -> usize {
        self.values.len()
    }

    /// The indices (within the chunk) and values of one chunk; empty outside [`Self::chunks`].
    pub fn chunk(&self, chunk: usize) -> impl Iterator<Item = (usize, f32)> {
        let range = match chunk.checked_sub(self.first) {
            Some(at) if at < self.ends.len() => {
                let start = if at == 0 { 0 } else { self.ends[at - 1] };
                start..self.ends[at]
            }
            Some(_) | None => 0..0,
        };
        let indices = self.indices[range.clone()].iter().map(|&index| usize::from(index));
        indices.zip(self.values[range].iter().copied())
    }

    /// self − other, each difference rounded once; both cover the same chunks.
    ///
    /// # Panics
    /// When they do not.
    pub fn minus(&self, other: &Self) -> Self {
        assert_eq!(self.chunks(), other.chunks(), "a difference needs the same chunks");
        let mut difference = Self::empty(self.first);
        let mut dense = vec![0.0_f32; CHUNK];
        for chunk in self.chunks() {
            dense.fill(0.0);
            for (index, value) in self.chunk(chunk) {
                dense[index] = value;
            }
            for (index, value) in other.chunk(chunk) {
                dense[index] -= value;
            }
            difference.push_chunk(dense.iter().copied().enumerate());
        }
        difference
    }

    /// Plain BLAKE3 of [`Self::to_bytes`].
    pub fn digest(&self) -> Digest {
        Digest::of(&self.to_bytes())
    }

    /// The canonical bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let chunks: Vec<usize> = self.chunks().collect();
        let groups: Vec<Vec<u8>> = chunks
            .par_chunks(GROUP_CHUNKS)
            .map(|chunks| {
                let mut writer = BitWriter::default();
                for &chunk in chunks {
                    self.write_chunk(&mut writer, chunk);
                }
                writer.finish()
            })
            .collect();
        let word = |value: usize| {
            u32::try_from(value).expect("chunk numbers and group lengths fit 32 bits").to_le_bytes()
        };
        let mut bytes = vec![VERSION];
        bytes.extend(word(self.first));
        bytes.extend(word(self.ends.len()));
        bytes.extend(groups.iter().flat_map(|group| word(group.len())));
        bytes.extend(groups.concat());
        bytes
    }

    fn write_chunk(&self, writer: &mut BitWriter, chunk: usize) {
        let count = self.chunk(chunk).count() as u32;
        writer.put(count, COUNT_WIDTH);
        if count == 0 {
            return;
        }
        let mut quotients = Quotients::default();
        let mut next = 0;
        for (index, _) in self.chunk(chunk) {
            quotients.add(index as u32 - next);
            next = index as u32 + 1;
        }
        let rice = quotients.shortest(count, |_| 0);
        writer.put(rice, RICE_WIDTH);
        next = 0;
        for (index, value) in self.chunk(chunk) {
            writer.put_rice(index as u32 - next, rice);
            writer.put(value.to_bits(), 32);
            next = index as u32 + 1;
        }
    }

    /// Reads an aggregate that must cover exactly `slice`. What it allocates is bounded by the layout
    /// and by the bytes that came.
    ///
    /// # Errors
    /// When the bytes are not what [`Self::to_bytes`] writes for some values of this slice.
    ///
    /// # Panics
    /// When `slice` ends past the layout.
    pub fn parse(
        bytes: &[u8],
        layout: &Layout,
        slice: Range<usize>,
    ) -> Result<Self, ParseAggregateError> {
        let places = &layout.places()[slice.clone()];
        let bytes_max = aggregate_bytes_max(places);
        if bytes.len() > bytes_max {
            return Err(ParseAggregateError::TooLong { bytes_max, got: bytes.len() });
        }
        let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(ParseAggregateError::Length { expected: HEADER_BYTES, got: bytes.len() });
        };
        let &[version, f0, f1, f2, f3, n0, n1, n2, n3] = header;
        if version != VERSION {
            return Err(ParseAggregateError::Version { got: version });
        }
        let first = u32::from_le_bytes([f0, f1, f2, f3]) as usize;
        let got = first..first + u32::from_le_bytes([n0, n1, n2, n3]) as usize;
        if got != slice {
            return Err(ParseAggregateError::Slice { expected: slice, got });
        }
        let groups = split_groups(body, places.len())?;
        let parts: Vec<Result<Self, ParseAggregateError>> = groups
            .par_iter()
            .zip(places.par_chunks(GROUP_CHUNKS))
            .enumerate()
            .map(|(group, (bytes, places))| read_group(first + group * GROUP_CHUNKS, bytes, places))
            .collect();
        let mut aggregate = Self::empty(first);
        for part in parts {
            aggregate.append(&part?);
        }
        Ok(aggregate)
    }
}

/// No aggregate of these chunks is longer, in bytes.
fn aggregate_bytes_max(places: &[ChunkPlace]) -> usize {
    let groups = places.chunks(GROUP_CHUNKS).map(|places| {
        // With parameter 0 all gaps together cost at most a bit per real value, beside their ends;
        // the best parameter costs no more.
        let bits: usize = places.iter().map(|place| 16 + place.real * (32 + 2)).sum();
        4 + bits.div_ceil(8)
    });
    HEADER_BYTES + groups.sum::<usize>()
}

fn split_groups(body: &[u8], chunks: usize) -> Result<Vec<&[u8]>, ParseAggregateError> {
    let table_bytes = chunks.div_ceil(GROUP_CHUNKS) * 4;
    let Some((table, mut rest)) = body.split_at_checked(table_bytes) else {
        let expected = HEADER_BYTES + table_bytes;
        return Err(ParseAggregateError::Length { expected, got: HEADER_BYTES + body.len() });
    };
    let lengths: Vec<usize> = table
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]) as usize)
        .collect();
    let expected = HEADER_BYTES + table_bytes + lengths.iter().sum::<usize>();
    let got = HEADER_BYTES + body.len();
    if expected != got {
        return Err(ParseAggregateError::Length { expected, got });
    }
    let mut groups = Vec::with_capacity(lengths.len());
    for length in lengths {
        let (group, after) = rest.split_at(length);
        groups.push(group);
        rest = after;
    }
    Ok(groups)
}

fn read_group(
    first: usize,
    bytes: &[u8],
    places: &[ChunkPlace],
) -> Result<Aggregate, ParseAggregateError> {
    let mut reader = BitReader::new(bytes);
    let mut group = Aggregate::empty(first);
    for (index, place) in places.iter().enumerate() {
        let chunk = first + index;
        read_chunk(&mut reader, place.real, &mut group)
            .map_err(|reason| ParseAggregateError::Chunk { chunk, reason })?;
    }
    if reader.is_finished() {
        Ok(group)
    } else {
        let chunk = group.chunks().end - 1;
        Err(ParseAggregateError::Chunk { chunk, reason: AggregateChunkError::Trailing })
    }
}

fn read_chunk(
    reader: &mut BitReader<'_>,
    real: usize,
    group: &mut Aggregate,
) -> Result<(), AggregateChunkError> {
    let count = reader.take(COUNT_WIDTH)?;
    if count > 0 {
        let rice = reader.take(RICE_WIDTH)?;
        let mut quotients = Quotients::default();
        let mut next = 0_u32;
        for _ in 0..count {
            let past = AggregateChunkError::Index { real };
            let limit = (real as u32).checked_sub(next + 1).ok_or(past)?;
            let gap = reader.take_rice(rice, limit).map_err(|error| match error {
                BitError::Ended => AggregateChunkError::Ended,
                BitError::OverLimit => past,
            })?;
            quotients.add(gap);
            let value = f32::from_bits(reader.take(32)?);
            if value.is_nan() || value.abs() > AGGREGATE_MAGNITUDE_MAX || value == 0.0 {
                return Err(AggregateChunkError::Value { got: value });
            }
            group.indices.push((next + gap) as u16);
            group.values.push(value);
            next += gap + 1;
        }
        if rice != quotients.shortest(count, |_| 0) {
            return Err(AggregateChunkError::NotShortest);
        }
    }
    group.ends.push(group.indices.len());
    Ok(())
}

impl From<BitError> for AggregateChunkError {
    /// Plain bits have no limit, so the only way to fail is to end.
    fn from(_: BitError) -> Self {
        Self::Ended
    }
}
