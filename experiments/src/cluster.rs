//! R workers in one process: the trainer, codec and merge of the product, without network, chain or checks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use manyhands_gradient::aggregate::{Member, rule_of};
use manyhands_gradient::codec::{Endpoints, Payload, Update, UpdateCodec};
use manyhands_gradient::moments8::{Moments, Moments8};
use manyhands_gradient::{
    Admitted, Layout, OuterState, OuterStep, initial_theta, outer_learning_rate,
};
use manyhands_model::data::{Dataset, SequenceId, SequenceSource, ShardSet, Split};
use manyhands_model::{
    Control, Device, EvaluateTask, LocalTrainer, TrainTask, Transformer, UnroundedOutcome, evaluate,
};
use manyhands_proto::message::LossEffect;
use manyhands_proto::run_file::Profile;
use manyhands_proto::{Digest, NodeId, Round, TokenCount};
use manyhands_rules::sampling::sequence_at;
use manyhands_simulation::forgery::Forgery;

use crate::experiment::{Carrying, Download, Experiment, Liars, Lie, Method, Sparse};
use crate::liars::{self, FlippedLabels};

/// The text that all experiments train on.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    pub(crate) folder: PathBuf,
    dataset: Dataset,
}

impl Text {
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Self> {
        let dataset = Dataset::open(folder)
            .with_context(|| format!("cannot read the data set {}", folder.display()))?;
        Ok(Self { folder: folder.to_owned(), dataset })
    }

    pub(crate) fn digest(&self) -> Digest {
        self.dataset.manifest().digest()
    }

    /// What is trained on.
    pub(crate) fn train(&self, context_length: u32) -> Arc<ShardSet> {
        self.split(Split::Train, context_length)
    }

    fn split(&self, split: Split, context_length: u32) -> Arc<ShardSet> {
        Arc::new(self.dataset.sequences(split, context_length))
    }
}

/// What a worker has from its last round.
#[derive(Debug, Clone, Default)]
pub(crate) struct Worker {
    /// None before its first round, or if they are reset.
    pub(crate) moments: Option<Moments>,
    pub(crate) adam_step: u64,
    /// Empty in methods without error feedback.
    pub(crate) error: Vec<f32>,
    /// Δ of a liar's first round; of all others, and before that, empty.
    pub(crate) first: Vec<f32>,
}

/// Everything that the next round follows from.
#[derive(Debug, Clone)]
pub(crate) struct ClusterState {
    pub(crate) round: u32,
    pub(crate) theta: Vec<f32>,
    /// The outer momentum of dense DiLoCo, or what broadcasts left out.
    pub(crate) outer: Vec<f32>,
    pub(crate) workers: Vec<Worker>,
}

/// What one round showed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RoundFigures {
    /// Mean loss of the workers' steps, nats per token.
    pub(crate) train_loss: f64,
    /// Bits that a worker sent, per parameter.
    pub(crate) bits_up: f64,
    /// Bits that a worker fetched, per parameter.
    pub(crate) bits_down: f64,
    /// Workers whose updates were worth a closer look.
    pub(crate) flagged: u32,
}

/// An experiment under way.
pub(crate) struct Cluster {
    experiment: Experiment,
    device: Device,
    layout: Layout,
    train: Arc<ShardSet>,
    held_out: Arc<ShardSet>,
    trainer: LocalTrainer,
    /// Of those who train on something else.
    liars_trainer: LocalTrainer,
    state: ClusterState,
}

const F32_BITS: f64 = 32.0;

/// Held-out sequences that a round's updates are measured with, where a rule asks for it.
const GATE_SEQUENCES: u64 = 16;
/// Every so manieth held-out sequence is one that results are measured with. The gate sees only others.
const MEASURED_EVERY: u64 = 9;

