//! Paired differences.

use std::fmt;

/// One-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; from any table of it.
const T_95: [f64; 9] = [6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833];

/// The mean of paired differences, and what it is below with 95 % confidence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct PairedDifference {
    pub(crate) mean: f64,
    /// None of a single pair: it says nothing about chance.
    pub(crate) upper: Option<f64>,
}

impl PairedDifference {
    /// None of no pairs.
    pub(crate) fn of(differences: &[f64]) -> Option<Self> {
        if differences.is_empty() {
            return None;
        }
        let count = differences.len() as f64;
        let mean = differences.iter().sum::<f64>() / count;
        let squares: f64 = differences.iter().map(|it| (it - mean).powi(2)).sum();
        let quantile = differences.len().checked_sub(2).map(|at| T_95[at.min(T_95.len() - 1)]);
        let upper =
            quantile.map(|quantile| mean + quantile * (squares / (count - 1.0) / count).sqrt());
        Some(Self { mean, upper })
    }
}

impl fmt::Display for PairedDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:+.4}", self.mean)?;
        self.upper.map_or(Ok(()), |upper| write!(f, " (≤ {upper:+.4})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_students() {
        assert_eq!(PairedDifference::of(&[]), None);
        assert_eq!(PairedDifference::of(&[3.0]), Some(PairedDifference { mean: 3.0, upper: None }));
        // Mean 2, standard deviation 1, so a standard error of 1/√3.
        let three = PairedDifference::of(&[1.0, 2.0, 3.0]).expect("three pairs");
        assert!((three.upper.expect("a bound") - (2.0 + 2.920 / 3.0_f64.sqrt())).abs() < 1e-12);
    }
}
