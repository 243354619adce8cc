//! What one chunk says, before it is bits: chosen indices, codes, levels.

use super::levels::Levels;
use super::select::Selection;
use crate::layout::CHUNK;

/// The symbols of one chunk of an update: equal symbols are equal bytes on the wire.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChunkSymbols<'a>(pub(crate) Symbols<'a>);

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Symbols<'a> {
    /// Rising indices and one 2-bit code each.
    Sparse { levels: Levels, indices: &'a [u16], codes: &'a [u8] },
    /// IEEE half precision, one for each real value.
    Half(&'a [u16]),
    /// value = code × step, one code for each real value.
    Byte { step: f32, codes: &'a [i8] },
}

impl Symbols<'_> {
    /// Every value that is sent (never 0), by rising index within the chunk.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(usize, f32)) {
        match *self {
            Self::Sparse { levels, indices, codes } => {
                let values = levels.values();
                for (&index, &code) in indices.iter().zip(codes) {
                    visit(usize::from(index), values[usize::from(code & 3)]);
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

/// Room for coding one chunk after another without allocating.
#[derive(Debug)]
pub struct ChunkScratch {
    pub(super) selection: Selection,
    pub(super) magnitudes: Vec<f32>,
    pub(super) indices: Vec<u16>,
    pub(super) codes: Vec<u8>,
    pub(super) halves: Vec<u16>,
    pub(super) bytes: Vec<i8>,
}

impl Default for ChunkScratch {
    fn default() -> Self {
        Self {
            selection: Selection::default(),
            magnitudes: Vec::with_capacity(CHUNK),
            indices: Vec::with_capacity(CHUNK),
            codes: Vec::with_capacity(CHUNK),
            halves: Vec::with_capacity(CHUNK),
            bytes: Vec::with_capacity(CHUNK),
        }
    }
}
