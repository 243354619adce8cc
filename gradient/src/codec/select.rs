//! Which values of a chunk are sent: the k of largest magnitude, ties to the lower index.

use multiversion::multiversion;

use super::scale::MAGNITUDE_MIN;
use crate::layout::CHUNK;

/// The bits of a float's magnitude: for finite floats they order as the magnitudes do.
pub(crate) const fn magnitude_bits(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

/// e ← β·e + (start − end), each operation rounded once. Returns the largest magnitude, as bits: those of
/// infinity or more if something is not finite.
#[multiversion(targets("x86_64+avx2"))]
pub(super) fn accumulate(error: &mut [f32], (start, end): (&[f32], &[f32]), decay: f32) -> u32 {
    const LANES: usize = 32;
    let mut largest = [0; LANES];
    let ends = start.chunks(LANES).zip(end.chunks(LANES));
    for (error, (start, end)) in error.chunks_mut(LANES).zip(ends) {
        let ends = start.iter().zip(end);
        for ((error, (start, end)), largest) in error.iter_mut().zip(ends).zip(&mut largest) {
            *error = decay * *error + (start - end);
            *largest = magnitude_bits(*error).max(*largest);
        }
    }
    largest.into_iter().fold(0, u32::max)
}

/// `lanes[j]` becomes the largest magnitude among the values at j, j + lanes, j + 2·lanes, …, as bits.
#[multiversion(targets("x86_64+avx2"))]
fn fill_lanes(values: &[f32], lanes: &mut [u32]) {
    lanes.fill(0);
    for values in values.chunks(lanes.len()) {
        for (value, lane) in values.iter().zip(&mut *lanes) {
            *lane = magnitude_bits(*value).max(*lane);
        }
    }
}

/// 1 where a magnitude reaches `bound`, else 0.
#[multiversion(targets("x86_64+avx2"))]
fn mark(values: &[f32], bound: u32, marks: &mut [u8]) {
    for (mark, &value) in marks.iter_mut().zip(values) {
        *mark = u8::from(magnitude_bits(value) >= bound);
    }
}

/// Values whose marks are looked at together.
const MARKS: usize = 64;

/// The places of the marks, rising, into the beginning of `places`, which has room for all of them and
/// `ROOM` more. Returns how many there are.
///
/// Where the next mark is nobody can foresee, and a jump that was foreseen wrongly costs more than ten
/// places: so of each 64 marks `ROOM` places are written, however many there are, and only where there are
/// more is there a jump.
#[multiversion(targets("x86_64+avx2+popcnt+bmi1"))]
fn places_of<const ROOM: usize>(marks: &[[u8; MARKS]], places: &mut [u16]) -> usize {
    let mut found = 0;
    for (block, marks) in marks.iter().enumerate() {
        let mut bits = marks.as_chunks::<8>().0.iter().enumerate().fold(0, |bits, (at, eight)| {
            // Eight bytes of 0 or 1 become eight bits: the product brings each to the highest byte.
            let eight = u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
            bits | eight << (8 * at)
        });
        let count = bits.count_ones() as usize;
        let mut write = |place: &mut u16| {
            *place = (MARKS * block) as u16 + bits.trailing_zeros() as u16;
            bits &= bits.wrapping_sub(1);
        };
        places[found..found + ROOM].iter_mut().for_each(&mut write);
        if count > ROOM {
            places[found + ROOM..found + count].iter_mut().for_each(write);
        }
        found += count;
    }
    found
}

/// Room for choosing, kept from chunk to chunk.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    /// What the last chunk's smallest chosen magnitude was: the next one's is often near. It decides how
    /// fast values are found, never which.
    threshold: u32,
    lanes: Vec<u32>,
    marks: Vec<[u8; MARKS]>,
    /// With room for more than there are.
    candidates: Vec<u16>,
    keys: Vec<u32>,
    /// Chosen indices, rising.
    chosen: Vec<u16>,
}

impl Selection {
    /// The indices of the at most `count_max` largest magnitudes, rising; zeros (below
    /// [`MAGNITUDE_MIN`]) are never chosen. `values` are finite and at most [`CHUNK`].
    pub(super) fn choose(&mut self, values: &[f32], count_max: usize) -> &[u16] {
        // A bound a little below the last threshold should leave little more than is needed.
        let guess = magnitude_bits(f32::from_bits(self.threshold) * 0.9);
        let mut found = self.find_candidates(values, guess, count_max);
        if found < count_max || found > 3 * count_max {
            let bound = self.bound(values, count_max);
            found = self.find_candidates(values, bound, count_max);
        }
        let candidates = &self.candidates[..found];
        if found <= count_max {
            return candidates;
        }
        let key = |index: u16| magnitude_bits(values[usize::from(index)]);
        self.keys.clear();
        self.keys.extend(candidates.iter().map(|&index| key(index)));
        let threshold = nth_largest(&mut self.keys, count_max);
        self.threshold = threshold;
        let above = self.keys[..count_max].iter().filter(|&&key| key > threshold).count();
        let mut ties = count_max - above;
        self.chosen.resize(found, 0);
        let mut chosen = 0;
        for &index in candidates {
            // Without jumps, see `places_of`.
            let is_tie = key(index) == threshold && ties > 0;
            self.chosen[chosen] = index;
            chosen += usize::from(key(index) > threshold || is_tie);
            ties -= usize::from(is_tie);
        }
        &self.chosen[..chosen]
    }

