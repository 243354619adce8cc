//! What the chain client counts, for whoever installed a `metrics` recorder.

use metrics::{counter, gauge};

/// Number of the newest finalised block, when one is seen.
pub(crate) fn finalized_head(number: u32) {
    gauge!("manyhands_chain_finalized_head").set(f64::from(number));
}

/// Counts a question that got no answer in time.
pub(crate) fn request_timed_out() {
    counter!("manyhands_chain_requests_timed_out_total").increment(1);
}

/// Counts a submission when its outcome is known.
pub(crate) fn submitted(outcome: &'static str) {
    counter!("manyhands_chain_submissions_total", "outcome" => outcome).increment(1);
}

/// Counts each time that a transaction is offered again.
pub(crate) fn resubmitted() {
    counter!("manyhands_chain_resubmissions_total").increment(1);
}
