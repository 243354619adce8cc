//! Adam's moments in 8 bits: small on disk, small to open, the same for everybody.
//!
//! Blocks of 256 values share a scale s, the block's largest magnitude. With q the code:
//!
//! | | code | value | worst error |
//! |---|---|---|---|
//! | m | −127 … 127 | ± s·(q/127)² | s·√(m/s)/127 + s/254²: .8 % at the scale, 8 % at a hundredth of it |
//! | v | 0 … 255 | s·(q/255)⁴ | of √v: .8 % where √v is the block's largest, 8 % at a hundredth of it |
//!
//! An update divides m by √v, so √v is coded as m is: by the square of an even grid. That keeps nine
//! decades of v. What is under one code becomes one code, 2.4·10⁻¹⁰·s, so a v that is not 0 does not become 0
//! (unless a whole block is under 2⁻⁹⁰, where Adam's ε is all that counts: it becomes 0, or its smallest codes would
//! be where f32 ends).
//!
//! m goes to the nearest code. v changes by little in a round (at β₂ = .999 and thirty steps by 3 %), less than
//! half a code of small values, and would stay where it is for ever; so it goes to one of its two neighbours by
//! chance, and is right in the mean. The chance follows from a number that the round's work implies and the value's
//! place, so it is the same for everybody who repeats the round. Quantising what was quantised changes nothing.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use crate::ieee::assert_ieee;
use crate::layout::{CHUNK, Layout};

/// Values that share a scale. 16 blocks make a chunk, so no block spans tensors.
pub const BLOCK: usize = 256;

/// No block's scale is smaller, unless it is 0: 2⁻⁹⁰.
const SCALE_MIN: f32 = f32::from_bits((127 - 90) << 23);

/// Bytes of a block: its scale, little-endian, then its codes.
const BLOCK_BYTES: usize = 4 + BLOCK;

/// 1 rounded with other chances.
const VERSION: u8 = 2;
const HEADER_BYTES: usize = 1;

/// Which of the two moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    First,
    Second,
}

/// Adam's m and v of every parameter, in 8 bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moments8 {
    /// Version, then the blocks of m, then those of v.
    bytes: Vec<u8>,
}

/// m and v as Adam uses them: canonical vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

/// Moments that cannot be coded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantiseError {
    #[error("expected finite moments, got an infinite one or NaN in block {block}")]
    NotFinite { block: usize },
    #[error("expected second moments of at least 0, got a negative one in block {block}")]
    Negative { block: usize },
}

/// Why bytes are not moments of the layout.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ParseMomentsError {
    #[error("expected {expected} bytes, got {got}")]
    Length { expected: usize, got: usize },
    #[error("expected moments version {VERSION}, got {got}")]
    Version { got: u8 },
    #[error("block {block}: expected a finite scale of at least {SCALE_MIN}, or 0, got {got}")]
    Scale { block: usize, got: f32 },
    #[error("block {block}: expected a largest code that fits its scale, got {got}")]
    Code { block: usize, got: u8 },
    #[error("expected zeros in the padding of chunk {chunk}")]
    Padding { chunk: usize },
}

impl Moments8 {
    /// m = v = 0: a fresh worker's.
    pub fn zero(layout: &Layout) -> Self {
        let mut bytes = vec![0; bytes_len(layout)];
        bytes[0] = VERSION;
        Self { bytes }
    }

    /// The moments, rounded with the chances of `stream`: a number that everybody who repeats the round knows.
    ///
    /// # Errors
    /// When a value is not finite or a second moment is negative.
    ///
    /// # Panics
    /// When a vector has not the layout's length.
    pub fn quantise(
        layout: &Layout,
        moments: &Moments,
        stream: u64,
    ) -> Result<Self, QuantiseError> {
        layout.assert_covers(&moments.first, "m");
        layout.assert_covers(&moments.second, "v");
        let mut quantised = Self::zero(layout);
        let (first, second) = quantised.halves_mut();
        quantise_all(Kind::First, &moments.first, first, stream)?;
        quantise_all(Kind::Second, &moments.second, second, stream)?;
        Ok(quantised)
    }

