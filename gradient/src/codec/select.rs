//! Which values of a chunk are sent: the k of largest magnitude, ties to the lower index.

use super::levels::MAGNITUDE_MIN;
use crate::layout::CHUNK;

/// Values per block when a lower bound of the k-th largest is sought.
const BLOCK: usize = 16;

/// The bits of a float's magnitude: for finite floats they order as the magnitudes do.
pub(crate) fn magnitude_bits(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

/// Room for choosing, kept from chunk to chunk.
#[derive(Debug)]
pub(crate) struct Selection {
    /// Chosen indices, rising.
    chosen: Vec<u16>,
    candidates: Vec<u16>,
    keys: Vec<u32>,
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            chosen: Vec::with_capacity(CHUNK),
            candidates: Vec::with_capacity(CHUNK),
            keys: Vec::with_capacity(CHUNK),
        }
    }
}

impl Selection {
    /// The indices of the at most `count_max` largest magnitudes, rising; zeros (below
    /// [`MAGNITUDE_MIN`]) are never chosen. `values` are finite and at most [`CHUNK`].
    pub(crate) fn choose(&mut self, values: &[f32], count_max: usize) -> &[u16] {
        self.chosen.clear();
        self.find_candidates(values, count_max);
        if self.candidates.len() <= count_max {
            self.chosen.extend_from_slice(&self.candidates);
            return &self.chosen;
        }
        self.keys.clear();
        self.keys.extend(
            self.candidates.iter().map(|&index| magnitude_bits(values[usize::from(index)])),
        );
        let (_, &mut threshold, _) =
            self.keys.select_nth_unstable_by(count_max - 1, |a, b| b.cmp(a));
        let above = self.keys[..count_max].iter().filter(|&&key| key > threshold).count();
        let mut ties = count_max - above;
        for &index in &self.candidates {
            let key = magnitude_bits(values[usize::from(index)]);
            if key > threshold {
                self.chosen.push(index);
            } else if key == threshold && ties > 0 {
                ties -= 1;
                self.chosen.push(index);
            }
        }
        &self.chosen
    }

    /// Every index whose magnitude could be among the `count_max` largest.
    ///
    /// The `count_max`-th largest of the blocks' maxima bounds the `count_max`-th largest value from
    /// below, and only few values more than needed reach it: one branch-free pass instead of a
    /// selection among all 4,096.
    fn find_candidates(&mut self, values: &[f32], count_max: usize) {
        self.keys.clear();
        self.keys.extend(values.chunks(BLOCK).map(|block| {
            block.iter().fold(0, |largest, &value| magnitude_bits(value).max(largest))
        }));
        let floor = magnitude_bits(MAGNITUDE_MIN);
        let bound = if self.keys.len() > count_max {
            let (_, &mut bound, _) =
                self.keys.select_nth_unstable_by(count_max - 1, |a, b| b.cmp(a));
            bound.max(floor)
        } else {
            floor
        };
        self.candidates.clear();
        for (block, block_values) in values.chunks(BLOCK).enumerate() {
            if !block_values.iter().any(|&value| magnitude_bits(value) >= bound) {
                continue;
            }
            for (offset, &value) in block_values.iter().enumerate() {
                if magnitude_bits(value) >= bound {
                    self.candidates.push((block * BLOCK + offset) as u16);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn by_sorting(values: &[f32], count_max: usize) -> Vec<u16> {
        let mut order: Vec<u16> = (0..values.len() as u16)
            .filter(|&index| values[usize::from(index)].abs() >= MAGNITUDE_MIN)
            .collect();
        // A stable sort keeps ties in the order of their indices.
        order.sort_by(|&a, &b| {
            values[usize::from(b)].abs().total_cmp(&values[usize::from(a)].abs())
        });
        order.truncate(count_max);
        order.sort_unstable();
        order
    }

    proptest! {
        #[test]
        fn it_chooses_what_sorting_would(
            values in prop::collection::vec((-20_i32..20).prop_map(|v| v as f32), 1..=CHUNK),
            share in 1_usize..=64,
        ) {
            let count_max = (values.len() / share).max(1);
            let mut selection = Selection::default();
            prop_assert_eq!(
                selection.choose(&values, count_max),
                by_sorting(&values, count_max)
            );
        }
    }

    #[test]
    fn ties_go_to_the_lower_index_and_zeros_stay() {
        let mut values = vec![0.0; CHUNK];
        for index in [7, 99, 100, 4000] {
            values[index] = -0.25;
        }
        values[4095] = 1e-12;
        let mut selection = Selection::default();
        assert_eq!(selection.choose(&values, 2), [7, 99]);
        assert_eq!(selection.choose(&values, 64), [7, 99, 100, 4000]);
        assert_eq!(selection.choose(&[0.0; 10], 1), [0_u16; 0]);
    }
}
