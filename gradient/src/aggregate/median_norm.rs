//! Each tensor of each worker clipped to the norm of the lower median worker.
//!
//! Needs no shared choice of coordinates, as medians of values would: with per-worker top-k most
//! coordinates have one or two values. As in Templar's production code.

use super::{Factor, MergeRule, Statistics};

/// Nobody's update of a tensor is longer than the (lower) median worker's.
#[derive(Debug, Clone, Copy)]
pub struct MedianNorm;

impl MergeRule for MedianNorm {
    fn name(&self) -> &'static str {
        "median_norm"
    }

    fn factors(&self, statistics: Statistics<'_>) -> Vec<Vec<Factor>> {
        let medians: Vec<u128> =
            (0..statistics.tensors()).map(|tensor| statistics.median_squared(tensor)).collect();
        let row = |squared: &[u128]| {
            squared.iter().zip(&medians).map(|(&squared, &median)| clip(squared, median)).collect()
        };
        statistics.norms.iter().map(|norms| row(norms.squared())).collect()
    }
}

/// √(median / squared), at most 1.
fn clip(squared: u128, median: u128) -> Factor {
    if squared <= median {
        return Factor::ONE;
    }
    Factor::of_share((median as f64 / squared as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_the_norm_gets_half_the_weight() {
        assert_eq!(clip(400, 100), Factor::from_units(1 << 23));
        assert_eq!(clip(100, 400), Factor::ONE);
        assert_eq!(clip(5, 0), Factor::from_units(0));
        assert_eq!(clip(0, 0), Factor::ONE);
        // The nearest floats of these are equal; the factor still must not exceed 1.
        assert_eq!(clip((1 << 100) + 1, 1 << 100), Factor::ONE);
    }
}
