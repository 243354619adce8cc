//! The messages as domain types: what is left once bytes have been understood.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{EndState, NumericClass, SignedCommitment, SignedReplay};
use crate::{Digest, NodeId, Round, TokenCount};

/// What a peer asks of the coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// The run's specification, before joining.
    Describe,
    Join(Join),
    /// "I am here": how far it is and what it holds. The reply is what to do next.
    Beat(Beat),
    Commit(SignedCommitment),
    Verdict(Verdict),
    Evaluation(Evaluation),
    Weighing(Weighing),
    Leave,
    /// The run's state as JSON, for people and programs.
    Status,
}

/// What the coordinator answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Description {
        /// Canonical bytes of the [`crate::run_file::RunSpec`].
        spec: Vec<u8>,
        round: Round,
    },
    Situation(Situation),
    Refused(Refusal),
    /// JSON.
    Status(Vec<u8>),
}

/// Why a peer was turned away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub code: RefusalCode,
    /// In plain words, with what was expected and what came.
    pub reason: String,
}

macro_rules! coded {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $code:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$variant_doc])* $variant = $code,)* }

        impl $name {
            pub const fn code(self) -> u32 {
                self as u32
            }

            pub const fn of_code(code: u32) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

coded! {
    /// The codes of refusals; the remedy belongs to the code.
    RefusalCode {
        WrongRun = 1,
        VersionMismatch = 2,
        TooLittleMemory = 3,
        StakeTooSmall = 4,
        NotAllowed = 5,
        RunIsFull = 6,
        WrongTheta = 7,
        NotAMember = 8,
        WrongRound = 9,
        NotAssigned = 10,
        AlreadyCommitted = 11,
        TooLate = 12,
        Malformed = 13,
        Replayed = 14,
        RunIsComplete = 15,
        NotYourTask = 16,
        Barred = 17,
        ImplausibleTokens = 18,
        TooSlow = 19,
        NotReady = 20,
        OtherNumerics = 21,
    }
}

impl RefusalCode {
    /// What the refused peer can do about it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::WrongRun => "join with the invitation that this run's launch printed",
            Self::VersionMismatch => "build the version that the coordinator runs",
            Self::TooLittleMemory => "choose a device with more memory or a smaller run",
            Self::StakeTooSmall => "raise the stake with --stake, or fund the account",
            Self::NotAllowed => {
                "the list of a launched run cannot change: ask its owner for another run with the account that `manyhands keys show` prints"
            }
            Self::RunIsFull => "wait for a place, or choose another run",
            Self::WrongTheta => "fetch the current parameters again",
            Self::NotAMember => "join the run first",
            Self::WrongRound | Self::NotAssigned => "wait for the next assignment",
            Self::AlreadyCommitted => "nothing to do: the first commitment counts",
            Self::TooLate => {
                "the round closed; lower the load of this machine or wait for the next"
            }
            Self::Malformed => "report this: the program sent what it should not",
            Self::Replayed => "check that no second program uses this key",
            Self::RunIsComplete => "claim what was earned; the run needs no more work",
            Self::NotYourTask => "wait for a task",
            Self::Barred => {
                "this key cannot work for the run any more; `manyhands status` says why, `manyhands claim` pays what was earned before"
            }
            Self::ImplausibleTokens => "commit the tokens of the assignment",
            Self::OtherNumerics => {
                "this run takes machines of one fingerprint only: `manyhands fingerprint` shows yours, with --deterministic and other --threads too"
            }
            Self::TooSlow => "choose a faster device or a smaller run",
            Self::NotReady => "try again in a moment",
        }
    }
}

coded! {
    Role {
        Worker = 0,
        Verifier = 1,
    }
}

impl Role {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Verifier => "verifier",
        }
    }
}

impl Request {
    /// The round that it is about, and is signed for; 0 if it is about none.
    pub fn round(&self) -> Round {
        match self {
            Self::Commit(signed) => signed.commitment.round,
            Self::Evaluation(evaluation) => evaluation.round,
            Self::Weighing(weighing) => weighing.round,
            Self::Beat(beat) => beat.theta.map_or(Round(0), |theta| theta.round),
            Self::Verdict(verdict) => match &verdict.outcome {
                ReplayOutcome::Replayed(signed) => signed.replayed.round,
                ReplayOutcome::Failed(_) => Round(0),
            },
            Self::Describe | Self::Join(_) | Self::Leave | Self::Status => Round(0),
        }
    }
}

