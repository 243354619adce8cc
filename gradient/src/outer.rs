//! From a round's updates to θ_{t+1}: the one computation that coordinator, reducers and auditors share.
//!
//! With r the residual (the coordinator's own error buffer, public by its digest) and A_t the admitted set:
//!
//! ```text
//! r_i ← r_i + α · aggregate_i, after what is taken back of earlier rounds, in the order given
//! v̂   = what the broadcast's profile sends of r, chunk by chunk
//! r   ← r − v̂;   θ ← θ − v̂
//! ```
//! Nothing is lost: what the broadcast leaves out waits in the residual (decay 1). No outer momentum: with
//! sparse error feedback it diverges.
//!
//! One pass over θ and the residual; beside them only the sums of a chunk per thread.

use std::ops::Range;

use manyhands_proto::message::Flagged;
use manyhands_proto::run_file::{Aggregation, Profile};
use manyhands_proto::{NodeId, Round};
use rayon::prelude::*;

use crate::aggregate::{ChunkSums, Member, PlanError, Term};
use crate::codec::{ChunkReader, ChunkScratch, GROUP, GROUP_CHUNKS, GroupWriter, Payload, frame};
use crate::ieee::assert_ieee;
use crate::layout::{CHUNK, Layout};

/// Updates that are merged, and the outer learning rate they are merged with.
#[derive(Debug, Clone, Copy)]
pub struct Admitted<'a> {
    /// In any order.
    pub members: &'a [Member<'a>],
    /// α of the round.
    pub alpha: f32,
}

/// Workers' parts in an earlier merge that are taken back.
///
/// A merge is no sum, so what two parts together did is not what each did beside the other: those that went
/// before have to be named too.
#[derive(Debug, Clone, Copy)]
pub struct Revoked<'a> {
    /// Whose parts are taken back now, together.
    pub workers: &'a [NodeId],
    /// Whose parts were taken back before.
    pub earlier: &'a [NodeId],
    /// All that was merged then.
    pub from: Admitted<'a>,
}

/// What a step changes: canonical vectors, or the same slice of both.
#[derive(Debug)]
pub struct OuterState<'a> {
    /// θ_t, which becomes θ_{t+1}.
    pub theta: &'a mut [f32],
    /// What earlier broadcasts left out.
    pub residual: &'a mut [f32],
}

/// Why a round's updates were not merged.
#[derive(Debug, thiserror::Error)]
pub enum AggregateError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("flat12 has statistics of whole tensors, so it cannot be broadcast slice by slice")]
    WholeTensors,
    #[error("zstd: {0}")]
    Compression(#[from] std::io::Error),
}

/// Everything that leads from θ_t to θ_{t+1}.
#[derive(Debug, Clone)]
pub struct OuterStep<'a> {
    layout: &'a Layout,
    broadcast: Profile,
    terms: Vec<Term<'a>>,
    flagged: Vec<Flagged>,
}

/// The broadcast's bytes of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BroadcastSlice {
    chunks: Range<usize>,
    groups: Vec<Vec<u8>>,
}

