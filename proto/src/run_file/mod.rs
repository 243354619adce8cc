//! The run's file: everything that all parties must agree on, as its owner writes it ([`RunFile`],
//! TOML) and as it is hashed and signed ([`RunSpec`], canonical JSON, the data set by digest).
//!
//! What is a node's own affair (device, ports, folders, chain endpoint) is not in here.

mod check;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use check::{RunFileError, RunFileProblem};

use crate::{Balance, Digest};

/// A run as its owner writes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    pub run: Run,
    pub model: Architecture,
    pub training: Training,
    pub data: DataSource,
    #[serde(default)]
    pub codec: Codec,
    #[serde(default)]
    pub aggregation: Aggregation,
    #[serde(default)]
    pub round: RoundTimes,
    #[serde(default)]
    pub verification: Verification,
    #[serde(default)]
    pub chain: Chain,
}

/// A run as all parties agree on it. Its canonical form is [`RunSpec::canonical_bytes`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    pub run: Run,
    pub model: Architecture,
    pub training: Training,
    pub data: DataSet,
    pub codec: Codec,
    pub aggregation: Aggregation,
    pub round: RoundTimes,
    pub verification: Verification,
    pub chain: Chain,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// For people; letters, digits, `-` and `_`.
    pub name: String,
    /// Everything random in the run follows from it.
    #[serde(default)]
    pub seed: u64,
    /// Rounds until the run is complete.
    pub rounds: u32,
    /// The first round waits for this many workers.
    #[serde(default = "default::workers_min")]
    pub workers_min: u32,
    /// Further workers are refused.
    #[serde(default = "default::workers_max")]
    pub workers_max: u32,
    /// Only these nodes may take part, as workers or verifiers; empty: anybody.
    #[serde(default)]
    pub allow: Vec<crate::NodeId>,
    /// Payloads, openings and verdicts of this many rounds are kept.
    #[serde(default = "default::evidence_rounds")]
    pub evidence_rounds: u32,
}

/// A Llama-architecture decoder. Head size is `hidden_size / heads`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    pub vocabulary_size: u32,
    pub hidden_size: u32,
    pub layers: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub key_value_heads: u32,
    pub feed_forward_size: u32,
    /// Tokens of one training sequence.
    pub context_length: u32,
    #[serde(default = "default::rope_theta")]
    pub rope_theta: f64,
    #[serde(default = "default::norm_epsilon")]
    pub norm_epsilon: f64,
    /// Whether the output projection is the embedding.
    #[serde(default = "default::tie_embeddings")]
    pub tie_embeddings: bool,
}

/// Number format of the forward and backward pass; master weights are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    F32,
    Bf16,
}

/// The inner optimiser: AdamW, linear warm-up, cosine decay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Inner steps between two merges (H).
    pub steps_per_round: u32,
    /// Sequences of one step, per worker on average; each gets a share by its measured speed.
    pub batch_sequences: u32,
    /// Sequences of one forward and backward pass; a step accumulates as many passes as it takes.
    pub micro_batch_sequences: u32,
    pub learning_rate: f64,
    #[serde(default)]
    pub warmup_steps: u32,
    /// Inner steps until the rate has decayed to `learning_rate_final_share`; 0: the whole run.
    #[serde(default)]
    pub decay_steps: u32,
    #[serde(default = "default::learning_rate_final_share")]
    pub learning_rate_final_share: f64,
    #[serde(default = "default::beta1")]
    pub beta1: f64,
    #[serde(default = "default::beta2")]
    pub beta2: f64,
    #[serde(default = "default::epsilon")]
    pub epsilon: f64,
    #[serde(default = "default::weight_decay")]
    pub weight_decay: f64,
    /// Largest Euclidean norm of the whole gradient.
    #[serde(default = "default::gradient_clip")]
    pub gradient_clip: f64,
    #[serde(default = "default::precision")]
    pub precision: Precision,
}

