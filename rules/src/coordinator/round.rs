//! The round that is open: who trains what, what came in, and why it may not close yet.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_proto::message::{Assignment, CommitSet, Role, SignedCommitment, WaitReason, Work};
use manyhands_proto::{Digest, NodeId, Round, Tick};
use serde::{Deserialize, Serialize};

use super::input::CodecResult;
use super::membership::Head;
use super::weighing::Measurement;
use crate::assignment::Candidate;
use crate::panel::Attendee;
use crate::record::{Check, Entropy, Finding, Outcome, commit_set};

/// Where a round stands. A deadline is when the phase ends whoever is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Phase {
    /// Members fetch θ_t and prove that they hold it.
    Gathering {
        deadline: Tick,
    },
    Training {
        deadline: Tick,
    },
    Uploading {
        deadline: Tick,
    },
    /// The deadline runs from when the draw is known.
    Checking {
        deadline: Option<Tick>,
    },
    Merging,
    /// All rounds are merged; audits, evaluations and settlement come to their end.
    Finishing {
        deadline: Tick,
    },
    Complete,
}

impl Phase {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gathering { .. } => "gathering",
            Self::Training { .. } => "training",
            Self::Uploading { .. } => "uploading",
            Self::Checking { .. } => "checking",
            Self::Merging => "merging",
            Self::Finishing { .. } => "finishing",
            Self::Complete => "complete",
        }
    }

    pub(super) const fn deadline(self) -> Option<Tick> {
        match self {
            Self::Gathering { deadline }
            | Self::Training { deadline }
            | Self::Uploading { deadline }
            | Self::Finishing { deadline } => Some(deadline),
            Self::Checking { deadline } => deadline,
            Self::Merging | Self::Complete => None,
        }
    }

    /// What a member without a duty waits for.
    pub(super) const fn wait_reason(self) -> WaitReason {
        match self {
            Self::Gathering { .. } => WaitReason::Others,
            Self::Training { .. } => WaitReason::Commitments,
            Self::Uploading { .. } => WaitReason::Uploads,
            Self::Checking { .. } => WaitReason::Checks,
            Self::Merging => WaitReason::Merge,
            Self::Finishing { .. } | Self::Complete => WaitReason::Tasks,
        }
    }
}

/// A payload that was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Upload {
    InTime,
    Late,
    Malformed(String),
}

/// One round, from its opening until its record is settled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct OpenRound {
    pub(super) number: Round,
    /// θ_t.
    pub(super) theta: Digest,
    /// What the broadcasts that led here left out; none before the first.
    pub(super) residual: Option<Digest>,
    pub(super) first_sequence: u64,
    pub(super) phase: Phase,
    pub(super) phase_since: Tick,
    pub(super) opened_at: Tick,
    /// Workers that the round had when it opened before, and that it opens again with.
    pub(super) awaited: usize,
    /// How long the training phase took.
    pub(super) train_ms: u64,
    pub(super) candidates: Vec<Candidate>,
    /// No worker got more, as verifiers could not repeat it in time.
    pub(super) sequences_max: Option<u32>,
    pub(super) verified: bool,
    pub(super) assignments: BTreeMap<NodeId, Assignment>,
    /// The heads that the assignments start from.
    pub(super) heads: BTreeMap<NodeId, Head>,
    /// Workers that start from nothing after it, whatever they commit to.
    pub(super) afresh: BTreeSet<NodeId>,
    /// Workers that lost the state that their assignment starts from: nobody waits for them.
    pub(super) excused: BTreeSet<NodeId>,
    pub(super) commitments: BTreeMap<NodeId, SignedCommitment>,
    /// Milliseconds into the training phase.
    pub(super) committed_ms: BTreeMap<NodeId, u64>,
    pub(super) uploads: BTreeMap<NodeId, Upload>,
    pub(super) codec: BTreeMap<NodeId, CodecResult>,
    /// Results of replays before the merge: none if it passed.
    pub(super) replayed: BTreeMap<NodeId, Option<Outcome>>,
    /// Workers whose update waits for a replay.
    pub(super) probation: Vec<NodeId>,
    /// Those whose replay has been asked for.
    pub(super) replay_asked: BTreeSet<NodeId>,
    /// Verifiers that were there when the commitments were closed, before anything was drawn, or if none was, when
    /// the round opened; in the order of their ids.
    pub(super) attending: Vec<Attendee>,
    /// What the updates do to held-out loss; none before it is asked for.
    pub(super) measurement: Option<Measurement>,
    pub(super) commitments_entropy: Option<Entropy>,
    /// Members whose stake is still to be looked up in this round.
    pub(super) stakes_unchecked: Vec<(NodeId, Role)>,
}

/// What a round starts from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parameters {
    pub(super) theta: Digest,
    pub(super) residual: Option<Digest>,
}

