//! What an experiment is: everything its result follows from but text and build, as it is written beside the result.

use manyhands_proto::run_file::{Aggregation, Architecture, Codec, Profile, Training};
use manyhands_simulation::forgery::Forgery;
use serde::{Deserialize, Serialize};

/// One training run of R workers in one process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Experiment {
    /// Also its file under the results folder, without `.json`.
    pub(crate) name: String,
    /// Initial θ and the order of the data follow from it; experiments of one seed are paired.
    pub(crate) seed: u64,
    /// R.
    pub(crate) workers: u32,
    pub(crate) rounds: u32,
    pub(crate) model: Architecture,
    /// `steps_per_round` is H, `batch_sequences` what each worker gets in a step.
    pub(crate) training: Training,
    pub(crate) method: Method,
    /// Begins with θ and the moments that this one ends with; otherwise θ₀ follows from the seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) start: Option<Box<Experiment>>,
    /// The last so many workers lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) liars: Option<Liars>,
}

/// Workers that work together against the others. Nobody checks them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Liars {
    pub(crate) count: u32,
    pub(crate) lie: Lie,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Lie {
    /// They send what they did not train.
    Forged(Forgery),
    /// They train on text in which token t of V reads V − 1 − t, as input and as target.
    FlippedLabels,
}

/// How what the workers learnt becomes the next θ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Method {
    /// One process that steps on the batches of all workers together.
    Synchronous,
    /// The mean of dense f32 updates, and Nesterov momentum on it: DiLoCo,
    /// <https://arxiv.org/abs/2311.08105>.
    DenseDiloco { outer_learning_rate: f32, outer_learning_rate_final: f32, momentum: f32 },
    /// The product's codec and merge.
    Sparse(Sparse),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sparse {
    pub(crate) codec: Codec,
    pub(crate) aggregation: Aggregation,
    pub(crate) moments: Carrying,
    pub(crate) download: Download,
    /// The first rounds may have another profile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) beginning: Option<Beginning>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Beginning {
    pub(crate) rounds: u32,
    pub(crate) profile: Profile,
}

/// What becomes of the optimiser's moments between rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Carrying {
    /// Rounded to 8 bits: the protocol.
    Rounded,
    Unrounded,
    /// Every round begins with none.
    Reset,
}

/// What a worker fetches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Download {
    /// The compressed merge: the protocol.
    Broadcast,
    /// Everybody's payload, merged by everybody in full precision.
    AllPayloads,
}

impl Experiment {
    /// Sequences that every step of every worker takes together.
    pub(crate) fn sequences_per_step(&self) -> u64 {
        u64::from(self.workers) * u64::from(self.training.batch_sequences)
    }

    pub(crate) fn total_steps(&self) -> u64 {
        u64::from(self.rounds) * u64::from(self.training.steps_per_round)
    }

    /// Targets that a round learns from, all workers together.
    pub(crate) fn tokens_per_round(&self) -> u64 {
        self.sequences_per_step()
            * u64::from(self.training.steps_per_round)
            * u64::from(self.model.context_length)
    }
}
