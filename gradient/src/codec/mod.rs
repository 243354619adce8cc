//! The update codec: "sparse error feedback", and two dense reference profiles.
//!
//! Δ = θ_t − θ_H; e = β·e_in + Δ; per chunk the k values of largest magnitude are sent as one of two
//! signed magnitudes; e_next = e − what was sent, so the quantisation's error comes back too. Encoding
//! a whole update and checking one opened chunk run the same code ([`UpdateCodec::encode_chunk`]).

mod dense;
mod levels;
mod select;
mod sparse;
mod symbols;
mod update;

use manyhands_proto::ChunkIndex;
use manyhands_proto::run_file::Profile;
use rayon::prelude::*;

pub use sparse::ChunkError;
pub use symbols::{ChunkScratch, ChunkSymbols};
pub use update::{ParseUpdateError, Payload, Update, payload_bytes_max};

pub(crate) use symbols::Symbols;

use crate::bits::BitWriter;
use crate::ieee::assert_ieee;
use crate::layout::{CHUNK, Layout};
use dense::DenseKind;
use levels::Levels;
use select::magnitude_bits;
use sparse::SparseShape;

/// Chunks whose bits are packed together: enough to make the length table and the filled-up last
/// byte vanish (a third of a bit per chunk), few enough to find one chunk quickly.
pub(crate) const GROUP_CHUNKS: usize = 64;

/// How a profile writes a chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Coding {
    Sparse(SparseShape),
    Dense(DenseKind),
}

/// A profile's number on the wire.
pub(crate) const fn profile_number(profile: Profile) -> u8 {
    match profile {
        Profile::Standard => 1,
        Profile::Quality => 2,
        Profile::DenseFp16 => 3,
        Profile::DenseInt8 => 4,
    }
}

pub(crate) const fn coding(profile: Profile) -> Coding {
    match profile {
        Profile::Standard => Coding::Sparse(SparseShape { kept: 64, usual_rice: 5 }),
        Profile::Quality => Coding::Sparse(SparseShape { kept: 128, usual_rice: 4 }),
        Profile::DenseFp16 => Coding::Dense(DenseKind::Half),
        Profile::DenseInt8 => Coding::Dense(DenseKind::Byte),
    }
}

/// A run's codec: the profile, and β, the share of the old error that is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateCodec {
    profile: Profile,
    error_decay: f32,
}

/// β outside 0 to 1.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("expected an error decay between 0 and 1, got {got}")]
pub struct ErrorDecayError {
    got: f32,
}

/// Parameters before and after a worker's steps: whole canonical vectors, or one chunk of each.
#[derive(Debug, Clone, Copy)]
pub struct Endpoints<'a> {
    /// θ_t.
    pub start: &'a [f32],
    /// θ_H.
    pub end: &'a [f32],
}

/// A chunk in which something is infinite or not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected finite values, got an infinite one or NaN")]
pub struct NotFinite;

/// Why an update could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("chunk {chunk}: {reason}")]
    NotFinite { chunk: usize, reason: NotFinite },
    #[error("zstd: {0}")]
    Compression(#[from] std::io::Error),
}

/// Why an opened chunk does not fit the update that was sent: evidence against the worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecMismatch {
    #[error("expected a chunk below {chunks}, got {chunk}")]
    NoSuchChunk { chunk: u32, chunks: usize },
    #[error("chunk {chunk}: expected {CHUNK} opened values of each kind, got another number")]
    OpenedLength { chunk: u32 },
    #[error("chunk {chunk}: {reason}")]
    NotFinite { chunk: u32, reason: NotFinite },
    #[error("expected an update of profile {expected:?}, got {got:?}")]
    Profile { expected: Profile, got: Profile },
    #[error(
        "chunk {chunk}: expected the {expected_count} values that follow from its opened states, \
         got {got_count} that differ{}",
        match first_difference { Some(index) => format!(" from index {index} on"), None => String::new() }
    )]
    Symbols {
        chunk: u32,
        expected_count: usize,
        got_count: usize,
        /// The lowest index at which the sent values differ; `None` if only their coding does.
        first_difference: Option<usize>,
    },
}