impl OpenRound {
    pub(super) fn new(
        number: Round,
        Parameters { theta, residual }: Parameters,
        first_sequence: u64,
        now: Tick,
        deadline: Tick,
    ) -> Self {
        Self {
            number,
            theta,
            residual,
            first_sequence,
            phase: Phase::Gathering { deadline },
            phase_since: now,
            opened_at: now,
            awaited: 0,
            train_ms: 0,
            candidates: Vec::new(),
            sequences_max: None,
            verified: false,
            assignments: BTreeMap::new(),
            heads: BTreeMap::new(),
            afresh: BTreeSet::new(),
            excused: BTreeSet::new(),
            commitments: BTreeMap::new(),
            committed_ms: BTreeMap::new(),
            uploads: BTreeMap::new(),
            codec: BTreeMap::new(),
            replayed: BTreeMap::new(),
            probation: Vec::new(),
            replay_asked: BTreeSet::new(),
            attending: Vec::new(),
            measurement: None,
            commitments_entropy: None,
            stakes_unchecked: Vec::new(),
        }
    }

    pub(super) fn parameters(&self) -> Parameters {
        Parameters { theta: self.theta, residual: self.residual }
    }

    pub(super) fn enter(&mut self, phase: Phase, now: Tick) {
        if matches!(self.phase, Phase::Training { .. }) {
            self.train_ms = now.since(self.phase_since);
        }
        self.phase = phase;
        self.phase_since = now;
    }

    /// From the first commitment to the end of the training phase.
    pub(super) fn waiting_ms_max(&self) -> u64 {
        let first = self.committed_ms.values().min();
        first.map_or(0, |first| self.train_ms.saturating_sub(*first))
    }

    pub(super) fn commit_set(&self) -> CommitSet {
        let commitments: Vec<_> = self.commitments.values().cloned().collect();
        commit_set(self.number, &commitments)
    }

    /// Committed workers whose payload has neither come nor been refused.
    pub(super) fn uploads_missing(&self) -> impl Iterator<Item = (NodeId, &SignedCommitment)> {
        self.commitments
            .iter()
            .filter(|(worker, _)| !self.uploads.contains_key(worker))
            .map(|(&worker, commitment)| (worker, commitment))
    }

    /// Workers whose payload is here and well-formed.
    pub(super) fn uploaded(&self) -> impl Iterator<Item = NodeId> {
        self.uploads
            .iter()
            .filter(|(_, upload)| !matches!(upload, Upload::Malformed(_)))
            .map(|(&worker, _)| worker)
    }

    pub(super) fn codec_missing(&self) -> impl Iterator<Item = NodeId> {
        self.uploaded().filter(|worker| !self.codec.contains_key(worker))
    }

    /// Whether every check that the merge waits for has ended.
    pub(super) fn is_checked(&self) -> bool {
        self.codec_missing().next().is_none()
            && self
                .uploaded()
                .filter(|worker| self.probation.contains(worker))
                .filter(|worker| self.codec.get(worker) == Some(&CodecResult::Passed))
                .all(|worker| self.replayed.contains_key(&worker))
    }

    /// What became of `worker`, from all that is known when the checks end.
    pub(super) fn outcome(&self, worker: NodeId) -> Outcome {
        if !self.commitments.contains_key(&worker) {
            return Outcome::NotCommitted;
        }
        let late = match self.uploads.get(&worker) {
            None => return Outcome::NotUploaded,
            Some(Upload::Malformed(reason)) => return Outcome::Malformed(reason.clone()),
            Some(Upload::Late) => true,
            Some(Upload::InTime) => false,
        };
        match self.codec.get(&worker) {
            None => return Outcome::Withheld("did not open the drawn chunks in time".to_owned()),
            Some(CodecResult::Fault(fault)) => return Outcome::CodecFault(fault.clone()),
            Some(CodecResult::Withheld(reason)) => return Outcome::Withheld(reason.clone()),
            Some(CodecResult::Passed) => {}
        }
        match self.replayed.get(&worker) {
            Some(Some(outcome)) => outcome.clone(),
            None if self.probation.contains(&worker) => Outcome::Unverified,
            Some(None) | None if late => Outcome::Late,
            Some(None) | None => Outcome::Admitted,
        }
    }

    /// What a worker stands for in this round, if it has committed.
    pub(super) fn work(&self, worker: NodeId) -> Option<Work> {
        Some(Work {
            commitment: self.commitments.get(&worker)?.clone(),
            assignment: self.assignments.get(&worker)?.clone(),
            head: self.heads.get(&worker).map(|head| head.signed.commitment.clone()),
        })
    }

    /// The updates that a fault of a worker's is in: its own, and the one that returns to its error buffer.
    pub(super) fn payloads(&self, worker: NodeId) -> Vec<Digest> {
        let Some(work) = self.work(worker) else { return Vec::new() };
        let own = work.commitment.commitment.payload;
        [own].into_iter().chain(work.returned_payload()).collect()
    }

    /// What faults of updates follow from.
    pub(super) fn evidence(&self) -> impl Iterator<Item = Digest> {
        self.codec.values().filter_map(|result| match result {
            CodecResult::Fault(fault) => Some(fault.evidence),
            CodecResult::Passed | CodecResult::Withheld(_) => None,
        })
    }

    pub(super) fn codec_checks(&self) -> impl Iterator<Item = Check> {
        self.codec.iter().map(|(&worker, result)| Check {
            round: self.number,
            worker,
            judgements: Vec::new(),
            finding: match result {
                CodecResult::Passed => Finding::CodecPassed,
                CodecResult::Fault(fault) => Finding::CodecFault(fault.clone()),
                CodecResult::Withheld(reason) => Finding::Withheld(reason.clone()),
            },
        })
    }
}