/// The protocol's version: peers of another are refused.
pub const PROTOCOL_VERSION: u32 = 9;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    pub role: Role,
    pub version: u32,
    pub class: NumericClass,
    pub memory_bytes: u64,
    /// Measured on the run's own model.
    pub tokens_per_second: u64,
    /// Where the data plane listens; the coordinator adds where it saw the peer.
    pub addresses: Vec<SocketAddr>,
    /// The rounds whose end state is still on this node's disk, ascending.
    pub head_rounds: Vec<Round>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// The round whose θ this node holds, with the proof of it.
    pub theta: Option<Possession>,
    /// Inner steps of the current assignment that are done.
    pub steps_done: u32,
    /// Takes no more work, and stays only for as long as its evidence may be asked for.
    pub leaving: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Possession {
    pub round: Round,
    pub proof: Digest,
}

impl Possession {
    /// Shows that a node has every byte of θ and did not copy another node's answer: BLAKE3 of
    /// θ's little-endian bytes under a key that depends on round and node.
    pub fn prove(round: Round, node: NodeId, theta_bytes: &[u8]) -> Self {
        let mut material = node.as_bytes().to_vec();
        material.extend_from_slice(&round.0.to_le_bytes());
        let key = Digest::derive("manyhands 2026 possession of theta", &material);
        let proof = Digest::new(*blake3::keyed_hash(key.as_bytes(), theta_bytes).as_bytes());
        Self { round, proof }
    }
}

/// What a worker binds itself to before anybody's update may be seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Commitment {
    pub round: Round,
    /// The first position of the assignment: a round that opened again has others.
    pub first_sequence: u64,
    pub payload: Digest,
    pub payload_bytes: u64,
    /// θ_H, f32 canonical vector.
    pub theta: Digest,
    /// m_H and v_H, rounded to 8 bits, as one blob.
    pub moments: Digest,
    /// e_next, f32 canonical vector.
    pub error: Digest,
    /// [`Assignment::digest`]: what it did the round for.
    pub assignment: Digest,
    pub tokens: TokenCount,
    /// Mean training loss of the round, nats per token; a claim, used for display only.
    pub loss: f32,
}

impl Commitment {
    /// Where the round ended, as it says.
    pub fn end(&self) -> EndState {
        EndState { theta: self.theta, moments: self.moments }
    }
}

/// What a worker starts a round from, beside θ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// Error buffer and moments are zero.
    Fresh,
    /// Moments and error buffer of the worker's last commitment in a CommitSet.
    Head {
        round: Round,
        /// [`SignedCommitment::digest`] of it.
        commitment: Digest,
        /// The values it sent were not merged through no fault of its own: they return to the
        /// error buffer.
        sent_values_returned: bool,
        /// Optimiser steps since the moments were zero.
        adam_step: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    pub round: Round,
    pub worker: NodeId,
    /// Digest of θ_t.
    pub theta: Digest,
    pub class: NumericClass,
    /// Position in the run's sequence order; the worker's samples are the `sequences` from here.
    pub first_sequence: u64,
    /// Training sequences of the whole round, spread over its steps by [`Assignment::step`].
    pub sequences: u32,
    pub steps: u32,
    /// Global inner step of the first one: sets the learning rate.
    pub first_step: u64,
    pub start: Start,
    /// Training sequences, ascending, in whose place the next ones come.
    pub left_out: Vec<u64>,
    /// Milliseconds of the training phase that were left when this was sent.
    pub commit_deadline_ms: u64,
}

impl Assignment {
    /// Positions of inner step `step` (from 0): ⌊j·S/H⌋ to ⌊(j+1)·S/H⌋ of the round's, so that any
    /// number of sequences can be given to a worker and no step differs by more than one.
    pub fn step(&self, step: u32) -> std::ops::Range<u64> {
        let (sequences, steps) = (u64::from(self.sequences), u64::from(self.steps.max(1)));
        let start = u64::from(step) * sequences / steps;
        let end = (u64::from(step) + 1) * sequences / steps;
        self.first_sequence + start..self.first_sequence + end
    }
}

/// Where a blob can be fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub node: NodeId,
    pub addresses: Vec<SocketAddr>,
}

/// The commitments of a round, closed: a later one is void. In worker order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitSet {
    pub round: Round,
    /// Worker and digest of its commitment ([`SignedCommitment::digest`]).
    pub entries: Vec<(NodeId, Digest)>,
}

