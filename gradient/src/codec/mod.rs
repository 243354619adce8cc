//! The update codec: "sparse error feedback", and profiles of others for comparison.
//!
//! Δ = θ_t − θ_H; e = β·e_in + Δ; per chunk the k values of largest magnitude are sent as ± their mean
//! magnitude; e_next = e − what was sent, so the quantisation's error comes back too. Encoding a whole
//! update, checking one opened chunk and compressing what is broadcast run the same code.

mod dense;
mod flat12;
mod scale;
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
pub(crate) use update::{ChunkReader, frame};

use crate::bits::BitWriter;
use crate::ieee::assert_ieee;
use crate::layout::{CHUNK, Layout};
use dense::DenseKind;
use scale::Scale;
use select::Selection;
use sparse::SparseShape;
use symbols::SignedIndex;

/// Chunks whose bits are packed together: enough to make the length table and the filled-up last
/// byte vanish (a third of a bit per chunk), few enough to find one chunk quickly.
pub const GROUP_CHUNKS: usize = 64;

/// Values of a whole group.
pub(crate) const GROUP: usize = GROUP_CHUNKS * CHUNK;

/// How a profile writes a chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Coding {
    Sparse(SparseShape),
    Dense(DenseKind),
    Flat12,
}

/// A profile's number on the wire.
pub(crate) const fn profile_number(profile: Profile) -> u8 {
    match profile {
        Profile::Standard => 1,
        Profile::Quality => 2,
        Profile::DenseFp16 => 3,
        Profile::DenseInt8 => 4,
        Profile::Wide => 5,
        Profile::Flat12 => 6,
    }
}

pub(crate) const fn coding(profile: Profile) -> Coding {
    match profile {
        Profile::Standard => Coding::Sparse(SparseShape::new(64, 5)),
        Profile::Quality => Coding::Sparse(SparseShape::new(128, 4)),
        Profile::Wide => Coding::Sparse(SparseShape::new(320, 3)),
        Profile::DenseFp16 => Coding::Dense(DenseKind::Half),
        Profile::DenseInt8 => Coding::Dense(DenseKind::Byte),
        Profile::Flat12 => Coding::Flat12,
    }
}

