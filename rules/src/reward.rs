//! What work is worth: verified training tokens × the model's operations per token. The same work
//! pays the same on any hardware.

use manyhands_gradient::Layout;
use manyhands_proto::run_file::{Architecture, RunSpec};
use manyhands_proto::{Balance, TokenCount, WorkUnits};

/// The layout of a checked run's model.
pub fn layout(model: &Architecture) -> Layout {
    Layout::of(model).expect("the size of a run's model was checked when its file was read")
}

/// Floating-point operations of training on one token, forward and backward: 6 for each parameter
/// of a matrix, and 12 · layers · context · hidden for attention (Chowdhery et al., "PaLM", 2022,
/// appendix B). The input embedding is a table and costs none, so an untied one is left out.
pub fn operations_per_token(model: &Architecture) -> u64 {
    let parameters = layout(model).parameter_count().0;
    let table = u64::from(model.vocabulary_size) * u64::from(model.hidden_size);
    let matrices = if model.tie_embeddings { parameters } else { parameters - table };
    let attention =
        u64::from(model.layers) * u64::from(model.context_length) * u64::from(model.hidden_size);
    6 * matrices + 12 * attention
}

/// Work units of `tokens`, rounded down to 10⁶ operations.
pub fn work(model: &Architecture, tokens: TokenCount) -> WorkUnits {
    let operations = u128::from(operations_per_token(model)) * u128::from(tokens.0);
    WorkUnits(u64::try_from(operations / 1_000_000).unwrap_or(u64::MAX))
}

/// What `work` earns in a run.
pub fn reward(spec: &RunSpec, work: WorkUnits) -> Balance {
    Balance(spec.chain.price_per_work_unit.0.saturating_mul(u128::from(work.0)))
}

/// An update that came late still cost its worker the work, but was not merged: it is paid half.
pub fn late(reward: Balance) -> Balance {
    Balance(reward.0 / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests_support::spec;

    #[test]
    fn twice_the_tokens_earn_twice_the_reward() {
        let spec = spec();
        let once = work(&spec.model, TokenCount(1_000_000));
        let twice = work(&spec.model, TokenCount(2_000_000));
        assert!(once.0 > 0 && twice.0.abs_diff(2 * once.0) <= 1);
        assert_eq!(reward(&spec, twice).0, spec.chain.price_per_work_unit.0 * u128::from(twice.0));
    }
}
