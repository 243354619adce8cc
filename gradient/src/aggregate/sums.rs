//! The sums of one chunk after another.

use manyhands_proto::NodeId;
use manyhands_proto::run_file::Aggregation;
use multiversion::multiversion;

use super::{Member, MergePlan, PlanError};
use crate::codec::{ChunkReader, ChunkScratch, Symbols, Update};
use crate::layout::{CHUNK, Layout};

/// Updates to be merged by a plan, or one of them to be taken back out of such a merge.
#[derive(Debug, Clone)]
pub(crate) struct Term<'a> {
    plan: MergePlan,
    /// In the order of the plan's workers.
    updates: Vec<&'a Update>,
    /// The place in that order of the one that is taken back.
    revoked: Option<usize>,
    /// α of the round.
    alpha: f32,
}

impl<'a> Term<'a> {
    /// α · aggregate(A).
    pub(crate) fn merging(
        layout: &Layout,
        config: &Aggregation,
        members: &[Member<'a>],
        alpha: f32,
    ) -> Result<Self, PlanError> {
        let plan = MergePlan::new(layout, config, members)?;
        let mut members = members.to_vec();
        members.sort_by_key(|member| member.worker);
        let updates = members.into_iter().map(|member| member.update).collect();
        Ok(Self { plan, updates, revoked: None, alpha })
    }

    /// α · (aggregate(A without r) − aggregate(A)), all weights and factors as they were: what takes r's
    /// part in an earlier merge back.
    pub(crate) fn revoking(
        layout: &Layout,
        config: &Aggregation,
        members: &[Member<'a>],
        alpha: f32,
        worker: NodeId,
    ) -> Result<Self, PlanError> {
        let term = Self::merging(layout, config, members, alpha)?;
        let place = term.plan.workers().position(|member| member == worker);
        Ok(Self { revoked: Some(place.ok_or(PlanError::NotMember { worker })?), ..term })
    }

    /// α of the round.
    pub(crate) fn alpha(&self) -> f32 {
        self.alpha
    }

    /// Readers of its updates, from a chunk on.
    pub(crate) fn readers(&self, layout: &'a Layout, first: usize) -> Vec<ChunkReader<'a>> {
        self.updates.iter().map(|update| update.reader(layout, first)).collect()
    }
}

/// Numerators and contributors' weights of one chunk; zeros between one term and the next.
#[derive(Debug)]
struct Sums {
    numerators: Box<[f32; CHUNK]>,
    contributors: Box<[f32; CHUNK]>,
}

impl Default for Sums {
    fn default() -> Self {
        Self { numerators: Box::new([0.0; CHUNK]), contributors: Box::new([0.0; CHUNK]) }
    }
}

impl Sums {
    fn add(&mut self, symbols: Symbols<'_>, clipped: f32, weight: f32) {
        if let Symbols::Sparse { scale, signs } = symbols {
            // The sign changes nothing of how a product rounds.
            let product = clipped * scale.magnitude();
            for sign in signs {
                self.numerators[sign.index()] += sign.of(product);
                self.contributors[sign.index()] += weight;
            }
            return;
        }
        symbols.for_each(|index, value| {
            self.numerators[index] += clipped * value;
            self.contributors[index] += weight;
        });
    }
}

/// Room for the sums of one chunk after another.
#[derive(Debug, Default)]
pub(crate) struct ChunkSums {
    all: Sums,
    others: Sums,
    scratch: ChunkScratch,
}

impl ChunkSums {
    /// Adds `factor` times what the term makes of the readers' next chunk, which belongs to `tensor`.
    pub(crate) fn add(
        &mut self,
        term: &Term<'_>,
        readers: &mut [ChunkReader<'_>],
        tensor: usize,
        (into, factor): (&mut [f32], f32),
    ) {
        let shares = term.plan.shares.iter().zip(readers).enumerate();
        for (place, (share, reader)) in shares {
            let (weight, clipped) = (share.weight, share.weight * share.factors[tensor].value());
            let symbols = reader.next(&mut self.scratch);
            self.all.add(symbols, clipped, weight);
            if term.revoked.is_some_and(|revoked| revoked != place) {
                self.others.add(symbols, clipped, weight);
            }
        }
        let least = term.plan.denominator_min();
        if term.revoked.is_some() {
            take_difference(into, &mut self.others, &mut self.all, least, factor);
        } else {
            take_quotients(into, &mut self.all, least, factor);
        }
    }
}

/// numerator / max(contributors, least). Weights are above 0, so contributors weigh 0 exactly where nobody
/// sent anything; there it is 0.
#[inline(always)]
fn quotient(numerator: f32, contributors: f32, least: f32) -> f32 {
    let denominator = if contributors > least { contributors } else { least };
    // 1 where nobody sent anything: 0 / 0 is not a number.
    numerator / if contributors > 0.0 { denominator } else { 1.0 }
}

/// into ← into + factor · quotient, the product and the sum each rounded once. The sums are zeros then.
#[multiversion(targets("x86_64+avx2"))]
fn take_quotients(into: &mut [f32], sums: &mut Sums, least: f32, factor: f32) {
    let sums = sums.numerators.iter_mut().zip(&mut *sums.contributors);
    for (into, (numerator, contributors)) in into.iter_mut().zip(sums) {
        *into += factor * quotient(*numerator, *contributors, least);
        (*numerator, *contributors) = (0.0, 0.0);
    }
}

/// into ← into + factor · (quotient without − quotient with). The sums are zeros then.
#[multiversion(targets("x86_64+avx2"))]
fn take_difference(into: &mut [f32], without: &mut Sums, with: &mut Sums, least: f32, factor: f32) {
    let with = with.numerators.iter_mut().zip(&mut *with.contributors);
    let without = without.numerators.iter_mut().zip(&mut *without.contributors);
    for (into, (with, without)) in into.iter_mut().zip(with.zip(without)) {
        let difference =
            quotient(*without.0, *without.1, least) - quotient(*with.0, *with.1, least);
        *into += factor * difference;
        (*with.0, *with.1, *without.0, *without.1) = (0.0, 0.0, 0.0, 0.0);
    }
}
