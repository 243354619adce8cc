//! The published wire of SparseLoCo, for comparison: blocks of 64 × 64, a quantiser of four bins per
//! tensor, indices of 12 bits. After <https://arxiv.org/abs/2508.15706> and its reference code.
//!
//! A matrix is cut into blocks whose sides are the largest divisors up to 64 of its own; any other tensor
//! into stretches of the largest divisor up to 64. Of a block of n values k = n·64/4096 are sent, rounded,
//! then up to an even number of at least 2 (as far as there are so many): two indices share three bytes.
//! With v the sent values of a tensor, shift their mean and s their standard deviation,
//! bin(v) = round((v − shift)/1.5s + 2) held between 0 and 3, and v̂ = shift + the mean of v − shift in its bin.
//!
//! ```text
//! for each tensor: shift, four bin means (4 bytes each, little-endian) · bins (2 bits each, from the lowest)
//!                  · indices within the block (12 bits each, two in three bytes), rising, block after block
//! ```
//! A tensor's statistics need all of it, so no chunk of such an update can be checked alone, and one update has
//! more than one byte string (the mean of an empty bin is any number): for experiments, not for runs.

use super::sparse::ChunkError;
use super::symbols::Symbols;
use super::update::ParseUpdateError;
use crate::layout::{CHUNK, Layout, Tensor};

/// Values sent of 4,096.
pub(super) const KEPT: usize = 64;
const SIDE_MAX: usize = 64;
const BINS: usize = 4;
const STATISTICS_BYTES: usize = 4 * (1 + BINS);
/// No value is larger, so that norms have room: as in the dense profiles.
const MAGNITUDE_MAX: f32 = 16.0;

/// How a tensor is cut into blocks.
#[derive(Debug, Clone, Copy)]
struct Blocks {
    columns: usize,
    block_rows: usize,
    block_columns: usize,
    count: usize,
    kept: usize,
}

impl Blocks {
    fn of(tensor: &Tensor) -> Self {
        let (rows, columns) = match *tensor.shape() {
            [rows, columns] => (rows, columns),
            _ => (1, tensor.elements()),
        };
        let (block_rows, block_columns) = (side(rows), side(columns));
        let length = block_rows * block_columns;
        let share = (length * KEPT + CHUNK / 2) / CHUNK;
        let kept = share.max(1).next_multiple_of(2).min(length);
        Self { columns, block_rows, block_columns, count: tensor.elements() / length, kept }
    }

    /// Where element `index` of a block lies within the tensor.
    fn offset(self, block: usize, index: usize) -> usize {
        let across = self.columns / self.block_columns;
        let row = block / across * self.block_rows + index / self.block_columns;
        let column = block % across * self.block_columns + index % self.block_columns;
        row * self.columns + column
    }

    fn length(self) -> usize {
        self.block_rows * self.block_columns
    }

    fn sent(self) -> usize {
        self.count * self.kept
    }

    fn bytes(self) -> usize {
        STATISTICS_BYTES + (2 * self.sent()).div_ceil(8) + (12 * self.sent()).div_ceil(8)
    }
}

/// The largest divisor up to 64.
fn side(length: usize) -> usize {
    (1..=SIDE_MAX.min(length)).rev().find(|&side| length.is_multiple_of(side)).unwrap_or(1)
}

/// Bytes of any body for this layout.
pub(super) fn body_bytes(layout: &Layout) -> usize {
    layout.tensors().iter().map(|tensor| Blocks::of(tensor).bytes()).sum()
}

