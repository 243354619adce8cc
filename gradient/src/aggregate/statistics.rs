//! What robust rules see of an admitted set: never values, always integers that slices add up to, or the
//! same f64 everywhere.

use manyhands_proto::message::LossEffect;

use super::{Gram, TensorNorms};

/// Statistics of an admitted set, its workers in the order of their ids.
#[derive(Debug, Clone, Copy)]
pub struct Statistics<'a> {
    pub norms: &'a [&'a TensorNorms],
    /// There if a rule of the run asks for it ([`super::MergeRule::needs_gram`]).
    pub gram: Option<&'a Gram>,
    /// One per worker, if it was measured.
    pub loss_effects: &'a [Option<LossEffect>],
}

impl Statistics<'_> {
    pub fn workers(&self) -> usize {
        self.norms.len()
    }

    pub fn tensors(&self) -> usize {
        self.norms.first().map_or(0, |norms| norms.squared().len())
    }

    /// The squared norm of a tensor's (lower) median worker, in units of 2⁻⁷².
    pub(super) fn median_squared(&self, tensor: usize) -> u128 {
        let mut column: Vec<u128> =
            self.norms.iter().map(|norms| norms.squared()[tensor]).collect();
        column.sort_unstable();
        column[(column.len() - 1) / 2]
    }

    /// Dot products between workers over all tensors, each tensor measured in its median worker's norm and
    /// each worker's tensor clipped to it, so that no tensor and no loud worker speaks for the others.
    /// Row after row.
    pub(super) fn balanced_products(&self) -> Vec<f64> {
        let gram = self.gram.expect("a rule that needs the products asks for them");
        let workers = self.workers();
        let mut products = vec![0.0; workers * workers];
        for tensor in 0..self.tensors() {
            let median = self.median_squared(tensor);
            if median == 0 {
                continue;
            }
            let lengths: Vec<f64> = self
                .norms
                .iter()
                .map(|norms| {
                    let squared = norms.squared()[tensor].max(median);
                    (squared as f64).sqrt()
                })
                .collect();
            for a in 0..workers {
                for b in 0..workers {
                    let product = if a == b {
                        self.norms[a].squared()[tensor] as f64
                    } else {
                        gram.product(tensor, (a, b)) as f64
                    };
                    products[a * workers + b] += product / lengths[a] / lengths[b];
                }
            }
        }
        products
    }
}

/// The (lower) median of some numbers, none of which is NaN.
pub(super) fn lower_median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[(sorted.len() - 1) / 2]
}
