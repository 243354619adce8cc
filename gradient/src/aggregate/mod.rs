//! Merging updates: token weights, a robust rule's factors, an explicit denominator.
//!
//! With c_r the rule's factor for worker r and the tensor, and w_r = T_r · N / ΣT over those of the admitted set whom
//! the rule does not leave out whole (whose weight then makes others' no lighter):
//!
//! ```text
//! num_i = Σ over workers, in the order of their ids, of fl(fl(w_r · c_r) · v̂_ri)
//! den_i = contributors: max(Σ of w_r over those who sent i, 1), 1 being the mean weight: who trained on little
//!                       does not move a coordinate as far as it likes only because nobody else sent it
//!         floor:        max(that, 2, 2 · the largest of them), so that nobody moves a coordinate by more than
//!                       half of what it sent there, however unpopular it is; with one worker, as contributors
//!         workers:      Σ of all w_r
//! aggregate_i = num_i / den_i; where nobody sent i, nothing
//! ```
//! A chunk's values follow from that chunk of each update and from the [`MergePlan`], so slices can be
//! merged anywhere and joined: the bits do not depend on slicing, threads or arrival.
//!
//! A rule is a [`MergeRule`] in a file of its own. It sees statistics, never values.

mod centered_clip;
mod cosine_trust;
mod geometric_median;
mod gram;
mod loss_gate;
mod mean;
mod median_norm;
mod norms;
mod signals;
mod statistics;
mod sums;

use manyhands_proto::message::{Flagged, LossEffect, Signal};
use manyhands_proto::run_file::{Aggregation, Denominator, Rule};
use manyhands_proto::{NodeId, TokenCount};

pub use centered_clip::CenteredClip;
pub use cosine_trust::CosineTrust;
pub use geometric_median::GeometricMedian;
pub use gram::Gram;
pub use loss_gate::LossGate;
pub use mean::Mean;
pub use median_norm::MedianNorm;
pub use norms::TensorNorms;
pub(crate) use norms::squared;
pub use statistics::Statistics;
pub(crate) use sums::{ChunkSums, Term};

use crate::codec::Update;
use crate::ieee::assert_ieee;
use crate::layout::Layout;

/// What of a worker's tensor is merged: 0 to 2²⁴ units of 2⁻²⁴, exact as an f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Factor(u32);

impl Factor {
    /// All of it.
    pub const ONE: Self = Self(1 << 24);
    /// None of it: as if the worker had sent nothing of the tensor.
    pub const NOTHING: Self = Self(0);

    /// `units` of 2⁻²⁴, at most 1.
    pub const fn from_units(units: u32) -> Self {
        if units < Self::ONE.0 { Self(units) } else { Self::ONE }
    }

    pub const fn units(self) -> u32 {
        self.0
    }

    /// A share of all, held between 0 and 1 and rounded down to 24 bits; what is not a number is nothing.
    pub(crate) fn of_share(share: f64) -> Self {
        Self((share.clamp(0.0, 1.0) * f64::from(Self::ONE.0)) as u32)
    }

    /// What is left of it when that is held back as well, rounded down.
    fn and(self, other: Self) -> Self {
        Self(((u64::from(self.0) * u64::from(other.0)) >> 24) as u32)
    }

    /// Exact: at most 25 bits, and the only one of 25 is a power of two.
    fn value(self) -> f32 {
        self.0 as f32 * (1.0 / 16_777_216.0)
    }
}

/// A robust rule: how much of each worker's tensors is merged. Only + − × ÷ √ of f64, in an order that
/// follows from the workers' ids.
pub trait MergeRule {
    /// Its name in a run's file.
    fn name(&self) -> &'static str;

    /// Whether it reads the dot products between workers.
    fn needs_gram(&self) -> bool {
        false
    }

    /// Whether it reads what each update does to held-out loss.
    fn needs_losses(&self) -> bool {
        false
    }

    /// One row per worker, one factor per tensor. Any number of workers from 1 on.
    fn factors(&self, statistics: Statistics<'_>) -> Vec<Vec<Factor>>;
}

/// The rule that a run's file names.
pub fn rule_of(rule: Rule) -> &'static dyn MergeRule {
    match rule {
        Rule::Mean => &Mean,
        Rule::MedianNorm => &MedianNorm,
        Rule::GeometricMedian => &GeometricMedian,
        Rule::CenteredClip => &CenteredClip,
        Rule::CosineTrust => &CosineTrust,
        Rule::LossGate => &LossGate,
    }
}

/// Each rule's factors, multiplied. One row per worker, one factor per tensor.
fn factors(rules: &[Rule], statistics: Statistics<'_>) -> Vec<Vec<Factor>> {
    let mut all = Mean.factors(statistics);
    for &rule in rules {
        let rows = rule_of(rule).factors(statistics);
        for (row, held_back) in all.iter_mut().zip(rows) {
            for (factor, held_back) in row.iter_mut().zip(held_back) {
                *factor = factor.and(held_back);
            }
        }
    }
    all
}

