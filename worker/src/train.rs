//! One round of work: train, encode the update, and have all of it on disk before it is committed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use manyhands_gradient::codec::{Endpoints, Update, UpdateCodec};
use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{error_feedback, vector};
use manyhands_model::data::SequenceId;
use manyhands_model::device::pause_for_load;
use manyhands_model::{Control, TrainError, TrainOutcome, TrainTask, Trainer};
use manyhands_network::data::{Access, StoreError};
use manyhands_proto::Digest;
use manyhands_proto::message::{Assignment, Commitment, EndState, SignedCommitment, Start};
use manyhands_rules::reward::layout;
use manyhands_rules::worker::Trained;
use tokio::sync::Notify;

use crate::context::{Context, WorkerEvent};
use crate::data::{DataError, RunData};
use crate::disk::{DiskError, RoundState};
use crate::sync::Theta;

/// Why a round was not trained.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RoundError {
    #[error("the assignment starts from θ {expected:?}, this node holds {held:?}")]
    Theta { expected: Digest, held: Option<Digest> },
    #[error("the assignment starts from round {round}, whose state is not on this disk")]
    NoHead { round: manyhands_proto::Round },
    #[error("the state of round {round} is damaged: {reason}")]
    DamagedHead { round: manyhands_proto::Round, reason: String },
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error("the update cannot be encoded: {0}")]
    Encode(String),
    #[error("cannot keep the round's end state: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// How heavy work is watched and stopped, from outside its thread.
#[derive(Debug, Default)]
pub(crate) struct Reins {
    stop: AtomicBool,
    stopped: Notify,
    pub(crate) steps_done: AtomicU32,
}

impl Reins {
    pub(crate) fn pull(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.stopped.notify_one();
    }

    pub(crate) fn control(&self) -> Control {
        if self.stop.load(Ordering::Relaxed) { Control::Stop } else { Control::Continue }
    }

    /// Ends when they are pulled. For one to wait.
    pub(crate) async fn stopped(&self) {
        self.stopped.notified().await;
    }
}

/// What a round starts from beside θ.
struct Beginning {
    moments: Option<Moments8>,
    adam_step: u64,
    /// e_in.
    error: Vec<f32>,
}

/// Trains an assignment and writes its end state. Returns what the machine is told.
pub(crate) async fn train(
    context: Arc<Context>,
    data: Arc<RunData>,
    theta: Option<Theta>,
    assignment: Assignment,
    reins: Arc<Reins>,
) -> Result<Trained, RoundError> {
    let held = theta.as_ref().map(|theta| theta.digest);
    let Some(theta) = theta.filter(|theta| theta.digest == assignment.theta) else {
        return Err(RoundError::Theta { expected: assignment.theta, held });
    };
    let batches = data.batches(&context, &assignment).await?;
    let trainer = context.trainer(data.train());
    let work = tokio::task::spawn_blocking(move || {
        let beginning = begin(&context, &assignment)?;
        let outcome = run(&context, trainer, &theta, &beginning, &assignment, &batches, &reins)?;
        finish(&context, &theta, beginning, assignment, outcome)
    });
    work.await.expect("a training thread does not panic")
}

/// Moments and error buffer, as the assignment says they follow from the head.
fn begin(context: &Context, assignment: &Assignment) -> Result<Beginning, RoundError> {
    let layout = layout(&context.spec.model);
    let Start::Head { round, commitment, sent_values_returned, adam_step } = assignment.start
    else {
        let error = vec![0.0; layout.vector_len()];
        return Ok(Beginning { moments: None, adam_step: 0, error });
    };
    let state = context.disk.round(round)?.ok_or(RoundError::NoHead { round })?;
    if state.trained.commitment.digest() != commitment {
        return Err(RoundError::NoHead { round });
    }
    let damaged = |reason: String| RoundError::DamagedHead { round, reason };
    let read = |digest: Digest| {
        let path = context.store.path(digest).ok_or(RoundError::NoHead { round })?;
        let bytes = std::fs::read(&path).map_err(|error| damaged(error.to_string()))?;
        if Digest::of(&bytes) != digest {
            return Err(damaged(format!("{} does not hash to its name", path.display())));
        }
        Ok(bytes)
    };
    let commitment = &state.trained.commitment.commitment;
    let moments = Moments8::parse(read(commitment.moments)?, &layout)
        .map_err(|error| damaged(error.to_string()))?;
    let mut error = vector::from_bytes(&read(commitment.error)?, &layout)
        .map_err(|error| damaged(error.to_string()))?;
    if sent_values_returned {
        let update = Update::parse(&read(commitment.payload)?, &layout, context.spec.codec.profile)
            .map_err(|error| damaged(error.to_string()))?;
        error_feedback::add_sent(&layout, &mut error, &update);
    }
    Ok(Beginning { moments: Some(moments), adam_step, error })
}

