//! The sparse profiles' bits: one chunk, and a group of chunks.
//!
//! A chunk is a header, then its scale (8 bits), then the gap of each value to the one before as a Rice code
//! of parameter p: of all gaps first gap / 2^p zeros and a one, then of all gaps the lowest p bits, each
//! followed by the value's sign (1: negative). The header:
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

use multiversion::multiversion;

use super::scale::Scale;
use super::symbols::{LANES, ONES, SignedIndex};
use crate::bits::{
    BATCH, BitError, BitReader, BitWriter, RICE_PARAMETER_MAX, RICE_WIDTH, shortest_rice,
};
use crate::layout::CHUNK;

/// More values are not kept of a chunk: their indices, right or wrong, are summed in 16 bits.
const KEPT_MAX: usize = 400;
const _: () = assert!((KEPT_MAX << RICE_PARAMETER_MAX) + CHUNK + KEPT_MAX < 1 << 16);

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

/// What stands before a chunk's values.
#[derive(Debug, Clone, Copy)]
struct Header {
    count: usize,
    rice: u32,
    /// Whether the count was told.
    short: bool,
}

/// Bits of a scale.
const SCALE_WIDTH: u32 = 8;
/// Bits of a sign.
const SIGN_WIDTH: u32 = 1;

impl SparseShape {
    /// # Panics
    /// When more than [`KEPT_MAX`] values would be kept.
    pub(crate) const fn new(kept: usize, usual_rice: u32) -> Self {
        assert!(kept <= KEPT_MAX);
        Self { kept, usual_rice }
    }

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
        let header = 2 + RICE_WIDTH + self.count_width(real) + SCALE_WIDTH;
        header as usize + rice + count * SIGN_WIDTH as usize
    }

    fn count_width(self, real: usize) -> u32 {
        usize::BITS - (self.count_max(real) - 1).leading_zeros()
    }

    /// The parameter of the shortest coding: a full chunk's header is shorter with the usual one.
    fn rice(self, gaps: &[u16], full: bool) -> u32 {
        shortest_rice(
            gaps,
            |parameter| {
                if full && parameter == self.usual_rice { 1 } else { 2 + RICE_WIDTH }
            },
        )
    }

    /// Appends one chunk: its indices rise, are below `real` and at most [`Self::count_max`] many.
    pub(crate) fn write(
        self,
        writer: &mut BitWriter,
        real: usize,
        scale: Scale,
        signs: &[SignedIndex],
        gaps: &mut Vec<u16>,
    ) {
        gaps.clear();
        let mut next = 0;
        gaps.extend(signs.iter().map(|sign| {
            let index = sign.index() as u16;
            let gap = index - next;
            next = index + 1;
            gap
        }));
        let count = signs.len();
        let full = count == self.count_max(real);
        let rice = self.rice(gaps, full);
        if full && rice == self.usual_rice {
            writer.put(0, 1);
        } else {
            writer.put(1, 1);
            writer.put(rice, RICE_WIDTH);
            writer.put(u32::from(full), 1);
            let width = self.count_width(real);
            if !full && width > 0 {
                writer.put(count as u32, width);
            }
        }
        if count == 0 {
            return;
        }
        writer.put(u32::from(scale.0), SCALE_WIDTH);
        for &gap in &*gaps {
            writer.put_unary(u32::from(gap) >> rice);
        }
        for (&gap, sign) in gaps.iter().zip(signs) {
            let remainder = u32::from(gap) & ((1 << rice) - 1);
            let negative = u32::from(sign.is_negative());
            writer.put(remainder << SIGN_WIDTH | negative, rice + SIGN_WIDTH);
        }
    }

    /// Reads one chunk of `real` values, refusing all that [`Self::write`] does not write.
    ///
    /// # Errors
    /// [`ChunkError`].
    pub(crate) fn validate(
        self,
        reader: &mut BitReader<'_>,
        real: usize,
        read: &mut ReadValues,
    ) -> Result<Scale, ChunkError> {
        let header = self.read_header(reader, real)?;
        let scale = self.read(header, reader, real, read)?;
        let gaps = read.gaps(header);
        if header.rice == self.rice(gaps, !header.short) {
            Ok(scale)
        } else {
            Err(ChunkError::NotShortest)
        }
    }

    /// Reads one chunk of `real` values that was validated before.
    ///
    /// # Panics
    /// When it was not.
    pub(crate) fn read_again(
        self,
        reader: &mut BitReader<'_>,
        real: usize,
        read: &mut ReadValues,
    ) -> Scale {
        self.read_header(reader, real)
            .and_then(|header| self.read(header, reader, real, read))
            .expect("an update was validated when it was parsed")
    }

    fn read_header(self, reader: &mut BitReader<'_>, real: usize) -> Result<Header, ChunkError> {
        let count_max = self.count_max(real);
        let (mut count, mut rice, mut short) = (count_max, self.usual_rice, false);
        let has_long_header = reader.take(1)? == 1;
        if has_long_header {
            rice = reader.take(RICE_WIDTH)?;
            short = reader.take(1)? == 0;
            if short {
                let width = self.count_width(real);
                count = if width == 0 { 0 } else { reader.take(width)? as usize };
            }
        }
        if short && count >= count_max {
            return Err(ChunkError::Count { count_max, count });
        }
        if has_long_header && !short && rice == self.usual_rice {
            return Err(ChunkError::NotShortest);
        }
        Ok(Header { count, rice, short })
    }

    /// What stands behind the header.
    fn read(
        self,
        Header { count, rice, .. }: Header,
        reader: &mut BitReader<'_>,
        real: usize,
        read: &mut ReadValues,
    ) -> Result<Scale, ChunkError> {
        let scale = if count > 0 { Scale(reader.take(SCALE_WIDTH)? as u8) } else { Scale(0) };
        read_values(reader, (count, rice, real), read)?;
        Ok(scale)
    }
}

