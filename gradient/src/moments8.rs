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

use std::ops::Range;

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

const BLOCKS: usize = CHUNK / BLOCK;
/// Bytes of one moment of a chunk.
const MOMENT_CHUNK_BYTES: usize = BLOCKS * BLOCK_BYTES;
const MOMENTS_CHUNK_BYTES: usize = 2 * MOMENT_CHUNK_BYTES;

/// 1 rounded with other chances, 2 had all of m before all of v.
const VERSION: u8 = 3;
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
    /// Version, then of each chunk its blocks of m and its blocks of v.
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
        let mut bytes = vec![0; Self::bytes_len(layout)];
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
        let shares = shares(Kind::Second);
        let outcomes: Vec<Result<(), QuantiseError>> = quantised.bytes[HEADER_BYTES..]
            .par_chunks_mut(MOMENTS_CHUNK_BYTES)
            .zip(moments.first.par_chunks(CHUNK).zip(moments.second.par_chunks(CHUNK)))
            .enumerate()
            .map(|(chunk, (bytes, (first, second)))| {
                assert_ieee();
                let (first_bytes, second_bytes) = bytes.split_at_mut(MOMENT_CHUNK_BYTES);
                for (block, values, bytes) in blocks_mut(chunk, first, first_bytes) {
                    check_block(Kind::First, values, block)?;
                    first_block(values, bytes);
                }
                for (block, values, bytes) in blocks_mut(chunk, second, second_bytes) {
                    check_block(Kind::Second, values, block)?;
                    second_block(values, bytes, &shares, chance(stream, block));
                }
                Ok(())
            })
            .collect();
        outcomes.into_iter().collect::<Result<(), QuantiseError>>()?;
        Ok(quantised)
    }

    /// Exactly what every machine makes of these codes.
    pub fn dequantise(&self) -> Moments {
        let chunks = (self.bytes.len() - HEADER_BYTES) / MOMENTS_CHUNK_BYTES;
        let (first_shares, second_shares) = (shares(Kind::First), shares(Kind::Second));
        let mut moments =
            Moments { first: vec![0.0; chunks * CHUNK], second: vec![0.0; chunks * CHUNK] };
        moments
            .first
            .par_chunks_mut(CHUNK)
            .zip(moments.second.par_chunks_mut(CHUNK))
            .zip(self.bytes[HEADER_BYTES..].par_chunks(MOMENTS_CHUNK_BYTES))
            .for_each(|((first, second), bytes)| {
                let (first_bytes, second_bytes) = bytes.split_at(MOMENT_CHUNK_BYTES);
                dequantise(&first_shares, first_bytes, first);
                dequantise(&second_shares, second_bytes, second);
            });
        moments
    }

    /// Canonical: equal moments are equal bytes. Their digest is what a worker is held to.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Bytes of the moments of a layout.
    pub fn bytes_len(layout: &Layout) -> usize {
        HEADER_BYTES + layout.chunk_count() * MOMENTS_CHUNK_BYTES
    }

    /// Where in the bytes chunk `chunk` lies: what [`parse_chunk`] reads.
    pub fn chunk_range(chunk: usize) -> Range<usize> {
        let start = HEADER_BYTES + chunk * MOMENTS_CHUNK_BYTES;
        start..start + MOMENTS_CHUNK_BYTES
    }

    /// # Errors
    /// When the bytes are not what [`Self::quantise`] makes of some moments of this layout.
    pub fn parse(bytes: Vec<u8>, layout: &Layout) -> Result<Self, ParseMomentsError> {
        let expected = Self::bytes_len(layout);
        if bytes.len() != expected {
            return Err(ParseMomentsError::Length { expected, got: bytes.len() });
        }
        if bytes[0] != VERSION {
            return Err(ParseMomentsError::Version { got: bytes[0] });
        }
        for (chunk, bytes) in bytes[HEADER_BYTES..].chunks(MOMENTS_CHUNK_BYTES).enumerate() {
            check_chunk(bytes, layout, chunk)?;
        }
        Ok(Self { bytes })
    }
}

/// m and v of one chunk, 4,096 values each, from its bytes alone.
///
/// # Errors
/// As [`Moments8::parse`]'s.
///
/// # Panics
/// When the layout has no such chunk.
pub fn parse_chunk(
    bytes: &[u8],
    layout: &Layout,
    chunk: usize,
) -> Result<Moments, ParseMomentsError> {
    if bytes.len() != MOMENTS_CHUNK_BYTES {
        return Err(ParseMomentsError::Length { expected: MOMENTS_CHUNK_BYTES, got: bytes.len() });
    }
    check_chunk(bytes, layout, chunk)?;
    let (first_bytes, second_bytes) = bytes.split_at(MOMENT_CHUNK_BYTES);
    let mut moments = Moments { first: vec![0.0; CHUNK], second: vec![0.0; CHUNK] };
    dequantise(&shares(Kind::First), first_bytes, &mut moments.first);
    dequantise(&shares(Kind::Second), second_bytes, &mut moments.second);
    Ok(moments)
}

/// The blocks of a chunk: their numbers, values and bytes.
fn blocks_mut<'a>(
    chunk: usize,
    values: &'a [f32],
    bytes: &'a mut [u8],
) -> impl Iterator<Item = (usize, &'a [f32], &'a mut [u8])> {
    let blocks = values.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(BLOCK_BYTES));
    blocks.enumerate().map(move |(index, (values, bytes))| (chunk * BLOCKS + index, values, bytes))
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

fn dequantise(shares: &[f32; 256], bytes: &[u8], values: &mut [f32]) {
    assert_ieee();
    for (values, bytes) in values.chunks_exact_mut(BLOCK).zip(bytes.chunks_exact(BLOCK_BYTES)) {
        let scale = scale_of(bytes);
        for (value, &code) in values.iter_mut().zip(&bytes[4..]) {
            *value = scale * shares[usize::from(code)];
        }
    }
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

/// Whether these are the bytes of a chunk of some moments.
fn check_chunk(bytes: &[u8], layout: &Layout, chunk: usize) -> Result<(), ParseMomentsError> {
    let (first, second) = bytes.split_at(MOMENT_CHUNK_BYTES);
    let kinds = [(Kind::First, first), (Kind::Second, second)];
    for (kind, bytes) in kinds {
        for (index, bytes) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            let real = layout.places()[chunk].real.saturating_sub(index * BLOCK).min(BLOCK);
            check_coded(kind, bytes, (chunk, chunk * BLOCKS + index), real)?;
        }
    }
    Ok(())
}

/// A block of which the first `real` values are not padding.
fn check_coded(
    kind: Kind,
    bytes: &[u8],
    (chunk, block): (usize, usize),
    real: usize,
) -> Result<(), ParseMomentsError> {
    let scale = scale_of(bytes);
    let is_written = scale.to_bits() == 0 || scale >= SCALE_MIN;
    if !scale.is_finite() || !is_written {
        return Err(ParseMomentsError::Scale { block, got: scale });
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
    let largest = bytes[4..].iter().map(|&code| magnitude(code)).max().unwrap_or(0);
    if largest != code_max {
        return Err(ParseMomentsError::Code { block, got: largest });
    }
    if bytes[4 + real..].iter().any(|&code| code != 0) {
        return Err(ParseMomentsError::Padding { chunk });
    }
    Ok(())
}
