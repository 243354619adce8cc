//! Bit strings and Rice codes, most significant bit first.
//!
//! The Rice codes of a list are written apart: first all quotients in unary, then all remainders. That is as
//! long as one code after the other, and is read several times as fast: the quotients by counting zeros, the
//! remainders at places that are known.

/// Appends bits to bytes.
#[derive(Debug, Default)]
pub(crate) struct BitWriter {
    bytes: Vec<u8>,
    /// The lowest `pending` bits are not written yet; always fewer than 32 between calls.
    accumulator: u64,
    pending: u32,
}

impl BitWriter {
    /// Appends the lowest `width` (at most 32) bits of `value`; the others must be 0.
    #[inline]
    pub(crate) fn put(&mut self, value: u32, width: u32) {
        debug_assert!(width == 32 || value >> width == 0);
        self.accumulator = (self.accumulator << width) | u64::from(value);
        self.pending += width;
        if self.pending >= 32 {
            self.pending -= 32;
            self.bytes.extend(((self.accumulator >> self.pending) as u32).to_be_bytes());
        }
    }

    /// Appends so many zeros and a one.
    #[inline]
    pub(crate) fn put_unary(&mut self, mut zeros: u32) {
        while zeros >= 31 {
            self.put(0, 31);
            zeros -= 31;
        }
        self.put(1, zeros + 1);
    }

    /// The bytes so far, the last one filled with zeros.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let aligned = self.accumulator.checked_shl(64 - self.pending).unwrap_or(0).to_be_bytes();
        self.bytes.extend(&aligned[..self.pending.div_ceil(8) as usize]);
        self.bytes
    }
}

/// The bytes ended where more bits were expected, or unary numbers went past their limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BitError {
    Ended,
    OverLimit,
}

/// Reads bits from bytes that nobody vouches for.
#[derive(Debug, Clone)]
pub(crate) struct BitReader<'a> {
    bytes: &'a [u8],
    /// The next bit.
    position: usize,
}

/// Unary numbers that are read together.
pub(crate) const BATCH: usize = 8;

/// Bits that a window holds wherever it begins.
const WINDOW_MIN: u32 = 57;

impl<'a> BitReader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// The bits from `position` on, from the top: at least 57 of them, zeros behind the last.
    #[inline(always)]
    fn window(&self, position: usize) -> u64 {
        let behind = self.bytes.get(position / 8..).unwrap_or_default();
        let word = match behind.first_chunk::<8>() {
            Some(word) => *word,
            None => last_word(behind),
        };
        u64::from_be_bytes(word) << (position % 8)
    }

    fn left(&self) -> usize {
        self.bytes.len() * 8 - self.position
    }

    /// The next `width` (1 to 32) bits.
    #[inline]
    pub(crate) fn take(&mut self, width: u32) -> Result<u32, BitError> {
        if (width as usize) > self.left() {
            return Err(BitError::Ended);
        }
        let value = self.window(self.position) >> (64 - width);
        self.position += width as usize;
        Ok(value as u32)
    }

    /// The next `count` unary numbers, each as the sum of all up to it. A sum above `limit` is refused.
    ///
    /// # Panics
    /// When `sums` has not room for [`BATCH`] more.
    #[inline(always)]
    pub(crate) fn take_unary(
        &mut self,
        count: usize,
        sums: &mut [u16],
        limit: u16,
    ) -> Result<(), BitError> {
        let start = self.position;
        // So many bits hold all ones if no sum is above the limit.
        let length_max = count + usize::from(limit);
        let (mut found, mut position) = (0, start);
        while found < count {
            if position >= self.bytes.len() * 8 {
                return Err(BitError::Ended);
            }
            if position - start > length_max {
                return Err(BitError::OverLimit);
            }
            // The lowest bit first: the next one is then found and cleared in an instruction each.
            let mut window = self.window(position).reverse_bits();
            let ones = (window.count_ones() as usize).min(count - found);
            let before = position - start;
            // Whole batches, so that the processor guesses right how many there are; what stands behind the last one is
            // written over.
            for first in (found..found + ones).step_by(BATCH) {
                for (sum, at) in sums[first..first + BATCH].iter_mut().zip(first..) {
                    *sum = (before + window.trailing_zeros() as usize).wrapping_sub(at) as u16;
                    window &= window.wrapping_sub(1);
                }
            }
            found += ones;
            position += 64 - position % 8;
        }
        let sum = if count > 0 { usize::from(sums[count - 1]) } else { 0 };
        self.position = start + sum + count;
        if sum > usize::from(limit) { Err(BitError::OverLimit) } else { Ok(()) }
    }

    /// The next numbers of `width` (1 to 16) bits each.
    #[inline(always)]
    pub(crate) fn take_all(&mut self, values: &mut [u16], width: u32) -> Result<(), BitError> {
        if values.len() * width as usize > self.left() {
            return Err(BitError::Ended);
        }
        for values in values.chunks_mut((WINDOW_MIN / width) as usize) {
            let mut window = self.window(self.position);
            for value in &mut *values {
                *value = (window >> (64 - width)) as u16;
                window <<= width;
            }
            self.position += values.len() * width as usize;
        }
        Ok(())
    }

    /// Whether nothing is left but fewer than 8 zero bits: how [`BitWriter::finish`] ends.
    pub(crate) fn is_finished(&self) -> bool {
        self.left() < 8 && self.window(self.position) == 0
    }
}

