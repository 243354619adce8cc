//! What a worker counts. Names begin with `manyhands_worker_`.

/// Rounds committed: counts when the commitment is on disk.
pub(crate) fn committed(payload_bytes: u64) {
    metrics::counter!("manyhands_worker_commitments_total").increment(1);
    metrics::counter!("manyhands_worker_payload_bytes_total").increment(payload_bytes);
}

/// Replays that ended, by result: counts when the verdict is formed.
pub(crate) fn replayed(result: &'static str) {
    metrics::counter!("manyhands_worker_replays_total", "result" => result).increment(1);
}

/// The round whose θ this node holds: set when its digest was checked.
pub(crate) fn holds_theta(round: u32) {
    metrics::gauge!("manyhands_worker_theta_round").set(f64::from(round));
}
