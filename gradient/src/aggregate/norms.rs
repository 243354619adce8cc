//! Squared norms per tensor, as integers: partial sums of slices add exactly.

use std::ops::Range;

use crate::codec::{ChunkScratch, Symbols, Update};
use crate::layout::Layout;

/// 2⁷², the units in 1. A sent value is at most 16, a vector has at most 2⁴⁴ values:
/// 2⁸ · 2⁴⁴ · 2⁷² fits 128 bits.
pub(super) const UNITS: f64 = 4_722_366_482_869_645_213_696.0;

/// For each tensor the sum of squares of what an update sends, in units of 2⁻⁷².
///
/// Squares under the unit (magnitudes under 2⁻³⁶) are lost; they are no part of any norm that matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorNorms(Vec<u128>);

impl TensorNorms {
    /// The part of the norms that a slice (an interval of chunks) contributes. Those of a whole update are
    /// [`Update::norms`].
    ///
    /// # Panics
    /// When the update belongs to another layout or the slice ends past it.
    pub fn of_slice(layout: &Layout, update: &Update, slice: Range<usize>) -> Self {
        let mut scratch = ChunkScratch::default();
        let mut reader = update.reader(layout, slice.start);
        let squares = slice.clone().map(|_| squared(reader.next(&mut scratch)));
        Self::of_chunks(layout, slice.start, squares)
    }

    /// From the squared norms of consecutive chunks.
    pub(crate) fn of_chunks(
        layout: &Layout,
        first: usize,
        squares: impl IntoIterator<Item = u128>,
    ) -> Self {
        let mut norms = Self(vec![0; layout.tensors().len()]);
        for (square, place) in squares.into_iter().zip(&layout.places()[first..]) {
            norms.0[place.tensor] += square;
        }
        norms
    }

    /// Adds another slice's part.
    ///
    /// # Panics
    /// When the two belong to different layouts.
    pub fn add(&mut self, part: &Self) {
        assert_eq!(self.0.len(), part.0.len(), "norms of one layout");
        for (sum, part) in self.0.iter_mut().zip(&part.0) {
            *sum += part;
        }
    }

    /// One sum of squares for each of the layout's tensors, in units of 2⁻⁷².
    pub fn squared(&self) -> &[u128] {
        &self.0
    }
}

/// The squared norm of what a chunk says, in units of 2⁻⁷².
pub(crate) fn squared(symbols: Symbols<'_>) -> u128 {
    if let Symbols::Sparse { scale, signs } = symbols {
        return squared_units(scale.magnitude()) * signs.len() as u128;
    }
    let mut sum = 0;
    symbols.for_each(|_, value| sum += squared_units(value));
    sum
}

/// v² in units of 2⁻⁷², rounded down. A float's square fits the 53 bits of an f64 and the
/// multiplication by a power of two is exact, so there is one rounding.
fn squared_units(value: f32) -> u128 {
    let value = f64::from(value);
    (value * value * UNITS) as u128
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squares_are_exact_where_they_have_room() {
        assert_eq!(UNITS, 2.0_f64.powi(72));
        assert_eq!(squared_units(-16.0), 1 << 80);
        assert_eq!(squared_units(0.5), 1 << 70);
        assert_eq!(squared_units(2.0_f32.powi(-36)), 1);
        assert_eq!(squared_units(2.0_f32.powi(-37)), 0);
    }
}
