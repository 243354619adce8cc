//! One round trained twice: under other numerics, as an honest verifier's machine has them, and as somebody who cheats
//! would. A run's thresholds have to lie between the distances of the two.

mod process;

use std::path::PathBuf;
use std::sync::Arc;

use manyhands_gradient::layout::LayoutError;
use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{Layout, initial_theta, replay};
use manyhands_proto::Digest;
use manyhands_proto::message::Distances;
use manyhands_proto::run_file::{Architecture, Precision, Training};
use serde::{Deserialize, Serialize};

use crate::data::{Dataset, ManifestError, SequenceId, SequenceSource, ShardSet, Split};
use crate::device::{DeviceChoice, DeviceError};
use crate::trainer::{Control, LocalTrainer, TrainError, TrainTask, Trainer};

pub use process::{Replayer, serve};

/// What is trained: a run's model on its data set, with rounds as long as here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Trial {
    /// A folder that `manyhands prepare` wrote.
    pub dataset: PathBuf,
    pub model: Architecture,
    pub training: Training,
    /// Of the whole run, for its schedule.
    pub total_steps: u64,
    /// Steps that a warm round has behind it.
    pub warm_steps: u64,
    /// Of a round.
    pub steps: u64,
    /// Sequences of a step.
    pub sequences: u32,
}

/// What decides the bits of a round, beside the process.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Numerics {
    pub device: DeviceChoice,
    pub precision: Precision,
    /// CPU threads of one operation.
    pub threads: u32,
    pub micro_batch_sequences: u32,
    pub without_onednn: bool,
}

/// Where a worker's round begins; its batches follow from the seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    pub seed: u64,
    pub theta: Vec<f32>,
    /// None of a worker that is new.
    pub moments: Option<Moments8>,
}

/// Where it ends.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    pub theta: Vec<f32>,
    pub moments: Moments8,
}

/// Why a trial went no further.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Dataset(#[from] ManifestError),
    #[error(
        "expected a data set of at most {expected} tokens in its vocabulary, as the model has, got {got}"
    )]
    Vocabulary { expected: u32, got: u32 },
    #[error("expected at least one sequence of {tokens} tokens to train on, the data set has none")]
    NoSequences { tokens: u32 },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error("the process of another class: {0}")]
    Process(#[from] std::io::Error),
    #[error("the process of another class ended too soon, with {0}")]
    Ended(String),
    #[error("the process of another class sent what is no end of a round")]
    NoEnd,
}

/// What a worker may have done instead of its assignment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cheat {
    /// One batch of the round is another.
    BatchReplaced,
    OtherData,
    /// So many of a hundred steps.
    Steps(u64),
    /// So many times the learning rate.
    LearningRate(f64),
    ZeroedMoments,
    ZeroUpdate,
    /// As long as an honest one, and in no relation to it.
    RandomUpdate,
    /// That of a worker with moments and batches of its own.
    CopiedUpdate,
    ScaledUpdate(f32),
    /// bf16 where f32 was assigned; in a run of bf16 there is none lower.
    LowerPrecision,
}

impl Cheat {
    pub const ALL: [Self; 11] = [
        Self::BatchReplaced,
        Self::OtherData,
        Self::Steps(90),
        Self::Steps(50),
        Self::LearningRate(1.1),
        Self::ZeroedMoments,
        Self::ZeroUpdate,
        Self::RandomUpdate,
        Self::CopiedUpdate,
        Self::ScaledUpdate(1.1),
        Self::LowerPrecision,
    ];

    pub fn name(self) -> String {
        match self {
            Self::BatchReplaced => "batch_replaced".to_owned(),
            Self::OtherData => "other_data".to_owned(),
            Self::Steps(percent) => format!("steps_{percent}_percent"),
            Self::LearningRate(factor) => format!("learning_rate_{factor}"),
            Self::ZeroedMoments => "zeroed_moments".to_owned(),
            Self::ZeroUpdate => "zero_update".to_owned(),
            Self::RandomUpdate => "random_update".to_owned(),
            Self::CopiedUpdate => "copied_update".to_owned(),
            Self::ScaledUpdate(factor) => format!("scaled_update_{factor}"),
            Self::LowerPrecision => "bf16_for_f32".to_owned(),
        }
    }
}

/// Trains the rounds of a trial on this machine.
pub struct Laboratory {
    trial: Trial,
    layout: Layout,
    text: Arc<ShardSet>,
}

