//! The dense reference profiles: half precision, and bytes with one step per chunk.
//!
//! Their bytes are one zstd frame. It must be the frame that this library's compressor makes of its
//! content, so that an update still has one byte string.

use super::sparse::ChunkError;
use super::symbols::Symbols;
use super::update::ParseUpdateError;
use crate::layout::{ChunkPlace, Layout};

/// No dense value is larger; what is beyond stays in the error buffer. Bounds what sums can reach.
pub(crate) const DENSE_MAGNITUDE_MAX: f32 = 16.0;

const ZSTD_LEVEL: i32 = 3;

/// The two dense profiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DenseKind {
    Half,
    Byte,
}

impl DenseKind {
    fn chunk_bytes(self, real: usize) -> usize {
        match self {
            Self::Half => 2 * real,
            Self::Byte => 4 + real,
        }
    }

    /// Bytes before compression: known from the layout alone.
    fn raw_bytes(self, layout: &Layout) -> usize {
        layout.places().iter().map(|place| self.chunk_bytes(place.real)).sum()
    }

    pub(crate) fn compressed_bytes_max(self, layout: &Layout) -> usize {
        zstd::zstd_safe::compress_bound(self.raw_bytes(layout))
    }

    /// Quantises `error` in place to what is left of it.
    pub(crate) fn code_chunk<'s>(
        self,
        error: &mut [f32],
        halves: &'s mut Vec<u16>,
        bytes: &'s mut Vec<i8>,
    ) -> Symbols<'s> {
        match self {
            Self::Half => {
                halves.clear();
                for value in error {
                    let clamped = value.clamp(-DENSE_MAGNITUDE_MAX, DENSE_MAGNITUDE_MAX);
                    let sent = half::f16::from_f32(clamped);
                    // −0 equals 0, and zero has one form.
                    let sent = if sent == half::f16::ZERO { half::f16::ZERO } else { sent };
                    halves.push(sent.to_bits());
                    *value -= sent.to_f32();
                }
                Symbols::Half(halves)
            }
            Self::Byte => {
                bytes.clear();
                let largest = error.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                let step = largest.min(DENSE_MAGNITUDE_MAX) / 127.0;
                // A subnormal step is too coarse for its own largest value to get code 127.
                let step = if step < f32::MIN_POSITIVE { 0.0 } else { step };
                for value in error {
                    let code = if step > 0.0 {
                        (*value / step).round_ties_even().clamp(-127.0, 127.0) as i8
                    } else {
                        0
                    };
                    bytes.push(code);
                    *value -= f32::from(code) * step;
                }
                Symbols::Byte { step, codes: bytes }
            }
        }
    }
}

/// Appends one chunk. Of halves first all high bytes, then all low ones: alike bytes compress.
pub(crate) fn write_chunk(raw: &mut Vec<u8>, symbols: Symbols<'_>) {
    match symbols {
        Symbols::Half(halves) => {
            raw.extend(halves.iter().map(|half| (half >> 8) as u8));
            raw.extend(halves.iter().map(|half| (half & 0xff) as u8));
        }
        Symbols::Byte { step, codes } => {
            raw.extend(step.to_le_bytes());
            raw.extend(codes.iter().map(|code| code.cast_unsigned()));
        }
        Symbols::Sparse { .. } | Symbols::Listed { .. } => {
            unreachable!("a dense profile makes dense symbols")
        }
    }
}

pub(crate) fn compress(raw: &[u8]) -> Result<Vec<u8>, std::io::Error> {
    zstd::bulk::compress(raw, ZSTD_LEVEL)
}

/// A whole dense update.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum DenseBody {
    Half { halves: Vec<u16>, starts: Vec<usize> },
    Byte { steps: Vec<f32>, codes: Vec<i8>, starts: Vec<usize> },
}

impl DenseBody {
    pub(crate) fn parse(
        kind: DenseKind,
        compressed: &[u8],
        layout: &Layout,
    ) -> Result<Self, ParseUpdateError> {
        let expected = kind.raw_bytes(layout);
        let raw = zstd::bulk::decompress(compressed, expected)
            .map_err(|error| ParseUpdateError::Compression { reason: error.to_string() })?;
        if raw.len() != expected {
            return Err(ParseUpdateError::Length { expected, got: raw.len() });
        }
        let again = compress(&raw)
            .map_err(|error| ParseUpdateError::Compression { reason: error.to_string() })?;
        if again != compressed {
            return Err(ParseUpdateError::CompressionNotCanonical);
        }
        Self::from_raw(kind, &raw, layout.places())
            .map_err(|(chunk, reason)| ParseUpdateError::Chunk { chunk, reason })
    }

    fn from_raw(
        kind: DenseKind,
        mut raw: &[u8],
        places: &[ChunkPlace],
    ) -> Result<Self, (usize, ChunkError)> {
        let mut starts = Vec::with_capacity(places.len() + 1);
        let (mut halves, mut steps, mut codes) = (Vec::new(), Vec::new(), Vec::new());
        let mut start = 0;
        for (chunk, place) in places.iter().enumerate() {
            let (chunk_bytes, rest) = raw.split_at(kind.chunk_bytes(place.real));
            raw = rest;
            starts.push(start);
            start += place.real;
            match kind {
                DenseKind::Half => {
                    let (high, low) = chunk_bytes.split_at(place.real);
                    for (&high, &low) in high.iter().zip(low) {
                        let bits = u16::from_be_bytes([high, low]);
                        let value = half::f16::from_bits(bits).to_f32();
                        check_value(value).map_err(|reason| (chunk, reason))?;
                        if bits == 0x8000 {
                            return Err((chunk, ChunkError::NotShortest));
                        }
                        halves.push(bits);
                    }
                }
                DenseKind::Byte => {
                    let (step, bytes) = chunk_bytes.split_at(4);
                    let step = f32::from_le_bytes([step[0], step[1], step[2], step[3]]);
                    check_value(step * 127.0).map_err(|reason| (chunk, reason))?;
                    steps.push(step);
                    codes.extend(bytes.iter().map(|byte| byte.cast_signed()));
                    let coded = &codes[codes.len() - place.real..];
                    // The step is the largest magnitude / 127: some code reaches it, none passes
                    // it, and without a step there is no code.
                    let largest =
                        coded.iter().fold(0, |largest, code| code.unsigned_abs().max(largest));
                    let expected = if step > 0.0 { 127 } else { 0 };
                    let is_written = step.to_bits() == 0 || step >= f32::MIN_POSITIVE;
                    if !is_written || largest != expected {
                        return Err((chunk, ChunkError::NotShortest));
                    }
                }
            }
        }
        starts.push(start);
        Ok(match kind {
            DenseKind::Half => Self::Half { halves, starts },
            DenseKind::Byte => Self::Byte { steps, codes, starts },
        })
    }

    pub(crate) fn chunk(&self, chunk: usize) -> Symbols<'_> {
        match self {
            Self::Half { halves, starts } => {
                Symbols::Half(&halves[starts[chunk]..starts[chunk + 1]])
            }
            Self::Byte { steps, codes, starts } => Symbols::Byte {
                step: steps[chunk],
                codes: &codes[starts[chunk]..starts[chunk + 1]],
            },
        }
    }
}

fn check_value(value: f32) -> Result<(), ChunkError> {
    // One rounding above the bound: (16 / 127) × 127 need not be 16.
    let bound = DENSE_MAGNITUDE_MAX * (1.0 + f32::EPSILON);
    if value.is_finite() && value.abs() <= bound {
        Ok(())
    } else {
        Err(ChunkError::Value { bound, got: value })
    }
}
