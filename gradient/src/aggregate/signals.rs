//! What makes an update worth a closer look: seen in passing while it is merged, and no proof of anything. Whoever shows
//! one of these is replayed.
//!
//! - it raises held-out loss so much that `loss_gate` leaves it out;
//! - its norm is more than three times the median worker's, or nothing;
//! - it points away from the sum of all others, where the median worker does not;
//! - it is nearly another's: honest workers choose different coordinates, and the cosine of two of them is small.
//!
//! The last two need the products between workers, so they are seen only where a rule of the run asks for them.

use manyhands_proto::message::Signal;

use super::cosine_trust::cosines;
use super::loss_gate::LossGate;
use super::statistics::lower_median;
use super::{Factor, MergeRule, Statistics};

const NORM_RATIO_MAX: f64 = 3.0;
/// Between two workers' updates.
const COSINE_MAX: f64 = 0.9;

/// The first signal that each worker's update shows, if it shows one.
pub(super) fn signals(statistics: Statistics<'_>) -> Vec<Option<Signal>> {
    let workers = statistics.workers();
    let mut signals = vec![None; workers];
    let mut show = |worker: usize, signal: Signal| {
        signals[worker].get_or_insert(signal);
    };
    for (worker, factors) in LossGate.factors(statistics).iter().enumerate() {
        if factors.contains(&Factor::NOTHING) {
            show(worker, Signal::RaisesLoss);
        }
    }
    let norms: Vec<f64> = statistics
        .norms
        .iter()
        .map(|norms| norms.squared().iter().fold(0.0, |sum, it| sum + *it as f64).sqrt())
        .collect();
    let median = lower_median(&norms);
    for (worker, norm) in norms.iter().enumerate() {
        // Of two that differ nobody can say which is usual.
        if workers > 2 && *norm > NORM_RATIO_MAX * median {
            show(worker, Signal::Loud);
        }
        // Who does fewer steps sends less, but never nothing.
        if *norm == 0.0 && median > 0.0 {
            show(worker, Signal::Nothing);
        }
    }
    if statistics.gram.is_none() {
        return signals;
    }
    let products = statistics.balanced_products();
    let cosines = cosines(&products, workers);
    if lower_median(&cosines) > 0.0 {
        for (worker, _) in cosines.iter().enumerate().filter(|(_, cosine)| **cosine <= 0.0) {
            show(worker, Signal::AgainstAll);
        }
    }
    for a in 0..workers {
        for b in (0..workers).filter(|b| *b != a) {
            let scale = (products[a * workers + a] * products[b * workers + b]).sqrt();
            if products[a * workers + b] > COSINE_MAX * scale {
                show(a, Signal::LikeAnother);
            }
        }
    }
    signals
}