    /// Exactly what every machine makes of these codes.
    pub fn dequantise(&self) -> Moments {
        let (first, second) = self.bytes[HEADER_BYTES..].split_at(self.half_len());
        Moments {
            first: dequantise_all(Kind::First, first),
            second: dequantise_all(Kind::Second, second),
        }
    }

    /// Canonical: equal moments are equal bytes. Their digest is what a worker is held to.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// # Errors
    /// When the bytes are not what [`Self::quantise`] makes of some moments of this layout.
    pub fn parse(bytes: Vec<u8>, layout: &Layout) -> Result<Self, ParseMomentsError> {
        let expected = bytes_len(layout);
        if bytes.len() != expected {
            return Err(ParseMomentsError::Length { expected, got: bytes.len() });
        }
        if bytes[0] != VERSION {
            return Err(ParseMomentsError::Version { got: bytes[0] });
        }
        let moments = Self { bytes };
        let (first, second) = moments.bytes[HEADER_BYTES..].split_at(moments.half_len());
        check_all(Kind::First, first, layout)?;
        check_all(Kind::Second, second, layout)?;
        Ok(moments)
    }

    fn half_len(&self) -> usize {
        (self.bytes.len() - HEADER_BYTES) / 2
    }

    fn halves_mut(&mut self) -> (&mut [u8], &mut [u8]) {
        let half = self.half_len();
        self.bytes[HEADER_BYTES..].split_at_mut(half)
    }
}

fn bytes_len(layout: &Layout) -> usize {
    HEADER_BYTES + 2 * (layout.vector_len() / BLOCK) * BLOCK_BYTES
}

fn quantise_all(
    kind: Kind,
    values: &[f32],
    bytes: &mut [u8],
    stream: u64,
) -> Result<(), QuantiseError> {
    const BLOCKS: usize = CHUNK / BLOCK;
    let shares = shares(kind);
    let outcomes: Vec<Result<(), QuantiseError>> = bytes
        .par_chunks_mut(BLOCKS * BLOCK_BYTES)
        .zip(values.par_chunks(CHUNK))
        .enumerate()
        .map(|(chunk, (bytes, values))| {
            assert_ieee();
            let blocks = bytes.chunks_exact_mut(BLOCK_BYTES).zip(values.chunks_exact(BLOCK));
            for (index, (bytes, values)) in blocks.enumerate() {
                let block = chunk * BLOCKS + index;
                check_block(kind, values, block)?;
                match kind {
                    Kind::First => first_block(values, bytes),
                    Kind::Second => second_block(values, bytes, &shares, chance(stream, block)),
                }
            }
            Ok(())
        })
        .collect();
    outcomes.into_iter().collect()
}

fn check_block(kind: Kind, values: &[f32], block: usize) -> Result<(), QuantiseError> {
    if values.iter().any(|value| !value.is_finite()) {
        return Err(QuantiseError::NotFinite { block });
    }
    if kind == Kind::Second && values.iter().any(|value| *value < 0.0) {
        return Err(QuantiseError::Negative { block });
    }
    Ok(())
}

/// The largest magnitude, which it writes down; `None` if all is (nearly) 0, and then so are the codes.
fn write_scale(values: &[f32], bytes: &mut [u8]) -> Option<f32> {
    let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let scale = if largest < SCALE_MIN { 0.0 } else { largest };
    bytes[..4].copy_from_slice(&scale.to_le_bytes());
    if scale == 0.0 {
        bytes[4..].fill(0);
    }
    (scale > 0.0).then_some(scale)
}

fn first_block(values: &[f32], bytes: &mut [u8]) {
    let Some(scale) = write_scale(values, bytes) else { return };
    for (byte, &value) in bytes[4..].iter_mut().zip(values) {
        // Between 0 and 1. √ is correctly rounded by IEEE 754, so it is the same everywhere.
        let share = value.abs() / scale;
        let magnitude = (share.sqrt() * 127.0).round_ties_even() as i8;
        *byte = if value < 0.0 { -magnitude } else { magnitude }.cast_unsigned();
    }
}

