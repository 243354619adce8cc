//! The token-weighted mean, nobody clipped.

use super::{Factor, MergeRule, TensorNorms};

/// Every worker at full strength.
#[derive(Debug, Clone, Copy)]
pub struct Mean;

impl MergeRule for Mean {
    fn name(&self) -> &'static str {
        "mean"
    }

    fn factors(&self, norms: &[&TensorNorms]) -> Vec<Vec<Factor>> {
        norms.iter().map(|norms| vec![Factor::ONE; norms.squared().len()]).collect()
    }
}
