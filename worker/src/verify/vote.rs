//! Saying on the chain that a worker cheated: after a look at the evidence of it, in which our own signature is.

use std::sync::Arc;

use manyhands_chain_client::types::FaultKind;
use manyhands_chain_client::{FaultReport, SubmitError};
use manyhands_gradient::Layout;
use manyhands_network::data::{FetchError, FetchRequest};
use manyhands_proto::message::{Distances, ReplayEvidence, Vote};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{ChunkIndex, Digest, NodeId, Round};
use manyhands_rules::evidence::{Subject, bytes_max, distances};
use manyhands_rules::panel::{Pair, within};
use manyhands_rules::reward::layout;

use crate::context::{Context, WorkerEvent};

/// Votes, or says why it does not: a vote that the evidence does not bear, or the chain does not want, is as
/// good as cast.
///
/// # Errors
/// When the evidence or the chain cannot be reached: a moment later they may be.
pub(crate) async fn vote(context: Arc<Context>, vote: &Vote) -> Result<(), String> {
    let Some(chain) = &context.chain else { return Ok(()) };
    let found = match judged(&context, vote).await? {
        Ok(found) => found,
        Err(reason) => {
            let Vote { round, worker, .. } = vote;
            context.trouble(format!(
                "not voting against {} for round {round}: {reason}",
                worker.short()
            ));
            return Ok(());
        }
    };
    let report = FaultReport {
        run: context.run,
        worker: vote.worker,
        round: vote.round,
        kind: FaultKind::Replay,
        evidence_digest: vote.evidence,
    };
    match chain.report_fault(&context.key, report).await {
        Ok(_) => {
            let (round, worker, delta) = (vote.round, vote.worker, found.delta);
            context.tell(WorkerEvent::Voted { round, worker, delta });
            Ok(())
        }
        // It is decided, or we have said it before.
        Err(SubmitError::Failed { error, .. }) => {
            context.trouble(format!("the chain did not take the vote: {error}"));
            Ok(())
        }
        Err(error) => Err(format!("cannot vote on the chain: {error}")),
    }
}

/// The distances that the evidence shows, if they are beyond the run's thresholds; else what is wrong with it.
async fn judged(context: &Context, vote: &Vote) -> Result<Result<Distances, String>, String> {
    let bytes = fetch_evidence(context, vote.evidence)
        .await
        .map_err(|error| format!("evidence: {error}"))?;
    let (by, found) = match judge(context, (vote.round, vote.worker), &bytes) {
        Ok(judged) => judged,
        Err(reason) => return Ok(Err(reason)),
    };
    if by != context.key.node_id() {
        return Ok(Err("the evidence is of another verifier".to_owned()));
    }
    let pair = Pair { worker: &vote.class, verifier: &context.class };
    if within(&found, &context.spec.verification, pair) {
        return Ok(Err(format!("the distance of Δ is {:.1e}, which is none", found.delta)));
    }
    Ok(Ok(found))
}

/// Fetches what somebody is accused by; it is the coordinator's to show.
pub(crate) async fn fetch_evidence(
    context: &Context,
    digest: Digest,
) -> Result<Vec<u8>, FetchError> {
    let layout = layout(&context.spec.model);
    let bytes_max = bytes_max(&layout, replay_chunks(&context.spec, &layout));
    let request = FetchRequest::new(digest, context.sources(&[]), bytes_max);
    Ok(context.data.fetch_to_memory(request).await?.0.into())
}

fn replay_chunks(spec: &RunSpec, layout: &Layout) -> usize {
    (spec.verification.replay_chunks as usize).min(layout.chunk_count())
}

/// Whose replay of that round and worker the evidence shows, and how far it ended from the worker's.
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn judge(
    context: &Context,
    (round, worker): (Round, NodeId),
    bytes: &[u8],
) -> Result<(NodeId, Distances), String> {
    let evidence = ReplayEvidence::parse(bytes).map_err(|error| error.to_string())?;
    let (replay, commitment) = (&evidence.replay, &evidence.commitment);
    let about = (replay.run, replay.replayed.round, replay.replayed.worker);
    if about != (context.run, round, worker) {
        return Err("the evidence is of another replay".to_owned());
    }
    if (commitment.run, commitment.worker) != (context.run, worker) {
        return Err("the evidence is of another worker".to_owned());
    }
    // Fewer could have been picked.
    let opened = evidence.opened.as_ref().map(|opened| &opened.start.groups);
    let chunks: Vec<ChunkIndex> = opened
        .into_iter()
        .flatten()
        .filter_map(|group| u32::try_from(group.opening.group).ok().map(ChunkIndex))
        .collect();
    let layout = layout(&context.spec.model);
    let drawn = replay_chunks(&context.spec, &layout);
    if opened.is_some() && (chunks.len() != drawn || !chunks.is_sorted_by(|a, b| a < b)) {
        return Err(format!("expected {drawn} chunks, got {}", chunks.len()));
    }
    let subject = Subject { layout: &layout, start: replay.replayed.start, chunks: &chunks };
    let found = distances(&evidence, subject).map_err(|error| error.to_string())?;
    Ok((replay.verifier, found))
}
