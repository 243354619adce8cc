//! Fetching a committed update from its worker.

use std::sync::Arc;

use manyhands_network::data::{Access, FetchRequest};
use manyhands_proto::{Digest, NodeId, Round};
use manyhands_rules::coordinator::Input;
use manyhands_rules::update_evidence::{check_length, parse_payload};

use super::{Done, EffectError, blocking};
use crate::context::Context;
use crate::journal::{BlobKind, BlobNote};
use crate::retry::Backoff;

/// Which update.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    pub(super) round: Round,
    pub(super) worker: NodeId,
    pub(super) payload: Digest,
    /// As committed.
    pub(super) payload_bytes: u64,
}

/// Fetches and parses the payload. A worker that cannot be reached is tried again until the machine
/// closes the round without it; one that sends what the codec cannot have written is answered with
/// the reason.
pub(super) async fn fetch(context: &Arc<Context>, order: Order) -> Result<Done, EffectError> {
    let Order { round, worker, payload, payload_bytes } = order;
    let arrived = |result| Input::PayloadArrived { round, worker, result };
    let (terms, length_max) = (&context.spec.codec, context.payload_bytes_max());
    if let Err(reason) = check_length(&context.layout, terms, payload_bytes) {
        return Ok(arrived(Err(reason)).into());
    }
    let mut backoff = Backoff::for_peers();
    let bytes = loop {
        let source = context.whereabouts.of(worker);
        let request = FetchRequest::new(payload, vec![source], length_max);
        match context.data.fetch_to_memory(request).await {
            Ok((bytes, _)) => break bytes,
            // One that is too long to be a payload is none: it is not uploaded in time.
            Err(error) => {
                tracing::debug!(%worker, %round, %error, "a payload is fetched again");
            }
        }
        backoff.wait().await;
    };
    let (context, kept) = (context.clone(), bytes.clone());
    let result = blocking(move || {
        // What others have the right to read stays theirs.
        if !context.store.contains(payload) {
            context.store.insert(&kept, Access::Nobody)?;
        }
        let parsed = parse_payload(&context.layout, &context.spec.codec, payload_bytes, &kept);
        Ok::<_, EffectError>(parsed.map(|_| ()))
    })
    .await??;
    metrics::counter!(crate::metrics::PAYLOAD_BYTES).increment(bytes.len() as u64);
    let note = BlobNote { digest: payload, kind: BlobKind::Payload, round };
    Ok(Done { input: arrived(result), blobs: vec![note] })
}