/// Quantises `error` in place to what is left of it. Its values are finite.
pub(super) fn encode(layout: &Layout, error: &mut [f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(body_bytes(layout));
    for tensor in layout.tensors() {
        encode_tensor(Blocks::of(tensor), &mut error[tensor.range()], &mut bytes);
    }
    bytes
}

fn encode_tensor(blocks: Blocks, error: &mut [f32], bytes: &mut Vec<u8>) {
    let mut indices = Vec::with_capacity(blocks.sent());
    let mut offsets = Vec::with_capacity(blocks.sent());
    let mut order: Vec<u16> = Vec::with_capacity(blocks.length());
    for block in 0..blocks.count {
        let magnitude = |index: u16| error[blocks.offset(block, usize::from(index))].abs();
        order.clear();
        order.extend(0..blocks.length() as u16);
        // Stable: ties stay in the order of their indices.
        order.sort_by(|&a, &b| magnitude(b).total_cmp(&magnitude(a)));
        order.truncate(blocks.kept);
        order.sort_unstable();
        indices.extend_from_slice(&order);
        offsets.extend(order.iter().map(|&index| blocks.offset(block, usize::from(index))));
    }
    let values: Vec<f64> = offsets.iter().map(|&offset| f64::from(error[offset])).collect();
    let quantiser = Quantiser::fit(&values);
    bytes.extend(quantiser.shift.to_le_bytes());
    bytes.extend(quantiser.means.iter().flat_map(|mean| mean.to_le_bytes()));
    let bins: Vec<u8> = values.iter().map(|&value| quantiser.bin(value)).collect();
    for four in bins.chunks(4) {
        bytes.push(four.iter().rev().fold(0, |byte, bin| byte << 2 | bin));
    }
    for pair in indices.chunks(2) {
        let (first, second) = (pair[0], pair.get(1).copied().unwrap_or(0));
        bytes.extend([first as u8, (first >> 8 | (second & 0xf) << 4) as u8]);
        if pair.len() == 2 {
            bytes.push((second >> 4) as u8);
        }
    }
    for (&offset, bin) in offsets.iter().zip(bins) {
        error[offset] -= quantiser.value(bin);
    }
}

/// A tensor's four values.
#[derive(Debug, Clone, Copy)]
struct Quantiser {
    shift: f32,
    /// 1.5 standard deviations.
    width: f64,
    means: [f32; BINS],
}

impl Quantiser {
    fn fit(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean) * (value - mean)).sum();
        let width = 1.5 * (squares / (count - 1.0).max(1.0)).sqrt();
        let mut quantiser = Self { shift: mean as f32, width, means: [0.0; BINS] };
        let (mut sums, mut counts) = ([0.0; BINS], [0.0; BINS]);
        for &value in values {
            let bin = usize::from(quantiser.bin(value));
            sums[bin] += value - f64::from(quantiser.shift);
            counts[bin] += 1.0;
        }
        for bin in 0..BINS {
            quantiser.means[bin] = (sums[bin] / f64::max(counts[bin], 1.0)) as f32;
        }
        quantiser
    }

    fn bin(&self, value: f64) -> u8 {
        if self.width == 0.0 {
            return 2;
        }
        let place = (value - f64::from(self.shift)) / self.width + 2.0;
        place.round_ties_even().clamp(0.0, 3.0) as u8
    }

    fn value(&self, bin: u8) -> f32 {
        self.shift + self.means[usize::from(bin)]
    }
}

/// A parsed body: its values by canonical chunk.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ListedBody {
    /// Where each chunk's values end.
    ends: Vec<usize>,
    indices: Vec<u16>,
    values: Vec<f32>,
}

impl ListedBody {
    pub(super) fn parse(body: &[u8], layout: &Layout) -> Result<Self, ParseUpdateError> {
        let expected = body_bytes(layout);
        if body.len() != expected {
            return Err(ParseUpdateError::Length { expected, got: body.len() });
        }
        let mut rest = body;
        let mut all = Self { ends: Vec::new(), indices: Vec::new(), values: Vec::new() };
        let mut sent: Vec<(usize, f32)> = Vec::new();
        for tensor in layout.tensors() {
            let blocks = Blocks::of(tensor);
            let (bytes, behind) = rest.split_at(blocks.bytes());
            rest = behind;
            sent.clear();
            read_tensor(blocks, bytes, &mut sent).map_err(|reason| ParseUpdateError::Chunk {
                chunk: tensor.chunks().start,
                reason,
            })?;
            sent.sort_unstable_by_key(|&(offset, _)| offset);
            let mut sent = sent.iter().peekable();
            for chunk in 0..tensor.chunks().len() {
                while let Some((offset, value)) =
                    sent.next_if(|(offset, _)| offset / CHUNK == chunk)
                {
                    if *value != 0.0 {
                        all.indices.push((offset % CHUNK) as u16);
                        all.values.push(*value);
                    }
                }
                all.ends.push(all.indices.len());
            }
        }
        Ok(all)
    }