impl Laboratory {
    /// # Errors
    /// When the model has no layout, or the data set cannot be read or is not for it.
    pub fn open(trial: Trial) -> Result<Self, CalibrationError> {
        let dataset = Dataset::open(&trial.dataset)?;
        let (expected, got) =
            (trial.model.vocabulary_size, dataset.manifest().tokenizer().vocabulary_size);
        if got > expected {
            return Err(CalibrationError::Vocabulary { expected, got });
        }
        let text = dataset.sequences(Split::Train, trial.model.context_length);
        if text.sequence_count() == 0 {
            return Err(CalibrationError::NoSequences { tokens: trial.model.context_length + 1 });
        }
        Ok(Self { layout: Layout::of(&trial.model)?, text: Arc::new(text), trial })
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn trial(&self) -> &Trial {
        &self.trial
    }

    fn batches(&self, seed: u64, steps: std::ops::Range<u64>) -> Vec<Vec<SequenceId>> {
        let count = self.text.sequence_count();
        let sequence = |at: u64| {
            let drawn = Digest::of(&[seed.to_le_bytes(), at.to_le_bytes()].concat());
            let number = drawn.as_bytes().first_chunk().expect("a digest has 32 bytes");
            SequenceId(u64::from_le_bytes(*number) % count)
        };
        let of = u64::from(self.trial.sequences);
        steps.map(|step| (step * of..(step + 1) * of).map(sequence).collect()).collect()
    }

    fn assigned(&self, seed: u64) -> Vec<Vec<SequenceId>> {
        let warm = self.trial.warm_steps;
        self.batches(seed, warm..warm + self.trial.steps)
    }

    /// A new worker's round of this seed.
    pub fn begin_cold(&self, seed: u64) -> Start {
        let theta = initial_theta(&self.layout, &self.trial.model, seed);
        Start { seed, theta, moments: None }
    }

    /// A round with the trial's warm steps behind it.
    ///
    /// # Errors
    /// When they cannot be trained.
    pub fn begin_warm(&self, seed: u64, numerics: Numerics) -> Result<Start, CalibrationError> {
        let cold = self.begin_cold(seed);
        let batches = self.batches(seed, 0..self.trial.warm_steps);
        let End { theta, moments } =
            self.run(&self.trial.training, &self.task(&cold, &batches, numerics), numerics.device)?;
        Ok(Start { seed, theta, moments: Some(moments) })
    }

    /// The assigned round.
    ///
    /// # Errors
    /// When it cannot be trained.
    pub fn train(&self, start: &Start, numerics: Numerics) -> Result<End, CalibrationError> {
        let batches = self.assigned(start.seed);
        self.run(&self.trial.training, &self.task(start, &batches, numerics), numerics.device)
    }

    fn task<'a>(
        &self,
        start: &'a Start,
        batches: &'a [Vec<SequenceId>],
        numerics: Numerics,
    ) -> TrainTask<'a> {
        let behind = if start.moments.is_some() { self.trial.warm_steps } else { 0 };
        TrainTask {
            theta: &start.theta,
            moments: start.moments.as_ref(),
            adam_step: behind,
            first_step: behind,
            batches,
            micro_batch_sequences: numerics.micro_batch_sequences,
            precision: numerics.precision,
            threads: numerics.threads,
        }
    }

    fn run(
        &self,
        training: &Training,
        task: &TrainTask<'_>,
        device: DeviceChoice,
    ) -> Result<End, CalibrationError> {
        let text = Arc::clone(&self.text) as Arc<dyn SequenceSource>;
        let (model, steps) = (&self.trial.model, self.trial.total_steps);
        let mut trainer = LocalTrainer::new(model, training, steps, text, device.resolve()?)?;
        let outcome = trainer.train(task, &mut |_| Control::Continue)?;
        Ok(End { theta: outcome.theta, moments: outcome.moments })
    }

    /// Where somebody ends who does `cheat` instead of the round that ends at `honest`.
    ///
    /// # Errors
    /// When it cannot be trained.
    pub fn claim(
        &self,
        cheat: Cheat,
        (start, honest): (&Start, &End),
        numerics: Numerics,
    ) -> Result<End, CalibrationError> {
        let mut assigned = self.assigned(start.seed);
        let training = &self.trial.training;
        let trained = |batches: &[Vec<SequenceId>]| {
            self.run(training, &self.task(start, batches, numerics), numerics.device)
        };
        let moved = |delta: &dyn Fn(usize, f32) -> f32| {
            let values = start.theta.iter().zip(&honest.theta).enumerate();
            let theta = values.map(|(at, (from, to))| from - delta(at, from - to)).collect();
            End { theta, moments: honest.moments.clone() }
        };
        Ok(match cheat {
            Cheat::BatchReplaced => {
                let middle = assigned.len() / 2;
                assigned[middle] = self.batches(start.seed + 1, 0..1).remove(0);
                trained(&assigned)?
            }
            Cheat::OtherData => trained(&self.assigned(start.seed + 1_000_000))?,
            Cheat::Steps(percent) => {
                let kept = (self.trial.steps * percent / 100).clamp(1, self.trial.steps);
                trained(&assigned[..kept as usize])?
            }
            Cheat::LearningRate(factor) => {
                let learning_rate = training.learning_rate * factor;
                let training = Training { learning_rate, ..training.clone() };
                self.run(&training, &self.task(start, &assigned, numerics), numerics.device)?
            }
            Cheat::ZeroedMoments => {
                let task = self.task(start, &assigned, numerics);
                let task = TrainTask { moments: None, adam_step: 0, ..task };
                self.run(training, &task, numerics.device)?
            }
            Cheat::ZeroUpdate => {
                let unmoved = || Moments8::zero(&self.layout);
                let moments = start.moments.clone().unwrap_or_else(unmoved);
                End { theta: start.theta.clone(), moments }
            }
            Cheat::RandomUpdate => {
                let last = start.theta.len() - 1;
                moved(&|at, _| start.theta[last - at] - honest.theta[last - at])
            }
            Cheat::CopiedUpdate => {
                let other = self.begin_warm(start.seed + 2_000_000, numerics)?;
                self.train(&Start { theta: start.theta.clone(), ..other }, numerics)?
            }
            Cheat::ScaledUpdate(factor) => moved(&|_, delta| factor * delta),
            Cheat::LowerPrecision => {
                self.train(start, Numerics { precision: Precision::Bf16, ..numerics })?
            }
        })
    }
}

impl Start {
    /// How far `claimed` is from `replayed`, over all chunks.
    pub fn distances(&self, claimed: &End, replayed: &End) -> Distances {
        let [claimed_moments, replayed_moments] =
            [claimed, replayed].map(|end| end.moments.dequantise());
        let claimed = replay::End::new(&claimed.theta, &claimed_moments);
        let replayed = replay::End::new(&replayed.theta, &replayed_moments);
        replay::distances(&self.theta, claimed, replayed)
    }
}
