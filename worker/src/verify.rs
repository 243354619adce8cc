//! What a verifier does: repeats a worker's round, and measures held-out loss.

mod evidence;
mod weigh;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{Layout, vector};
use manyhands_model::data::SequenceId;
use manyhands_model::{EvaluateTask, TrainError, TrainOutcome, TrainTask, Transformer, evaluate};
use manyhands_network::data::{Access, Source};
use manyhands_proto::Digest;
use manyhands_proto::message::{
    Assignment, EndState, Evaluate, Evaluation, Replay, ReplayEnd, ReplayOutcome, Replayed,
    SignedReplay, Start, Verdict,
};
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

/// Does a replay task, keeps where it ended, and stands for it with our signature. Where the worker says that it
/// ended we do not know, and have no way to find out before.
pub(crate) async fn replay(
    context: Arc<Context>,
    data: Arc<RunData>,
    task: Replay,
    reins: Arc<Reins>,
) -> Verdict {
    let (round, worker) = (task.assignment.round, task.assignment.worker);
    let end = match repeat(&context, &data, &task, &reins).await {
        Ok(end) => {
            metrics::replayed("done");
            context.tell(WorkerEvent::Replayed { round, worker });
            end
        }
        Err(Stopped::Withheld(reason)) => {
            metrics::replayed("withheld");
            context.trouble(format!("worker {} withheld evidence: {reason}", worker.short()));
            ReplayEnd::Withheld(shorten(reason))
        }
        Err(Stopped::Failed(reason)) => {
            metrics::replayed("failed");
            context.trouble(format!("cannot replay round {round}: {reason}"));
            return Verdict { id: task.id, outcome: ReplayOutcome::Failed(shorten(reason)) };
        }
    };
    let replayed = Replayed { round, worker, assignment: task.assignment.digest(), end };
    let signed = SignedReplay::sign(&context.key, context.run, replayed);
    Verdict { id: task.id, outcome: ReplayOutcome::Replayed(signed) }
}

/// Reasons travel in messages of limited size.
fn shorten(reason: String) -> String {
    reason.chars().take(200).collect()
}

async fn repeat(
    context: &Arc<Context>,
    data: &RunData,
    task: &Replay,
    reins: &Arc<Reins>,
) -> Result<ReplayEnd, Stopped> {
    let assignment = &task.assignment;
    let layout = layout(&context.spec.model);
    let theta = borrow_theta(context, assignment.theta).await.map_err(Stopped::failed)?;
    let theta = vector::from_bytes(&theta, &layout).map_err(Stopped::failed)?;
    let moments = match (&task.head, &assignment.start) {
        (Some(head), Start::Head { commitment, .. })
            if head.digest_of(context.run, assignment.worker) == *commitment =>
        {
            Some(fetch_moments(context, task, head.moments, &layout).await?)
        }
        (None, Start::Fresh) => None,
        (Some(_), Start::Head { .. } | Start::Fresh) | (None, Start::Head { .. }) => {
            let reason = "the coordinator names another head than the assignment's".to_owned();
            return Err(Stopped::Failed(reason));
        }
    };
    let batches = data.batches(context, assignment).await.map_err(Stopped::failed)?;
    let from_own_moments = moments.is_some();
    let beginning = Beginning { theta, moments, batches };
    match run(context, data, assignment, beginning, Arc::clone(reins)).await {
        Ok(outcome) => keep(context, outcome).await.map(ReplayEnd::At),
        Err(error) if from_own_moments && is_not_finite(&error) => {
            let (round, worker) = (assignment.round, assignment.worker.short());
            context.trouble(format!("round {round} of {worker}, from its own moments: {error}"));
            Ok(ReplayEnd::Nowhere)
        }
        Err(error) => Err(Stopped::failed(error)),
    }
}

/// Writes down where a replay ended, for the coordinator alone.
async fn keep(context: &Arc<Context>, outcome: TrainOutcome) -> Result<EndState, Stopped> {
    let context = Arc::clone(context);
    let keeping = tokio::task::spawn_blocking(move || {
        let coordinator = || Access::Only(BTreeSet::from([context.coordinator.peer]));
        let insert =
            |bytes: &[u8]| context.store.insert(bytes, coordinator()).map_err(Stopped::failed);
        let theta = insert(&vector::to_bytes(&outcome.theta))?;
        let moments = insert(outcome.moments.as_bytes())?;
        let end = EndState { theta, moments };
        context.disk.keep_replay(end).map_err(Stopped::failed)?;
        Ok(end)
    });
    keeping.await.expect("storing a blob does not panic")
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
) -> Result<TrainOutcome, TrainError> {
    let mut trainer = context.trainer(data.train());
    let context = Arc::clone(context);
    let assignment = assignment.clone();
    let work = tokio::task::spawn_blocking(move || {
        let Beginning { theta, moments, batches } = beginning;
        let train = TrainTask {
            theta: &theta,
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
        trainer.train(&train, &mut |progress| {
            let (step, steps) = (progress.steps_done, progress.steps);
            context.tell(WorkerEvent::Replaying { round, worker, step, steps });
            reins.control()
        })
    });
    work.await.expect("a replaying thread does not panic")
}

async fn fetch_moments(
    context: &Context,
    task: &Replay,
    digest: Digest,
    layout: &Layout,
) -> Result<Moments8, Stopped> {
    let worker = Source { peer: task.source.node, addresses: task.source.addresses.clone() };
    let evidence = Evidence {
        data: &context.data,
        worker,
        incoming: incoming(context),
        progress: progress(context, "evidence"),
        pause_max: PAUSE_MAX,
        // The rest of the time that checks have is for our own work, and for comparing.
        patience: Duration::from_millis(context.spec.round.check_ms / 4),
    };
    let bytes = evidence.blob(digest, Moments8::bytes_len(layout) as u64).await;
    let bytes = bytes.map_err(|error| Stopped::by("moments", &error))?;
    Moments8::parse(bytes, layout).map_err(|error| Stopped::Withheld(format!("moments: {error}")))
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
}
