//! A worker's training of one round.
//!
//! [`Trainer`] is the seam: the worker and the verifier know only it. [`LocalTrainer`] does the work.
//!
//! The same task on the same machine with the same libtorch, kernel set and number of threads gives the
//! same bits on a CPU. On CUDA the backward pass of attention adds in no fixed order, so replays there
//! are compared with a tolerance (see [`crate::replay`]).

use std::sync::{Arc, mpsc};
use std::time::Duration;

use manyhands_gradient::Layout;
use manyhands_gradient::layout::LayoutError;
use manyhands_gradient::moments8::{Moments, Moments8, QuantiseError};
use manyhands_proto::TokenCount;
use manyhands_proto::run_file::{Architecture, Precision, Training};
use tch::{Device, Kind, Tensor};

use crate::batch::{Batch, tokens_of};
use crate::data::{SequenceError, SequenceId, SequenceSource};
use crate::metrics;
use crate::optimizer::AdamW;
use crate::schedule::learning_rate;
use crate::torch::{TorchError, guarded, set_threads};
use crate::transformer::Transformer;

/// The work of one round, as its assignment states it. Equal tasks have equal results.
#[derive(Debug, Clone)]
pub struct TrainTask<'a> {
    /// θ_t, a canonical vector.
    pub theta: &'a [f32],
    /// The optimiser's moments at the start, rounded to 8 bits; none for a fresh worker.
    pub moments: Option<&'a Moments8>,
    /// Optimiser steps behind those moments; 0 for a fresh worker.
    pub adam_step: u64,
    /// The run's inner step at which the round starts: the learning rate follows from it.
    pub first_step: u64,
    /// The sequences of each inner step.
    pub batches: &'a [Vec<SequenceId>],
    /// Sequences of one forward and backward pass. Part of the task, as it orders summation.
    pub micro_batch_sequences: u32,
    pub precision: Precision,
    /// CPU threads of one operation. Part of the task, as it orders summation.
    pub threads: u32,
}

impl TrainTask<'_> {
    /// The stream of chances that the moments at the end are rounded with: its own for each worker and round, so that
    /// what rounding adds is averaged out where updates are merged.
    pub fn rounding_stream(&self) -> u64 {
        let first = self.batches.first().and_then(|step| step.first());
        first.map_or(0, |sequence| sequence.0).rotate_left(32) ^ self.adam_step
    }
}

/// What a round of training gave.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOutcome {
    /// θ_H, a canonical vector.
    pub theta: Vec<f32>,
    /// The moments at the end, rounded to 8 bits: as everybody uses them from here on.
    pub moments: Moments8,
    /// Optimiser steps behind those moments.
    pub adam_step: u64,
    /// Targets learnt from.
    pub tokens: TokenCount,
    /// Mean loss of each step before its update, nats per token.
    pub losses: Vec<f32>,
}

/// The same with the moments as they came out of the optimiser.
#[derive(Debug, Clone, PartialEq)]
pub struct UnroundedOutcome {
    /// θ_H, a canonical vector.
    pub theta: Vec<f32>,
    pub moments: Moments,
    /// Optimiser steps behind those moments.
    pub adam_step: u64,
    /// Targets learnt from.
    pub tokens: TokenCount,
    /// Mean loss of each step before its update, nats per token.
    pub losses: Vec<f32>,
}

/// How far a round of training is; reported after each micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps that are done.
    pub steps_done: u64,
    pub steps: u64,
    /// Targets seen so far.
    pub tokens: TokenCount,
    /// Loss of the step that was just finished, if this ends one.
    pub loss: Option<f32>,
}

/// What training does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    Continue,
    /// Leave the machine alone for so long.
    Pause(Duration),
    /// Give up this round.
    Stop,
}

/// Why a round was not trained.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("stopped after {steps_done} steps")]
    Stopped { steps_done: u64 },
    #[error("expected θ of {expected} values, got {got}")]
    ThetaLength { expected: usize, got: usize },
    #[error("expected moments of {expected} values, got {got}")]
    MomentsLength { expected: usize, got: usize },
    #[error("the moments cannot be kept: {0}")]
    Moments(#[from] QuantiseError),
    #[error(
        "expected at least one sequence in every step and micro-batch, got none in step {step}"
    )]
    EmptyStep { step: u64 },
    #[error("expected sequences of {expected} targets, the data has {got}")]
    ContextLength { expected: u32, got: u32 },
    #[error("the loss of step {step} is {loss}: the run has diverged or θ is damaged")]
    NotFinite { step: u64, loss: f32 },
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    #[error(transparent)]
    Torch(#[from] TorchError),
}

