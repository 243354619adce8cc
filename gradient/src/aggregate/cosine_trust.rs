//! A worker counts as far as its update points where the others' do.
//!
//! Honest workers choose different coordinates, but where their choices meet they agree more often than not.
//! An update that is turned around, invented, or kept away from everybody else's coordinates does not agree.
//! After the trust scores of FLTrust (Cao et al. 2021, <https://arxiv.org/abs/2012.13995>), with the other
//! workers in the place of a trusted one.

use super::{Factor, MergeRule, Statistics, statistics::lower_median};

/// What of the median worker's agreement is enough to count in full.
const ENOUGH: f64 = 0.5;

/// Each worker's whole update, by its cosine with the sum of all others.
#[derive(Debug, Clone, Copy)]
pub struct CosineTrust;

impl MergeRule for CosineTrust {
    fn name(&self) -> &'static str {
        "cosine_trust"
    }

    fn needs_gram(&self) -> bool {
        true
    }

    fn factors(&self, statistics: Statistics<'_>) -> Vec<Vec<Factor>> {
        let cosines = cosines(&statistics.balanced_products(), statistics.workers());
        let enough = if cosines.is_empty() { 0.0 } else { ENOUGH * lower_median(&cosines) };
        cosines
            .iter()
            .map(|&cosine| {
                // Where not even the median worker agrees with the others there is nothing to go by.
                let share = if enough > 0.0 { cosine / enough } else { 1.0 };
                vec![Factor::of_share(share); statistics.tensors()]
            })
            .collect()
    }
}

/// Each worker's cosine with the sum of the others; 0 where one of the two is 0.
pub(super) fn cosines(products: &[f64], workers: usize) -> Vec<f64> {
    if workers < 3 {
        // Of two that disagree nobody can say which is right.
        return vec![0.0; workers];
    }
    let sums: Vec<f64> = (0..workers)
        .map(|row| products[row * workers..][..workers].iter().fold(0.0, |sum, it| sum + it))
        .collect();
    let all = sums.iter().fold(0.0, |sum, it| sum + it);
    (0..workers)
        .map(|worker| {
            let own = products[worker * workers + worker];
            let dot = sums[worker] - own;
            let others = all - 2.0 * sums[worker] + own;
            let scale = (own * others).sqrt();
            if scale > 0.0 { dot / scale } else { 0.0 }
        })
        .collect()
}
