//! What the devnet counts, for whoever installed a `metrics` recorder.

use metrics::{counter, gauge};

/// Counts a block when it is on disk; the gauge is its number.
pub(crate) fn block_sealed(number: u32, transactions: usize) {
    counter!("manyhands_devnet_blocks_total").increment(1);
    counter!("manyhands_devnet_transactions_included_total").increment(transactions as u64);
    gauge!("manyhands_devnet_head").set(f64::from(number));
}

/// Counts a block that could not be built or written.
pub(crate) fn block_failed() {
    counter!("manyhands_devnet_blocks_failed_total").increment(1);
}

/// Counts a transaction when it comes over RPC, by what was answered.
pub(crate) fn transaction_submitted(accepted: bool) {
    let outcome = if accepted { "accepted" } else { "refused" };
    counter!("manyhands_devnet_transactions_submitted_total", "outcome" => outcome).increment(1);
}

/// Transactions that wait, after each change.
pub(crate) fn pool_size(transactions: usize) {
    gauge!("manyhands_devnet_pool_transactions").set(transactions as f64);
}
