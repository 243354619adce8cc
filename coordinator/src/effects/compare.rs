//! Comparing where a verifier ended with where the worker says it did. Neither sees the other's end: both open
//! drawn chunks to the coordinator, and what was opened is kept, so that anybody can compare again.

use std::sync::Arc;
use std::time::Duration;

use manyhands_gradient::moments8::Moments8;
use manyhands_network::data::Access;
use manyhands_proto::message::Distances;
use manyhands_proto::message::{EndState, OpenedEnd, OpenedEnds, ReplayEnd, ReplayEvidence};
use manyhands_proto::tree::Openings;
use manyhands_proto::{ChunkIndex, Digest, NodeId};
use manyhands_rules::coordinator::{Compared, Comparison, Input};
use manyhands_rules::evidence::{Subject, Whose, distances, moments_groups, near, theta_groups};
use tokio::time::Instant;

use super::judges::stored_evidence;
use super::openings::{Blob, NotOpened, open};
use super::{Done, EffectError, blocking};
use crate::context::Context;
use crate::journal::{BlobKind, BlobNote};
use crate::store::ReadBlobError;

pub(super) async fn compare(
    context: &Arc<Context>,
    order: Comparison,
) -> Result<Done, EffectError> {
    let (id, verifier, round) = (order.id, order.replay.verifier, order.case.round());
    let result = run(context, order).await?;
    let blobs = match &result {
        Compared::Distances { evidence: Some(digest), .. } => {
            vec![BlobNote { digest: *digest, kind: BlobKind::Evidence, round }]
        }
        Compared::Distances { evidence: None, .. }
        | Compared::Withheld(_)
        | Compared::Unopened(_) => Vec::new(),
    };
    Ok(Done { input: Input::Compared { id, verifier, result }, blobs })
}

async fn run(context: &Arc<Context>, order: Comparison) -> Result<Compared, EffectError> {
    let (worker, verifier) = (order.case.worker(), order.replay.verifier);
    let chunks = &order.case.chunks;
    let replayed = match &order.replay.replayed.end {
        ReplayEnd::At(end) => *end,
        ReplayEnd::Nowhere => return judge(context, order, None).await,
        ReplayEnd::Withheld(reason) => return Ok(Compared::Withheld(reason.clone())),
    };
    let claimed = order.case.work.commitment.commitment.end();
    // Checks have this time; a verifier's own work and another's come out of it too.
    let quarter = Duration::from_millis(context.spec.round.check_ms / 4);
    if replayed == claimed {
        // The same bits. That it has them it has to show: the digests are no secret.
        let count = context.spec.verification.codec_chunks as usize;
        let apart = chunks.len().div_ceil(count.max(1));
        let shown: Vec<ChunkIndex> = chunks.iter().copied().step_by(apart).collect();
        let opened =
            open_theta(context, verifier, replayed.theta, &shown, Instant::now() + quarter);
        return Ok(match opened.await {
            Ok(_) => {
                Compared::Distances { distances: Distances::NONE, evidence: None, near: Vec::new() }
            }
            Err(NotOpened(reason)) => Compared::Unopened(reason),
        });
    }
    if context.spec.verification.fingerprint.is_some() {
        // Digests that differ say it all.
        return judge(context, order, None).await;
    }
    let replayed = match open_end(context, verifier, replayed, chunks, quarter).await {
        Ok(opened) => opened,
        Err(NotOpened(reason)) => return Ok(Compared::Unopened(reason)),
    };
    let claimed = match open_end(context, worker, claimed, chunks, 2 * quarter).await {
        Ok(opened) => opened,
        Err(NotOpened(reason)) => return Ok(Compared::Withheld(reason)),
    };
    judge(context, order, Some((claimed, replayed))).await
}

async fn open_end(
    context: &Context,
    of: NodeId,
    end: EndState,
    chunks: &[ChunkIndex],
    patience: Duration,
) -> Result<OpenedEnd, NotOpened> {
    let deadline = Instant::now() + patience;
    let theta = open_theta(context, of, end.theta, chunks, deadline).await?;
    let bytes = Moments8::bytes_len(&context.layout) as u64;
    let moments = Blob { of, name: "the moments", digest: end.moments, bytes };
    let moments = open(context, moments, &moments_groups(chunks), Some(deadline)).await?;
    Ok(OpenedEnd { theta, moments })
}

async fn open_theta(
    context: &Context,
    of: NodeId,
    digest: Digest,
    chunks: &[ChunkIndex],
    deadline: Instant,
) -> Result<Openings, NotOpened> {
    let theta = Blob { of, name: "θ_H", digest, bytes: context.vector_bytes() };
    open(context, theta, &theta_groups(chunks), Some(deadline)).await
}

/// Keeps what was opened, and says what follows from it.
async fn judge(
    context: &Arc<Context>,
    order: Comparison,
    ends: Option<(OpenedEnd, OpenedEnd)>,
) -> Result<Compared, EffectError> {
    let Comparison { case, replay, .. } = order;
    let start = case.work.assignment.theta;
    let context = context.clone();
    blocking(move || {
        let opened = match ends {
            None => None,
            Some((claimed, replayed)) => {
                let theta = match context.store.theta(start) {
                    Ok(theta) => theta,
                    // The verifier had it a moment ago; nobody can show now what its replay began with.
                    Err(ReadBlobError::Missing(_)) => {
                        let reason = "the round's parameters are not kept any more".to_owned();
                        return Ok(Compared::Unopened(reason));
                    }
                    Err(error) => return Err(error.into()),
                };
                let start = Openings::of(&theta, &theta_groups(&case.chunks))
                    .expect("drawn chunks are chunks of θ");
                Some(OpenedEnds { start, claimed, replayed })
            }
        };
        let evidence = ReplayEvidence {
            commitment: case.work.commitment.clone(),
            replay: replay.clone(),
            opened,
        };
        let subject = Subject::of(&case, &context.layout, &context.spec.verification);
        let distances = match distances(&evidence, subject) {
            Ok(distances) => distances,
            Err(error) => {
                return Ok(match error.whose {
                    Whose::Worker => Compared::Withheld(error.reason),
                    Whose::Start | Whose::Verifier => Compared::Unopened(error.reason),
                });
            }
        };
        let earlier = stored_evidence(&context, &case)?;
        let terms = &context.spec.verification;
        let near = near(&case, &earlier, (&replay, &evidence), &context.layout, terms)
            // What was judged by it a moment ago was parsed and compared.
            .unwrap_or_default();
        let evidence = Some(context.store.insert(&evidence.to_bytes(), Access::Nobody)?);
        Ok(Compared::Distances { distances, evidence, near })
    })
    .await?
}
