//! What a verifier does: repeats a worker's round and compares, and measures held-out loss.

mod evidence;
mod weigh;

use std::sync::Arc;
use std::time::Duration;

use manyhands_chain_client::FaultReport;
use manyhands_chain_client::types::FaultKind;
use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{CHUNK, Layout, vector};
use manyhands_model::data::SequenceId;
use manyhands_model::{
    ClaimedChunk, EndState, EvaluateTask, TrainError, TrainTask, Transformer,
    compare as compare_chunks, evaluate,
};
use manyhands_network::data::{GROUPS_PER_REQUEST_MAX, Source};
use manyhands_proto::message::{
    Assignment, Distances, Evaluate, Evaluation, Replay, ReplayOutcome, Start, Verdict,
};
use manyhands_proto::{ChunkIndex, Digest};
use manyhands_rules::panel::within;
use manyhands_rules::reward::layout;

use crate::context::{Context, WorkerEvent};
use crate::data::{RunData, progress};
use crate::metrics;
use crate::sync::{borrow_theta, incoming};
use crate::train::Reins;
use evidence::{Evidence, EvidenceError, PAUSE_MAX};
pub(crate) use weigh::weigh;

/// How a replay can end without distances.
enum Stopped {
    /// By the worker: it did not open what it committed to.
    Withheld(String),
    /// By us.
    Failed(String),
}

impl Stopped {
    fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }

    /// By whom depends on the evidence that is missing.
    fn by(what: &str, error: &EvidenceError) -> Self {
        let reason = format!("{what}: {error}");
        if error.is_withheld() { Self::Withheld(reason) } else { Self::Failed(reason) }
    }
}

/// Does a replay task and forms the verdict; a fault is also reported on the chain.
pub(crate) async fn replay(
    context: Arc<Context>,
    data: Arc<RunData>,
    task: Replay,
    reins: Arc<Reins>,
) -> Verdict {
    let (round, worker) = (task.assignment.round, task.assignment.worker);
    let outcome = match compare(&context, &data, &task, &reins).await {
        Ok(distances) => {
            let passed = within(&distances, &context.spec.verification);
            metrics::replayed(if passed { "passed" } else { "fault" });
            let delta = distances.delta;
            context.tell(WorkerEvent::Replayed { round, worker, delta, passed });
            if !passed {
                report(&context, &task, &distances).await;
            }
            ReplayOutcome::Compared(distances)
        }
        Err(Stopped::Withheld(reason)) => {
            metrics::replayed("withheld");
            context.trouble(format!("worker {} withheld evidence: {reason}", worker.short()));
            ReplayOutcome::Withheld(shorten(reason))
        }
        Err(Stopped::Failed(reason)) => {
            metrics::replayed("failed");
            context.trouble(format!("cannot replay round {round}: {reason}"));
            ReplayOutcome::Failed(shorten(reason))
        }
    };
    Verdict { id: task.id, outcome }
}

/// Reasons travel in messages of limited size.
fn shorten(reason: String) -> String {
    reason.chars().take(200).collect()
}

async fn compare(
    context: &Arc<Context>,
    data: &RunData,
    task: &Replay,
    reins: &Arc<Reins>,
) -> Result<Distances, Stopped> {
    let assignment = &task.assignment;
    let layout = layout(&context.spec.model);
    let chunks = layout.chunk_count();
    // Nobody could open these, and that is not the worker's fault.
    if let Some(chunk) = task.chunks.iter().find(|chunk| chunk.0 as usize >= chunks) {
        return Err(Stopped::Failed(format!("expected chunks below {chunks}, got {}", chunk.0)));
    }
    let theta = borrow_theta(context, assignment.theta).await.map_err(Stopped::failed)?;
    let theta = vector::from_bytes(&theta, &layout).map_err(Stopped::failed)?;
    let mut evidence = evidence_of(context, task);
    let moments = match task.head_moments {
        None => None,
        Some(digest) => Some(fetch_moments(&mut evidence, digest, &layout).await?),
    };
    let batches = data.batches(context, assignment).await.map_err(Stopped::failed)?;
    let from_own_moments = moments.is_some();
    let beginning = Beginning { theta, moments, batches };
    let replayed = match run(context, data, &task.assignment, beginning, Arc::clone(reins)).await {
        Ok(replayed) => replayed,
        Err(error) if from_own_moments && is_not_finite(&error) => {
            let (round, worker) = (assignment.round, assignment.worker.short());
            context.trouble(format!("round {round} of {worker}, from its own moments: {error}"));
            return Ok(farthest());
        }
        Err(error) => return Err(Stopped::failed(error)),
    };
    let theta_digest = vector::digest(&replayed.theta);
    // The worker's end state is opened only now, when ours is fixed.
    let claimed_moments =
        fetch_moments(&mut evidence, task.commitment.moments, &layout).await?.dequantise();
    let claimed_theta = open_chunks(&mut evidence, task, &layout).await?;
    let claimed: Vec<_> = claimed_theta
        .into_iter()
        .map(|(index, theta)| {
            let range = index.0 as usize * CHUNK..(index.0 as usize + 1) * CHUNK;
            ClaimedChunk {
                index,
                theta,
                first_moment: claimed_moments.first[range.clone()].to_vec(),
                second_moment: claimed_moments.second[range].to_vec(),
            }
        })
        .collect();
    let moments = replayed.moments.dequantise();
    let end = EndState { theta: &replayed.theta, moments: &moments };
    let distances = compare_chunks(&replayed.start, end, &claimed).map_err(Stopped::failed)?;
    // A distance from nothing has no number; it is as far as a message can say.
    let finite = |distance: f64| if distance.is_finite() { distance } else { f64::MAX };
    Ok(Distances {
        delta: finite(distances.delta),
        first_moment: finite(distances.first_moment),
        second_moment: finite(distances.second_moment),
        theta: theta_digest,
    })
}