impl UpdateCodec {
    /// # Errors
    /// When `error_decay` is not between 0 and 1.
    pub fn new(profile: Profile, error_decay: f32) -> Result<Self, ErrorDecayError> {
        if (0.0..=1.0).contains(&error_decay) {
            Ok(Self { profile, error_decay })
        } else {
            Err(ErrorDecayError { got: error_decay })
        }
    }

    pub fn profile(&self) -> Profile {
        self.profile
    }

    pub fn error_decay(&self) -> f32 {
        self.error_decay
    }

    /// Encodes a worker's update. `error` holds e_in and becomes e_next (canonical vectors all).
    /// The same bytes for any number of threads.
    ///
    /// # Errors
    /// When a value is not finite (training diverged); `error` is then half overwritten and must be
    /// taken from the last commitment again.
    ///
    /// # Panics
    /// When a vector has not the layout's length, or this thread flushes subnormals to zero.
    pub fn encode(
        &self,
        layout: &Layout,
        error: &mut [f32],
        ends: Endpoints<'_>,
    ) -> Result<Payload, EncodeError> {
        layout.assert_covers(error, "the error buffer");
        layout.assert_covers(ends.start, "the start");
        layout.assert_covers(ends.end, "the end");
        const GROUP: usize = GROUP_CHUNKS * CHUNK;
        let pieces = error
            .par_chunks_mut(GROUP)
            .zip(ends.start.par_chunks(GROUP).zip(ends.end.par_chunks(GROUP)))
            .enumerate()
            .map_init(ChunkScratch::default, |scratch, (group, (error, (start, end)))| {
                self.encode_group(layout, group, error, Endpoints { start, end }, scratch)
            })
            .collect::<Vec<_>>()
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        Ok(update::frame(self.profile, layout.chunk_count(), pieces)?)
    }

    fn encode_group(
        &self,
        layout: &Layout,
        group: usize,
        error: &mut [f32],
        ends: Endpoints<'_>,
        scratch: &mut ChunkScratch,
    ) -> Result<Vec<u8>, EncodeError> {
        assert_ieee();
        let first = group * GROUP_CHUNKS;
        let mut writer = BitWriter::default();
        let mut raw = Vec::new();
        let states = error
            .chunks_exact_mut(CHUNK)
            .zip(ends.start.chunks_exact(CHUNK).zip(ends.end.chunks_exact(CHUNK)));
        for (index, (error, (start, end))) in states.enumerate() {
            let chunk = first + index;
            let real = layout.places()[chunk].real;
            let symbols = self
                .encode_chunk(real, error, Endpoints { start, end }, scratch)
                .map_err(|reason| EncodeError::NotFinite { chunk, reason })?
                .0;
            match coding(self.profile) {
                Coding::Sparse(shape) => shape.write_symbols(&mut writer, real, symbols),
                Coding::Dense(_) => dense::write_chunk(&mut raw, symbols),
            }
        }
        match coding(self.profile) {
            Coding::Sparse(_) => Ok(writer.finish()),
            Coding::Dense(_) => Ok(raw),
        }
    }