/// The values of a chunk, as they were read, and room to read them in.
#[derive(Debug, Default)]
pub(crate) struct ReadValues {
    /// Places and signs.
    signs: Vec<SignedIndex>,
    count: usize,
    /// Of the gaps' quotients, up to each.
    sums: Vec<u16>,
    /// The gaps' remainders, each with a sign behind it.
    behind: Vec<u16>,
    gaps: Vec<u16>,
}

impl ReadValues {
    pub(crate) fn signs(&self) -> &[SignedIndex] {
        &self.signs[..self.count]
    }

    fn gaps(&mut self, Header { count, rice, .. }: Header) -> &[u16] {
        let before = std::iter::once(&0).chain(&self.sums);
        let quotients = self.sums[..count].iter().zip(before).map(|(sum, before)| sum - before);
        let gap = |(quotient, behind): (u16, &u16)| quotient << rice | behind >> SIGN_WIDTH;
        self.gaps.clear();
        self.gaps.extend(quotients.zip(&self.behind).map(gap));
        &self.gaps
    }
}

impl From<BitError> for ChunkError {
    /// Plain bits have no limit, so the only way to fail is to end.
    fn from(_: BitError) -> Self {
        Self::Ended
    }
}

/// Reads the places and signs of `count` values.
#[multiversion(targets("x86_64+avx2+lzcnt+popcnt+bmi1+bmi2"))]
fn read_values(
    reader: &mut BitReader<'_>,
    (count, rice, real): (usize, u32, usize),
    ReadValues { signs, count: read, sums, behind, .. }: &mut ReadValues,
) -> Result<(), ChunkError> {
    let past = ChunkError::Index { real };
    let room = count + BATCH;
    if sums.len() < room {
        sums.resize(room, 0);
        behind.resize(room, 0);
        signs.resize(room, SignedIndex::default());
    }
    *read = count;
    reader.take_unary(count, sums, (real >> rice) as u16).map_err(|error| match error {
        BitError::Ended => ChunkError::Ended,
        BitError::OverLimit => past,
    })?;
    reader.take_all(&mut behind[..count], rice + SIGN_WIDTH)?;
    // An index is what the gaps up to it sum to, quotients (known) and remainders, and how many came before it. No profile
    // keeps so many values that this passes 2^16; lanes behind the last value hold anything, and disturb none before them.
    let (mut before, mut numbers) = (0_u64, 0x0003_0002_0001_0000_u64);
    let lanes = sums.as_chunks::<LANES>().0.iter().zip(behind.as_chunks::<LANES>().0);
    let lanes = lanes.zip(signs.as_chunks_mut::<LANES>().0).take(count.div_ceil(LANES));
    let mut indices = 0;
    for ((&sums, &behind), signs) in lanes {
        let (sums, behind) = (pack(sums), pack(behind));
        let remainders = (behind >> SIGN_WIDTH) & (ONES * 0x7fff);
        let summed = remainders.wrapping_mul(ONES);
        indices = summed
            .wrapping_add(before.wrapping_mul(ONES))
            .wrapping_add(sums << rice)
            .wrapping_add(numbers);
        *signs = SignedIndex::of_lanes(indices, behind);
        before += summed >> 48;
        numbers += ONES * LANES as u64;
    }
    let Some(last) = count.checked_sub(1) else { return Ok(()) };
    // Indices rise: whatever index is past the end, the last one is.
    let last = (indices >> (last % LANES * 16)) as u16;
    if usize::from(last) < real { Ok(()) } else { Err(past) }
}

/// The first in the lowest bits.
#[inline(always)]
fn pack([a, b, c, d]: [u16; LANES]) -> u64 {
    u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48
}