/// Half of the time that checks have: the rest is for our own work, and for another verifier.
fn evidence_of<'a>(context: &'a Context, task: &Replay) -> Evidence<'a> {
    let worker = Source { peer: task.source.node, addresses: task.source.addresses.clone() };
    Evidence {
        data: &context.data,
        worker,
        incoming: incoming(context),
        progress: progress(context, "evidence"),
        pause_max: PAUSE_MAX,
        left: Duration::from_millis(context.spec.round.check_ms / 2),
    }
}

/// Whether what was trained on led nowhere, rather than something of ours failed. Whoever starts from
/// moments that it committed itself, and ended somewhere, was not led there by them: such moments are
/// a fault, or every replay of this worker could be made to fail.
fn is_not_finite(error: &TrainError) -> bool {
    match error {
        TrainError::NotFinite { .. } | TrainError::Moments(_) => true,
        TrainError::Stopped { .. }
        | TrainError::ThetaLength { .. }
        | TrainError::MomentsLength { .. }
        | TrainError::EmptyStep { .. }
        | TrainError::ContextLength { .. }
        | TrainError::Sequence(_)
        | TrainError::Torch(_) => false,
    }
}

/// The claim is as far from the replay as a message can say, which ended nowhere.
fn farthest() -> Distances {
    let (delta, first_moment, second_moment) = (f64::MAX, f64::MAX, f64::MAX);
    Distances { delta, first_moment, second_moment, theta: Digest::of(&[]) }
}

/// Where our own repetition started and ended.
struct Replayed {
    start: Vec<f32>,
    theta: Vec<f32>,
    moments: Moments8,
}

/// What our own repetition starts from.
struct Beginning {
    theta: Vec<f32>,
    moments: Option<Moments8>,
    batches: Vec<Vec<SequenceId>>,
}

async fn run(
    context: &Arc<Context>,
    data: &RunData,
    assignment: &Assignment,
    beginning: Beginning,
    reins: Arc<Reins>,
) -> Result<Replayed, TrainError> {
    let mut trainer = context.honest_trainer(data.train());
    let context = Arc::clone(context);
    let assignment = assignment.clone();
    let work = tokio::task::spawn_blocking(move || {
        let Beginning { theta: start, moments, batches } = beginning;
        let train = TrainTask {
            theta: &start,
            moments: moments.as_ref(),
            adam_step: match assignment.start {
                Start::Fresh => 0,
                Start::Head { adam_step, .. } => adam_step,
            },
            first_step: assignment.first_step,
            batches: &batches,
            micro_batch_sequences: context.spec.training.micro_batch_sequences,
            precision: context.spec.training.precision,
            threads: context.threads,
        };
        let (round, worker) = (assignment.round, assignment.worker);
        let outcome = trainer.train(&train, &mut |progress| {
            let (step, steps) = (progress.steps_done, progress.steps);
            context.tell(WorkerEvent::Replaying { round, worker, step, steps });
            reins.control()
        });
        outcome.map(|outcome| Replayed { theta: outcome.theta, moments: outcome.moments, start })
    });
    work.await.expect("a replaying thread does not panic")
}

