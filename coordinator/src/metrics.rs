//! What is counted, and when. Served as text for Prometheus at `/metrics` of the live page.

use std::sync::OnceLock;

use manyhands_rules::coordinator::Status;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

/// Requests by `result`: `answered` (by the machine), `quiet` (without changing it), `malformed`,
/// `refused` (for another reason, at the door), `dropped` (too many wait). Counts when the answer is
/// known.
pub const REQUESTS: &str = "manyhands_coordinator_requests_total";
/// Inputs written to the journal. Counts when they are on disk.
pub const INPUTS: &str = "manyhands_coordinator_inputs_total";
/// Seconds that one batch took to reach the disk.
pub const COMMIT_SECONDS: &str = "manyhands_coordinator_journal_commit_seconds";
/// Effects by `effect` and `end`: `started`, `done`, `unwanted` (stopped, the machine moved on).
pub const EFFECTS: &str = "manyhands_coordinator_effects_total";
/// Bytes of payloads that were fetched and verified.
pub const PAYLOAD_BYTES: &str = "manyhands_coordinator_payload_bytes_total";
/// Bytes of merges that were stored for members to fetch.
pub const AGGREGATE_BYTES: &str = "manyhands_coordinator_aggregate_bytes_total";
/// The open round.
pub const ROUND: &str = "manyhands_coordinator_round";
/// Members that are there, by `role`.
pub const MEMBERS: &str = "manyhands_coordinator_members";
/// Loss in nats per token, by `kind`: `train` (as claimed, of the last merged round), `held_out` (as
/// verified, of the last θ that was evaluated).
pub const LOSS: &str = "manyhands_coordinator_loss";
/// Faults found so far.
pub const FAULTS: &str = "manyhands_coordinator_faults";
/// Records that the chain has not taken yet.
pub const UNSETTLED: &str = "manyhands_coordinator_records_unsettled";

/// The process's recorder; installed by the first call. None if the program installed another one.
pub fn prometheus() -> Option<&'static PrometheusHandle> {
    static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let handle = PrometheusBuilder::new().install_recorder();
            if let Err(error) = &handle {
                tracing::warn!(%error, "no metrics: the program records them elsewhere");
            }
            describe();
            handle.ok()
        })
        .as_ref()
}

fn describe() {
    metrics::describe_counter!(REQUESTS, "Requests of peers, by result");
    metrics::describe_counter!(INPUTS, "Inputs written to the journal");
    metrics::describe_histogram!(COMMIT_SECONDS, metrics::Unit::Seconds, "Time to reach the disk");
    metrics::describe_counter!(EFFECTS, "Effects of the machine, by effect and end");
    metrics::describe_counter!(PAYLOAD_BYTES, metrics::Unit::Bytes, "Payloads fetched");
    metrics::describe_counter!(AGGREGATE_BYTES, metrics::Unit::Bytes, "Merges stored");
    metrics::describe_gauge!(ROUND, "The open round");
    metrics::describe_gauge!(MEMBERS, "Members that are there, by role");
    metrics::describe_gauge!(LOSS, "Loss in nats per token, by kind");
    metrics::describe_gauge!(FAULTS, "Faults found");
    metrics::describe_gauge!(UNSETTLED, "Records that wait for the chain");
}

/// Sets the gauges from what the page shows too.
pub(crate) fn observe(status: &Status) {
    use manyhands_proto::message::Role;
    metrics::gauge!(ROUND).set(f64::from(status.round.0));
    for (role, label) in [(Role::Worker, "worker"), (Role::Verifier, "verifier")] {
        let here = status.members.iter().filter(|member| member.present && member.role == role);
        metrics::gauge!(MEMBERS, "role" => label).set(here.count() as f64);
    }
    let newest = |loss: fn(&manyhands_rules::coordinator::RoundStatus) -> Option<f64>| {
        status.history.iter().rev().find_map(loss)
    };
    let losses = [("train", newest(|r| r.train_loss)), ("held_out", newest(|r| r.held_out_loss))];
    for (kind, loss) in losses {
        if let Some(loss) = loss {
            metrics::gauge!(LOSS, "kind" => kind).set(loss);
        }
    }
    metrics::gauge!(FAULTS).set(status.faults.len() as f64);
    metrics::gauge!(UNSETTLED).set(status.records_unsettled as f64);
}