/// Trains a round. What it does must depend on the task alone.
pub trait Trainer: Send {
    /// Does the work of `task`. `progress` is called after each micro-batch and decides how to go on.
    ///
    /// # Errors
    /// When it was stopped, the task contradicts itself, data is missing, or the machine fails.
    fn train(
        &mut self,
        task: &TrainTask<'_>,
        progress: &mut dyn FnMut(Progress) -> Control,
    ) -> Result<TrainOutcome, TrainError>;
}

/// Trains on this machine with libtorch.
pub struct LocalTrainer {
    architecture: Architecture,
    training: Training,
    total_steps: u64,
    layout: Layout,
    source: Arc<dyn SequenceSource>,
    device: Device,
}

impl LocalTrainer {
    /// `total_steps` is the length of the run in inner steps, for the schedule.
    ///
    /// # Errors
    /// When the architecture has no layout.
    pub fn new(
        architecture: &Architecture,
        training: &Training,
        total_steps: u64,
        source: Arc<dyn SequenceSource>,
        device: Device,
    ) -> Result<Self, LayoutError> {
        Ok(Self {
            architecture: architecture.clone(),
            training: training.clone(),
            total_steps,
            layout: Layout::of(architecture)?,
            source,
            device,
        })
    }

    fn check(&self, task: &TrainTask<'_>) -> Result<(), TrainError> {
        let expected = self.layout.vector_len();
        if task.theta.len() != expected {
            return Err(TrainError::ThetaLength { expected, got: task.theta.len() });
        }
        let (expected, got) = (self.architecture.context_length, self.source.context_length());
        if expected != got {
            return Err(TrainError::ContextLength { expected, got });
        }
        let empty = task.batches.iter().position(Vec::is_empty);
        match empty.or((task.micro_batch_sequences == 0).then_some(0)) {
            Some(step) => Err(TrainError::EmptyStep { step: step as u64 }),
            None => Ok(()),
        }
    }

    /// Trains from moments that were never rounded, and gives them back so: how the protocol's rounding to
    /// 8 bits is measured. `task.moments` is not looked at.
    ///
    /// # Errors
    /// As [`Trainer::train`].
    pub fn train_unrounded(
        &mut self,
        task: &TrainTask<'_>,
        moments: Option<Moments>,
        progress: &mut dyn FnMut(Progress) -> Control,
    ) -> Result<UnroundedOutcome, TrainError> {
        self.check(task)?;
        guarded(|| self.run(task, moments, progress))?
    }

    fn run(
        &self,
        task: &TrainTask<'_>,
        moments: Option<Moments>,
        progress: &mut dyn FnMut(Progress) -> Control,
    ) -> Result<UnroundedOutcome, TrainError> {
        set_threads(task.threads);
        let model = Transformer::with_layout(
            &self.architecture,
            task.precision,
            &self.layout,
            task.theta,
            self.device,
        );
        let mut optimizer = match moments {
            None => AdamW::fresh(&self.layout, self.device),
            Some(moments) => {
                let (expected, got) = (self.layout.vector_len(), moments.first.len());
                if expected != got {
                    return Err(TrainError::MomentsLength { expected, got });
                }
                AdamW::new(&self.layout, &moments, task.adam_step, self.device)
            }
        };
        let mut report =
            Report { progress, steps: task.batches.len() as u64, steps_done: 0, tokens: 0 };
        let mut losses = Vec::with_capacity(task.batches.len());
        std::thread::scope(|scope| {
            // One micro-batch is read while another is trained on.
            let (sender, tokens) = mpsc::sync_channel(1);
            scope.spawn(move || {
                let size = task.micro_batch_sequences as usize;
                let mut micro_batches = task.batches.iter().flat_map(|step| step.chunks(size));
                // Nobody receives any more once training has failed.
                micro_batches.all(|it| sender.send(tokens_of(self.source.as_ref(), it)).is_ok());
            });
            for (index, sequences) in (0_u64..).zip(task.batches) {
                let (loss, gradients) =
                    self.gradients(task, &model, sequences, &tokens, &mut report)?;
                let rate = learning_rate(&self.training, self.total_steps, task.first_step + index);
                optimizer.step(model.parameters(), &gradients, &self.training, rate);
                // Waits for the device, which has the whole step by now.
                let loss = loss.double_value(&[]) as f32;
                if !loss.is_finite() {
                    return Err(TrainError::NotFinite { step: task.first_step + index, loss });
                }
                losses.push(loss);
                report.steps_done = index + 1;
                report.tell(Some(loss))?;
            }
            Ok(())
        })?;
        Ok(UnroundedOutcome {
            theta: model.theta(),
            moments: optimizer.moments(),
            adam_step: optimizer.steps(),
            tokens: TokenCount(report.tokens),
            losses,
        })
    }

