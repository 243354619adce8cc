//! What a verifier does: repeats a worker's round and compares, and measures held-out loss.

use std::sync::Arc;
use std::time::Duration;

use manyhands_chain_client::FaultReport;
use manyhands_chain_client::types::FaultKind;
use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{CHUNK, Layout, vector};
use manyhands_model::{
    ClaimedChunk, Control, EndState, EvaluateTask, TrainTask, Transformer,
    compare as compare_chunks, evaluate,
};
use manyhands_network::data::{
    FetchError, FetchRequest, GROUPS_PER_REQUEST_MAX, Source, SourceError,
};
use manyhands_proto::message::{
    Distances, Evaluate, Evaluation, Replay, ReplayOutcome, Start, Verdict,
};
use manyhands_proto::{ChunkIndex, Digest};
use manyhands_rules::coordinator::within;
use manyhands_rules::reward::layout;

use crate::context::{Context, WorkerEvent};
use crate::data::RunData;
use crate::metrics;
use crate::sync::fetch_theta;

/// Attempts to reach a worker before its silence is reported.
const ATTEMPTS: u32 = 5;

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
}

/// Does a replay task and forms the verdict; a fault is also reported on the chain.
pub(crate) async fn replay(context: Arc<Context>, data: Arc<RunData>, task: Replay) -> Verdict {
    let (round, worker) = (task.assignment.round, task.assignment.worker);
    let outcome = match compare(&context, &data, &task).await {
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
) -> Result<Distances, Stopped> {
    let assignment = &task.assignment;
    let layout = layout(&context.spec.model);
    let vector_bytes = layout.vector_len() as u64 * 4;
    let theta = fetch_theta(context, assignment.theta, vector_bytes, &[]).await;
    let theta = vector::from_bytes(&theta.map_err(Stopped::failed)?, &layout);
    let theta = theta.map_err(Stopped::failed)?;
    let worker = Source { peer: task.source.node, addresses: task.source.addresses.clone() };
    let moments = match task.head_moments {
        None => None,
        Some(digest) => Some(fetch_moments(context, &worker, digest, &layout).await?),
    };
    let batches = data.batches(context, assignment).await.map_err(Stopped::failed)?;
    let replayed = run(context, data, task, theta, moments, batches).await?;
    let theta_digest = vector::digest(&replayed.theta);
    // The worker's end state is opened only now, when ours is fixed.
    let claimed_moments =
        fetch_moments(context, &worker, task.commitment.moments, &layout).await?.dequantise();
    let claimed_theta = open_chunks(context, &worker, task, vector_bytes).await?;
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

/// Where our own repetition started and ended.
struct Replayed {
    start: Vec<f32>,
    theta: Vec<f32>,
    moments: Moments8,
}

async fn run(
    context: &Arc<Context>,
    data: &RunData,
    task: &Replay,
    start: Vec<f32>,
    moments: Option<Moments8>,
    batches: Vec<Vec<manyhands_model::data::SequenceId>>,
) -> Result<Replayed, Stopped> {
    let mut trainer = context.honest_trainer(data.train());
    let context = Arc::clone(context);
    let assignment = task.assignment.clone();
    let work = tokio::task::spawn_blocking(move || {
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
            Control::Continue
        });
        outcome.map(|outcome| Replayed { theta: outcome.theta, moments: outcome.moments, start })
    });
    work.await.expect("a replaying thread does not panic").map_err(Stopped::failed)
}

async fn fetch_moments(
    context: &Context,
    worker: &Source,
    digest: Digest,
    layout: &Layout,
) -> Result<Moments8, Stopped> {
    let bytes_max = Moments8::zero(layout).as_bytes().len() as u64;
    let mut attempt = 0;
    let bytes = loop {
        let request = FetchRequest::new(digest, vec![worker.clone()], bytes_max);
        match context.data.fetch_to_memory(request).await {
            Ok((bytes, _)) => break bytes,
            Err(FetchError::NoSource { .. }) if attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(Stopped::Withheld(format!("moments: {error}"))),
        }
        pause(attempt).await;
    };
    Moments8::parse(bytes.to_vec(), layout)
        .map_err(|error| Stopped::Withheld(format!("moments: {error}")))
}

/// Opens the drawn chunks of θ_H, each proven against the committed digest.
async fn open_chunks(
    context: &Context,
    worker: &Source,
    task: &Replay,
    vector_bytes: u64,
) -> Result<Vec<(ChunkIndex, Vec<f32>)>, Stopped> {
    let mut opened = Vec::with_capacity(task.chunks.len());
    for chunks in task.chunks.chunks(GROUPS_PER_REQUEST_MAX) {
        let groups: Vec<u64> = chunks.iter().map(|chunk| u64::from(chunk.0)).collect();
        let mut attempt = 0;
        let openings = loop {
            match context.data.open_groups(worker, task.commitment.theta, &groups).await {
                Ok(openings) => break openings,
                Err(SourceError::Blame(blame)) => {
                    return Err(Stopped::Withheld(format!("θ: {blame}")));
                }
                Err(_) if attempt < ATTEMPTS => attempt += 1,
                Err(error) => return Err(Stopped::Withheld(format!("θ: {error}"))),
            }
            pause(attempt).await;
        };
        if openings.length != vector_bytes {
            let got = openings.length;
            return Err(Stopped::Withheld(format!("θ has {got} bytes, not {vector_bytes}")));
        }
        let values = openings.groups.into_iter().map(|group| vector::floats(&group.bytes));
        opened.extend(chunks.iter().copied().zip(values));
    }
    Ok(opened)
}

/// Half a second, then twice as long each time: the worker may be restarting.
async fn pause(attempt: u32) {
    tokio::time::sleep(Duration::from_millis(250 << attempt)).await;
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
) -> Result<Evaluation, String> {
    let layout = layout(&context.spec.model);
    let vector_bytes = layout.vector_len() as u64 * 4;
    let bytes = fetch_theta(&context, task.theta, vector_bytes, &[]).await;
    let theta = vector::from_bytes(&bytes.map_err(|error| error.to_string())?, &layout)
        .map_err(|error| error.to_string())?;
    let sequences = data.held_out_sequences(&context).await.map_err(|error| error.to_string())?;
    let source = data.held_out();
    let shared = Arc::clone(&context);
    let work = tokio::task::spawn_blocking(move || {
        let training = &shared.spec.training;
        let model = Transformer::new(&shared.spec.model, training.precision, &theta, shared.device)
            .map_err(|error| error.to_string())?;
        let task = EvaluateTask {
            sequences: &sequences,
            batch_sequences: training.micro_batch_sequences,
            threads: shared.threads,
        };
        evaluate(&model, source.as_ref(), task, &mut |_| Control::Continue)
            .map_err(|error| error.to_string())
    });
    let found = work.await.expect("an evaluating thread does not panic")?;
    context.tell(WorkerEvent::Evaluated { round: task.round, loss: found.loss });
    Ok(Evaluation { round: task.round, theta: task.theta, loss: found.loss })
}