impl<'a> OuterStep<'a> {
    /// First what is `revoked`, in the order given, each with its own round's weights and α; then what is
    /// `admitted`, if anything.
    ///
    /// # Errors
    /// When a set cannot be merged, an update does not fit the layout, or the broadcast is `flat12`.
    pub fn new(
        layout: &'a Layout,
        config: &Aggregation,
        admitted: Admitted<'a>,
        revoked: &[Revoked<'a>],
    ) -> Result<Self, AggregateError> {
        if config.broadcast == Profile::Flat12 {
            return Err(AggregateError::WholeTensors);
        }
        let mut terms = Vec::with_capacity(revoked.len() + 1);
        for revoked in revoked {
            terms.push(Term::revoking(layout, config, *revoked)?);
        }
        let mut flagged = Vec::new();
        if !admitted.members.is_empty() {
            let term = Term::merging(layout, config, admitted)?;
            flagged = term.flagged();
            terms.push(term);
        }
        Ok(Self { layout, broadcast: config.broadcast, terms, flagged })
    }

    /// Of those admitted, whose updates are worth a closer look, in the order of their ids.
    pub fn flagged(&self) -> Vec<Flagged> {
        self.flagged.clone()
    }

    /// Does the step on a slice, an interval of chunks that begins with a group of [`GROUP_CHUNKS`] and ends
    /// with one or with the layout. The same bits for any slicing and any number of threads.
    ///
    /// # Panics
    /// When the slice is none such, a vector is not as long, or this thread flushes subnormals to zero.
    pub fn apply(&self, slice: Range<usize>, state: OuterState<'_>) -> BroadcastSlice {
        self.check(&slice, state.theta);
        self.check(&slice, state.residual);
        let groups = state
            .theta
            .par_chunks_mut(GROUP)
            .zip(state.residual.par_chunks_mut(GROUP))
            .enumerate()
            .map_init(Room::default, |room, (group, (theta, residual))| {
                self.apply_group(slice.start + group * GROUP_CHUNKS, theta, residual, room)
            })
            .collect();
        BroadcastSlice { chunks: slice, groups }
    }

    fn apply_group(
        &self,
        first: usize,
        theta: &mut [f32],
        residual: &mut [f32],
        room: &mut Room,
    ) -> Vec<u8> {
        assert_ieee();
        let mut readers = self.readers(first);
        let mut writer = GroupWriter::new(self.broadcast);
        let chunks = theta.chunks_exact_mut(CHUNK).zip(residual.chunks_exact_mut(CHUNK));
        for (chunk, (theta, residual)) in (first..).zip(chunks) {
            let place = self.layout.places()[chunk];
            for (term, readers) in self.terms.iter().zip(&mut readers) {
                room.sums.add(term, readers, place.tensor, (residual, term.alpha()));
            }
            let sent = writer.code(&mut residual[..place.real], &mut room.scratch);
            sent.for_each(|index, value| theta[index] -= value);
        }
        writer.finish()
    }

    /// θ ← θ − α · aggregate on a slice, nothing compressed and nothing left for later: what whoever has all
    /// payloads can do without a broadcast. The same bits for any slicing and any number of threads.
    ///
    /// # Panics
    /// As [`Self::apply`].
    pub fn merge_into(&self, slice: Range<usize>, theta: &mut [f32]) {
        self.check(&slice, theta);
        theta.par_chunks_mut(GROUP).enumerate().for_each_init(
            ChunkSums::default,
            |sums, (group, theta)| {
                assert_ieee();
                let first = slice.start + group * GROUP_CHUNKS;
                let mut readers = self.readers(first);
                for (chunk, theta) in (first..).zip(theta.chunks_exact_mut(CHUNK)) {
                    let tensor = self.layout.places()[chunk].tensor;
                    for (term, readers) in self.terms.iter().zip(&mut readers) {
                        sums.add(term, readers, tensor, (theta, -term.alpha()));
                    }
                }
            },
        );
    }

    /// Of each term's updates, from a chunk on.
    fn readers(&self, first: usize) -> Vec<Vec<ChunkReader<'_>>> {
        self.terms.iter().map(|term| term.readers(self.layout, first)).collect()
    }

    fn check(&self, slice: &Range<usize>, values: &[f32]) {
        let chunks = self.layout.chunk_count();
        let ends_well = slice.end.is_multiple_of(GROUP_CHUNKS) || slice.end == chunks;
        assert!(slice.start.is_multiple_of(GROUP_CHUNKS) && ends_well, "slices are whole groups");
        assert_eq!(values.len(), slice.len() * CHUNK, "the vector's slice");
    }

    /// The broadcast, from slices that together cover the layout, in order.
    ///
    /// # Errors
    /// When zstd cannot allocate.
    ///
    /// # Panics
    /// When they do not cover it.
    pub fn join(&self, slices: &[BroadcastSlice]) -> Result<Payload, AggregateError> {
        let mut end = 0;
        for slice in slices {
            assert_eq!(slice.chunks.start, end, "slices are joined in order");
            end = slice.chunks.end;
        }
        assert_eq!(end, self.layout.chunk_count(), "slices cover the layout");
        let groups: Vec<_> = slices.iter().flat_map(|slice| &slice.groups).cloned().collect();
        Ok(frame(self.broadcast, end, &groups)?)
    }
}

/// What a merge comes to beside θ_{t+1}.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// Leads everybody else from θ_t to θ_{t+1} ([`crate::codec::Update::subtract_from`]).
    pub broadcast: Payload,
    /// Whose updates are worth a closer look, in the order of their ids.
    pub flagged: Vec<Flagged>,
}

/// Merges a round: `state` moves from θ_t to θ_{t+1}.
///
/// # Errors
/// When a set cannot be merged or an update does not fit the layout; `state` is then as it was.
pub fn merge(
    layout: &Layout,
    config: &Aggregation,
    admitted: Admitted<'_>,
    revoked: &[Revoked<'_>],
    state: OuterState<'_>,
) -> Result<Merged, AggregateError> {
    let step = OuterStep::new(layout, config, admitted, revoked)?;
    let whole = step.apply(0..layout.chunk_count(), state);
    Ok(Merged { broadcast: step.join(&[whole])?, flagged: step.flagged() })
}

/// α of a round: linear from the first round's to the last round's.
pub fn outer_learning_rate(config: &Aggregation, round: Round, rounds: u32) -> f32 {
    let Aggregation { outer_learning_rate: first, outer_learning_rate_final: last, .. } = *config;
    let final_round = rounds.saturating_sub(1);
    if final_round == 0 {
        return first;
    }
    if round.0 >= final_round {
        return last;
    }
    let share = round.0 as f32 / final_round as f32;
    first + (last - first) * share
}

/// What a thread works in.
#[derive(Debug, Default)]
struct Room {
    sums: ChunkSums,
    scratch: ChunkScratch,
}
