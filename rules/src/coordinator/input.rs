//! What the coordinator's machine is told, and what it wants done.

use std::net::SocketAddr;

use manyhands_proto::message::{
    Distances, Flagged, LossEffect, Merge, Request, Role, SignedReplay, UpdateEvidence, Work,
};
use manyhands_proto::{Balance, Digest, NodeId, Round, TokenCount};
use serde::{Deserialize, Serialize};

use crate::draw::Beacon;
use crate::panel::Case;
use crate::record::{CodecFault, Entropy, FalseEnd, FaultKind, RoundRecord};

/// Everything that can change the machine. Inputs carry digests and findings, never blobs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Input {
    Message {
        from: NodeId,
        nonce: u64,
        request: Request,
        facts: Facts,
    },
    /// A payload was fetched, verified and decoded.
    PayloadArrived {
        round: Round,
        worker: NodeId,
        result: Result<(), String>,
    },
    CodecChecked {
        round: Round,
        worker: NodeId,
        result: CodecResult,
    },
    PossessionChecked {
        round: Round,
        worker: NodeId,
        proof: Digest,
        holds: bool,
    },
    /// Of a replay task.
    Compared {
        id: u64,
        verifier: NodeId,
        result: Compared,
    },
    /// Verifiers' ends of the round with that commitment were compared; these are made up.
    JudgesCompared {
        commitment: Digest,
        liars: Vec<NodeId>,
    },
    /// The chain has decided on a verifier.
    VerifierSettled {
        end: FalseEnd,
        slashed: Balance,
    },
    Merged {
        round: Round,
        result: MergeResult,
    },
    /// A set was anchored, and randomness later than that is known.
    Entropy {
        round: Round,
        stage: Stage,
        entropy: Entropy,
    },
    /// The stakes of a round's members were looked up; these have too little, or are leaving.
    StakesChecked {
        round: Round,
        gone: Vec<NodeId>,
    },
    /// The chain has taken the round's record.
    Settled {
        round: Round,
    },
    /// A fault was reported and carried through on the chain.
    FaultSettled {
        round: Round,
        worker: NodeId,
        slashed: Balance,
    },
    /// The final θ is on the chain.
    RunCompleted,
    /// A deadline that [`super::Coordinator::poll_timeout`] named has passed.
    Timeout,
}

/// What the shell looked up for a request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// What the chain holds for the sender as stake or bond.
    pub stake: Balance,
    /// Where the sender was seen.
    pub observed: Vec<SocketAddr>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum CodecResult {
    Passed,
    /// The opened chunks do not encode to the payload.
    Fault(CodecFault),
    /// The worker opened something else than it committed to.
    Withheld(String),
}

/// What came of comparing where a verifier ended with where the worker says it did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Compared {
    Distances {
        distances: Distances,
        /// The blob that they follow from; none if both ends are the same.
        evidence: Option<Digest>,
        /// Of those that found a fault before, whose ends are near this one.
        near: Vec<NodeId>,
    },
    /// The worker did not open its end, or opened something else.
    Withheld(String),
    /// The verifier did not.
    Unopened(String),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MergeResult {
    pub merge: Merge,
    /// θ_{t+1}.
    pub theta: Digest,
    /// Whose updates are worth a closer look ([`manyhands_gradient::Merged`]).
    pub flagged: Vec<Flagged>,
}

/// The two moments of a round that are anchored on chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Commitments,
    Admitted,
}

/// What the machine wants done. It is read off the state, so it is wanted until the input that
/// answers it has come, also after a restart; doing it twice must do no harm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Effect {
    /// Answered by [`Input::PayloadArrived`]; tried until it is no longer wanted.
    FetchPayload {
        round: Round,
        worker: NodeId,
        payload: Digest,
        payload_bytes: u64,
    },
    CheckCodec(CodecCheck),
    CheckPossession {
        round: Round,
        worker: NodeId,
        theta: Digest,
        proof: Digest,
    },
    /// Answered by [`Input::Compared`], in a time that the shell bounds.
    Compare(Comparison),
    /// Answered by [`Input::JudgesCompared`].
    CompareJudges(Case),
    /// Answered by [`Input::VerifierSettled`]. Everybody may see the case.
    ReportVerifier {
        end: FalseEnd,
        case: Box<Case>,
    },
    Merge(MergeOrder),
    /// Look up on chain whether these still have what they put down.
    CheckStakes {
        round: Round,
        members: Vec<(NodeId, Role)>,
    },
    /// Anchor `digest`, and answer with entropy that is later.
    Anchor {
        round: Round,
        stage: Stage,
        digest: Digest,
    },
    Settle(Box<RoundRecord>),
    ReportFault {
        round: Round,
        worker: NodeId,
        kind: FaultKind,
        /// A blob that everybody may see.
        evidence: Digest,
        /// What the blob is made of, unless it is there.
        shown: Option<Shown>,
    },
    CompleteRun {
        theta: Digest,
    },
}

/// What an accusation follows from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Shown {
    /// What verifiers found.
    Case(Box<Case>),
    /// What a worker stands for: it is in what it did with it, or did not do.
    Work(Box<Work>),
}

impl Shown {
    /// The blob that everybody is shown.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Case(case) => case.canonical_bytes(),
            Self::Work(work) => UpdateEvidence { work: (**work).clone(), opened: None }.to_bytes(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CodecCheck {
    pub round: Round,
    pub worker: NodeId,
    pub beacon: Beacon,
    pub work: Work,
}

/// Where a worker says its round ended, and where a verifier ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The replay task's.
    pub id: u64,
    /// What others found before.
    pub case: Case,
    pub replay: SignedReplay,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MergeOrder {
    pub round: Round,
    /// θ_t.
    pub theta: Digest,
    /// What earlier broadcasts left out; none before the first, when it is all zeros.
    pub residual: Option<Digest>,
    /// In worker order; not empty unless there are revocations.
    pub contributions: Vec<Contribution>,
    pub revocations: Vec<RevocationOrder>,
    /// α of this round.
    pub outer_learning_rate: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Contribution {
    pub worker: NodeId,
    pub payload: Digest,
    pub tokens: TokenCount,
    /// If it was measured.
    pub loss_effect: Option<LossEffect>,
}

/// Everything needed to take back workers' parts in an earlier merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RevocationOrder {
    pub round: Round,
    /// Whose parts are taken back now.
    pub workers: Vec<NodeId>,
    /// Whose parts other merges took back.
    pub earlier: Vec<NodeId>,
    /// Of that round, all that were merged.
    pub contributions: Vec<Contribution>,
    /// α of that round.
    pub outer_learning_rate: f32,
}