async fn fetch_moments(
    evidence: &mut Evidence<'_>,
    digest: Digest,
    layout: &Layout,
) -> Result<Moments8, Stopped> {
    let bytes_max = Moments8::zero(layout).as_bytes().len() as u64;
    let bytes = evidence.blob(digest, bytes_max).await;
    let bytes = bytes.map_err(|error| Stopped::by("moments", &error))?;
    Moments8::parse(bytes, layout).map_err(|error| Stopped::Withheld(format!("moments: {error}")))
}

/// Opens the drawn chunks of θ_H, each proven against the committed digest.
async fn open_chunks(
    evidence: &mut Evidence<'_>,
    task: &Replay,
    layout: &Layout,
) -> Result<Vec<(ChunkIndex, Vec<f32>)>, Stopped> {
    let length = layout.vector_len() as u64 * 4;
    let mut opened = Vec::with_capacity(task.chunks.len());
    for chunks in task.chunks.chunks(GROUPS_PER_REQUEST_MAX) {
        let groups: Vec<u64> = chunks.iter().map(|chunk| u64::from(chunk.0)).collect();
        let bytes = evidence.groups(task.commitment.theta, length, &groups).await;
        let bytes = bytes.map_err(|error| Stopped::by("θ", &error))?;
        let values = bytes.iter().map(|bytes| vector::floats(bytes));
        opened.extend(chunks.iter().copied().zip(values));
    }
    Ok(opened)
}

/// A failed replay goes on the chain under the verifier's own name.
async fn report(context: &Context, task: &Replay, distances: &Distances) {
    let Some(chain) = &context.chain else { return };
    let evidence = serde_json::to_vec(&(task, distances)).expect("plain structs serialise");
    let report = FaultReport {
        run: context.run,
        worker: task.assignment.worker,
        round: task.assignment.round,
        kind: FaultKind::Replay,
        evidence_digest: Digest::of(&evidence),
    };
    if let Err(error) = chain.report_fault(&context.key, report).await {
        context.trouble(format!("cannot report the fault on the chain: {error}"));
    }
}

/// Measures the held-out loss of a θ.
pub(crate) async fn evaluation(
    context: Arc<Context>,
    data: Arc<RunData>,
    task: Evaluate,
    reins: Arc<Reins>,
) -> Result<Evaluation, String> {
    let bytes = borrow_theta(&context, task.theta).await.map_err(|error| error.to_string())?;
    let theta = vector::from_bytes(&bytes, &layout(&context.spec.model))
        .map_err(|error| error.to_string())?;
    let sequences = data.held_out_sequences(&context).await.map_err(|error| error.to_string())?;
    let loss = loss(&context, &data, theta, sequences, &reins).await?;
    context.tell(WorkerEvent::Evaluated { round: task.round, loss });
    Ok(Evaluation { round: task.round, theta: task.theta, loss })
}

/// Loss of held-out sequences at `theta`, in nats per token.
async fn loss(
    context: &Arc<Context>,
    data: &RunData,
    theta: Vec<f32>,
    sequences: Vec<SequenceId>,
    reins: &Arc<Reins>,
) -> Result<f64, String> {
    let source = data.held_out();
    let (shared, reins) = (Arc::clone(context), Arc::clone(reins));
    let work = tokio::task::spawn_blocking(move || {
        let training = &shared.spec.training;
        let model = Transformer::new(&shared.spec.model, training.precision, &theta, shared.device)
            .map_err(|error| error.to_string())?;
        let task = EvaluateTask {
            sequences: &sequences,
            batch_sequences: training.micro_batch_sequences,
            threads: shared.threads,
        };
        evaluate(&model, source.as_ref(), task, &mut |_| reins.control())
            .map(|found| found.loss)
            .map_err(|error| error.to_string())
    });
    work.await.expect("an evaluating thread does not panic")
}

#[cfg(test)]
mod tests {
    use manyhands_gradient::moments8::QuantiseError;

    use super::*;

    #[test]
    fn training_that_is_not_finite_is_told_from_what_is_our_own_fault() {
        let step = 7;
        assert!(is_not_finite(&TrainError::NotFinite { step, loss: f32::NAN }));
        assert!(is_not_finite(&TrainError::Moments(QuantiseError::NotFinite { block: 0 })));
        assert!(!is_not_finite(&TrainError::EmptyStep { step }));
        assert!(!is_not_finite(&TrainError::Stopped { steps_done: step }));
    }

    #[test]
    fn what_is_farthest_is_a_fault_and_can_be_said() {
        let distances = farthest();
        assert!(!within(&distances, &manyhands_proto::run_file::Verification::default()));
        for distance in [distances.delta, distances.first_moment, distances.second_moment] {
            assert!(distance.is_finite());
        }
    }
}
