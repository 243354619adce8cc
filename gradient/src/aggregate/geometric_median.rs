//! Weights of the geometric median: workers far from the middle of all count less.
//!
//! The smoothed Weiszfeld algorithm in a fixed number of steps (Pillutla, Kakade, Harchaoui, "Robust Aggregation
//! for Federated Learning", 2022, <https://arxiv.org/abs/1912.13445>), on dot products alone.

use super::{Factor, MergeRule, Statistics};

const STEPS: usize = 8;
/// Distances are held above this share of the mean length, so that no weight is infinite.
const SMOOTHING: f64 = 1e-3;

/// Each worker's whole update, by its weight in the geometric median over the largest such weight.
#[derive(Debug, Clone, Copy)]
pub struct GeometricMedian;

impl MergeRule for GeometricMedian {
    fn name(&self) -> &'static str {
        "geometric_median"
    }

    fn needs_gram(&self) -> bool {
        true
    }

    fn factors(&self, statistics: Statistics<'_>) -> Vec<Vec<Factor>> {
        let workers = statistics.workers();
        let products = statistics.balanced_products();
        let least = SMOOTHING
            * (0..workers).fold(0.0, |sum, at| sum + products[at * workers + at].sqrt())
            / workers as f64;
        if least == 0.0 {
            // Nobody sent anything to measure by.
            return vec![vec![Factor::ONE; statistics.tensors()]; workers];
        }
        let mut weights = vec![1.0 / workers as f64; workers];
        for _ in 0..STEPS {
            let inverse: Vec<f64> = distances(&products, &weights)
                .into_iter()
                .map(|distance| 1.0 / distance.max(least))
                .collect();
            let sum = inverse.iter().fold(0.0, |sum, it| sum + it);
            weights = inverse.iter().map(|it| it / sum).collect();
        }
        let largest = weights.iter().fold(0.0_f64, |largest, &it| largest.max(it));
        weights
            .iter()
            .map(|weight| vec![Factor::of_share(weight / largest); statistics.tensors()])
            .collect()
    }
}

/// How far each vector is from the combination of all with these coefficients.
pub(super) fn distances(products: &[f64], coefficients: &[f64]) -> Vec<f64> {
    let workers = coefficients.len();
    let with_middle: Vec<f64> = (0..workers)
        .map(|row| {
            let row = &products[row * workers..][..workers];
            row.iter().zip(coefficients).fold(0.0, |sum, (product, it)| sum + product * it)
        })
        .collect();
    let middle = with_middle.iter().zip(coefficients).fold(0.0, |sum, (dot, it)| sum + dot * it);
    (0..workers)
        .map(|at| {
            let squared = products[at * workers + at] - 2.0 * with_middle[at] + middle;
            // Rounding may leave a little less than nothing.
            squared.max(0.0).sqrt()
        })
        .collect()
}