fn run(
    context: &Context,
    mut trainer: Box<dyn Trainer>,
    theta: &Theta,
    beginning: &Beginning,
    assignment: &Assignment,
    batches: &[Vec<SequenceId>],
    reins: &Reins,
) -> Result<TrainOutcome, TrainError> {
    let task = TrainTask {
        theta: &theta.values,
        moments: beginning.moments.as_ref(),
        adam_step: beginning.adam_step,
        first_step: assignment.first_step,
        batches,
        micro_batch_sequences: context.spec.training.micro_batch_sequences,
        precision: context.spec.training.precision,
        threads: context.threads,
    };
    let round = assignment.round;
    let mut busy_since = Instant::now();
    trainer.train(&task, &mut |progress| {
        reins.steps_done.store(progress.steps_done as u32, Ordering::Relaxed);
        if progress.loss.is_some() {
            let (step, steps, loss) = (progress.steps_done, progress.steps, progress.loss);
            context.tell(WorkerEvent::Training { round, step, steps, loss });
        }
        if reins.control() == Control::Stop {
            return Control::Stop;
        }
        let pause = pause_for_load(busy_since.elapsed(), context.load_max);
        // The pause is over when the next micro-batch begins.
        busy_since = Instant::now() + pause;
        Control::Pause(pause)
    })
}

fn finish(
    context: &Context,
    theta: &Theta,
    beginning: Beginning,
    assignment: Assignment,
    outcome: TrainOutcome,
) -> Result<Trained, RoundError> {
    let layout = layout(&context.spec.model);
    let codec = UpdateCodec::new(context.spec.codec.profile, context.spec.codec.error_decay)
        .map_err(|error| RoundError::Encode(error.to_string()))?;
    let mut error = beginning.error;
    let ends = Endpoints { start: &theta.values, end: &outcome.theta };
    let payload = codec
        .encode(&layout, &mut error, ends)
        .map_err(|error| RoundError::Encode(error.to_string()))?;
    let payload = payload.into_bytes();
    let losses = &outcome.losses;
    let loss = losses.iter().sum::<f32>() / losses.len().max(1) as f32;
    let keep = |bytes: &[u8]| context.store.insert(bytes, Access::Nobody);
    let commitment = Commitment {
        round: assignment.round,
        first_sequence: assignment.first_sequence,
        payload: keep(&payload)?,
        payload_bytes: payload.len() as u64,
        theta: keep(&vector::to_bytes(&outcome.theta))?,
        moments: keep(outcome.moments.as_bytes())?,
        error: keep(&vector::to_bytes(&error))?,
        assignment: assignment.digest(),
        tokens: outcome.tokens,
        loss,
    };
    let commitment = SignedCommitment::sign(&context.key, context.run, commitment);
    let trained = Trained { assignment, commitment };
    let adam_step = outcome.adam_step;
    let state = RoundState { trained: trained.clone(), adam_step, published_to: None };
    // The blobs of dropped rounds go with the next θ, when nobody asks for them any more.
    context.disk.keep_round(&state)?;
    Ok(trained)
}

/// From now on the coordinator may fetch a round's payload and open its evidence, and these verifiers may read
/// its moments: the next round starts from them. Where the round ended they have to find out themselves.
pub(crate) fn publish(
    context: &Context,
    round: manyhands_proto::Round,
    verifiers: &[manyhands_proto::NodeId],
) -> Result<(), RoundError> {
    let readers: BTreeSet<_> = verifiers.iter().copied().collect();
    for mut state in context.disk.rounds()? {
        let closed = state.trained.assignment.round <= round;
        if !closed || state.published_to.as_ref() == Some(&readers) {
            continue;
        }
        state.published_to = Some(readers.clone());
        context.disk.keep_round(&state)?;
        allow(context, &state)?;
    }
    Ok(())
}

/// Lets those read evidence who might before the process was restarted.
pub(crate) fn restore_access(context: &Context) -> Result<(), RoundError> {
    for state in context.disk.rounds()? {
        allow(context, &state)?;
    }
    let coordinator = BTreeSet::from([context.coordinator.peer]);
    for EndState { theta, moments } in context.disk.replays()? {
        for digest in [theta, moments] {
            // One that is gone was never asked for again.
            let _ = context.store.set_access(digest, Access::Only(coordinator.clone()));
        }
    }
    Ok(())
}

fn allow(context: &Context, state: &RoundState) -> Result<(), RoundError> {
    let Some(verifiers) = &state.published_to else { return Ok(()) };
    let coordinator = BTreeSet::from([context.coordinator.peer]);
    for digest in state.secrets() {
        context.store.set_access(digest, Access::Only(coordinator.clone()))?;
    }
    let readers = verifiers.union(&coordinator).copied().collect();
    context.store.set_access(state.moments(), Access::Only(readers))?;
    Ok(())
}
