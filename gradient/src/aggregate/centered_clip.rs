//! Updates are drawn toward the middle of all until none is farther from it than the median one.
//!
//! Centred clipping (Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", 2021,
//! <https://arxiv.org/abs/2012.10333>) in a fixed number of steps from 0, its radius the (lower) median distance; on
//! dot products alone.

use super::geometric_median::distances;
use super::statistics::lower_median;
use super::{Factor, MergeRule, Statistics};

const STEPS: usize = 3;

/// Each worker's whole update, by its coefficient in the clipped middle over an equal share.
#[derive(Debug, Clone, Copy)]
pub struct CenteredClip;

impl MergeRule for CenteredClip {
    fn name(&self) -> &'static str {
        "centered_clip"
    }

    fn needs_gram(&self) -> bool {
        true
    }

    fn factors(&self, statistics: Statistics<'_>) -> Vec<Vec<Factor>> {
        let workers = statistics.workers();
        let products = statistics.balanced_products();
        let equal = 1.0 / workers as f64;
        let mut coefficients = vec![0.0; workers];
        for _ in 0..STEPS {
            let distances = distances(&products, &coefficients);
            let radius = lower_median(&distances);
            let shares: Vec<f64> = distances
                .iter()
                .map(|&distance| if distance > radius { radius / distance } else { 1.0 })
                .collect();
            let moved = equal * shares.iter().fold(0.0, |sum, it| sum + it);
            for (coefficient, share) in coefficients.iter_mut().zip(&shares) {
                *coefficient = *coefficient * (1.0 - moved) + equal * share;
            }
        }
        coefficients
            .iter()
            .map(|it| vec![Factor::of_share(it / equal); statistics.tensors()])
            .collect()
    }
}
