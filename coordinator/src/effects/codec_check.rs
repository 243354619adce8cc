//! The exact codec check: drawn chunks of the worker's states must encode to what it sent. Of the first that does not,
//! what was opened is kept, so that anybody can see it.

use std::sync::Arc;

use bytes::Bytes;
use manyhands_gradient::codec::Update;
use manyhands_gradient::{CHUNK, chunk_energies, vector};
use manyhands_network::data::{Access, FetchRequest};
use manyhands_proto::message::{OpenedStates, UpdateEvidence, Work};
use manyhands_proto::tree::{GROUP_BYTES, Openings};
use manyhands_proto::{ChunkIndex, Digest, NodeId};
use manyhands_rules::coordinator::{CodecCheck, CodecResult, Input};
use manyhands_rules::evidence::theta_groups;
use manyhands_rules::record::CodecFault;
use manyhands_rules::update_evidence::{States, check_states};

use super::openings::{Blob, NotOpened, open as open_groups};
use super::{Done, EffectError, blocking};
use crate::context::Context;
use crate::journal::{BlobKind, BlobNote};
use crate::retry::Backoff;
use crate::store::ReadBlobError;

/// The drawn chunks of each state, as the worker opened them against its commitments.
struct Opened {
    end: Openings,
    /// None for a fresh start.
    error_in: Option<Openings>,
    error_next: Openings,
}

/// What the worker opened instead of what it committed to.
struct Withheld(String);

pub(super) async fn check(context: &Arc<Context>, check: CodecCheck) -> Result<Done, EffectError> {
    let (round, worker) = (check.round, check.worker);
    let returned = check.work.returned_payload();
    let result = match run(context, check).await? {
        Ok(result) => result,
        Err(Withheld(reason)) => CodecResult::Withheld(reason),
    };
    let evidence = match &result {
        CodecResult::Fault(CodecFault { evidence, .. }) => {
            Some(BlobNote { digest: *evidence, kind: BlobKind::Evidence, round })
        }
        CodecResult::Passed | CodecResult::Withheld(_) => None,
    };
    // It may have been fetched again for this, and whoever looks at a fault needs it as well.
    let earlier = returned.filter(|digest| context.store.contains(*digest));
    let earlier = earlier.map(|digest| BlobNote { digest, kind: BlobKind::Payload, round });
    let blobs = evidence.into_iter().chain(earlier).collect();
    Ok(Done { input: Input::CodecChecked { round, worker, result }, blobs })
}

async fn run(
    context: &Arc<Context>,
    check: CodecCheck,
) -> Result<Result<CodecResult, Withheld>, EffectError> {
    let CodecCheck { worker, beacon, work, .. } = check;
    let own = context.clone();
    let payload = work.commitment.commitment.payload;
    let (update, drawn) = blocking(move || {
        let update = stored_update(&own, payload)?;
        let count = own.spec.verification.codec_chunks;
        let drawn = beacon.codec_chunks(worker, count, &chunk_energies(&own.layout, &update));
        Ok::<_, EffectError>((update, drawn))
    })
    .await??;
    let returned = match work.returned_payload() {
        None => None,
        Some(payload) => match returned_update(context, payload, worker).await? {
            Ok(update) => Some(update),
            Err(withheld) => return Ok(Err(withheld)),
        },
    };
    let opened = match open(context, &work, &drawn).await {
        Ok(opened) => opened,
        Err(withheld) => return Ok(Err(withheld)),
    };
    let context = context.clone();
    blocking(move || {
        let theta = context.store.theta(work.assignment.theta)?;
        let updates = (&update, returned.as_ref());
        Ok(Ok(judge(&context, &theta, work, updates, (&drawn, &opened))?))
    })
    .await?
}

fn stored_update(context: &Context, payload: Digest) -> Result<Update, EffectError> {
    let bytes = context.store.get(payload)?;
    Update::parse(&bytes, &context.layout, context.spec.codec.profile).map_err(|_| {
        // It was parsed when it came: what the store holds now is something else.
        EffectError::Read(ReadBlobError::Missing(payload))
    })
}

