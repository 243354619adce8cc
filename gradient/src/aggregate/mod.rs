//! Merging updates: token weights, a robust rule's factors, an explicit denominator.
//!
//! With w_r = T_r · N / ΣT over the admitted set and c_r the rule's factor for worker r and the tensor:
//!
//! ```text
//! num_i = Σ over workers, in the order of their ids, of fl(fl(w_r · c_r) · v̂_ri)
//! den_i = contributors: Σ of w_r over those who sent i
//!         floor:        max(that, min(2, N)), so that a lone contributor owns no unpopular coordinate
//!         workers:      Σ of all w_r
//! aggregate_i = num_i / den_i; where nobody sent i, nothing
//! ```
//! A chunk's values follow from that chunk of each update and from the [`MergePlan`], so slices can be
//! merged anywhere and joined: the bits do not depend on slicing, threads or arrival.
//!
//! A rule is a [`MergeRule`] in a file of its own. It sees statistics, never values.

mod mean;
mod median_norm;
mod norms;
mod vector;

use std::ops::Range;

use manyhands_proto::run_file::{Aggregation, Clip, Denominator};
use manyhands_proto::{Digest, NodeId, TokenCount};
use rayon::prelude::*;

pub use mean::Mean;
pub use median_norm::MedianNorm;
pub use norms::TensorNorms;
pub use vector::{AGGREGATE_MAGNITUDE_MAX, Aggregate, AggregateChunkError, ParseAggregateError};

use crate::codec::{GROUP_CHUNKS, Update};
use crate::ieee::assert_ieee;
use crate::layout::{CHUNK, Layout};

/// What of a worker's tensor is merged: 0 to 2²⁴ units of 2⁻²⁴, exact as an f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Factor(u32);

impl Factor {
    /// All of it.
    pub const ONE: Self = Self(1 << 24);

    /// `units` of 2⁻²⁴, at most 1.
    pub const fn from_units(units: u32) -> Self {
        if units < Self::ONE.0 { Self(units) } else { Self::ONE }
    }

    pub const fn units(self) -> u32 {
        self.0
    }

    /// Exact: at most 25 bits, and the only one of 25 is a power of two.
    fn value(self) -> f32 {
        self.0 as f32 * (1.0 / 16_777_216.0)
    }
}

/// A robust rule: how much of each worker's tensors is merged.
pub trait MergeRule {
    /// Its name in a run's file.
    fn name(&self) -> &'static str;

    /// One row per worker (in the order of `norms`), one factor per tensor. Any number of workers.
    fn factors(&self, norms: &[&TensorNorms]) -> Vec<Vec<Factor>>;
}

/// The rule that a run's file names.
pub fn rule_of(clip: Clip) -> &'static dyn MergeRule {
    match clip {
        Clip::None => &Mean,
        Clip::MedianNorm => &MedianNorm,
    }
}

/// A member of the admitted set.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    pub worker: NodeId,
    /// Tokens it trained on: its weight.
    pub tokens: TokenCount,
    pub norms: &'a TensorNorms,
}

/// Why a set of members cannot be merged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("expected at least one admitted update, got none")]
    NoMembers,
    #[error("expected one update per worker, got two of {worker}")]
    Duplicate { worker: NodeId },
    #[error("expected {worker} to have trained on at least one token, got 0")]
    NoTokens { worker: NodeId },
    #[error("expected fewer than 2^64 tokens in all, got more")]
    TooManyTokens,
}

/// Why updates do not fit a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    #[error("expected an update of {worker}, got none")]
    Missing { worker: NodeId },
    #[error("expected only updates of the plan's workers, once each, got one of {worker}")]
    Unexpected { worker: NodeId },
    #[error("expected an update of {expected} chunks from {worker}, got {got}")]
    Layout { worker: NodeId, expected: usize, got: usize },
    #[error("expected a slice of at most {chunks} chunks, got {slice:?}")]
    Slice { slice: Range<usize>, chunks: usize },
    #[error("expected a plan for {expected} tensors, got {got}")]
    Tensors { expected: usize, got: usize },
}

/// One worker's update, to be merged.
#[derive(Debug, Clone, Copy)]
pub struct WorkerUpdate<'a> {
    pub worker: NodeId,
    pub update: &'a Update,
}