/// How many values of a whole chunk a profile sends; of a shorter one the same share, rounded up.
pub const fn kept(profile: Profile) -> usize {
    match coding(profile) {
        Coding::Sparse(shape) => shape.kept,
        Coding::Dense(_) => CHUNK,
        Coding::Flat12 => flat12::KEPT,
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
        "updates of this profile have statistics of whole tensors: no chunk can be checked alone"
    )]
    WholeTensors,
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
        let mut pieces = error
            .par_chunks_mut(GROUP)
            .zip(ends.start.par_chunks(GROUP).zip(ends.end.par_chunks(GROUP)))
            .enumerate()
            .map_init(ChunkScratch::default, |scratch, (group, (error, (start, end)))| {
                self.encode_group(layout, group, error, Endpoints { start, end }, scratch)
            })
            .collect::<Vec<_>>()
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        if self.profile == Profile::Flat12 {
            pieces = vec![flat12::encode(layout, error)];
        }
        Ok(frame(self.profile, layout.chunk_count(), &pieces)?)
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
        let mut writer = GroupWriter::new(self.profile);
        let states = error
            .chunks_exact_mut(CHUNK)
            .zip(ends.start.chunks_exact(CHUNK).zip(ends.end.chunks_exact(CHUNK)));
        for (chunk, (error, (start, end))) in (group * GROUP_CHUNKS..).zip(states) {
            let real = layout.places()[chunk].real;
            self.accumulate(real, error, Endpoints { start, end })
                .map_err(|reason| EncodeError::NotFinite { chunk, reason })?;
            writer.code(&mut error[..real], scratch);
        }
        Ok(writer.finish())
    }

    /// e = β·e_in + (θ_t − θ_H) of one chunk, of which the first `real` values are not padding; padding
    /// becomes 0.
    fn accumulate(
        &self,
        real: usize,
        error: &mut [f32],
        ends: Endpoints<'_>,
    ) -> Result<(), NotFinite> {
        let (error, padding) = error.split_at_mut(real);
        padding.fill(0.0);
        let ends = (&ends.start[..real], &ends.end[..real]);
        let largest = select::accumulate(error, ends, self.error_decay);
        if largest < f32::INFINITY.to_bits() { Ok(()) } else { Err(NotFinite) }
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
        let mut sent_scratch = ChunkScratch::default();
        let (Some(place), Some(sent)) =
            (layout.place(chunk), update.chunk(layout, chunk, &mut sent_scratch))
        else {
            return Err(CodecMismatch::NoSuchChunk { chunk: number, chunks: layout.chunk_count() });
        };
        if update.profile() != self.profile {
            return Err(CodecMismatch::Profile { expected: self.profile, got: update.profile() });
        }
        let OpenedChunk { error_in, ends } = opened;
        if self.profile == Profile::Flat12 {
            return Err(CodecMismatch::WholeTensors);
        }
        if [error_in, ends.start, ends.end].iter().any(|values| values.len() != CHUNK) {
            return Err(CodecMismatch::OpenedLength { chunk: number });
        }
        let mut error = error_in.to_vec();
        let mut scratch = ChunkScratch::default();
        self.accumulate(place.real, &mut error, ends)
            .map_err(|reason| CodecMismatch::NotFinite { chunk: number, reason })?;
        let mut writer = GroupWriter::new(self.profile);
        let expected = ChunkSymbols(writer.code(&mut error[..place.real], &mut scratch));
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

/// Codes the chunks of a group, one after the other.
#[derive(Debug)]
pub(crate) enum GroupWriter {
    Sparse {
        shape: SparseShape,
        bits: BitWriter,
    },
    Dense {
        kind: DenseKind,
        raw: Vec<u8>,
    },
    /// Not chunk by chunk: everything waits in the error buffer until all of the tensor is there.
    Flat12,
}

impl GroupWriter {
    pub(crate) fn new(profile: Profile) -> Self {
        match coding(profile) {
            Coding::Sparse(shape) => Self::Sparse { shape, bits: BitWriter::default() },
            Coding::Dense(kind) => Self::Dense { kind, raw: Vec::new() },
            Coding::Flat12 => Self::Flat12,
        }
    }

    /// Chooses what is sent of a chunk, takes it out of `values`, appends it to the group and returns it.
    /// None of the values is padding.
    pub(crate) fn code<'s>(
        &mut self,
        values: &mut [f32],
        scratch: &'s mut ChunkScratch,
    ) -> Symbols<'s> {
        let ChunkScratch { selection, signs, gaps, halves, bytes, .. } = scratch;
        match self {
            Self::Sparse { shape, bits } => {
                let scale = send_largest(*shape, values, selection, signs);
                shape.write(bits, values.len(), scale, signs, gaps);
                Symbols::Sparse { scale, signs }
            }
            Self::Dense { kind, raw } => {
                let symbols = kind.code_chunk(values, halves, bytes);
                dense::write_chunk(raw, symbols);
                symbols
            }
            Self::Flat12 => Symbols::Listed { indices: &[], values: &[] },
        }
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        match self {
            Self::Sparse { bits, .. } => bits.finish(),
            Self::Dense { raw, .. } => raw,
            Self::Flat12 => Vec::new(),
        }
    }
}

/// Fills `signs` with the largest values, which are sent as ± their mean magnitude.
fn send_largest(
    shape: SparseShape,
    values: &mut [f32],
    selection: &mut Selection,
    signs: &mut Vec<SignedIndex>,
) -> Scale {
    signs.clear();
    let chosen = selection.choose(values, shape.count_max(values.len()));
    if chosen.is_empty() {
        return Scale::default();
    }
    // In the order of the indices, so the same sum everywhere.
    let sum = chosen.iter().fold(0.0, |sum, &i| sum + f64::from(values[usize::from(i)].abs()));
    let scale = Scale::nearest(sum / chosen.len() as f64);
    let magnitude = scale.magnitude();
    signs.extend(chosen.iter().map(|&index| {
        let value = &mut values[usize::from(index)];
        let sign = SignedIndex::new(index, value.is_sign_negative());
        *value -= sign.of(magnitude);
        sign
    }));
    scale
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