/// Fewer than 8 bytes, filled up with zeros.
#[cold]
fn last_word(bytes: &[u8]) -> [u8; 8] {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    word
}

/// Rice parameters are 0 to 7 and travel in so many bits.
pub(crate) const RICE_WIDTH: u32 = 3;
const RICE_PARAMETERS: usize = 1 << RICE_WIDTH;
pub(crate) const RICE_PARAMETER_MAX: usize = RICE_PARAMETERS - 1;

/// The parameter with which the `gaps` are shortest, `extra` bits included; the lowest of equals.
/// Writer and reader agree on it, so values have one coding.
pub(crate) fn shortest_rice(gaps: &[u16], extra: impl Fn(u32) -> u32) -> u32 {
    // The gaps of a chunk sum to less than its length, so 16 bits are enough.
    let mut sums = [0_u16; RICE_PARAMETERS];
    for (parameter, sum) in sums.iter_mut().enumerate() {
        *sum = gaps.iter().fold(0, |sum, &gap| sum + (gap >> parameter));
    }
    let count = gaps.len() as u32;
    let cost = |parameter: u32| {
        u32::from(sums[parameter as usize]) + count * (1 + parameter) + extra(parameter)
    };
    // Of several smallest elements `min_by_key` returns the first.
    (0..RICE_PARAMETERS as u32).min_by_key(|&parameter| cost(parameter)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_end_is_noticed() {
        let mut writer = BitWriter::default();
        writer.put(5, 12);
        writer.put(u32::MAX, 32);
        let bytes = writer.finish();
        let mut reader = BitReader::new(&bytes);
        assert_eq!(reader.take(12), Ok(5));
        assert!(!reader.is_finished());
        assert_eq!(reader.take(32), Ok(u32::MAX));
        assert!(reader.is_finished());
        assert_eq!(reader.take(8), Err(BitError::Ended));
        assert_eq!(reader.take_all(&mut [0; 2], 4), Err(BitError::Ended));
        let mut sums = [0; 1 + BATCH];
        assert_eq!(BitReader::new(&[0; 3]).take_unary(1, &mut sums, 4_095), Err(BitError::Ended));
    }

    #[test]
    fn unary_numbers_stop_at_their_limit() {
        let zeros = [0; 2_000];
        let mut sums = [0; 3 + BATCH];
        assert_eq!(BitReader::new(&zeros).take_unary(3, &mut sums, 100), Err(BitError::OverLimit));
        let mut writer = BitWriter::default();
        writer.put_unary(10);
        writer.put_unary(0);
        let bytes = writer.finish();
        assert_eq!(BitReader::new(&bytes).take_unary(2, &mut sums, 9), Err(BitError::OverLimit));
        assert_eq!(BitReader::new(&bytes).take_unary(2, &mut sums, 10), Ok(()));
        assert_eq!(sums[..2], [10, 10]);
    }

    proptest! {
        #[test]
        fn any_numbers_come_back(
            numbers in prop::collection::vec(0_u32..90, 0..80),
            width in 7_u32..=16,
            before in 0_u32..12,
        ) {
            let mut writer = BitWriter::default();
            writer.put(0, before);
            numbers.iter().for_each(|&number| writer.put_unary(number));
            numbers.iter().for_each(|&number| writer.put(number, width));
            let bytes = writer.finish();
            let mut reader = BitReader::new(&bytes);
            if before > 0 {
                prop_assert_eq!(reader.take(before), Ok(0));
            }
            let mut got = vec![0; numbers.len() + BATCH];
            prop_assert_eq!(reader.take_unary(numbers.len(), &mut got, 8_000), Ok(()));
            got.truncate(numbers.len());
            let mut sum = 0;
            for (&number, &got) in numbers.iter().zip(&got) {
                sum += number;
                prop_assert_eq!(u32::from(got), sum);
            }
            prop_assert_eq!(reader.take_all(&mut got, width), Ok(()));
            prop_assert!(numbers.iter().zip(&got).all(|(a, b)| *a == u32::from(*b)));
            prop_assert!(reader.is_finished());
        }
    }
}
