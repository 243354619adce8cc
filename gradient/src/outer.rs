//! The outer step: θ_{t+1} from θ_t and the aggregate.

use manyhands_proto::Round;
use manyhands_proto::run_file::Aggregation;
use rayon::prelude::*;

use crate::aggregate::Aggregate;
use crate::ieee::assert_ieee;
use crate::layout::CHUNK;

/// θ_i ← θ_i − α · aggregate_i, the product and the difference each rounded once. No outer momentum:
/// with sparse error feedback it diverges.
///
/// # Panics
/// When the aggregate's chunks go past `theta`.
pub fn outer_step(theta: &mut [f32], aggregate: &Aggregate, alpha: f32) {
    let chunks = aggregate.chunks();
    let first = chunks.start;
    theta[chunks.start * CHUNK..chunks.end * CHUNK].par_chunks_mut(CHUNK).enumerate().for_each(
        |(index, theta)| {
            assert_ieee();
            for (index, value) in aggregate.chunk(first + index) {
                theta[index] -= alpha * value;
            }
        },
    );
}

/// α of a round: linear from the first round's to the last round's.
pub fn outer_learning_rate(config: &Aggregation, round: Round, rounds: u32) -> f32 {
    let Aggregation { outer_learning_rate: first, outer_learning_rate_final: last, .. } = *config;
    let final_round = rounds.saturating_sub(1);
    if final_round == 0 {
        return first;
    }
    if round.0 >= final_round {
        return last;
    }
    let share = round.0 as f32 / final_round as f32;
    first + (last - first) * share
}