/// The head's update, whose values return to e_in: ours if its evidence is still kept, otherwise the
/// worker's.
async fn returned_update(
    context: &Arc<Context>,
    payload: Digest,
    worker: NodeId,
) -> Result<Result<Update, Withheld>, EffectError> {
    if context.store.contains(payload) {
        let own = context.clone();
        return Ok(Ok(blocking(move || stored_update(&own, payload)).await??));
    }
    let (profile, length_max) = (context.spec.codec.profile, context.payload_bytes_max());
    let mut backoff = Backoff::for_peers();
    loop {
        let source = context.whereabouts.of(worker);
        let request = FetchRequest::new(payload, vec![source], length_max);
        match context.data.fetch_to_memory(request).await {
            Ok((bytes, _)) => {
                let parsed = Update::parse(&bytes, &context.layout, profile);
                if parsed.is_ok() {
                    context.store.insert(&bytes, Access::Nobody)?;
                }
                return Ok(parsed.map_err(|error| {
                    Withheld(format!("the update that returns to its error buffer: {error}"))
                }));
            }
            Err(error) => tracing::debug!(%error, "an earlier payload is fetched again"),
        }
        backoff.wait().await;
    }
}

/// Opens the drawn chunks of θ_H, e_in and e_next.
async fn open(context: &Context, work: &Work, drawn: &[ChunkIndex]) -> Result<Opened, Withheld> {
    let of = work.worker();
    let commitment = &work.commitment.commitment;
    Ok(Opened {
        end: open_vector(context, of, ("θ_H", commitment.theta), drawn).await?,
        error_next: open_vector(context, of, ("e_next", commitment.error), drawn).await?,
        error_in: match &work.head {
            None => None,
            Some(head) => Some(open_vector(context, of, ("e_in", head.error), drawn).await?),
        },
    })
}

async fn open_vector(
    context: &Context,
    of: NodeId,
    (name, digest): (&str, Digest),
    drawn: &[ChunkIndex],
) -> Result<Openings, Withheld> {
    let blob = Blob { of, name, digest, bytes: context.vector_bytes() };
    let opened = open_groups(context, blob, &theta_groups(drawn), None).await;
    opened.map_err(|NotOpened(reason)| Withheld(reason))
}

fn judge(
    context: &Context,
    theta: &Bytes,
    work: Work,
    updates: (&Update, Option<&Update>),
    (drawn, opened): (&[ChunkIndex], &Opened),
) -> Result<CodecResult, EffectError> {
    let Opened { end, error_in, error_next } = opened;
    for (at, &chunk) in drawn.iter().enumerate() {
        let values = |openings: &Openings| vector::floats(&openings.groups[at].bytes);
        let from = chunk.0 as usize * GROUP_BYTES as usize;
        let states = States {
            start: vector::floats(&theta[from..from + GROUP_BYTES as usize]),
            end: values(end),
            error_in: error_in.as_ref().map_or_else(|| vec![0.0; CHUNK], values),
            error_next: values(error_next),
        };
        let checked = check_states(&context.layout, &context.spec.codec, updates, (chunk, &states));
        let Err(reason) = checked else { continue };
        let only = |openings: &Openings| Openings {
            length: openings.length,
            groups: vec![openings.groups[at].clone()],
        };
        let opened = OpenedStates {
            start: Openings::of(theta, &theta_groups(&[chunk]))
                .expect("drawn chunks are chunks of θ"),
            end: only(end),
            error_in: error_in.as_ref().map(only),
            error_next: only(error_next),
        };
        let shown = UpdateEvidence { work, opened: Some(opened) };
        let evidence = context.store.insert(&shown.to_bytes(), Access::Nobody)?;
        return Ok(CodecResult::Fault(CodecFault { reason, evidence }));
    }
    Ok(CodecResult::Passed)
}