/// Where the owner has the data; resolved to a [`DataSet`] at launch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSource {
    /// A folder that `manyhands prepare` wrote; relative to the run file.
    pub dataset: PathBuf,
    /// A Hugging Face folder whose weights the run starts from; relative to the run file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_from: Option<PathBuf>,
    /// Held-out sequences that an evaluation reads.
    #[serde(default = "default::held_out_sequences")]
    pub held_out_sequences: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSet {
    /// Digest of the data set's manifest.
    pub manifest: Digest,
    /// Training sequences of `context_length` tokens that it holds.
    pub train_sequences: u64,
    /// Held-out sequences that an evaluation reads.
    pub held_out_sequences: u32,
    /// Digest of θ₀ as a canonical vector.
    pub theta: Digest,
    /// Whether θ₀ must be fetched, as it does not follow from `run.seed`.
    pub theta_is_given: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// The 64 largest of 4,096 values, by their signs.
    Standard,
    /// The 128 largest of 4,096 values, by their signs.
    Quality,
    /// The 320 largest of 4,096 values, by their signs.
    Wide,
    /// Every value as an f16, for comparison.
    DenseFp16,
    /// Every value as 8 bits with a scale for each chunk, for comparison.
    DenseInt8,
    /// The published wire of SparseLoCo, for comparison: no chunk of it can be checked alone.
    Flat12,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Codec {
    #[serde(default = "default::profile")]
    pub profile: Profile,
    /// β: what of the error buffer is carried into the next round.
    #[serde(default = "default::error_decay")]
    pub error_decay: f32,
}

/// What the weighted sum of updates is divided by, for each parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Denominator {
    /// The weights of those who sent the parameter, or the mean worker's weight if that is more.
    Contributors,
    /// The same, but at least twice the mean weight and twice the heaviest of theirs.
    Floor,
    /// The weights of all.
    Workers,
}

/// What holds a worker's update back when it is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Nothing.
    Mean,
    /// Each tensor's norm is clipped to that of the (lower) median worker.
    MedianNorm,
    /// Weights of the geometric median of all updates.
    GeometricMedian,
    /// Clipped to the median distance from the middle of all updates.
    CenteredClip,
    /// As far as the update points where the others' do.
    CosineTrust,
    /// Nothing of an update that raises held-out loss far more than the median worker's does.
    LossGate,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Aggregation {
    #[serde(default = "default::denominator")]
    pub denominator: Denominator,
    /// Each gives every worker a factor, and the factors are multiplied; none: the plain mean.
    #[serde(default = "default::rules")]
    pub rules: Vec<Rule>,
    /// How the merged update is compressed for everybody to fetch.
    #[serde(default = "default::broadcast")]
    pub broadcast: Profile,
    /// α of the first round.
    #[serde(default = "default::outer_learning_rate")]
    pub outer_learning_rate: f32,
    /// α of the last round; between them it changes linearly.
    #[serde(default = "default::outer_learning_rate_final")]
    pub outer_learning_rate_final: f32,
}

/// Deadlines, from the moment a phase begins. A phase ends earlier when everybody has answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WrittenTimes")]
pub struct RoundTimes {
    /// Training and commitment: the run's clock, of which the other phases are shares where they are not said. Nobody is
    /// given more than half of it can hold at its speed.
    pub commit_ms: u64,
    pub upload_ms: u64,
    /// Codec checks, and replays before the merge.
    pub check_ms: u64,
    /// Fetching the aggregate and proving θ.
    pub sync_ms: u64,
    /// A worker that was silent for so long is gone until it returns.
    pub silence_ms: u64,
}

/// No deadline is shorter.
const SHARE_MS_MIN: u64 = 100;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenTimes {
    #[serde(default = "default::commit_ms")]
    commit_ms: u64,
    upload_ms: Option<u64>,
    check_ms: Option<u64>,
    sync_ms: Option<u64>,
    #[serde(default = "default::silence_ms")]
    silence_ms: u64,
}

