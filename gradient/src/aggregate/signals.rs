//! What makes an update worth a closer look: seen in passing while it is merged, and no proof of anything. Whoever shows
//! one of these is replayed.
//!
//! - its norm is more than three times the median worker's, or less than a third of it;
//! - it points away from the sum of all others, where the median worker does not;
//! - it is nearly another's: honest workers choose different coordinates, and the cosine of two of them is small;
//! - it raises held-out loss so much that `loss_gate` leaves it out.
//!
//! The second and third need the products between workers, so they are seen only where a rule of the run asks for them.

use super::cosine_trust::cosines;
use super::loss_gate::LossGate;
use super::statistics::lower_median;
use super::{Factor, MergeRule, Statistics};

const NORM_RATIO_MAX: f64 = 3.0;
/// Between two workers' updates.
const COSINE_MAX: f64 = 0.5;

/// Whether each worker's update shows a signal.
pub(super) fn flagged(statistics: Statistics<'_>) -> Vec<bool> {
    let workers = statistics.workers();
    let out = LossGate.factors(statistics);
    let mut flagged: Vec<bool> = out.iter().map(|row| row.contains(&Factor::NOTHING)).collect();
    let norms: Vec<f64> = statistics
        .norms
        .iter()
        .map(|norms| norms.squared().iter().fold(0.0, |sum, it| sum + *it as f64).sqrt())
        .collect();
    let median = lower_median(&norms);
    for (flag, norm) in flagged.iter_mut().zip(&norms) {
        // Of two that differ nobody can say which is usual.
        *flag |=
            workers > 2 && (*norm > NORM_RATIO_MAX * median || *norm * NORM_RATIO_MAX < median);
    }
    if statistics.gram.is_none() || workers < 2 {
        return flagged;
    }
    let cosines = cosines(statistics);
    if lower_median(&cosines) > 0.0 {
        flagged.iter_mut().zip(&cosines).for_each(|(flag, cosine)| *flag |= *cosine <= 0.0);
    }
    let products = statistics.balanced_products();
    for a in 0..workers {
        for b in (0..workers).filter(|b| *b != a) {
            let scale = (products[a * workers + a] * products[b * workers + b]).sqrt();
            flagged[a] |= products[a * workers + b] > COSINE_MAX * scale;
        }
    }
    flagged
}