    /// Puts the rising indices at which a magnitude reaches `bound`, zeros never, at the beginning of
    /// `candidates`, and says how many there are. About `expected` are fastest.
    fn find_candidates(&mut self, values: &[f32], bound: u32, expected: usize) -> usize {
        const ROOM_MAX: usize = 16;
        self.marks.resize(CHUNK / MARKS, [0; MARKS]);
        self.candidates.resize(CHUNK + ROOM_MAX, 0);
        let marks = self.marks.as_flattened_mut();
        mark(values, bound.max(magnitude_bits(MAGNITUDE_MIN)), marks);
        marks[values.len()..].fill(0);
        // Of 4,096 values in blocks of 64, a few more than there are in the mean.
        match expected {
            0..=64 => places_of::<4>(&self.marks, &mut self.candidates),
            65..=128 => places_of::<8>(&self.marks, &mut self.candidates),
            _ => places_of::<ROOM_MAX>(&self.marks, &mut self.candidates),
        }
    }

    /// A bound that the `count_max` largest magnitudes reach, and few others: the `count_max`-th largest of
    /// several times as many lanes' largest bounds the `count_max`-th largest of all values from below.
    fn bound(&mut self, values: &[f32], count_max: usize) -> u32 {
        const LANES_PER_VALUE: usize = 4;
        let lanes = LANES_PER_VALUE * count_max;
        if lanes > values.len() {
            return 0;
        }
        self.lanes.resize(lanes, 0);
        fill_lanes(values, &mut self.lanes);
        nth_largest(&mut self.lanes, count_max)
    }
}

/// The `n`-th largest key, n from 1; the first `n` keys are then the largest.
fn nth_largest(keys: &mut [u32], n: usize) -> u32 {
    *keys.select_nth_unstable_by(n - 1, |a, b| b.cmp(a)).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choose(values: &[f32], count_max: usize) -> Vec<u16> {
        Selection::default().choose(values, count_max).to_vec()
    }

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
            kept in prop::sample::select(vec![64_usize, 128, 320, 2048]),
        ) {
            let count_max = (kept * values.len()).div_ceil(CHUNK);
            prop_assert_eq!(choose(&values, count_max), by_sorting(&values, count_max));
        }

        #[test]
        fn what_was_before_never_matters(
            before in prop::collection::vec(-1.0_f32..1.0, 500),
            values in prop::collection::vec(-1.0_f32..1.0, 500),
            scale in prop::sample::select(vec![1e-12_f32, 0.1, 1.0, 1.2, 30.0]),
            count_max in 1_usize..40,
        ) {
            let values: Vec<f32> = values.iter().map(|value| value * scale).collect();
            let mut selection = Selection::default();
            selection.choose(&before, count_max);
            prop_assert_eq!(selection.choose(&values, count_max), by_sorting(&values, count_max));
        }
    }

    #[test]
    fn ties_go_to_the_lower_index_and_zeros_stay() {
        let mut values = vec![0.0; CHUNK];
        for index in [7, 99, 100, 4000] {
            values[index] = -0.25;
        }
        values[4095] = 1e-12;
        assert_eq!(choose(&values, 2), [7, 99]);
        assert_eq!(choose(&values, 64), [7, 99, 100, 4000]);
        assert_eq!(choose(&[0.0; 10], 1), [0_u16; 0]);
    }

    #[test]
    fn accumulating_rounds_each_operation_once() {
        let start: Vec<f32> = (0..CHUNK).map(|i| i as f32 * 0.37).collect();
        let end: Vec<f32> = (0..CHUNK).map(|i| i as f32 * -0.21 + 3.0).collect();
        let before: Vec<f32> = (0..CHUNK).map(|i| (i as f32).sqrt()).collect();
        let mut error = before.clone();
        let largest = accumulate(&mut error, (&start, &end), 0.95);
        for (index, &value) in error.iter().enumerate() {
            let expected = 0.95_f32 * before[index] + (start[index] - end[index]);
            assert_eq!(value.to_bits(), expected.to_bits(), "{index}");
        }
        let largest_of_all = error.iter().map(|&value| magnitude_bits(value)).max();
        assert_eq!(Some(largest), largest_of_all);
        assert!(accumulate(&mut [f32::NAN], (&[0.0], &[0.0]), 0.95) >= f32::INFINITY.to_bits());
    }
}