fn second_block(
    values: &[f32],
    bytes: &mut [u8],
    shares: &[f32; 256],
    mut chance: impl Iterator<Item = f32>,
) {
    let Some(scale) = write_scale(values, bytes) else { return };
    for (byte, &value) in bytes[4..].iter_mut().zip(values) {
        let share = value / scale;
        let code = share.sqrt().sqrt() * 255.0;
        let nearest = code.round_ties_even() as u8;
        let below = (code as u8).min(254);
        let (low, high) = (shares[usize::from(below)], shares[usize::from(below) + 1]);
        let chance = chance.next().expect("it has no end");
        let code = if scale * shares[usize::from(nearest)] == value {
            nearest
        } else {
            below + u8::from(chance * (high - low) < share - low)
        };
        // What is not 0 stays not 0: Adam divides by its root.
        *byte = code.max(u8::from(value > 0.0));
    }
}

/// Numbers from 0 to below 1 for the values of a block: ChaCha8 with `stream` as its key and the
/// block's number as its stream.
fn chance(stream: u64, block: usize) -> impl Iterator<Item = f32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&stream.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    random.set_stream(block as u64);
    // 24 bits: exact as an f32.
    std::iter::repeat_with(move || (random.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0))
}

/// Every code's value / scale.
fn shares(kind: Kind) -> [f32; 256] {
    std::array::from_fn(|code| share_of(kind, code as u8))
}

fn dequantise_all(kind: Kind, bytes: &[u8]) -> Vec<f32> {
    let shares = shares(kind);
    let mut values = vec![0.0; bytes.len() / BLOCK_BYTES * BLOCK];
    values.par_chunks_mut(BLOCK).zip(bytes.par_chunks(BLOCK_BYTES)).for_each(|(values, bytes)| {
        assert_ieee();
        let scale = scale_of(bytes);
        for (value, &code) in values.iter_mut().zip(&bytes[4..]) {
            *value = scale * shares[usize::from(code)];
        }
    });
    values
}

/// value / scale for a code.
fn share_of(kind: Kind, code: u8) -> f32 {
    match kind {
        Kind::First => {
            let root = f32::from(code.cast_signed()) / 127.0;
            root * root.abs()
        }
        Kind::Second => {
            let root = f32::from(code) / 255.0;
            let square = root * root;
            square * square
        }
    }
}

fn scale_of(block: &[u8]) -> f32 {
    f32::from_le_bytes([block[0], block[1], block[2], block[3]])
}

fn check_all(kind: Kind, bytes: &[u8], layout: &Layout) -> Result<(), ParseMomentsError> {
    for (index, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
        let scale = scale_of(block);
        let is_written = scale.to_bits() == 0 || scale >= SCALE_MIN;
        if !scale.is_finite() || !is_written {
            return Err(ParseMomentsError::Scale { block: index, got: scale });
        }
        // The largest value's code is the largest there is; without a scale there is no code.
        let code_max = match (scale > 0.0, kind) {
            (false, _) => 0,
            (true, Kind::First) => 127,
            (true, Kind::Second) => 255,
        };
        let magnitude = |code: u8| match kind {
            Kind::First => code.cast_signed().unsigned_abs(),
            Kind::Second => code,
        };
        let largest = block[4..].iter().map(|&code| magnitude(code)).max().unwrap_or(0);
        if largest != code_max {
            return Err(ParseMomentsError::Code { block: index, got: largest });
        }
        let (chunk, first) = (index * BLOCK / CHUNK, index * BLOCK % CHUNK);
        let real = layout.places()[chunk].real.saturating_sub(first).min(BLOCK);
        if block[4 + real..].iter().any(|&code| code != 0) {
            return Err(ParseMomentsError::Padding { chunk });
        }
    }
    Ok(())
}