/// What a member should do now. It is the whole truth each time, so a lost or repeated reply does
/// no harm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Situation {
    pub duty: Duty,
    /// Who may open this node's evidence, beside the coordinator.
    pub verifiers: Vec<NodeId>,
    /// Rounds from this one on may still be checked: what they started from and ended in is kept.
    pub evidence_from: Round,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Duty {
    Gathering {
        workers: u32,
        workers_min: u32,
    },
    Train(Assignment),
    /// The commitments are closed: the payload may be fetched from now on.
    Upload(CommitSet),
    Wait {
        round: Round,
        reason: WaitReason,
    },
    Sync(Sync),
    Tasks(Tasks),
    Complete {
        round: Round,
        theta: Digest,
    },
    Dismissed(Refusal),
}

coded! {
    /// Why there is nothing to do.
    WaitReason {
        /// Others are still training.
        Commitments = 0,
        Uploads = 1,
        Checks = 2,
        Merge = 3,
        /// Others still fetch θ.
        Others = 4,
        /// Joined in the middle of a round: works from the next one.
        NextRound = 5,
        Paused = 6,
        Tasks = 7,
    }
}

/// Get to θ of a round: from θ of the round before by its merge, or whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sync {
    pub round: Round,
    pub theta: Digest,
    pub theta_bytes: u64,
    /// None for θ₀.
    pub merge: Option<Merge>,
    pub sources: Vec<Source>,
}

/// How θ_{t+1} follows from θ_t.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Merge {
    /// What is broadcast: the merged update, compressed.
    pub aggregate: Digest,
    pub aggregate_bytes: u64,
    /// What this broadcast and those before it left out: the next merge begins with it.
    pub residual: Digest,
    /// α.
    pub outer_learning_rate: f32,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Tasks {
    pub replays: Vec<Replay>,
    pub evaluations: Vec<Evaluate>,
    /// What the merge of the open round waits for.
    pub weigh: Option<Weigh>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Replay {
    pub id: u64,
    pub assignment: Assignment,
    /// The commitment whose moments the round started from; none for a fresh start. Where it ended is not said.
    pub head: Option<Commitment>,
    /// Who has the moments.
    pub source: Source,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evaluate {
    pub round: Round,
    pub theta: Digest,
}

/// What each update alone does to held-out loss is to be measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weigh {
    pub round: Round,
    /// θ_t.
    pub theta: Digest,
    /// Payloads, in the order of their workers; the coordinator serves them.
    pub updates: Vec<(NodeId, Digest)>,
}

/// What a verifier measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weighing {
    pub round: Round,
    /// In the order of the workers.
    pub effects: Vec<(NodeId, LossEffect)>,
}

/// A worker whose update is worth a closer look, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flagged {
    pub worker: NodeId,
    pub signal: Signal,
}

/// What is seen of an update in passing. It proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Signal {
    /// It raises held-out loss more than others do.
    RaisesLoss,
    /// Its norm is far above the median worker's.
    Loud,
    /// It holds nothing, where others hold something.
    Nothing,
    /// It points away from the sum of all others.
    AgainstAll,
    /// It is nearly another worker's.
    LikeAnother,
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RaisesLoss => "raises held-out loss",
            Self::Loud => "is far longer than others",
            Self::Nothing => "holds nothing",
            Self::AgainstAll => "points away from all others",
            Self::LikeAnother => "is nearly another worker's",
        })
    }
}

/// What an update alone does to held-out loss: that of θ_t less what it sends, over that of θ_t. In nats per
/// token, in units of 10⁻⁹.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LossEffect(pub i64);

impl LossEffect {
    /// From two losses in nats per token. What is not a number is as bad as can be.
    pub fn between(before: f64, after: f64) -> Self {
        let effect = ((after - before) * 1e9).round_ties_even();
        Self(if effect.is_nan() { i64::MAX } else { effect as i64 })
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The replay task's.
    pub id: u64,
    pub outcome: ReplayOutcome,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ReplayOutcome {
    /// Whoever has both ends compares them: the verifier never sees the worker's.
    Replayed(SignedReplay),
    /// The verifier could not replay; says nothing about the worker.
    Failed(String),
}

/// Relative L2 distances, each a finite number, between what was claimed and what the replay gave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Distances {
    /// Of Δ = θ_t − θ_H.
    pub delta: f64,
    pub first_moment: f64,
    pub second_moment: f64,
}

impl Distances {
    /// Of the same bits.
    pub const NONE: Self = Self { delta: 0.0, first_moment: 0.0, second_moment: 0.0 };
    /// From a replay that led nowhere.
    pub const FARTHEST: Self =
        Self { delta: f64::MAX, first_moment: f64::MAX, second_moment: f64::MAX };
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub round: Round,
    pub theta: Digest,
    /// Held-out loss in nats per token.
    pub loss: f64,
}