/// An admitted worker's weight and factors.
#[derive(Debug, Clone, PartialEq)]
struct Share {
    worker: NodeId,
    tokens: TokenCount,
    weight: f32,
    /// One per tensor.
    factors: Vec<Factor>,
}

/// Everything about a merge that is not values: who, at which weight, over which denominator. All of it
/// follows from integers that are published, so anybody can compute it again.
#[derive(Debug, Clone, PartialEq)]
pub struct MergePlan {
    /// In the order of the workers' ids.
    shares: Vec<Share>,
    denominator: Denominator,
}

impl MergePlan {
    /// The plan for an admitted set, in whatever order its members come.
    ///
    /// # Errors
    /// When the set is empty, a worker is in it twice, or trained on nothing.
    pub fn new(
        members: &[Member<'_>],
        rule: &dyn MergeRule,
        denominator: Denominator,
    ) -> Result<Self, PlanError> {
        assert_ieee();
        let mut members = members.to_vec();
        members.sort_by_key(|member| member.worker);
        if members.is_empty() {
            return Err(PlanError::NoMembers);
        }
        if let Some(pair) = members.windows(2).find(|pair| pair[0].worker == pair[1].worker) {
            return Err(PlanError::Duplicate { worker: pair[0].worker });
        }
        if let Some(member) = members.iter().find(|member| member.tokens.0 == 0) {
            return Err(PlanError::NoTokens { worker: member.worker });
        }
        let total = members
            .iter()
            .try_fold(0_u64, |sum, member| sum.checked_add(member.tokens.0))
            .ok_or(PlanError::TooManyTokens)?;
        let norms: Vec<&TensorNorms> = members.iter().map(|member| member.norms).collect();
        let factors = rule.factors(&norms);
        assert_eq!(factors.len(), members.len(), "rule {} gives each worker a row", rule.name());
        let count = members.len() as u128;
        let shares = members
            .iter()
            .zip(factors)
            .map(|(member, factors)| Share {
                worker: member.worker,
                tokens: member.tokens,
                weight: nearest_ratio(u128::from(member.tokens.0) * count, total),
                factors,
            })
            .collect();
        Ok(Self { shares, denominator })
    }

    /// The workers, in the order in which they are summed.
    pub fn workers(&self) -> impl Iterator<Item = NodeId> {
        self.shares.iter().map(|share| share.worker)
    }

    /// A worker's token weight w_r; `None` if it is not in the plan.
    pub fn weight(&self, worker: &NodeId) -> Option<f32> {
        self.share(worker).map(|share| share.weight)
    }

    /// A worker's factors, one per tensor; `None` if it is not in the plan.
    pub fn factors(&self, worker: &NodeId) -> Option<&[Factor]> {
        self.share(worker).map(|share| share.factors.as_slice())
    }

    /// Digest of the integers that the plan follows from: workers, tokens, factors, denominator.
    pub fn digest(&self) -> Digest {
        let mut bytes = vec![match self.denominator {
            Denominator::Contributors => 1,
            Denominator::Floor => 2,
            Denominator::Workers => 3,
        }];
        for share in &self.shares {
            bytes.extend(share.worker.as_bytes());
            bytes.extend(share.tokens.0.to_le_bytes());
            bytes.extend((share.factors.len() as u64).to_le_bytes());
            bytes.extend(share.factors.iter().flat_map(|factor| factor.units().to_le_bytes()));
        }
        Digest::derive("manyhands 2026 merge plan", &bytes)
    }

    /// Merges the updates of all the plan's workers over a slice (an interval of chunks).
    ///
    /// # Errors
    /// When an update is missing, foreign, there twice, or of another layout.
    pub fn merge(
        &self,
        layout: &Layout,
        updates: &[WorkerUpdate<'_>],
        slice: Range<usize>,
    ) -> Result<Aggregate, MergeError> {
        let matched = self.matched(layout, updates, &slice)?;
        Ok(self.merge_shares(layout, &matched, slice))
    }

    /// What takes back a worker's part in a past merge: aggregate(A without r) − aggregate(A), all
    /// weights and factors as they were. Given to [`crate::outer_step`] like an aggregate, with that
    /// round's α, it adds α · (aggregate(A) − aggregate(A without r)).
    ///
    /// # Errors
    /// As [`Self::merge`], and when `worker` is not in the plan. `updates` are those of the whole set.
    pub fn revocation(
        &self,
        layout: &Layout,
        updates: &[WorkerUpdate<'_>],
        worker: &NodeId,
    ) -> Result<Aggregate, MergeError> {
        let slice = 0..layout.chunk_count();
        let matched = self.matched(layout, updates, &slice)?;
        let others: Vec<_> =
            matched.iter().filter(|(share, _)| share.worker != *worker).copied().collect();
        if others.len() == matched.len() {
            return Err(MergeError::Missing { worker: *worker });
        }
        let with = self.merge_shares(layout, &matched, slice.clone());
        Ok(self.merge_shares(layout, &others, slice).minus(&with))
    }

    fn share(&self, worker: &NodeId) -> Option<&Share> {
        let index = self.shares.binary_search_by_key(worker, |share| share.worker).ok()?;
        self.shares.get(index)
    }

    /// Each share with its update, in the order of the workers' ids.
    fn matched<'a>(
        &'a self,
        layout: &Layout,
        updates: &[WorkerUpdate<'a>],
        slice: &Range<usize>,
    ) -> Result<Vec<(&'a Share, &'a Update)>, MergeError> {
        let chunks = layout.chunk_count();
        if slice.start > slice.end || slice.end > chunks {
            return Err(MergeError::Slice { slice: slice.clone(), chunks });
        }
        let mut updates = updates.to_vec();
        updates.sort_by_key(|update| update.worker);
        if let Some(pair) = updates.windows(2).find(|pair| pair[0].worker == pair[1].worker) {
            return Err(MergeError::Unexpected { worker: pair[0].worker });
        }
        if let Some(stranger) = updates.iter().find(|update| self.share(&update.worker).is_none()) {
            return Err(MergeError::Unexpected { worker: stranger.worker });
        }
        let expected = layout.tensors().len();
        self.shares
            .iter()
            .map(|share| {
                let worker = share.worker;
                let index = updates
                    .binary_search_by_key(&worker, |update| update.worker)
                    .map_err(|_| MergeError::Missing { worker })?;
                let update = updates[index].update;
                if update.chunk_count() != chunks {
                    let got = update.chunk_count();
                    return Err(MergeError::Layout { worker, expected: chunks, got });
                }
                if share.factors.len() != expected {
                    return Err(MergeError::Tensors { expected, got: share.factors.len() });
                }
                Ok((share, update))
            })
            .collect()
    }

    fn merge_shares(
        &self,
        layout: &Layout,
        matched: &[(&Share, &Update)],
        slice: Range<usize>,
    ) -> Aggregate {
        let denominator = DenominatorRule::new(self.denominator, matched);
        let chunks: Vec<usize> = slice.clone().collect();
        let parts: Vec<Aggregate> = chunks
            .par_chunks(GROUP_CHUNKS)
            .map_init(ChunkSums::default, |sums, chunks| {
                assert_ieee();
                let mut part = Aggregate::empty(chunks[0]);
                for &chunk in chunks {
                    sums.add_all(layout.places()[chunk].tensor, chunk, matched);
                    part.push_chunk(sums.quotients(denominator));
                }
                part
            })
            .collect();
        let mut aggregate = Aggregate::empty(slice.start);
        for part in &parts {
            aggregate.append(part);
        }
        aggregate
    }
}

/// A denominator with what it needs of the set.
#[derive(Debug, Clone, Copy)]
enum DenominatorRule {
    Contributors,
    /// At least this.
    Floor(f32),
    /// Always this.
    Workers(f32),
}

impl DenominatorRule {
    fn new(denominator: Denominator, matched: &[(&Share, &Update)]) -> Self {
        match denominator {
            Denominator::Contributors => Self::Contributors,
            Denominator::Floor => Self::Floor(matched.len().min(2) as f32),
            Denominator::Workers => {
                Self::Workers(matched.iter().fold(0.0, |sum, (share, _)| sum + share.weight))
            }
        }
    }

    fn of(self, contributors: f32) -> f32 {
        match self {
            Self::Contributors => contributors,
            Self::Floor(floor) => contributors.max(floor),
            Self::Workers(all) => all,
        }
    }
}

/// Numerators and contributors' weights of one chunk.
#[derive(Debug)]
struct ChunkSums {
    numerators: Vec<f32>,
    contributors: Vec<f32>,
}

impl Default for ChunkSums {
    fn default() -> Self {
        Self { numerators: vec![0.0; CHUNK], contributors: vec![0.0; CHUNK] }
    }
}

impl ChunkSums {
    fn add_all(&mut self, tensor: usize, chunk: usize, matched: &[(&Share, &Update)]) {
        self.numerators.fill(0.0);
        self.contributors.fill(0.0);
        for (share, update) in matched {
            let clipped = share.weight * share.factors[tensor].value();
            update.symbols(chunk).for_each(|index, value| {
                self.numerators[index] += clipped * value;
                self.contributors[index] += share.weight;
            });
        }
    }

    /// Weights are above 0, so contributors weigh 0 exactly where nobody sent anything.
    fn quotients(&self, denominator: DenominatorRule) -> impl Iterator<Item = (usize, f32)> {
        let sums = self.numerators.iter().zip(&self.contributors).enumerate();
        sums.filter(|(_, (_, contributors))| **contributors > 0.0)
            .map(move |(index, (sum, contributors))| (index, sum / denominator.of(*contributors)))
    }
}

/// What a round merges, from its updates alone: the coordinator's and the auditor's one call.
///
/// # Errors
/// When the set cannot be merged or the updates do not fit the layout.
pub fn aggregate(
    layout: &Layout,
    config: &Aggregation,
    admitted: &[(WorkerUpdate<'_>, TokenCount)],
) -> Result<(MergePlan, Aggregate), AggregateError> {
    if let Some((foreign, _)) =
        admitted.iter().find(|(sent, _)| sent.update.chunk_count() != layout.chunk_count())
    {
        let got = foreign.update.chunk_count();
        let (worker, expected) = (foreign.worker, layout.chunk_count());
        return Err(MergeError::Layout { worker, expected, got }.into());
    }
    let norms: Vec<TensorNorms> =
        admitted.iter().map(|(sent, _)| TensorNorms::of(layout, sent.update)).collect();
    let members: Vec<Member<'_>> = admitted
        .iter()
        .zip(&norms)
        .map(|((sent, tokens), norms)| Member { worker: sent.worker, tokens: *tokens, norms })
        .collect();
    let plan = MergePlan::new(&members, rule_of(config.clip), config.denominator)?;
    let updates: Vec<WorkerUpdate<'_>> = admitted.iter().map(|(sent, _)| *sent).collect();
    let merged = plan.merge(layout, &updates, 0..layout.chunk_count())?;
    Ok((plan, merged))
}

/// Why a round's updates were not merged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AggregateError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Merge(#[from] MergeError),
}

/// The f32 nearest to numerator / denominator (ties to even), of a numerator above 0.
fn nearest_ratio(numerator: u128, denominator: u64) -> f32 {
    let denominator = u128::from(denominator);
    // With the numerator's highest bit at the top, a quotient has at least 64 bits.
    let shift = numerator.leading_zeros();
    let shifted = numerator << shift;
    let quotient = shifted / denominator;
    let is_inexact = !shifted.is_multiple_of(denominator);
    // The lowest bit is far below the 24 that stay; set, it stands for all that was cut off, so the
    // conversion is the one rounding. Powers of two are exact, and no ratio here is subnormal.
    let rounded = (quotient | u128::from(is_inexact)) as f32;
    let scale = f64::from_bits((1023 - u64::from(shift)) << 52);
    (f64::from(rounded) * scale) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_the_nearest_float() {
        assert_eq!(nearest_ratio(1, 1), 1.0);
        assert_eq!(nearest_ratio(1, 3), 1.0 / 3.0);
        assert_eq!(nearest_ratio(2, 3), 2.0 / 3.0);
        assert_eq!(nearest_ratio(30_000, 7), 30_000.0 / 7.0);
        assert_eq!(nearest_ratio(u128::from(u64::MAX) * 5, u64::MAX), 5.0);
        // 1 + 2⁻²⁴ is a tie and goes to even; a trace more goes up.
        let tie = (1_u128 << 24) + 1;
        assert_eq!(nearest_ratio(tie, 1 << 24), 1.0);
        assert_eq!(nearest_ratio(tie * (1 << 30) + 1, 1 << 54), 1.0 + f32::EPSILON);
        assert_eq!(nearest_ratio(1, u64::MAX), 2.0_f32.powi(-64));
    }
}
