//! Bit strings and Rice codes, most significant bit first.

/// Appends bits to bytes.
#[derive(Debug, Default)]
pub(crate) struct BitWriter {
    bytes: Vec<u8>,
    /// The lowest `pending` bits are not written yet; always fewer than 8 between calls.
    accumulator: u64,
    pending: u32,
}

impl BitWriter {
    /// Appends the lowest `width` (at most 32) bits of `value`; the others must be 0.
    pub(crate) fn put(&mut self, value: u32, width: u32) {
        debug_assert!(width == 32 || value >> width == 0);
        self.accumulator = (self.accumulator << width) | u64::from(value);
        self.pending += width;
        while self.pending >= 8 {
            self.pending -= 8;
            self.bytes.push((self.accumulator >> self.pending) as u8);
        }
    }

    /// Appends `value` as a Rice code: value / 2^`parameter` ones, a zero, then the remainder.
    pub(crate) fn put_rice(&mut self, value: u32, parameter: u32) {
        let mut ones = value >> parameter;
        while ones >= 16 {
            self.put(0xffff, 16);
            ones -= 16;
        }
        self.put(((1 << ones) - 1) << 1, ones + 1);
        self.put(value & ((1 << parameter) - 1), parameter);
    }

    /// The bytes so far, the last one filled with zeros.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        if self.pending > 0 {
            self.put(0, 8 - self.pending);
        }
        self.bytes
    }
}

/// The bytes ended where more bits were expected, or a Rice code went past its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BitError {
    Ended,
    OverLimit,
}

/// Reads bits from bytes that nobody vouches for.
#[derive(Debug)]
pub(crate) struct BitReader<'a> {
    bytes: &'a [u8],
    next: usize,
    accumulator: u64,
    available: u32,
}

impl<'a> BitReader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, next: 0, accumulator: 0, available: 0 }
    }

    /// The next `width` (at most 32) bits.
    pub(crate) fn take(&mut self, width: u32) -> Result<u32, BitError> {
        while self.available < width {
            let byte = *self.bytes.get(self.next).ok_or(BitError::Ended)?;
            self.next += 1;
            self.accumulator = (self.accumulator << 8) | u64::from(byte);
            self.available += 8;
        }
        self.available -= width;
        let value = self.accumulator >> self.available;
        self.accumulator &= (1 << self.available) - 1;
        Ok(value as u32)
    }

    /// The next Rice code, refused as soon as it is known to exceed `limit`.
    pub(crate) fn take_rice(&mut self, parameter: u32, limit: u32) -> Result<u32, BitError> {
        let mut ones = 0;
        while self.take(1)? == 1 {
            ones += 1;
            if ones > limit >> parameter {
                return Err(BitError::OverLimit);
            }
        }
        let value = (ones << parameter) | self.take(parameter)?;
        if value > limit { Err(BitError::OverLimit) } else { Ok(value) }
    }

    /// Whether nothing is left but fewer than 8 zero bits: how [`BitWriter::finish`] ends.
    pub(crate) fn is_finished(&self) -> bool {
        self.next == self.bytes.len() && self.available < 8 && self.accumulator == 0
    }
}

/// Rice parameters are 0 to 7 and travel in so many bits.
pub(crate) const RICE_WIDTH: u32 = 3;
const RICE_PARAMETERS: usize = 1 << RICE_WIDTH;

/// For each Rice parameter the sum of the quotients of the values added: their cost, but for what
/// every value costs.
#[derive(Debug, Default)]
pub(crate) struct Quotients([u32; RICE_PARAMETERS]);

impl Quotients {
    pub(crate) fn add(&mut self, value: u32) {
        for (parameter, sum) in self.0.iter_mut().enumerate() {
            *sum += value >> parameter;
        }
    }

    /// The parameter with which `count` values are shortest, `extra` bits included; the lowest of
    /// equals. Writer and reader agree on it, so values have one coding.
    pub(crate) fn shortest(&self, count: u32, extra: impl Fn(u32) -> u32) -> u32 {
        let cost = |parameter: u32| {
            self.0[parameter as usize] + count * (1 + parameter) + extra(parameter)
        };
        // Of several smallest elements `min_by_key` returns the first.
        (0..RICE_PARAMETERS as u32).min_by_key(|&parameter| cost(parameter)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_the_end_is_noticed() {
        let mut writer = BitWriter::default();
        for value in [0, 1, 63, 64, 4095] {
            writer.put_rice(value, 5);
            writer.put(value, 12);
        }
        writer.put(u32::MAX, 32);
        let bytes = writer.finish();
        let mut reader = BitReader::new(&bytes);
        for value in [0, 1, 63, 64, 4095] {
            assert_eq!(reader.take_rice(5, 4095), Ok(value));
            assert_eq!(reader.take(12), Ok(value));
        }
        assert_eq!(reader.take(32), Ok(u32::MAX));
        assert!(reader.is_finished());
        assert_eq!(reader.take(8), Err(BitError::Ended));
    }

    #[test]
    fn a_rice_code_stops_at_its_limit() {
        let mut reader = BitReader::new(&[0xff; 600]);
        assert_eq!(reader.take_rice(0, 100), Err(BitError::OverLimit));
        let mut writer = BitWriter::default();
        writer.put_rice(10, 2);
        let bytes = writer.finish();
        assert_eq!(BitReader::new(&bytes).take_rice(2, 9), Err(BitError::OverLimit));
        assert_eq!(BitReader::new(&bytes).take_rice(2, 10), Ok(10));
    }
}