    pub(super) fn chunk(&self, chunk: usize) -> Symbols<'_> {
        let start = if chunk == 0 { 0 } else { self.ends[chunk - 1] };
        let range = start..self.ends[chunk];
        Symbols::Listed { indices: &self.indices[range.clone()], values: &self.values[range] }
    }
}

/// The offsets within the tensor and the values of what one tensor sends.
fn read_tensor(
    blocks: Blocks,
    bytes: &[u8],
    sent: &mut Vec<(usize, f32)>,
) -> Result<(), ChunkError> {
    let (statistics, codes) = bytes.split_at(STATISTICS_BYTES);
    let (bins, indices) = codes.split_at((2 * blocks.sent()).div_ceil(8));
    let mut numbers = statistics
        .chunks_exact(4)
        .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    let shift = numbers.next().unwrap_or(0.0);
    let mut values = [0.0; BINS];
    for (value, mean) in values.iter_mut().zip(numbers) {
        *value = shift + mean;
        if value.is_nan() || value.abs() > MAGNITUDE_MAX {
            return Err(ChunkError::Value { bound: MAGNITUDE_MAX, got: *value });
        }
    }
    let mut previous = None;
    for at in 0..blocks.sent() {
        let bin = usize::from(bins[at / 4] >> (2 * (at % 4)) & 3);
        let three = &indices[at / 2 * 3..];
        let index = if at % 2 == 0 {
            usize::from(three[0]) | usize::from(three[1] & 0xf) << 8
        } else {
            usize::from(three[1] >> 4) | usize::from(three[2]) << 4
        };
        let rises = at % blocks.kept == 0 || previous.is_some_and(|previous| index > previous);
        if index >= blocks.length() || !rises {
            return Err(ChunkError::Index { real: blocks.length() });
        }
        previous = Some(index);
        sent.push((blocks.offset(at / blocks.kept, index), values[bin]));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_cut_into_squares_and_every_place_is_met_once() {
        let layout = Layout::from_tensors(vec![
            ("matrix".to_owned(), vec![96, 130]),
            ("norm".to_owned(), vec![130]),
        ])
        .expect("a layout");
        let blocks = Blocks::of(&layout.tensors()[0]);
        assert_eq!((blocks.block_rows, blocks.block_columns, blocks.count), (48, 26, 10));
        assert_eq!(blocks.kept, 20, "19.5 of 1,248, rounded, and even");
        let mut seen = vec![false; 96 * 130];
        for block in 0..blocks.count {
            for index in 0..blocks.length() {
                assert!(!std::mem::replace(&mut seen[blocks.offset(block, index)], true));
            }
        }
        assert!(seen.iter().all(|&seen| seen));
        assert_eq!(Blocks::of(&layout.tensors()[1]).kept, 2);
    }

    #[test]
    fn the_bins_are_the_published_ones() {
        // Mean 0, standard deviation 2: bins are 3 wide, centred on −6, −3, 0 and 3.
        let quantiser = Quantiser::fit(&[-2.0, -2.0, 2.0, 2.0, 0.0]);
        let bins = [-9.0, -4.6, -4.4, -1.6, -1.4, 1.4, 1.6, 9.0].map(|value| quantiser.bin(value));
        assert_eq!(bins, [0, 0, 1, 1, 2, 2, 3, 3]);
        assert_eq!(quantiser.means, [0.0, -2.0, 0.0, 2.0]);
    }
}
