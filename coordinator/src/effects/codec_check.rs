//! The exact codec check: drawn chunks of the worker's states must encode to what it sent.

use std::sync::Arc;

use manyhands_gradient::codec::{Endpoints, OpenedChunk, Update, UpdateCodec};
use manyhands_gradient::error_feedback::add_sent_to_chunk;
use manyhands_gradient::{CHUNK, chunk_energies, vector};
use manyhands_network::data::FetchRequest;
use manyhands_proto::tree::GROUP_BYTES;
use manyhands_proto::{ChunkIndex, Digest, NodeId};
use manyhands_rules::coordinator::{CodecCheck, CodecResult, Input};
use manyhands_rules::evidence::theta_groups;

use super::openings::{Blob, NotOpened, open as open_groups};
use super::{Done, EffectError, blocking};
use crate::context::Context;
use crate::retry::Backoff;
use crate::store::ReadBlobError;

/// One chunk of each state, as the worker opened it against its commitments.
struct Opened {
    chunk: ChunkIndex,
    theta_end: Vec<f32>,
    error_in: Vec<f32>,
    error_next: Vec<f32>,
}

/// What the worker opened instead of what it committed to.
struct Withheld(String);

pub(super) async fn check(context: &Arc<Context>, check: CodecCheck) -> Result<Done, EffectError> {
    let (round, worker) = (check.round, check.worker);
    let result = match run(context, check).await? {
        Ok(result) => result,
        Err(Withheld(reason)) => CodecResult::Withheld(reason),
    };
    Ok(Input::CodecChecked { round, worker, result }.into())
}

async fn run(
    context: &Arc<Context>,
    check: CodecCheck,
) -> Result<Result<CodecResult, Withheld>, EffectError> {
    let (own, order) = (context.clone(), check.clone());
    let (update, drawn) = blocking(move || {
        let update = stored_update(&own, order.payload)?;
        let count = own.spec.verification.codec_chunks;
        let drawn =
            order.beacon.codec_chunks(order.worker, count, &chunk_energies(&own.layout, &update));
        Ok::<_, EffectError>((update, drawn))
    })
    .await??;
    let returned = match check.error.and_then(|error| error.returned_payload) {
        None => None,
        Some(payload) => match returned_update(context, payload, check.worker).await? {
            Ok(update) => Some(update),
            Err(withheld) => return Ok(Err(withheld)),
        },
    };
    let opened = match open(context, &check, &drawn).await {
        Ok(opened) => opened,
        Err(withheld) => return Ok(Err(withheld)),
    };
    let context = context.clone();
    blocking(move || {
        let theta = context.store.theta(check.theta)?;
        Ok(Ok(judge(&context, &theta, &update, returned.as_ref(), opened)))
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
    let profile = context.spec.codec.profile;
    let length_max = manyhands_gradient::codec::payload_bytes_max(&context.layout, profile) as u64;
    let mut backoff = Backoff::for_peers();
    loop {
        let source = context.whereabouts.of(worker);
        let request = FetchRequest::new(payload, vec![source], length_max);
        match context.data.fetch_to_memory(request).await {
            Ok((bytes, _)) => {
                let parsed = Update::parse(&bytes, &context.layout, profile);
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
async fn open(
    context: &Context,
    check: &CodecCheck,
    drawn: &[ChunkIndex],
) -> Result<Vec<Opened>, Withheld> {
    let theta_end = open_vector(context, check.worker, ("θ_H", check.theta_end), drawn).await?;
    let error_next =
        open_vector(context, check.worker, ("e_next", check.error_next), drawn).await?;
    let error_in = match check.error {
        None => vec![vec![0.0; CHUNK]; drawn.len()],
        Some(error) => open_vector(context, check.worker, ("e_in", error.digest), drawn).await?,
    };
    Ok(drawn
        .iter()
        .zip(theta_end)
        .zip(error_in.into_iter().zip(error_next))
        .map(|((&chunk, theta_end), (error_in, error_next))| Opened {
            chunk,
            theta_end,
            error_in,
            error_next,
        })
        .collect())
}

async fn open_vector(
    context: &Context,
    of: NodeId,
    (name, digest): (&str, Digest),
    drawn: &[ChunkIndex],
) -> Result<Vec<Vec<f32>>, Withheld> {
    let blob = Blob { of, name, digest, bytes: context.vector_bytes() };
    let opened = open_groups(context, blob, &theta_groups(drawn), None).await;
    let opened = opened.map_err(|NotOpened(reason)| Withheld(reason))?;
    Ok(opened.groups.iter().map(|group| vector::floats(&group.bytes)).collect())
}

fn judge(
    context: &Context,
    theta: &[u8],
    update: &Update,
    returned: Option<&Update>,
    opened: Vec<Opened>,
) -> CodecResult {
    let terms = &context.spec.codec;
    let codec = UpdateCodec::new(terms.profile, terms.error_decay)
        .expect("β was checked when the run's file was read");
    for Opened { chunk, theta_end, mut error_in, error_next } in opened {
        if let Some(returned) = returned {
            add_sent_to_chunk(&context.layout, &mut error_in, returned, chunk);
        }
        let start = chunk.0 as usize * GROUP_BYTES as usize;
        let theta_start = vector::floats(&theta[start..start + GROUP_BYTES as usize]);
        let ends = Endpoints { start: &theta_start, end: &theta_end };
        let opened = OpenedChunk { error_in: &error_in, ends };
        let expected = match codec.check_chunk(&context.layout, update, chunk, opened) {
            Ok(expected) => expected,
            Err(mismatch) => return CodecResult::Fault(mismatch.to_string()),
        };
        let differs =
            expected.iter().zip(&error_next).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(index) = differs {
            return CodecResult::Fault(format!(
                "chunk {}: e_next does not follow from its opened states, from index {index} on",
                chunk.0
            ));
        }
    }
    CodecResult::Passed
}
