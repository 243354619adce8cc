//! Finding out whose end is made up among verifiers that contradict each other.

use std::collections::BTreeMap;
use std::sync::Arc;

use manyhands_network::data::Access;
use manyhands_proto::message::ReplayEvidence;
use manyhands_rules::coordinator::Input;
use manyhands_rules::evidence::false_ends;
use manyhands_rules::panel::Contradiction;

use super::{Done, EffectError, blocking};
use crate::context::Context;
use crate::journal::{BlobKind, BlobNote};
use crate::store::ReadBlobError;

pub(super) async fn compare(
    context: &Arc<Context>,
    contradiction: Contradiction,
) -> Result<Done, EffectError> {
    let context = context.clone();
    blocking(move || {
        let mut evidence = BTreeMap::new();
        for digest in contradiction.judgements.iter().filter_map(|judgement| judgement.evidence) {
            // Our own, from when the ends were compared; without it there is nothing to hold against anybody.
            let bytes = match context.store.get(digest) {
                Ok(bytes) => bytes,
                Err(ReadBlobError::Missing(_)) => continue,
                Err(error) => return Err(error.into()),
            };
            if let Ok(parsed) = ReplayEvidence::parse(&bytes) {
                evidence.insert(digest, parsed);
            }
        }
        let terms = &context.spec.verification;
        let liars = false_ends(&contradiction, &evidence, &context.layout, terms);
        let commitment = contradiction.commitment.digest();
        let mut blobs = Vec::new();
        if !liars.is_empty() {
            let digest = context.store.insert(&contradiction.canonical_bytes(), Access::Nobody)?;
            let round = contradiction.commitment.commitment.round;
            blobs.push(BlobNote { digest, kind: BlobKind::Evidence, round });
        }
        Ok(Done { input: Input::JudgesCompared { commitment, liars }, blobs })
    })
    .await?
}
