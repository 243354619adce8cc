//! The token-weighted mean, nobody held back.

use super::{Factor, MergeRule, Statistics};

/// Every worker at full strength.
#[derive(Debug, Clone, Copy)]
pub struct Mean;

impl MergeRule for Mean {
    fn name(&self) -> &'static str {
        "mean"
    }

    fn factors(&self, statistics: Statistics<'_>) -> Vec<Vec<Factor>> {
        vec![vec![Factor::ONE; statistics.tensors()]; statistics.workers()]
    }
}
