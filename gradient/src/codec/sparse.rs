//! The sparse profiles' bits: one chunk, and a group of chunks.
//!
//! A chunk is a header, then its levels (16 bits), then for each value the gap to the one before
//! as a Rice code and two bits of sign and magnitude:
//!
//! ```text
//! 0                                   as many values as allowed, the profile's own Rice parameter
//! 1 ppp 1                             as many as allowed, Rice parameter ppp
//! 1 ppp 0 n…n                         fewer: n values; of none, ppp is 0 and nothing follows
//! ```
//!
//! The Rice parameter is the one that makes the chunk shortest, the lower of equals: the decoder
//! checks it, so a chunk has one byte string. Chunks of a group follow one another without
//! alignment; a group ends on a byte with zero bits.

use super::levels::Levels;
use super::symbols::Symbols;
use crate::bits::{BitError, BitReader, BitWriter, Quotients, RICE_WIDTH};
use crate::layout::{CHUNK, ChunkPlace};

/// Values of a chunk that are kept, and how their gaps are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SparseShape {
    /// Values kept of a whole chunk.
    pub(crate) kept: usize,
    /// The Rice parameter that random indices want: 2^5 and 2^4 are half the mean gap.
    pub(crate) usual_rice: u32,
}

/// Why a chunk's bits were refused.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum ChunkError {
    #[error("expected more bits, the group ended")]
    Ended,
    #[error("expected indices below {real}, got one past it")]
    Index { real: usize },
    #[error("expected fewer than {count_max} values after a short header, got {count}")]
    Count { count_max: usize, count: usize },
    #[error("expected the shortest coding of its values, got a longer one")]
    NotShortest,
    #[error("expected the group to end with this chunk, got more bits")]
    Trailing,
    #[error("expected finite values of magnitude at most {bound}, got {got}")]
    Value { bound: f32, got: f32 },
}

impl SparseShape {
    /// ⌈kept · real / 4096⌉: never 0.
    pub(crate) fn count_max(self, real: usize) -> usize {
        (self.kept * real).div_ceil(CHUNK)
    }

    /// No chunk of `real` values is longer than this.
    pub(crate) fn chunk_bits_max(self, real: usize) -> usize {
        let count = self.count_max(real);
        // The best parameter is no worse than the usual one, whose quotients sum to at most
        // real / 2^parameter.
        let rice = (real >> self.usual_rice) + count * (1 + self.usual_rice as usize);
        1 + RICE_WIDTH as usize + 1 + 13 + 16 + rice + 2 * count
    }

    fn count_width(self, real: usize) -> u32 {
        usize::BITS - (self.count_max(real) - 1).leading_zeros()
    }

    /// The parameter of the shortest coding: a full chunk's header is shorter with the usual one.
    fn shortest_rice(self, quotients: &Quotients, count: usize, full: bool) -> u32 {
        quotients.shortest(count as u32, |parameter| {
            if full && parameter == self.usual_rice { 1 } else { 2 + RICE_WIDTH }
        })
    }

    /// Appends one chunk: its indices rise, are below `real` and at most [`Self::count_max`] many.
    pub(crate) fn write_symbols(self, writer: &mut BitWriter, real: usize, symbols: Symbols<'_>) {
        let Symbols::Sparse { levels, indices, codes } = symbols else {
            unreachable!("a sparse profile makes sparse symbols");
        };
        let count = indices.len();
        let full = count == self.count_max(real);
        let mut quotients = Quotients::default();
        for gap in gaps(indices) {
            quotients.add(gap);
        }
        let rice = self.shortest_rice(&quotients, count, full);
        if full && rice == self.usual_rice {
            writer.put(0, 1);
        } else {
            writer.put(1, 1);
            writer.put(rice, RICE_WIDTH);
            writer.put(u32::from(full), 1);
            if !full {
                writer.put(count as u32, self.count_width(real));
            }
        }
        if count == 0 {
            return;
        }
        writer.put(u32::from(levels.scale), 8);
        writer.put(u32::from(levels.ratio), 8);
        for (gap, &code) in gaps(indices).zip(codes) {
            writer.put_rice(gap, rice);
            writer.put(u32::from(code), 2);
        }
    }

    fn read_chunk(
        self,
        reader: &mut BitReader<'_>,
        real: usize,
        group: &mut SparseGroup,
    ) -> Result<(), ChunkError> {
        let count_max = self.count_max(real);
        let (mut count, mut rice, mut short) = (count_max, self.usual_rice, false);
        let has_long_header = reader.take(1)? == 1;
        if has_long_header {
            rice = reader.take(RICE_WIDTH)?;
            short = reader.take(1)? == 0;
            if short {
                count = reader.take(self.count_width(real))? as usize;
            }
        }
        if short && count >= count_max {
            return Err(ChunkError::Count { count_max, count });
        }
        if has_long_header && !short && rice == self.usual_rice {
            return Err(ChunkError::NotShortest);
        }
        let mut levels = Levels::default();
        let mut quotients = Quotients::default();
        if count > 0 {
            levels.scale = reader.take(8)? as u8;
            levels.ratio = reader.take(8)? as u8;
            let mut next = 0_u32;
            for _ in 0..count {
                let limit =
                    (real as u32).checked_sub(next + 1).ok_or(ChunkError::Index { real })?;
                let gap = reader.take_rice(rice, limit).map_err(|error| match error {
                    BitError::Ended => ChunkError::Ended,
                    BitError::OverLimit => ChunkError::Index { real },
                })?;
                quotients.add(gap);
                group.indices.push((next + gap) as u16);
                group.codes.push(reader.take(2)? as u8);
                next += gap + 1;
            }
        }
        if rice != self.shortest_rice(&quotients, count, !short) {
            return Err(ChunkError::NotShortest);
        }
        group.levels.push(levels);
        group.ends.push(group.indices.len() as u32);
        Ok(())
    }

    /// Reads a whole group; on refusal also says which of its chunks it was.
    pub(crate) fn read_group(
        self,
        bytes: &[u8],
        places: &[ChunkPlace],
    ) -> Result<SparseGroup, (usize, ChunkError)> {
        let mut reader = BitReader::new(bytes);
        let mut group = SparseGroup::default();
        for (index, place) in places.iter().enumerate() {
            self.read_chunk(&mut reader, place.real, &mut group).map_err(|error| (index, error))?;
        }
        if reader.is_finished() { Ok(group) } else { Err((places.len() - 1, ChunkError::Trailing)) }
    }
}

impl From<BitError> for ChunkError {
    /// Plain bits have no limit, so the only way to fail is to end.
    fn from(_: BitError) -> Self {
        Self::Ended
    }
}

/// The sparse symbols of a group's chunks.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct SparseGroup {
    levels: Vec<Levels>,
    /// Where each chunk's values end in `indices` and `codes`.
    ends: Vec<u32>,
    indices: Vec<u16>,
    codes: Vec<u8>,
}

impl SparseGroup {
    pub(crate) fn chunk(&self, index: usize) -> Symbols<'_> {
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        let range = start..self.ends[index] as usize;
        Symbols::Sparse {
            levels: self.levels[index],
            indices: &self.indices[range.clone()],
            codes: &self.codes[range],
        }
    }
}

/// How many values lie between each index and the one before it.
fn gaps(indices: &[u16]) -> impl Iterator<Item = u32> {
    let mut next = 0;
    indices.iter().map(move |&index| {
        let gap = u32::from(index) - next;
        next = u32::from(index) + 1;
        gap
    })
}
