//! What one chunk says, before it is bits.

use super::scale::Scale;
use super::select::Selection;
use super::sparse::ReadValues;
use crate::layout::CHUNK;

/// The symbols of one chunk of an update: equal symbols are equal bytes on the wire.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChunkSymbols<'a>(pub(crate) Symbols<'a>);

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Symbols<'a> {
    /// One magnitude, and where it is sent with which sign.
    Sparse { scale: Scale, signs: &'a [SignedIndex] },
    /// IEEE half precision, one for each real value.
    Half(&'a [u16]),
    /// value = code × step, one code for each real value.
    Byte { step: f32, codes: &'a [i8] },
    /// Any values, by rising index.
    Listed { indices: &'a [u16], values: &'a [f32] },
}

/// Numbers of 16 bits that a `u64` holds, the first in the lowest bits.
pub(crate) const LANES: usize = 4;
/// One in each lane: a product with it is the sum of each lane and those before it.
pub(crate) const ONES: u64 = 0x0001_0001_0001_0001;

/// An index within a chunk and a sign: bits 0 to 11, and bit 15 (set: negative).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SignedIndex(u16);

impl SignedIndex {
    const SIGN: u16 = 1 << 15;
    const INDEX: u16 = CHUNK as u16 - 1;

    pub(crate) fn new(index: u16, negative: bool) -> Self {
        debug_assert!(index <= Self::INDEX);
        Self(index | if negative { Self::SIGN } else { 0 })
    }

    /// One for each lane: of an index the lowest 12 bits count, of a sign the lowest bit (1: negative).
    #[inline(always)]
    pub(crate) fn of_lanes(indices: u64, signs: u64) -> [Self; LANES] {
        let lanes =
            indices & (ONES * Self::INDEX as u64) | signs << 15 & (ONES * Self::SIGN as u64);
        std::array::from_fn(|lane| Self((lanes >> (16 * lane)) as u16))
    }

    /// Below [`CHUNK`].
    pub(crate) fn index(self) -> usize {
        usize::from(self.0 & Self::INDEX)
    }

    pub(crate) fn is_negative(self) -> bool {
        self.0 & Self::SIGN != 0
    }

    /// `magnitude` with this sign.
    pub(crate) fn of(self, magnitude: f32) -> f32 {
        f32::from_bits(magnitude.to_bits() ^ u32::from(self.0 & Self::SIGN) << 16)
    }
}

impl Symbols<'_> {
    /// Every value that is sent (never 0), by rising index within the chunk.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(usize, f32)) {
        match *self {
            Self::Sparse { scale, signs } => {
                let magnitude = scale.magnitude();
                for sign in signs {
                    visit(sign.index(), sign.of(magnitude));
                }
            }
            Self::Half(halves) => {
                for (index, &bits) in halves.iter().enumerate() {
                    let value = half::f16::from_bits(bits).to_f32();
                    if value != 0.0 {
                        visit(index, value);
                    }
                }
            }
            Self::Byte { step, codes } => {
                for (index, &code) in codes.iter().enumerate() {
                    if code != 0 {
                        visit(index, f32::from(code) * step);
                    }
                }
            }
            Self::Listed { indices, values } => {
                for (&index, &value) in indices.iter().zip(values) {
                    visit(usize::from(index), value);
                }
            }
        }
    }
}

impl ChunkSymbols<'_> {
    /// Every value that is sent, by rising index within the chunk; never 0.
    pub fn for_each(&self, visit: impl FnMut(usize, f32)) {
        self.0.for_each(visit);
    }

    /// How many values are sent.
    pub fn count(&self) -> usize {
        let mut count = 0;
        self.0.for_each(|_, _| count += 1);
        count
    }
}

/// Room for coding or reading one chunk after another without allocating.
#[derive(Debug, Default)]
pub struct ChunkScratch {
    pub(super) selection: Selection,
    pub(super) signs: Vec<SignedIndex>,
    pub(super) gaps: Vec<u16>,
    pub(super) read: ReadValues,
    pub(super) halves: Vec<u16>,
    pub(super) bytes: Vec<i8>,
}