/// A member of an admitted set.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    pub worker: NodeId,
    /// Tokens it trained on: its weight.
    pub tokens: TokenCount,
    pub update: &'a Update,
    /// If somebody measured it.
    pub loss_effect: Option<LossEffect>,
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
    #[error("expected an update of {expected} chunks from {worker}, got {got}")]
    Layout { worker: NodeId, expected: usize, got: usize },
    #[error("expected {worker} to be in the set that it is taken out of")]
    NotMember { worker: NodeId },
    #[error("expected somebody to be taken out of the set, got nobody")]
    NothingRevoked,
    #[error("expected {worker} to be taken out of the set once, got it twice")]
    RevokedTwice { worker: NodeId },
}

/// An admitted worker's weight and factors.
#[derive(Debug, Clone, PartialEq)]
struct Share {
    worker: NodeId,
    weight: f32,
    /// One per tensor.
    factors: Vec<Factor>,
    /// What makes its update worth a closer look.
    signal: Option<Signal>,
}

/// Everything about a merge that is not values: who, at which weight, over which denominator. All of it
/// follows from integers that are published, so anybody can compute it again.
#[derive(Debug, Clone, PartialEq)]
pub struct MergePlan {
    /// In the order of the workers' ids.
    shares: Vec<Share>,
    denominator: Denominator,
    /// Workers that are not left out whole; all, if everybody is.
    count: usize,
    /// Of their weights.
    weight_sum: f32,
}

impl MergePlan {
    /// The plan for an admitted set, in whatever order its members come.
    ///
    /// # Errors
    /// When the set is empty, a worker is in it twice, trained on nothing, or its update is of another layout.
    pub fn new(
        layout: &Layout,
        config: &Aggregation,
        members: &[Member<'_>],
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
        let expected = layout.chunk_count();
        if let Some(foreign) = members.iter().find(|it| it.update.chunk_count() != expected) {
            let (worker, got) = (foreign.worker, foreign.update.chunk_count());
            return Err(PlanError::Layout { worker, expected, got });
        }
        members
            .iter()
            .try_fold(0_u64, |sum, member| sum.checked_add(member.tokens.0))
            .ok_or(PlanError::TooManyTokens)?;
        let updates: Vec<&Update> = members.iter().map(|member| member.update).collect();
        let norms: Vec<&TensorNorms> = updates.iter().map(|update| update.norms()).collect();
        let needs_gram = config.rules.iter().any(|&rule| rule_of(rule).needs_gram());
        let gram = needs_gram.then(|| Gram::of(layout, &updates));
        let loss_effects: Vec<_> = members.iter().map(|member| member.loss_effect).collect();
        let statistics =
            Statistics { norms: &norms, gram: gram.as_ref(), loss_effects: &loss_effects };
        let factors = factors(&config.rules, statistics);
        let signals = signals::signals(statistics);
        let all_out = factors.iter().all(|factors| is_out(factors));
        let counts = |factors: &[Factor]| all_out || !is_out(factors);
        let counted = members.iter().zip(&factors).filter(|(_, factors)| counts(factors));
        let tokens: Vec<u64> = counted.map(|(member, _)| member.tokens.0).collect();
        let (count, total) = (tokens.len(), tokens.iter().sum());
        let shares: Vec<Share> = members
            .iter()
            .zip(factors.into_iter().zip(signals))
            .map(|(member, (factors, signal))| Share {
                worker: member.worker,
                weight: nearest_ratio(u128::from(member.tokens.0) * count as u128, total),
                factors,
                signal,
            })
            .collect();
        let weights = shares.iter().filter(|share| counts(&share.factors)).map(|it| it.weight);
        let weight_sum = weights.fold(0.0, |sum, weight| sum + weight);
        Ok(Self { shares, denominator: config.denominator, count, weight_sum })
    }

    /// The workers, in the order in which they are summed.
    pub fn workers(&self) -> impl Iterator<Item = NodeId> {
        self.shares.iter().map(|share| share.worker)
    }

    /// Workers whose updates are worth a closer look, with what makes them so, in the order of their ids.
    pub fn flagged(&self) -> impl Iterator<Item = Flagged> {
        let flagged = |share: &Share| Some(Flagged { worker: share.worker, signal: share.signal? });
        self.shares.iter().filter_map(flagged)
    }

    /// A worker's token weight w_r; `None` if it is not in the plan.
    pub fn weight(&self, worker: &NodeId) -> Option<f32> {
        self.share(worker).map(|share| share.weight)
    }

    /// A worker's factors, one per tensor; `None` if it is not in the plan.
    pub fn factors(&self, worker: &NodeId) -> Option<&[Factor]> {
        self.share(worker).map(|share| share.factors.as_slice())
    }

    fn share(&self, worker: &NodeId) -> Option<&Share> {
        let index = self.shares.binary_search_by_key(worker, |share| share.worker).ok()?;
        self.shares.get(index)
    }

    /// What the denominator is at least. Nobody's weights sum to more than all weights do, so with the
    /// denominator `workers` this is all there is to it.
    fn denominator_min(&self) -> f32 {
        match self.denominator {
            Denominator::Contributors => 1.0,
            Denominator::Floor => self.count.min(2) as f32,
            Denominator::Workers => self.weight_sum,
        }
    }

    /// Whether nobody moves a coordinate by more than half of what it sent there.
    fn is_capped(&self) -> bool {
        self.denominator == Denominator::Floor && self.count > 1
    }
}

/// Whether a worker is left out whole.
fn is_out(factors: &[Factor]) -> bool {
    factors.iter().all(|factor| *factor == Factor::NOTHING)
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