impl Cluster {
    /// Begins with θ and the moments of `start`, its workers' in turn, but with nothing that waits to be sent;
    /// or else where the experiment's seed says.
    pub(crate) fn new(
        experiment: &Experiment,
        text: &Text,
        device: Device,
        start: Option<ClusterState>,
    ) -> anyhow::Result<Self> {
        let Experiment { model, training, .. } = experiment;
        let layout = Layout::of(model)?;
        let train = text.train(model.context_length);
        let zeros = || vec![0.0; layout.vector_len()];
        let (processes, error) = match experiment.method {
            Method::Synchronous => (1, Vec::new()),
            Method::DenseDiloco { .. } => (experiment.workers, Vec::new()),
            Method::Sparse(_) => (experiment.workers, zeros()),
        };
        let mut workers = vec![Worker { error, ..Worker::default() }; processes as usize];
        let theta = match start {
            Some(start) => {
                for (worker, from) in workers.iter_mut().zip(start.workers.iter().cycle()) {
                    (worker.moments, worker.adam_step) = (from.moments.clone(), from.adam_step);
                }
                start.theta
            }
            None => initial_theta(&layout, model, experiment.seed),
        };
        let trainer =
            |source| LocalTrainer::new(model, training, experiment.total_steps(), source, device);
        let flipped =
            FlippedLabels { text: Arc::clone(&train), vocabulary_size: model.vocabulary_size };
        Ok(Self {
            trainer: trainer(Arc::clone(&train) as Arc<dyn SequenceSource>)?,
            liars_trainer: trainer(Arc::new(flipped))?,
            state: ClusterState { round: 0, theta, outer: zeros(), workers },
            held_out: text.split(Split::HeldOut, model.context_length),
            experiment: experiment.clone(),
            device,
            layout,
            train,
        })
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn state(&self) -> &ClusterState {
        &self.state
    }

    pub(crate) fn into_state(self) -> ClusterState {
        self.state
    }

    /// Goes on from a state of the same experiment, or one like it.
    pub(crate) fn resume(&mut self, state: ClusterState) {
        self.state = state;
    }

    /// Trains every worker from θ: where each ends.
    pub(crate) fn train_all(&mut self) -> anyhow::Result<Vec<UnroundedOutcome>> {
        (0..self.state.workers.len()).map(|worker| self.train(worker)).collect()
    }

    /// Trains and merges one round.
    pub(crate) fn step(&mut self) -> anyhow::Result<RoundFigures> {
        let ends = self.train_all()?;
        let losses = || ends.iter().flat_map(|end| &end.losses);
        let sum: f64 = losses().map(|&loss| f64::from(loss)).sum();
        let train_loss = sum / losses().count() as f64;
        let mut flagged = 0;
        let (bits_up, bits_down) = match self.experiment.method.clone() {
            Method::Synchronous => {
                self.state.theta.clone_from(&ends[0].theta);
                // A gradient and its sum, every step.
                let steps = f64::from(self.experiment.training.steps_per_round);
                (F32_BITS * steps, F32_BITS * steps)
            }
            Method::DenseDiloco { outer_learning_rate, outer_learning_rate_final, momentum } => {
                let last = self.experiment.rounds.saturating_sub(1).max(1);
                let progress = self.state.round as f32 / last as f32;
                let rise = outer_learning_rate_final - outer_learning_rate;
                self.nesterov(&ends, outer_learning_rate + rise * progress, momentum);
                (F32_BITS, F32_BITS)
            }
            Method::Sparse(method) => self.sparse(&method, &ends, &mut flagged)?,
        };
        self.state.round += 1;
        Ok(RoundFigures { train_loss, bits_up, bits_down, flagged })
    }

    fn train(&mut self, worker: usize) -> anyhow::Result<UnroundedOutcome> {
        let batches = self.batches(worker);
        let Experiment { training, method, liars, .. } = &self.experiment;
        let honest = self.state.workers.len() - liars.map_or(0, |liars| liars.count as usize);
        let lie = liars.map(|liars| liars.lie).filter(|_| worker >= honest);
        if let Some(Lie::Forged(forgery)) = lie
            && !forgery.trains()
        {
            let sequences = batches.iter().map(Vec::len).sum::<usize>() as u64;
            return Ok(UnroundedOutcome {
                theta: self.state.theta.clone(),
                moments: Moments { first: Vec::new(), second: Vec::new() },
                adam_step: 0,
                tokens: TokenCount(sequences * u64::from(self.experiment.model.context_length)),
                losses: Vec::new(),
            });
        }
        let state = &mut self.state.workers[worker];
        let task = TrainTask {
            theta: &self.state.theta,
            moments: None,
            adam_step: state.adam_step,
            first_step: u64::from(self.state.round) * u64::from(training.steps_per_round),
            batches: &batches,
            micro_batch_sequences: training.micro_batch_sequences,
            precision: training.precision,
            threads: 1,
        };
        let moments = state.moments.take();
        let trainer = if lie == Some(Lie::FlippedLabels) {
            &mut self.liars_trainer
        } else {
            &mut self.trainer
        };
        let outcome = trainer.train_unrounded(&task, moments, &mut |_| Control::Continue)?;
        let carrying = match method {
            Method::Sparse(method) => method.moments,
            Method::Synchronous | Method::DenseDiloco { .. } => Carrying::Unrounded,
        };
        (state.moments, state.adam_step) = match carrying {
            Carrying::Unrounded => (Some(outcome.moments.clone()), outcome.adam_step),
            Carrying::Rounded => {
                let (layout, steps) = (&self.layout, outcome.adam_step);
                let rounded = Moments8::quantise(layout, &outcome.moments, task.rounding_stream())?;
                (Some(rounded.dequantise()), steps)
            }
            Carrying::Reset => (None, 0),
        };
        Ok(outcome)
    }

    /// The sequences of a worker's steps. All methods see the same ones in the same step.
    fn batches(&self, worker: usize) -> Vec<Vec<SequenceId>> {
        let Experiment { training, seed, .. } = &self.experiment;
        let all = self.experiment.sequences_per_step();
        let own = all / self.state.workers.len() as u64;
        let steps = u64::from(training.steps_per_round);
        (0..steps)
            .map(|step| {
                let round = u64::from(self.state.round);
                let first = (round * steps + step) * all + worker as u64 * own;
                (first..first + own)
                    .map(|at| SequenceId(sequence_at(*seed, at, self.train.sequence_count())))
                    .collect()
            })
            .collect()
    }

    fn nesterov(&mut self, ends: &[UnroundedOutcome], rate: f32, momentum: f32) {
        let share = 1.0 / ends.len() as f32;
        let values = self.state.theta.iter_mut().zip(&mut self.state.outer).enumerate();
        for (at, (theta, velocity)) in values {
            let delta = ends.iter().map(|end| *theta - end.theta[at]).sum::<f32>() * share;
            *velocity = momentum * *velocity + delta;
            *theta -= rate * (delta + momentum * *velocity);
        }
    }

    /// Bits up and down, per parameter.
    fn sparse(
        &mut self,
        method: &Sparse,
        ends: &[UnroundedOutcome],
        flagged: &mut u32,
    ) -> anyhow::Result<(f64, f64)> {
        let payloads = match self.experiment.liars {
            Some(Liars { count, lie: Lie::Forged(forgery) }) => {
                let mut sent = ends.to_vec();
                let forged = self.forge(method, ends, (count, forgery));
                let liars = sent.len() - count as usize;
                for (end, forged) in sent[liars..].iter_mut().zip(forged) {
                    end.theta = forged;
                }
                self.encode(method, &sent)?
            }
            _ => self.encode(method, ends)?,
        };
        let profile = self.profile(method);
        let updates = payloads
            .iter()
            .map(|payload| Update::parse(payload.as_bytes(), &self.layout, profile))
            .collect::<Result<Vec<_>, _>>()?;
        let effects = if method.aggregation.rules.iter().any(|&rule| rule_of(rule).needs_losses()) {
            self.loss_effects(&updates)?.into_iter().map(Some).collect()
        } else {
            vec![None; updates.len()]
        };
        let members: Vec<Member<'_>> = updates
            .iter()
            .zip(ends)
            .zip(effects)
            .enumerate()
            .map(|(number, ((update, end), loss_effect))| Member {
                worker: NodeId::new([number as u8; 32]),
                tokens: end.tokens,
                update,
                loss_effect,
            })
            .collect();
        let rounds = self.experiment.rounds;
        let alpha = outer_learning_rate(&method.aggregation, Round(self.state.round), rounds);
        let ClusterState { theta, outer, .. } = &mut self.state;
        let admitted = Admitted { members: &members, alpha };
        let step = OuterStep::new(&self.layout, &method.aggregation, admitted, &[])?;
        *flagged = step.flagged().len() as u32;
        let whole = 0..self.layout.chunk_count();
        let bits = |payload: &Payload| payload.bits_per_parameter(&self.layout);
        let up: f64 = payloads.iter().map(bits).sum();
        let down = match method.download {
            Download::Broadcast => {
                let slice = step.apply(whole, OuterState { theta, residual: outer });
                bits(&step.join(&[slice])?)
            }
            Download::AllPayloads => {
                step.merge_into(whole, theta);
                up
            }
        };
        Ok((up / payloads.len() as f64, down))
    }

    /// What each update alone does to the loss of held-out sequences, others in each round.
    fn loss_effects(&self, updates: &[Update]) -> anyhow::Result<Vec<LossEffect>> {
        let others = MEASURED_EVERY - 1;
        let count = self.held_out.sequence_count() / MEASURED_EVERY * others;
        let first = u64::from(self.state.round) * GATE_SEQUENCES;
        let sequences: Vec<_> = (first..first + GATE_SEQUENCES)
            .map(|at| sequence_at(self.experiment.seed, at, count))
            .map(|other| SequenceId(other / others * MEASURED_EVERY + 1 + other % others))
            .collect();
        let before = self.loss_of(&self.state.theta, &sequences)?;
        updates
            .iter()
            .map(|update| {
                let mut theta = self.state.theta.clone();
                update.subtract_from(&self.layout, &mut theta);
                Ok(LossEffect::between(before, self.loss_of(&theta, &sequences)?))
            })
            .collect()
    }

    /// θ_H as the last workers claim it.
    fn forge(
        &mut self,
        method: &Sparse,
        ends: &[UnroundedOutcome],
        (count, forgery): (u32, Forgery),
    ) -> Vec<Vec<f32>> {
        let profile = self.profile(method);
        let seed = self.experiment.seed * 1_000_000 + u64::from(self.state.round);
        let ClusterState { theta, workers, .. } = &mut self.state;
        let honest = workers.len() - count as usize;
        let mut firsts: Vec<Vec<f32>> =
            workers[honest..].iter_mut().map(|liar| std::mem::take(&mut liar.first)).collect();
        let round = liars::Round {
            layout: &self.layout,
            theta,
            ends,
            errors: workers.iter().map(|worker| worker.error.as_slice()).collect(),
            error_decay: method.codec.error_decay,
            profile,
            seed,
        };
        let forged = round.forge(forgery, &mut firsts);
        for (liar, first) in workers[honest..].iter_mut().zip(firsts) {
            liar.first = first;
        }
        forged
    }

    /// Every worker's payload; its error buffer moves on.
    pub(crate) fn encode(
        &mut self,
        method: &Sparse,
        ends: &[UnroundedOutcome],
    ) -> anyhow::Result<Vec<Payload>> {
        let codec = UpdateCodec::new(self.profile(method), method.codec.error_decay)?;
        let ClusterState { theta, workers, .. } = &mut self.state;
        let mut payloads = Vec::with_capacity(ends.len());
        for (worker, end) in workers.iter_mut().zip(ends) {
            let ends = Endpoints { start: theta, end: &end.theta };
            payloads.push(codec.encode(&self.layout, &mut worker.error, ends)?);
        }
        Ok(payloads)
    }

    fn profile(&self, method: &Sparse) -> Profile {
        match method.beginning {
            Some(beginning) if self.state.round < beginning.rounds => beginning.profile,
            Some(_) | None => method.codec.profile,
        }
    }

    /// Held-out loss over `sequences` from all over the held-out split, nats per token.
    pub(crate) fn held_out_loss(&self, sequences: u64) -> anyhow::Result<f64> {
        let count = sequences.min(self.held_out.sequence_count().div_ceil(MEASURED_EVERY));
        let sequences: Vec<_> = (0..count).map(|at| SequenceId(at * MEASURED_EVERY)).collect();
        self.loss_of(&self.state.theta, &sequences)
    }

    fn loss_of(&self, theta: &[f32], sequences: &[SequenceId]) -> anyhow::Result<f64> {
        let Experiment { model, training, .. } = &self.experiment;
        let model = Transformer::new(model, training.precision, theta, self.device)?;
        let task = EvaluateTask { sequences, batch_sequences: 16, threads: 1 };
        let source = self.held_out.as_ref();
        Ok(evaluate(&model, source, task, &mut |_| Control::Continue)?.loss)
    }
}
