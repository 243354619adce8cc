//! Nobody is merged who makes the model clearly worse than the others do.
//!
//! Norms and directions show what an update looks like, held-out loss what it does. Measured is each update
//! alone: the loss of θ_t less what it sends, over that of θ_t. Deviations are counted in median absolute
//! deviations (Hampel 1974, <https://doi.org/10.1080/01621459.1974.10482962>), which a minority cannot move far.

use manyhands_proto::message::LossEffect;

use super::{Factor, MergeRule, Statistics};

/// Of honest effects that are normally distributed and around 0, one in 45 is farther out in a set of five, one in 170
/// in a set of eight, one in 900 in a set of twenty; of effects that lower the loss, none.
const DEVIATIONS: i128 = 6;

/// Out goes who raises held-out loss, and by more than six deviations over the median worker. Who was not measured
/// is let through.
#[derive(Debug, Clone, Copy)]
pub struct LossGate;

impl MergeRule for LossGate {
    fn name(&self) -> &'static str {
        "loss_gate"
    }

    fn needs_losses(&self) -> bool {
        true
    }

    fn factors(&self, statistics: Statistics<'_>) -> Vec<Vec<Factor>> {
        let measured: Vec<LossEffect> =
            statistics.loss_effects.iter().filter_map(|effect| *effect).collect();
        let most = most(&measured);
        statistics
            .loss_effects
            .iter()
            .map(|effect| {
                let passes = effect.is_none_or(|LossEffect(effect)| i128::from(effect) <= most);
                let factor = if passes { Factor::ONE } else { Factor::NOTHING };
                vec![factor; statistics.tensors()]
            })
            .collect()
    }
}

/// The most that an update may raise the loss by.
fn most(measured: &[LossEffect]) -> i128 {
    let mut effects: Vec<i128> = measured.iter().map(|it| i128::from(it.0)).collect();
    effects.sort_unstable();
    let Some(&median) = effects.get(effects.len().saturating_sub(1) / 2) else { return i128::MAX };
    let mut deviations: Vec<i128> = effects.iter().map(|it| (it - median).abs()).collect();
    deviations.sort_unstable();
    // Of an even number the upper one: of two that differ, nobody can say which is right.
    (median + DEVIATIONS * deviations[deviations.len() / 2]).max(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_follows_the_majority() {
        let most = |effects: &[i64]| {
            super::most(&effects.iter().map(|&effect| LossEffect(effect)).collect::<Vec<_>>())
        };
        assert_eq!(most(&[]), i128::MAX);
        assert_eq!(most(&[7]), 7, "one alone is the majority");
        assert!(most(&[-5, 900]) >= 900, "of two nobody is outvoted");
        assert_eq!(most(&[-20, -22, 500]), 0, "who lowers the loss is never out");
        assert_eq!(most(&[10, 12, 14, 10_000, 10_000]), 14 + 6 * 4);
        assert_eq!(most(&[3, 3, 3, 4]), 3);
        assert_eq!(most(&[i64::MIN, i64::MAX, i64::MAX]), i128::from(i64::MAX));
    }
}
