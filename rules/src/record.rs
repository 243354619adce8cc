//! What is kept of a round, so that anybody can recompute it: the evidence behind the chain's
//! contributions root. Records form a hash chain that starts at the run's specification.

use std::collections::BTreeMap;
use std::fmt;

use manyhands_proto::message::{
    CommitSet, Distances, Evaluation, Flagged, LossEffect, Merge, SignedCommitment,
};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId, WorkUnits};
use serde::{Deserialize, Serialize};

use crate::assignment::Candidate;
use crate::panel::{Attendee, Judgement};

/// Everything about a round that is not in a blob named by it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundRecord {
    pub run: RunId,
    pub round: Round,
    /// Digest of the record before; of the run's specification for the first.
    pub previous: Digest,
    /// θ_t.
    pub theta: Digest,
    /// θ_{t+1}.
    pub theta_next: Digest,
    /// Where the round starts in the run's sequence order.
    pub first_sequence: u64,
    /// In worker order; assignments follow from them ([`crate::assignment::plan`]).
    pub candidates: Vec<Candidate>,
    /// Whether a verifier was there. Without one nothing is replayed, and the run says so.
    pub verified: bool,
    /// Verifiers that were there before anything was drawn, in the order of their ids: who may judge the round.
    pub attending: Vec<Attendee>,
    /// No worker got more sequences than this, which a verifier repeats in time.
    pub sequences_max: Option<u32>,
    /// In worker order.
    pub commitments: Vec<SignedCommitment>,
    pub commitments_entropy: Option<Entropy>,
    /// What became of each candidate, in worker order.
    pub results: Vec<WorkerResult>,
    /// None if nothing was admitted: θ stays.
    pub merge: Option<Merge>,
    /// Whose updates were worth a closer look when they were merged, in worker order: they are replayed.
    pub flagged: Vec<Flagged>,
    /// Earlier updates whose effect this merge takes back.
    pub revocations: Vec<Revocation>,
    /// Checks that ended since the previous record, of this round or earlier ones.
    pub checks: Vec<Check>,
    /// Verifiers whose replays were found to be made up since the previous record.
    pub false_ends: Vec<FalseEnd>,
    /// Draws made since the previous record, of earlier rounds.
    pub draws: Vec<Draw>,
    /// Held-out losses measured since the previous record.
    pub evaluations: Vec<Evaluation>,
    /// What verifiers found the updates to do to held-out loss, in the order of their ids; none if the run does
    /// not ask for it, or not enough of them answered.
    pub weighings: Vec<Weighed>,
    /// Every account that ever earned, in account order.
    pub earnings: Vec<Earning>,
}

impl RoundRecord {
    /// The results of those whose update was merged.
    pub fn admitted(&self) -> impl Iterator<Item = &WorkerResult> {
        self.results.iter().filter(|result| result.outcome == Outcome::Admitted)
    }

    /// Compact JSON, fields in the order of their declaration.
    pub fn canonical_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain structs with string keys serialise")
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.canonical_bytes())
    }

    /// # Errors
    /// [`ParseRecordError`] unless `bytes` are the canonical form of a record.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseRecordError> {
        let record: Self = serde_json::from_slice(bytes)?;
        if record.canonical_bytes() != bytes {
            return Err(ParseRecordError::NotCanonical);
        }
        Ok(record)
    }

    /// The closed commitments.
    pub fn commit_set(&self) -> CommitSet {
        commit_set(self.round, &self.commitments)
    }

    /// What the first draw is over, as anchored on chain.
    pub fn committed(&self) -> Digest {
        committed(
            self.previous,
            &self.commit_set(),
            (&self.candidates, self.sequences_max),
            &self.attending,
        )
    }

    /// Digest of the updates that were merged, as anchored on chain.
    pub fn admitted_set(&self) -> Digest {
        admitted_set(self.round, &self.results)
    }
}

