//! Each tensor of each worker clipped to the norm of the lower median worker.
//!
//! Needs no shared choice of coordinates, as medians of values would: with per-worker top-k most
//! coordinates have one or two values. As in Templar's production code.

use super::{Factor, MergeRule, TensorNorms};

/// Nobody's update of a tensor is longer than the (lower) median worker's.
#[derive(Debug, Clone, Copy)]
pub struct MedianNorm;

impl MergeRule for MedianNorm {
    fn name(&self) -> &'static str {
        "median_norm"
    }

    fn factors(&self, norms: &[&TensorNorms]) -> Vec<Vec<Factor>> {
        let tensors = norms.first().map_or(0, |norms| norms.squared().len());
        let medians: Vec<u128> = (0..tensors)
            .map(|tensor| {
                let mut column: Vec<u128> =
                    norms.iter().map(|norms| norms.squared()[tensor]).collect();
                column.sort_unstable();
                column[(column.len() - 1) / 2]
            })
            .collect();
        norms
            .iter()
            .map(|norms| {
                let pairs = norms.squared().iter().zip(&medians);
                pairs.map(|(&squared, &median)| clip(squared, median)).collect()
            })
            .collect()
    }
}

/// √(median / squared), at most 1, rounded down to 24 bits.
///
/// Two conversions, a division, a root and a product with a power of two, all in f64 and so correctly
/// rounded: the same integer everywhere.
fn clip(squared: u128, median: u128) -> Factor {
    if squared <= median {
        return Factor::ONE;
    }
    let share = (median as f64 / squared as f64).sqrt();
    Factor::from_units((share * f64::from(Factor::ONE.units())) as u32)
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