    /// Encodes one chunk, of which the first `real` values are not padding. `error` holds e_in and
    /// becomes e_next; padding becomes 0.
    ///
    /// # Errors
    /// When e = β·e_in + (θ_t − θ_H) is not finite somewhere.
    ///
    /// # Panics
    /// When a slice is shorter than `real`.
    pub fn encode_chunk<'s>(
        &self,
        real: usize,
        error: &mut [f32],
        ends: Endpoints<'_>,
        scratch: &'s mut ChunkScratch,
    ) -> Result<ChunkSymbols<'s>, NotFinite> {
        let (error, padding) = error.split_at_mut(real);
        padding.fill(0.0);
        let mut largest = 0;
        for (value, (&start, &end)) in
            error.iter_mut().zip(ends.start[..real].iter().zip(&ends.end[..real]))
        {
            *value = self.error_decay * *value + (start - end);
            largest = magnitude_bits(*value).max(largest);
        }
        if largest >= f32::INFINITY.to_bits() {
            return Err(NotFinite);
        }
        Ok(ChunkSymbols(match coding(self.profile) {
            Coding::Sparse(shape) => quantise_largest(shape, error, scratch),
            Coding::Dense(kind) => kind.code_chunk(error, &mut scratch.halves, &mut scratch.bytes),
        }))
    }

    /// The exact codec check: from a chunk's opened e_in, θ_t and θ_H ([`CHUNK`] values each, padding
    /// included), must the worker have sent what `update` says there? Returns e_next of the chunk,
    /// which must be what the worker committed to, bit for bit.
    ///
    /// # Errors
    /// When the update says anything else: the worker did not follow the protocol.
    pub fn check_chunk(
        &self,
        layout: &Layout,
        update: &Update,
        chunk: ChunkIndex,
        opened: OpenedChunk<'_>,
    ) -> Result<Vec<f32>, CodecMismatch> {
        assert_ieee();
        let ChunkIndex(number) = chunk;
        let (Some(place), Some(sent)) = (layout.place(chunk), update.chunk(chunk)) else {
            return Err(CodecMismatch::NoSuchChunk { chunk: number, chunks: layout.chunk_count() });
        };
        if update.profile() != self.profile {
            return Err(CodecMismatch::Profile { expected: self.profile, got: update.profile() });
        }
        let OpenedChunk { error_in, ends } = opened;
        if [error_in, ends.start, ends.end].iter().any(|values| values.len() != CHUNK) {
            return Err(CodecMismatch::OpenedLength { chunk: number });
        }
        let mut error = error_in.to_vec();
        let mut scratch = ChunkScratch::default();
        let expected = self
            .encode_chunk(place.real, &mut error, ends, &mut scratch)
            .map_err(|reason| CodecMismatch::NotFinite { chunk: number, reason })?;
        if expected == sent {
            return Ok(error);
        }
        Err(CodecMismatch::Symbols {
            chunk: number,
            expected_count: expected.count(),
            got_count: sent.count(),
            first_difference: first_difference(expected, sent),
        })
    }
}

/// What a worker opened of one chunk, and the public θ_t there.
#[derive(Debug, Clone, Copy)]
pub struct OpenedChunk<'a> {
    pub error_in: &'a [f32],
    pub ends: Endpoints<'a>,
}

/// Chooses and quantises a chunk's largest values, and takes them out of `error`.
fn quantise_largest<'s>(
    shape: SparseShape,
    error: &mut [f32],
    scratch: &'s mut ChunkScratch,
) -> Symbols<'s> {
    let ChunkScratch { selection, magnitudes, indices, codes, .. } = scratch;
    indices.clear();
    codes.clear();
    indices.extend_from_slice(selection.choose(error, shape.count_max(error.len())));
    if indices.is_empty() {
        return Symbols::Sparse { levels: Levels::default(), indices, codes };
    }
    magnitudes.clear();
    magnitudes.extend(indices.iter().map(|&index| error[usize::from(index)].abs()));
    magnitudes.sort_unstable_by(f32::total_cmp);
    let levels = Levels::fit(magnitudes);
    let values = levels.values();
    let boundary = levels.boundary();
    for &index in indices.iter() {
        let value = &mut error[usize::from(index)];
        let code = u8::from(value.is_sign_negative()) | u8::from(value.abs() >= boundary) << 1;
        *value -= values[usize::from(code)];
        codes.push(code);
    }
    Symbols::Sparse { levels, indices, codes }
}

fn first_difference(expected: ChunkSymbols<'_>, got: ChunkSymbols<'_>) -> Option<usize> {
    let dequantised = |symbols: ChunkSymbols<'_>| {
        let mut values = [0.0_f32; CHUNK];
        symbols.for_each(|index, value| values[index] = value);
        values
    };
    dequantised(expected)
        .iter()
        .zip(dequantised(got))
        .position(|(expected, got)| expected.to_bits() != got.to_bits())
}