/// Why bytes are not a record.
#[derive(Debug, thiserror::Error)]
pub enum ParseRecordError {
    #[error("not a round record: {0}")]
    Syntax(#[from] serde_json::Error),
    #[error("not the canonical form of a round record")]
    NotCanonical,
}

pub(crate) fn commit_set(round: Round, commitments: &[SignedCommitment]) -> CommitSet {
    let entries = commitments.iter().map(|signed| (signed.worker, signed.digest())).collect();
    CommitSet { round, entries }
}

/// Digest of the closed commitments, of the machines that had work and how much at most, of the verifiers that may judge it,
/// and of the record before: nobody is added, left out or said to be another machine once the draw is known, and no verdict is moved from one
/// record to another.
pub(crate) fn committed(
    previous: Digest,
    commitments: &CommitSet,
    (candidates, sequences_max): (&[Candidate], Option<u32>),
    attending: &[Attendee],
) -> Digest {
    let who = serde_json::to_vec(&(candidates, sequences_max, attending))
        .expect("plain structs with string keys serialise");
    let material = [&previous.as_bytes()[..], commitments.digest().as_bytes(), &who].concat();
    Digest::derive("manyhands 2026 committed", &material)
}

pub(crate) fn admitted_set(round: Round, results: &[WorkerResult]) -> Digest {
    let mut material = round.0.to_le_bytes().to_vec();
    for result in results.iter().filter(|result| result.outcome == Outcome::Admitted) {
        material.extend_from_slice(result.worker.as_bytes());
    }
    Digest::derive("manyhands 2026 admitted set", &material)
}

/// Randomness that came after what it is used on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entropy {
    pub value: Digest,
    /// The finalised block whose hash it is; none in a run without a chain.
    pub block: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerResult {
    pub worker: NodeId,
    pub outcome: Outcome,
    /// Of this round.
    pub work: WorkUnits,
    pub reward: Balance,
}

/// What became of one worker's round, with the reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "detail")]
pub enum Outcome {
    Admitted,
    /// Uploaded after the deadline: not merged, paid half.
    Late,
    NotCommitted,
    NotUploaded,
    /// The payload is not what the codec can have written.
    Malformed(String),
    /// The opened chunks do not encode to the payload.
    CodecFault(CodecFault),
    /// A replay came out elsewhere.
    ReplayFault(Distances),
    /// Drawn chunks were not opened.
    Withheld(String),
    /// No verifier answered in time. Nobody is blamed.
    Unverified,
    /// Every replay ended somewhere else. Nobody is blamed.
    Irreproducible,
}

/// In words, for log, status, page and refusals alike.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Admitted => f.write_str("merged"),
            Self::Late => f.write_str("came after the deadline"),
            Self::NotCommitted => f.write_str("did not commit"),
            Self::NotUploaded => f.write_str("committed and did not upload"),
            Self::Malformed(reason) => write!(f, "the payload is malformed: {reason}"),
            Self::CodecFault(fault) => {
                write!(f, "the update is not what its states encode to: {}", fault.reason)
            }
            Self::ReplayFault(distances) if distances.delta < 1_000.0 => write!(
                f,
                "a replay differs from what was sent by {:.3} of the update's length",
                distances.delta
            ),
            Self::ReplayFault(_) => f.write_str("the replay came out elsewhere altogether"),
            Self::Withheld(reason) => write!(f, "withheld evidence: {reason}"),
            Self::Unverified => f.write_str("no verdict in time, which is nobody's fault"),
            Self::Irreproducible => {
                f.write_str("every replay of it ended somewhere else, which is nobody's fault")
            }
        }
    }
}

impl Outcome {
    /// What the worker's stake answers for, if for anything.
    pub fn fault(&self) -> Option<FaultKind> {
        match self {
            Self::Malformed(_) => Some(FaultKind::Malformed),
            Self::CodecFault(_) => Some(FaultKind::Codec),
            Self::ReplayFault(_) => Some(FaultKind::Replay),
            Self::NotUploaded | Self::Withheld(_) => Some(FaultKind::Withheld),
            Self::Admitted
            | Self::Late
            | Self::NotCommitted
            | Self::Unverified
            | Self::Irreproducible => None,
        }
    }
}

/// A chunk of an update that does not follow from its worker's states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodecFault {
    pub reason: String,
    /// The blob that shows it ([`crate::update_evidence`]).
    pub evidence: Digest,
}

/// What a worker did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    Malformed,
    Codec,
    Replay,
    /// Committed, and then did not upload, or did not open what was drawn. It may have been misfortune: it costs less,
    /// and the worker is not barred.
    Withheld,
}

impl FaultKind {
    /// Whether the worker may take no further part.
    pub fn bars(self) -> bool {
        match self {
            Self::Malformed | Self::Codec | Self::Replay => true,
            Self::Withheld => false,
        }
    }
}

