//! The sums of one chunk after another.

use manyhands_proto::message::Flagged;
use manyhands_proto::run_file::Aggregation;
use multiversion::multiversion;

use super::{Factor, MergePlan, PlanError};
use crate::codec::{ChunkReader, ChunkScratch, Symbols, Update};
use crate::layout::{CHUNK, Layout};
use crate::outer::{Admitted, Revoked};

/// What becomes of an update in a term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is merged, and stays so.
    Stays,
    /// It was merged, and is taken back now.
    Goes,
    /// It was taken back before.
    Gone,
}

/// Updates to be merged by a plan, or some of them to be taken back out of such a merge.
#[derive(Debug, Clone)]
pub(crate) struct Term<'a> {
    plan: MergePlan,
    /// In the order of the plan's workers.
    updates: Vec<&'a Update>,
    standings: Vec<Standing>,
    /// α of the round.
    alpha: f32,
}

impl<'a> Term<'a> {
    /// α · aggregate(A).
    pub(crate) fn merging(
        layout: &Layout,
        config: &Aggregation,
        admitted: Admitted<'a>,
    ) -> Result<Self, PlanError> {
        let plan = MergePlan::new(layout, config, admitted.members)?;
        let mut members = admitted.members.to_vec();
        members.sort_by_key(|member| member.worker);
        let updates: Vec<_> = members.into_iter().map(|member| member.update).collect();
        let standings = vec![Standing::Stays; updates.len()];
        Ok(Self { plan, updates, standings, alpha: admitted.alpha })
    }

    /// Whose updates are worth a closer look.
    pub(crate) fn flagged(&self) -> Vec<Flagged> {
        self.plan.flagged().collect()
    }

    /// α · (aggregate(A without E and R) − aggregate(A without E)), all weights and factors as they were: what
    /// takes the parts of R in an earlier merge back after those of E.
    pub(crate) fn revoking(
        layout: &Layout,
        config: &Aggregation,
        revoked: Revoked<'a>,
    ) -> Result<Self, PlanError> {
        if revoked.workers.is_empty() {
            return Err(PlanError::NothingRevoked);
        }
        let mut term = Self::merging(layout, config, revoked.from)?;
        let earlier = revoked.earlier.iter().map(|&worker| (worker, Standing::Gone));
        let now = revoked.workers.iter().map(|&worker| (worker, Standing::Goes));
        for (worker, standing) in earlier.chain(now) {
            let place = term.plan.workers().position(|member| member == worker);
            let place = place.ok_or(PlanError::NotMember { worker })?;
            if term.standings[place] != Standing::Stays {
                return Err(PlanError::RevokedTwice { worker });
            }
            term.standings[place] = standing;
        }
        Ok(term)
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

/// Numerators, contributors' weights and the largest of those, of one chunk; zeros between one term and the next.
#[derive(Debug)]
struct Sums {
    numerators: Box<[f32; CHUNK]>,
    contributors: Box<[f32; CHUNK]>,
    /// Touched only where there is a cap.
    heaviest: Box<[f32; CHUNK]>,
}

impl Default for Sums {
    fn default() -> Self {
        let zeros = || Box::new([0.0; CHUNK]);
        Self { numerators: zeros(), contributors: zeros(), heaviest: zeros() }
    }
}

/// A worker's part in a chunk's sums.
#[derive(Debug, Clone, Copy)]
struct Part {
    weight: f32,
    /// The weight times the rule's factor.
    clipped: f32,
    is_capped: bool,
}

impl Sums {
    fn add(&mut self, symbols: Symbols<'_>, part: Part) {
        let Part { weight, clipped, is_capped } = part;
        if let Symbols::Sparse { scale, signs } = symbols {
            // The sign changes nothing of how a product rounds.
            let product = clipped * scale.magnitude();
            for sign in signs {
                self.numerators[sign.index()] += sign.of(product);
                self.contributors[sign.index()] += weight;
            }
        } else {
            symbols.for_each(|index, value| {
                self.numerators[index] += clipped * value;
                self.contributors[index] += weight;
            });
        }
        if is_capped {
            symbols.for_each(|index, _| {
                self.heaviest[index] = self.heaviest[index].max(weight);
            });
        }
    }

    /// Twice the heaviest contributor weighs at least as much as all of them.
    fn cap(&mut self) {
        for (contributors, heaviest) in self.contributors.iter_mut().zip(&mut *self.heaviest) {
            *contributors = larger(*contributors, 2.0 * std::mem::take(heaviest));
        }
    }
}

/// Room for the sums of one chunk after another.
#[derive(Debug, Default)]
pub(crate) struct ChunkSums {
    all: Sums,
    staying: Sums,
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
        let revokes = term.standings.contains(&Standing::Goes);
        let is_capped = term.plan.is_capped();
        for ((share, standing), reader) in term.plan.shares.iter().zip(&term.standings).zip(readers)
        {
            let symbols = reader.next(&mut self.scratch);
            let factor = share.factors[tensor];
            // Who is held back whole does not dilute what others send either.
            if *standing == Standing::Gone || factor == Factor::NOTHING {
                continue;
            }
            let weight = share.weight;
            let part = Part { weight, clipped: weight * factor.value(), is_capped };
            self.all.add(symbols, part);
            if *standing == Standing::Stays && revokes {
                self.staying.add(symbols, part);
            }
        }
        let least = term.plan.denominator_min();
        if is_capped {
            self.all.cap();
            self.staying.cap();
        }
        if revokes {
            take_difference(into, &mut self.staying, &mut self.all, least, factor);
        } else {
            take_quotients(into, &mut self.all, least, factor);
        }
    }
}

/// Of two numbers; `f32::max` also asks which of them is not one.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// numerator / max(contributors, least). Weights are above 0, so contributors weigh 0 exactly where nobody sent
/// anything; there it is 0.
#[inline(always)]
fn quotient(numerator: f32, contributors: f32, least: f32) -> f32 {
    // 1 where nobody sent anything: 0 / 0 is not a number.
    numerator / if contributors > 0.0 { larger(contributors, least) } else { 1.0 }
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
fn take_difference(into: &mut [f32], without: &mut Sums, with: &mut Sums, least: f32, factor: f32) {
    let take = |sums: &mut Sums, index: usize| {
        let take = |values: &mut [f32; CHUNK]| std::mem::take(&mut values[index]);
        quotient(take(&mut sums.numerators), take(&mut sums.contributors), least)
    };
    for (index, into) in into.iter_mut().enumerate() {
        *into += factor * (take(without, index) - take(with, index));
    }
}
