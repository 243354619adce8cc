//! Workers of an experiment that lie: what they send instead.

use std::sync::Arc;

use manyhands_gradient::Layout;
use manyhands_gradient::codec::kept;
use manyhands_model::UnroundedOutcome;
use manyhands_model::data::{SequenceError, SequenceId, SequenceSource, ShardSet};
use manyhands_proto::run_file::Profile;
use manyhands_simulation::forgery::{Forgery, Scene};

/// A text in which token t of V reads V − 1 − t.
pub(crate) struct FlippedLabels {
    pub(crate) text: Arc<ShardSet>,
    pub(crate) vocabulary_size: u32,
}

impl SequenceSource for FlippedLabels {
    fn sequence(&self, id: SequenceId) -> Result<Vec<u32>, SequenceError> {
        let tokens = self.text.sequence(id)?;
        Ok(tokens.into_iter().map(|token| self.vocabulary_size - 1 - token).collect())
    }

    fn sequence_count(&self) -> u64 {
        self.text.sequence_count()
    }

    fn context_length(&self) -> u32 {
        self.text.context_length()
    }
}

/// A round as liars see it, honest workers first.
pub(crate) struct Round<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) theta: &'a [f32],
    pub(crate) ends: &'a [UnroundedOutcome],
    /// e_in of each worker.
    pub(crate) errors: Vec<&'a [f32]>,
    pub(crate) error_decay: f32,
    pub(crate) profile: Profile,
    pub(crate) seed: u64,
}

impl Round<'_> {
    /// θ_H as each of the last workers claims it, who are as many as there are `firsts`: what each of them
    /// trained in its first round, or nothing yet.
    pub(crate) fn forge(&self, forgery: Forgery, firsts: &mut [Vec<f32>]) -> Vec<Vec<f32>> {
        let (honest_ends, ends) = self.ends.split_at(self.ends.len() - firsts.len());
        let honest: Vec<Vec<f32>> = honest_ends.iter().map(|end| self.delta(end)).collect();
        let honest_sums: Vec<Vec<f32>> = honest
            .iter()
            .zip(&self.errors)
            .map(|(delta, error)| {
                let sum = |(delta, error): (&f32, &f32)| self.error_decay * error + delta;
                delta.iter().zip(*error).map(sum).collect()
            })
            .collect();
        let forge = |(liar, (end, first)): (usize, (&UnroundedOutcome, &mut Vec<f32>))| {
            let own = self.delta(end);
            if first.is_empty() {
                first.clone_from(&own);
            }
            let forged = forgery.forge(Scene {
                layout: self.layout,
                honest: &honest,
                honest_sums: &honest_sums,
                own: &own,
                first,
                kept: kept(self.profile),
                seed: (self.seed << 8) + liar as u64,
            });
            self.theta.iter().zip(forged).map(|(theta, delta)| theta - delta).collect()
        };
        ends.iter().zip(firsts).enumerate().map(forge).collect()
    }

    fn delta(&self, end: &UnroundedOutcome) -> Vec<f32> {
        self.theta.iter().zip(&end.theta).map(|(start, end)| start - end).collect()
    }
}