impl From<WrittenTimes> for RoundTimes {
    fn from(written: WrittenTimes) -> Self {
        let WrittenTimes { commit_ms, upload_ms, check_ms, sync_ms, silence_ms } = written;
        Self {
            commit_ms,
            upload_ms: upload_ms.unwrap_or((commit_ms / 3).max(SHARE_MS_MIN)),
            // A replay is as much work as what it repeats.
            check_ms: check_ms.unwrap_or(commit_ms),
            sync_ms: sync_ms.unwrap_or((commit_ms / 2).max(SHARE_MS_MIN)),
            silence_ms,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verification {
    /// The first round waits for this many verifiers. Without one nothing is replayed.
    #[serde(default)]
    pub verifiers_min: u32,
    /// q₀: audits of a worker without credibility, in thousandths of its rounds.
    #[serde(default = "default::audit_rate_per_mille")]
    pub audit_rate_per_mille: u32,
    /// A new worker is replayed before the merge until it passed so many checks.
    #[serde(default = "default::probation_checks")]
    pub probation_checks: u32,
    /// Of replays that passed, how many a second verifier looks over, in thousandths.
    #[serde(default = "default::recheck_per_mille")]
    pub recheck_per_mille: u32,
    /// Chunks of each update that the coordinator recomputes.
    #[serde(default = "default::codec_chunks")]
    pub codec_chunks: u32,
    /// Chunks that a replay compares.
    #[serde(default = "default::replay_chunks")]
    pub replay_chunks: u32,
    /// Largest relative L2 distance of a Δ that was replayed on a device of another kind.
    #[serde(default = "default::delta_distance_max")]
    pub delta_distance_max: f64,
    /// And on one of the same kind.
    #[serde(default = "default::same_kind_delta_distance_max")]
    pub same_kind_delta_distance_max: f64,
    /// Largest relative L2 distance of the first moments.
    #[serde(default = "default::moment_distance_max")]
    pub first_moment_distance_max: f64,
    /// Largest relative L2 distance of the second moments.
    #[serde(default = "default::moment_distance_max")]
    pub second_moment_distance_max: f64,
    /// Only machines on which the run's own model comes to just these bits take part: digests are compared, and no distance
    /// is allowed. None: any machine, by the distances above.
    pub fingerprint: Option<Digest>,
    /// Evaluate held-out loss after every so many rounds.
    #[serde(default = "default::evaluate_every_rounds")]
    pub evaluate_every_rounds: u32,
    /// The run may be launched although cheating pays.
    #[serde(default)]
    pub cheating_may_pay: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChainKind {
    /// Contributions are signed and chained in the journal, and settled on no chain.
    None,
    Substrate,
}

/// Terms that the chain enforces. Amounts are in the chain's smallest unit, windows in blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chain {
    #[serde(default = "default::chain_kind")]
    pub kind: ChainKind,
    /// Reward for one work unit (10⁶ floating-point operations of verified training).
    #[serde(default = "default::price_per_work_unit")]
    pub price_per_work_unit: Balance,
    /// Escrow that launch locks.
    #[serde(default = "default::budget")]
    pub budget: Balance,
    #[serde(default = "default::stake_min")]
    pub stake_min: Balance,
    #[serde(default = "default::bond")]
    pub coordinator_bond: Balance,
    #[serde(default = "default::bond")]
    pub verifier_bond: Balance,
    /// What a fault takes of the stake, in thousandths.
    #[serde(default = "default::slash_per_mille")]
    pub slash_per_mille: u32,
    /// What it takes to have committed and then not uploaded, or not opened what was drawn.
    #[serde(default = "default::withheld_slash_per_mille")]
    pub withheld_slash_per_mille: u32,
    /// What verifiers that found the accused guilty share of the slash, in thousandths; the rest goes to the escrow.
    #[serde(default = "default::reporter_share_per_mille")]
    pub reporter_share_per_mille: u32,
    /// Rounds until a reward can be claimed.
    #[serde(default = "default::vesting_rounds")]
    pub vesting_rounds: u32,
    #[serde(default = "default::window_blocks")]
    pub challenge_window_blocks: u32,
    #[serde(default = "default::window_blocks")]
    pub contest_window_blocks: u32,
    /// Votes of verifiers that a side needs to decide about an accusation.
    #[serde(default = "default::fault_quorum")]
    pub fault_quorum: u32,
}

impl RunFile {
    /// # Errors
    /// [`RunFileError`] names each problem with its line, field and remedy.
    pub fn parse(text: &str) -> Result<Self, RunFileError> {
        check::parse(text)
    }

    /// The run as all parties will agree on it.
    pub fn resolve(self, data: DataSet) -> RunSpec {
        RunSpec {
            run: self.run,
            model: self.model,
            training: self.training,
            data,
            codec: self.codec,
            aggregation: self.aggregation,
            round: self.round,
            verification: self.verification,
            chain: self.chain,
        }
    }
}

/// Why a received run specification was refused.
#[derive(Debug, thiserror::Error)]
pub enum RunSpecError {
    #[error("a run specification has at most {RUN_SPEC_BYTES_MAX} bytes, got {0}")]
    TooLong(usize),
    #[error("not a run specification: {0}")]
    Syntax(#[from] serde_json::Error),
    #[error("not the canonical form of a run specification")]
    NotCanonical,
    #[error("contradictory run specification: {0}")]
    Contradiction(String),
}

const RUN_SPEC_BYTES_MAX: usize = 1 << 20;

impl RunSpec {
    /// Compact JSON, fields in the order of their declaration.
    pub fn canonical_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain structs with string keys serialise")
    }

    /// The run's config digest, as anchored on chain.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.canonical_bytes())
    }

    /// # Errors
    /// [`RunSpecError`] unless `bytes` are the canonical form of a consistent specification.
    pub fn parse(bytes: &[u8]) -> Result<Self, RunSpecError> {
        if bytes.len() > RUN_SPEC_BYTES_MAX {
            return Err(RunSpecError::TooLong(bytes.len()));
        }
        let spec: Self = serde_json::from_slice(bytes)?;
        if spec.canonical_bytes() != bytes {
            return Err(RunSpecError::NotCanonical);
        }
        if let Some(problem) = check::contradictions_of_spec(&spec).into_iter().next() {
            return Err(RunSpecError::Contradiction(problem.to_string()));
        }
        Ok(spec)
    }

    /// Inner steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        u64::from(self.run.rounds) * u64::from(self.training.steps_per_round)
    }
}

macro_rules! default_from_empty {
    ($($section:ident),*) => {
        $(impl Default for $section {
            fn default() -> Self {
                toml::from_str("").expect(concat!(stringify!($section), " has a default for each field"))
            }
        })*
    };
}
default_from_empty!(Codec, Aggregation, RoundTimes, Verification, Chain);

/// Defaults, each with its reason.
mod default {
    use super::{ChainKind, Denominator, Precision, Profile, Rule};
    use crate::Balance;

