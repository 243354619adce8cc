//! Finding out whose end is made up among verifiers that contradict each other.

use std::collections::BTreeMap;
use std::sync::Arc;

use manyhands_proto::Digest;
use manyhands_proto::message::ReplayEvidence;
use manyhands_rules::coordinator::Input;
use manyhands_rules::evidence::false_ends;
use manyhands_rules::panel::Case;

use super::{Done, EffectError, blocking};
use crate::context::Context;
use crate::store::ReadBlobError;

pub(super) async fn compare(context: &Arc<Context>, case: Case) -> Result<Done, EffectError> {
    let context = context.clone();
    blocking(move || {
        let evidence = stored_evidence(&context, &case)?;
        let terms = &context.spec.verification;
        let liars = false_ends(&case, &evidence, &context.layout, terms);
        let commitment = case.work.commitment.digest();
        Ok(Input::JudgesCompared { commitment, liars }.into())
    })
    .await?
}

/// What was opened when the ends of a case were compared; without it there is nothing to hold against anybody.
pub(super) fn stored_evidence(
    context: &Context,
    case: &Case,
) -> Result<BTreeMap<Digest, ReplayEvidence>, ReadBlobError> {
    let mut evidence = BTreeMap::new();
    for digest in case.judgements.iter().filter_map(|judgement| judgement.evidence) {
        let bytes = match context.store.get(digest) {
            Ok(bytes) => bytes,
            Err(ReadBlobError::Missing(_)) => continue,
            Err(error) => return Err(error),
        };
        if let Ok(parsed) = ReplayEvidence::parse(&bytes) {
            evidence.insert(digest, parsed);
        }
    }
    Ok(evidence)
}
