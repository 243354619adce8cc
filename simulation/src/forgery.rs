//! Updates that liars send in the place of their own: dense, as a worker hands them to the codec.
//!
//! Liars know everything of a round and work together. What they forge goes through the real codec, with an
//! error buffer of their own, so the bytes are those of a well-formed update.

use std::ops::Range;

use manyhands_gradient::Layout;
use manyhands_gradient::layout::CHUNK;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

/// What liars make of a round.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Forgery {
    /// −`factor` times the liar's own Δ.
    SignFlip { factor: f32 },
    /// −`factor` times the mean Δ of the honest: inner-product manipulation (Xie, Koyejo, Gupta 2019,
    /// <https://arxiv.org/abs/1903.03936>).
    InnerProduct { factor: f32 },
    /// The honest mean less `deviations` of the honest standard deviations, value by value: a little is
    /// enough (Baruch, Baruch, Goldberg 2019, <https://arxiv.org/abs/1902.06156>).
    LittleIsEnough { deviations: f32 },
    /// Normal noise, each tensor `factor` times as long as the honest one's Δ.
    Gaussian { factor: f32 },
    /// As many places as the codec keeps or a few less (one may be drawn twice), at random, with random signs
    /// and `factor` times what the honest send.
    RandomPlaces { factor: f32 },
    /// As many places as the codec keeps, those that the honest are least likely to choose, each against the
    /// honest direction and with `factor` times what the honest send.
    UnpopularPlaces { factor: f32 },
    /// The liar's own Δ, moved against the mean Δ of the honest by `distance` of its length: as far as a replay lets
    /// pass, where it hurts most.
    WithinTolerance { distance: f32 },
    /// The liar's own Δ of its first round, again and again.
    Stale,
    /// Nothing.
    Zero,
}

/// What there is to know when an update is forged.
#[derive(Debug, Clone, Copy)]
pub struct Scene<'a> {
    pub layout: &'a Layout,
    /// Δ of every honest worker.
    pub honest: &'a [Vec<f32>],
    /// β·e + Δ of every honest worker: what its codec chooses from.
    pub honest_sums: &'a [Vec<f32>],
    /// Δ that the liar trained itself; anything where [`Forgery::trains`] does not ask for it.
    pub own: &'a [f32],
    /// Its own Δ of its first round.
    pub first: &'a [f32],
    /// Values that the codec keeps of a whole chunk.
    pub kept: usize,
    /// Of the run, the round and the liar.
    pub seed: u64,
}

impl Forgery {
    /// Whether it needs what the liar trained itself.
    pub const fn trains(self) -> bool {
        matches!(self, Self::SignFlip { .. } | Self::WithinTolerance { .. } | Self::Stale)
    }

    /// The forged Δ, a canonical vector.
    ///
    /// # Panics
    /// When nobody is honest.
    pub fn forge(self, scene: Scene<'_>) -> Vec<f32> {
        assert!(!scene.honest.is_empty(), "somebody is honest");
        match self {
            Self::SignFlip { factor } => scene.own.iter().map(|it| -factor * it).collect(),
            Self::InnerProduct { factor } => scene.by_value(|mean, _| -factor * mean),
            Self::LittleIsEnough { deviations } => {
                scene.by_value(|mean, deviation| mean - deviations * deviation)
            }
            Self::Gaussian { factor } => scene.gaussian(factor),
            Self::RandomPlaces { factor } => {
                let mut random = ChaCha8Rng::seed_from_u64(scene.seed);
                scene.by_chunk(factor, |range, kept| {
                    let place = |_| {
                        let at = random.next_u32() as usize % range.len();
                        (range.start + at, if random.next_u32() & 1 == 0 { 1.0 } else { -1.0 })
                    };
                    (0..kept).map(place).collect()
                })
            }
            Self::UnpopularPlaces { factor } => scene.by_chunk(factor, |range, kept| {
                let mut places: Vec<usize> = range.collect();
                let wanted = |&at: &usize| scene.wanted(at);
                places.select_nth_unstable_by(kept - 1, |a, b| wanted(a).total_cmp(&wanted(b)));
                places[..kept].iter().map(|&at| (at, -scene.mean(at).signum())).collect()
            }),
            Self::WithinTolerance { distance } => scene.within(distance),
            Self::Stale => scene.first.to_vec(),
            Self::Zero => vec![0.0; scene.own.len()],
        }
    }
}

