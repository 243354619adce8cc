//! Metrics of this crate.

use metrics::{counter, gauge};

/// `manyhands_trained_tokens_total`: targets of each finished micro-batch, honest work and replays alike.
pub(crate) fn trained_tokens(tokens: u64) {
    counter!("manyhands_trained_tokens_total").increment(tokens);
}

/// `manyhands_evaluated_tokens_total`: targets of each evaluated batch.
pub(crate) fn evaluated_tokens(tokens: u64) {
    counter!("manyhands_evaluated_tokens_total").increment(tokens);
}

/// `manyhands_measured_tokens_per_second`: set when the machine's speed was measured on the run's model.
pub(crate) fn measured_speed(tokens_per_second: f64) {
    gauge!("manyhands_measured_tokens_per_second").set(tokens_per_second);
}
