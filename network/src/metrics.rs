//! The names of every metric of this crate. Counters only ever grow; gauges say so.

/// Counter. Control requests answered or refused, with label `result`: `answered`, `dropped_rate` (the
/// peer asks too often), `dropped_full` (too many of the peer's wait), `nonsense`, and, once more for
/// each of those, `dropped_unanswered` (nobody answers).
pub const CONTROL_REQUESTS_RECEIVED: &str = "manyhands_control_requests_received_total";
/// Counter. Control requests sent, with label `result`: `answered` or `failed`.
pub const CONTROL_REQUESTS_SENT: &str = "manyhands_control_requests_sent_total";
/// Counter. Gossip announcements received, with label `verdict`: `accept`, `reject`, `ignore`, or
/// `dropped_full` (the owner's queue was full, so nobody judged it).
pub const CONTROL_ANNOUNCEMENTS: &str = "manyhands_control_announcements_total";
/// Counter. Peers blocked for a while, for nonsense or a flood.
pub const CONTROL_PEERS_BLOCKED: &str = "manyhands_control_peers_blocked_total";
/// Counter. Events the owner never saw because its queue was full, with label `kind`.
pub const CONTROL_EVENTS_DROPPED: &str = "manyhands_control_events_dropped_total";
/// Gauge. Established control connections.
pub const CONTROL_CONNECTIONS: &str = "manyhands_control_connections";

/// Counter. Blob bytes written to streams: chunk lists, chunks and openings, without headers.
pub const DATA_BYTES_SENT: &str = "manyhands_data_bytes_sent_total";
/// Counter. Blob bytes read from streams, whether or not they verified.
pub const DATA_BYTES_RECEIVED: &str = "manyhands_data_bytes_received_total";
/// Counter. Requests of peers, with label `result`: `served`, or the refusal's name.
pub const DATA_REQUESTS: &str = "manyhands_data_requests_total";
/// Counter. A chunk that arrived whole and matched its chaining value.
pub const DATA_CHUNKS_VERIFIED: &str = "manyhands_data_chunks_verified_total";
/// Counter. A source gave up on, with label `reason`.
pub const DATA_SOURCE_FAILURES: &str = "manyhands_data_source_failures_total";
/// Counter. A peer whose connection was closed for misbehaviour, with label `reason`.
pub const DATA_PEERS_DROPPED: &str = "manyhands_data_peers_dropped_total";
/// Gauge. Open data connections, both directions.
pub const DATA_CONNECTIONS: &str = "manyhands_data_connections";