    /// The mean loss over `sequences`, whose micro-batches `tokens` gives next, and its gradient for each weight.
    fn gradients(
        &self,
        task: &TrainTask<'_>,
        model: &Transformer,
        sequences: &[SequenceId],
        tokens: &mpsc::Receiver<Result<Vec<Vec<u32>>, SequenceError>>,
        report: &mut Report<'_>,
    ) -> Result<(Tensor, Vec<Tensor>), TrainError> {
        let context = u64::from(self.architecture.context_length);
        let targets = sequences.len() as u64 * context;
        let mut loss_sum = Tensor::zeros([], (Kind::Float, self.device));
        let micro_batches = sequences.chunks(task.micro_batch_sequences as usize);
        let last = micro_batches.len() - 1;
        let mut sums = Vec::new();
        for (index, micro_batch) in micro_batches.enumerate() {
            let tokens = tokens.recv().expect("micro-batches are read to the last");
            let batch = Batch::new(&tokens?, self.device);
            // Divided by all targets of the step, so that micro-batches of any size add up to its mean.
            let loss = model.loss_sum(&batch.inputs_bt, &batch.targets_bt) / targets as f64;
            let gradients =
                Tensor::run_backward(&[&loss], model.parameters().weights(), false, false);
            tch::no_grad(|| {
                if sums.is_empty() {
                    // To be added to where they lie: each weight takes part in a product or a norm, so its gradient is a
                    // tensor of its own.
                    sums = gradients;
                } else {
                    for (sum, gradient) in sums.iter_mut().zip(&gradients) {
                        let _ = sum.g_add_(gradient);
                    }
                }
                let _ = loss_sum.g_add_(&loss);
            });
            report.tokens += micro_batch.len() as u64 * context;
            metrics::trained_tokens(micro_batch.len() as u64 * context);
            if index < last {
                report.tell(None)?;
            }
        }
        Ok((loss_sum, sums))
    }
}

impl Trainer for LocalTrainer {
    fn train(
        &mut self,
        task: &TrainTask<'_>,
        progress: &mut dyn FnMut(Progress) -> Control,
    ) -> Result<TrainOutcome, TrainError> {
        self.check(task)?;
        let moments = task.moments.map(Moments8::dequantise);
        let UnroundedOutcome { theta, moments, adam_step, tokens, losses } =
            guarded(|| self.run(task, moments, progress))??;
        let moments = Moments8::quantise(&self.layout, &moments, task.rounding_stream())?;
        Ok(TrainOutcome { theta, moments, adam_step, tokens, losses })
    }
}

/// Tells the caller how far training is, and does what it says.
struct Report<'a> {
    progress: &'a mut dyn FnMut(Progress) -> Control,
    steps: u64,
    steps_done: u64,
    tokens: u64,
}

impl Report<'_> {
    fn tell(&mut self, loss: Option<f32>) -> Result<(), TrainError> {
        let progress = Progress {
            steps_done: self.steps_done,
            steps: self.steps,
            tokens: TokenCount(self.tokens),
            loss,
        };
        match (self.progress)(progress) {
            Control::Continue => Ok(()),
            Control::Pause(duration) => {
                std::thread::sleep(duration);
                Ok(())
            }
            Control::Stop => Err(TrainError::Stopped { steps_done: self.steps_done }),
        }
    }
}