    macro_rules! defaults {
        ($($(#[$doc:meta])* $name:ident: $kind:ty = $value:expr;)*) => {
            $($(#[$doc])* pub(super) fn $name() -> $kind { $value })*
        };
    }

    const TOKEN: u128 = 1_000_000_000_000;

    defaults! {
        workers_min: u32 = 1;
        workers_max: u32 = 256;
        // Longer than vesting at the floor of the audit rate (20 rounds), so a fault can be shown.
        evidence_rounds: u32 = 32;
        rope_theta: f64 = 10_000.0;
        norm_epsilon: f64 = 1e-5;
        tie_embeddings: bool = true;
        learning_rate_final_share: f64 = 0.1;
        beta1: f64 = 0.9;
        beta2: f64 = 0.95;
        epsilon: f64 = 1e-8;
        weight_decay: f64 = 0.1;
        gradient_clip: f64 = 1.0;
        precision: Precision = Precision::F32;
        held_out_sequences: u32 = 64;
        profile: Profile = Profile::Standard;
        broadcast: Profile = Profile::Wide;
        error_decay: f32 = 0.9;
        denominator: Denominator = Denominator::Contributors;
        rules: Vec<Rule> = vec![Rule::MedianNorm, Rule::CosineTrust, Rule::LossGate];
        outer_learning_rate: f32 = 1.0;
        outer_learning_rate_final: f32 = 1.0;
        commit_ms: u64 = 120_000;
        silence_ms: u64 = 30_000;
        audit_rate_per_mille: u32 = 100;
        probation_checks: u32 = 5;
        recheck_per_mille: u32 = 50;
        codec_chunks: u32 = 16;
        replay_chunks: u32 = 256;
        // Honest f32 replays came out up to 2.5e-4 apart between a CPU and a GPU; one replaced batch of a hundred
        // gives .066.
        delta_distance_max: f64 = 1e-3;
        // In another summation order they stay below 1.4e-5 on CPUs; bf16 in the place of f32 gives 9e-4 and more.
        same_kind_delta_distance_max: f64 = 1e-4;
        // Moments travel as 8 bits: an honest value on the edge of two codes can fall either way.
        moment_distance_max: f64 = 2e-2;
        evaluate_every_rounds: u32 = 1;
        chain_kind: ChainKind = ChainKind::Substrate;
        price_per_work_unit: Balance = Balance(TOKEN / 1_000_000);
        budget: Balance = Balance(10_000 * TOKEN);
        stake_min: Balance = Balance(100 * TOKEN);
        bond: Balance = Balance(100 * TOKEN);
        slash_per_mille: u32 = 500;
        // As much as a fault: a cheat that is drawn would choose what costs it less. A machine that dies at the wrong
        // moment loses it too.
        withheld_slash_per_mille: u32 = 500;
        reporter_share_per_mille: u32 = 200;
        // One over the floor of the default audit rate.
        vesting_rounds: u32 = 20;
        window_blocks: u32 = 20;
        fault_quorum: u32 = 2;
    }
}
