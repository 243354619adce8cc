//! Saying on the chain that a worker cheated: after a look at the evidence of it, in which our own signature is.

use std::sync::Arc;

use manyhands_chain_client::types::FaultKind;
use manyhands_chain_client::{FaultReport, SubmitError};
use manyhands_network::data::FetchRequest;
use manyhands_proto::ChunkIndex;
use manyhands_proto::message::{Distances, ReplayEvidence, Vote};
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
    let layout = layout(&context.spec.model);
    let terms = &context.spec.verification;
    let drawn = (terms.replay_chunks as usize).min(layout.chunk_count());
    let bytes_max = bytes_max(&layout, drawn);
    let request = FetchRequest::new(vote.evidence, context.sources(&[]), bytes_max);
    let (bytes, _) = context
        .data
        .fetch_to_memory(request)
        .await
        .map_err(|error| format!("evidence: {error}"))?;
    Ok(judge(context, vote, &bytes, drawn))
}

fn judge(context: &Context, vote: &Vote, bytes: &[u8], drawn: usize) -> Result<Distances, String> {
    let evidence = ReplayEvidence::parse(bytes).map_err(|error| error.to_string())?;
    let (replay, commitment) = (&evidence.replay, &evidence.commitment);
    let about = (replay.run, replay.replayed.round, replay.replayed.worker);
    if replay.verifier != context.key.node_id() || about != (context.run, vote.round, vote.worker) {
        return Err("the evidence is of another replay".to_owned());
    }
    if (commitment.run, commitment.worker) != (context.run, vote.worker) {
        return Err("the evidence is of another worker".to_owned());
    }
    // Fewer could have been picked.
    let opened = evidence.opened.as_ref().map(|opened| &opened.start.groups);
    let chunks: Vec<ChunkIndex> = opened
        .into_iter()
        .flatten()
        .filter_map(|group| u32::try_from(group.opening.group).ok().map(ChunkIndex))
        .collect();
    if opened.is_some() && (chunks.len() != drawn || !chunks.is_sorted_by(|a, b| a < b)) {
        return Err(format!("expected {drawn} chunks, got {}", chunks.len()));
    }
    let layout = layout(&context.spec.model);
    let subject = Subject { layout: &layout, start: replay.replayed.start, chunks: &chunks };
    let found = distances(&evidence, subject).map_err(|error| error.to_string())?;
    let pair = Pair { worker: &vote.class, verifier: &context.class };
    if within(&found, &context.spec.verification, pair) {
        return Err(format!("the distance of Δ is {:.1e}, which is none", found.delta));
    }
    Ok(found)
}