impl Scene<'_> {
    /// Of the honest Δ.
    fn mean(&self, at: usize) -> f32 {
        self.honest.iter().map(|delta| delta[at]).sum::<f32>() / self.honest.len() as f32
    }

    fn deviation(&self, at: usize, mean: f32) -> f32 {
        let squares: f32 = self.honest.iter().map(|delta| (delta[at] - mean).powi(2)).sum();
        (squares / self.honest.len() as f32).sqrt()
    }

    /// How near an honest worker is to choosing this place.
    fn wanted(&self, at: usize) -> f32 {
        self.honest_sums.iter().map(|sum| sum[at].abs()).fold(0.0, f32::max)
    }

    /// From the honest mean and standard deviation of each value.
    fn by_value(&self, forged: impl Fn(f32, f32) -> f32) -> Vec<f32> {
        let value = |at| {
            let mean = self.mean(at);
            forged(mean, self.deviation(at, mean))
        };
        (0..self.own.len()).map(value).collect()
    }

    fn within(&self, distance: f32) -> Vec<f32> {
        let length = |values: &[f32]| values.iter().map(|it| it * it).sum::<f32>().sqrt();
        let means: Vec<f32> = (0..self.own.len()).map(|at| self.mean(at)).collect();
        let step = distance * length(self.own) / length(&means).max(f32::MIN_POSITIVE);
        self.own.iter().zip(means).map(|(own, mean)| own - step * mean).collect()
    }

    fn gaussian(&self, factor: f32) -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut forged = vec![0.0; self.own.len()];
        for tensor in self.layout.tensors() {
            let squares: f32 = self.honest[0][tensor.range()].iter().map(|it| it * it).sum();
            let deviation = factor * (squares / tensor.elements() as f32).sqrt();
            forged[tensor.range()].fill_with(|| deviation * normal(&mut random));
        }
        forged
    }

    /// Nothing but, in each chunk, `kept` places with signs, `factor` times what an honest worker sends there.
    fn by_chunk(
        &self,
        factor: f32,
        mut choose: impl FnMut(Range<usize>, usize) -> Vec<(usize, f32)>,
    ) -> Vec<f32> {
        let mut forged = vec![0.0; self.own.len()];
        for (chunk, place) in self.layout.places().iter().enumerate() {
            let range = chunk * CHUNK..chunk * CHUNK + place.real;
            let kept = (self.kept * place.real).div_ceil(CHUNK);
            let mut sent: Vec<f32> =
                self.honest_sums[0][range.clone()].iter().map(|it| it.abs()).collect();
            sent.select_nth_unstable_by(kept - 1, |a, b| b.total_cmp(a));
            let magnitude = factor * sent[..kept].iter().sum::<f32>() / kept as f32;
            for (at, sign) in choose(range, kept) {
                forged[at] = sign * magnitude;
            }
        }
        forged
    }
}

/// Mean 0, standard deviation 1, near enough: twelve uniform numbers, summed.
fn normal(random: &mut ChaCha8Rng) -> f32 {
    let sum: f32 = (0..12).map(|_| (random.next_u32() >> 8) as f32 / 16_777_216.0).sum();
    sum - 6.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two honest workers that agree on the first half of one tensor.
    fn forge(forgery: Forgery) -> Vec<f32> {
        let layout = Layout::from_tensors(vec![("w".into(), vec![CHUNK])]).expect("a layout");
        let honest: Vec<Vec<f32>> = [1.0, 3.0]
            .map(|value| (0..CHUNK).map(|at| if at < CHUNK / 2 { value } else { 0.0 }).collect())
            .into();
        let own = vec![2.0; CHUNK];
        let first = vec![7.0; CHUNK];
        forgery.forge(Scene {
            layout: &layout,
            honest: &honest,
            honest_sums: &honest,
            own: &own,
            first: &first,
            kept: 64,
            seed: 1,
        })
    }

    #[test]
    fn forgeries_of_the_direction() {
        assert_eq!(forge(Forgery::SignFlip { factor: 10.0 }), vec![-20.0; CHUNK]);
        assert_eq!(forge(Forgery::Stale), vec![7.0; CHUNK]);
        assert_eq!(forge(Forgery::Zero), vec![0.0; CHUNK]);
        let against = forge(Forgery::InnerProduct { factor: 2.0 });
        assert_eq!((against[0], against[CHUNK - 1]), (-4.0, 0.0));
        // The mean is 2 and the standard deviation 1.
        assert_eq!(forge(Forgery::LittleIsEnough { deviations: 1.5 })[0], 0.5);
    }

    #[test]
    fn what_is_within_a_tolerance_is_that_far_away() {
        let forged = forge(Forgery::WithinTolerance { distance: 0.02 });
        let moved: f32 = forged.iter().map(|it| (it - 2.0).powi(2)).sum();
        let own = 4.0 * CHUNK as f32;
        assert!((moved.sqrt() / own.sqrt() - 0.02).abs() < 1e-4);
        assert!(forged[0] < 2.0, "against the honest mean");
    }

    #[test]
    fn noise_is_as_long_as_it_was_asked_to_be() {
        let length = |values: &[f32]| values.iter().map(|it| it * it).sum::<f32>().sqrt();
        let noise = forge(Forgery::Gaussian { factor: 10.0 });
        let honest = (CHUNK as f32 / 2.0).sqrt();
        assert!((length(&noise) / honest - 10.0).abs() < 0.5, "{}", length(&noise));
    }

    #[test]
    fn chosen_places_are_as_many_as_the_codec_keeps() {
        let sent = |values: &[f32]| values.iter().filter(|&&it| it != 0.0).count();
        let unpopular = forge(Forgery::UnpopularPlaces { factor: 5.0 });
        assert_eq!(sent(&unpopular), 64);
        assert_eq!(sent(&unpopular[..CHUNK / 2]), 0, "where the honest choose, it does not");
        let random = forge(Forgery::RandomPlaces { factor: 5.0 });
        assert!((50..=64).contains(&sent(&random)), "a place may come twice");
        assert!(random.iter().all(|it| [0.0, 5.0, -5.0].contains(it)));
    }
}