/// Whether those who showed nothing in a round are held to it: where most did, the trouble is on the coordinator's
/// side.
pub fn hiding_is_held_against(results: &[WorkerResult]) -> bool {
    let committed = results.iter().filter(|it| it.outcome != Outcome::NotCommitted).count();
    let hidden = results.iter().filter(|it| it.outcome.fault() == Some(FaultKind::Withheld));
    2 * hidden.count() <= committed
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Revocation {
    pub round: Round,
    pub worker: NodeId,
}

/// One verifier's measurement of a round's updates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weighed {
    pub verifier: NodeId,
    /// In the order of the workers.
    pub effects: Vec<(NodeId, LossEffect)>,
}

/// Each worker's effect on held-out loss: the (lower) median of what verifiers measured.
pub fn loss_effects(weighings: &[Weighed]) -> BTreeMap<NodeId, LossEffect> {
    let mut measured: BTreeMap<NodeId, Vec<LossEffect>> = BTreeMap::new();
    for &(worker, effect) in weighings.iter().flat_map(|weighed| &weighed.effects) {
        measured.entry(worker).or_default().push(effect);
    }
    let median = |(worker, mut effects): (NodeId, Vec<LossEffect>)| {
        effects.sort_unstable();
        (worker, effects[(effects.len() - 1) / 2])
    };
    measured.into_iter().map(median).collect()
}

/// Who is taken back of which round: one correction for each, in the order of the rounds.
pub fn by_round<'a>(
    revocations: impl IntoIterator<Item = &'a Revocation>,
) -> BTreeMap<Round, Vec<NodeId>> {
    let mut rounds: BTreeMap<Round, Vec<NodeId>> = BTreeMap::new();
    for revocation in revocations {
        rounds.entry(revocation.round).or_default().push(revocation.worker);
    }
    rounds
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    pub round: Round,
    pub worker: NodeId,
    pub finding: Finding,
    /// What verifiers found, in the order in which it came; none for the coordinator's codec check.
    pub judgements: Vec<Judgement>,
}

impl Check {
    /// Whether it is the coordinator's own.
    pub fn is_of_codec(&self) -> bool {
        self.judgements.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "detail")]
pub enum Finding {
    CodecPassed,
    CodecFault(CodecFault),
    ReplayPassed(Distances),
    ReplayFault(Distances),
    Withheld(String),
    /// As many verifiers found against the worker as for it, and no other could be asked.
    Undecided,
    /// Each of at least two verifiers ended somewhere else, and none where the worker did.
    Irreproducible,
}

/// A verifier's replay of a worker's round that did not end where it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FalseEnd {
    pub round: Round,
    pub worker: NodeId,
    pub verifier: NodeId,
}

/// Who of a merged round is replayed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Draw {
    pub round: Round,
    pub entropy: Entropy,
    pub drawn: Vec<NodeId>,
}

/// What an account earned up to a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Earning {
    pub account: NodeId,
    /// Of this round alone.
    pub work: WorkUnits,
    pub cumulative: Balance,
}

#[cfg(test)]
pub(crate) mod tests_support {
    use manyhands_proto::message::{Assignment, DeviceKind, NumericClass, Start};
    use manyhands_proto::run_file::{DataSet, RunFile, RunSpec};
    use manyhands_proto::{Digest, NodeId, Round};

    /// Round 3 of a worker: eight sequences in four steps, from θ and `start`.
    pub(crate) fn assignment(worker: NodeId, theta: Digest, start: Start) -> Assignment {
        Assignment {
            round: Round(3),
            worker,
            theta,
            class: NumericClass::unknown(DeviceKind::Cpu),
            first_sequence: 40,
            sequences: 8,
            steps: 4,
            first_step: 12,
            start,
            left_out: Vec::new(),
            commit_deadline_ms: 1_000,
        }
    }

    /// A tiny run whose deadlines are short.
    pub(crate) fn spec() -> RunSpec {
        let text = r#"
            [run]
            name = "tiny"
            rounds = 3
            workers_min = 2
            [model]
            vocabulary_size = 512
            hidden_size = 32
            layers = 2
            heads = 4
            key_value_heads = 2
            feed_forward_size = 64
            context_length = 32
            [training]
            steps_per_round = 4
            batch_sequences = 4
            micro_batch_sequences = 2
            learning_rate = 1e-3
            [data]
            dataset = "data"
            [verification]
            probation_checks = 1
        "#;
        RunFile::parse(text).expect("a good file").resolve(DataSet {
            manifest: Digest::of(b"manifest"),
            train_sequences: 10_000,
            held_out_sequences: 2,
            theta: Digest::of(b"theta 0"),
            theta_is_given: false,
        })
    }
}
