//! What the owner of a run accuses its workers and verifiers of, and what they and others answer.

use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Digest, NodeId, Round, RunId};
use serde::Serialize;

use crate::calls::call;
use crate::client::{ChainClient, ReadError};
use crate::signer::account;
use crate::state::ChainState;
use crate::submit::{Submission, SubmitError};
use crate::types::{Convert, Fault, FaultKind, FaultState, Finding, VerifierFault, Votes};

/// Who is accused of what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case", tag = "accused")]
pub enum Accusation {
    Worker {
        worker: NodeId,
        round: Round,
        kind: FaultKind,
    },
    /// That its replay of that worker's round did not end where it says.
    Verifier {
        verifier: NodeId,
        worker: NodeId,
        round: Round,
    },
}

impl Accusation {
    /// The accused.
    pub fn node(&self) -> NodeId {
        match *self {
            Self::Worker { worker, .. } => worker,
            Self::Verifier { verifier, .. } => verifier,
        }
    }

    pub fn round(&self) -> Round {
        match *self {
            Self::Worker { round, .. } | Self::Verifier { round, .. } => round,
        }
    }
}

/// An accusation as the chain has it. Blocks are block numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dispute {
    pub accusation: Accusation,
    pub evidence_digest: Digest,
    pub votes: Votes,
    pub reported_at: u32,
    pub state: FaultState,
}

impl Dispute {
    fn of_worker(worker: NodeId, round: Round, fault: Fault) -> Self {
        let Fault { kind, evidence_digest, votes, reported_at, state, .. } = fault;
        let accusation = Accusation::Worker { worker, round, kind };
        Self { accusation, evidence_digest, votes, reported_at, state }
    }

    fn of_verifier(
        (verifier, worker, round): (NodeId, NodeId, Round),
        fault: VerifierFault,
    ) -> Self {
        let VerifierFault { evidence_digest, votes, reported_at, state, .. } = fault;
        let accusation = Accusation::Verifier { verifier, worker, round };
        Self { accusation, evidence_digest, votes, reported_at, state }
    }

    /// The block from which on anybody may have it decided; none if it is.
    pub fn decided_from(&self) -> Option<u32> {
        match self.state {
            FaultState::Reported { executable_at: at }
            | FaultState::Contested { resolves_at: at, .. } => Some(at),
            FaultState::Executed { .. } | FaultState::Dismissed => None,
        }
    }

    pub fn is_contested(&self) -> bool {
        matches!(self.state, FaultState::Contested { .. })
    }
}

impl ChainState {
    /// What came of an accusation; none if it was never made.
    ///
    /// # Errors
    /// A node that does not answer, or whose answer is not what its metadata says.
    pub async fn dispute(
        &self,
        run: &RunId,
        accusation: &Accusation,
    ) -> Result<Option<Dispute>, ReadError> {
        Ok(match *accusation {
            Accusation::Worker { worker, round, .. } => {
                let fault = self.fault(run, &worker, round).await?;
                fault.map(|fault| Dispute::of_worker(worker, round, fault))
            }
            Accusation::Verifier { verifier, worker, round } => {
                let fault = self.verifier_fault(run, &verifier, &worker, round).await?;
                fault.map(|fault| Dispute::of_verifier((verifier, worker, round), fault))
            }
        })
    }

    /// All accusations of a run, open and decided, those of workers first.
    ///
    /// # Errors
    /// As for [`ChainState::dispute`].
    pub async fn disputes(&self, run: &RunId) -> Result<Vec<Dispute>, ReadError> {
        let workers = self.faults(run).await?.into_iter();
        let workers =
            workers.map(|((worker, round), fault)| Dispute::of_worker(worker, round, fault));
        let verifiers = self.verifier_faults(run).await?.into_iter();
        Ok(workers.chain(verifiers.map(|(key, fault)| Dispute::of_verifier(key, fault))).collect())
    }
}

impl ChainClient {
    /// The owner of the run accuses. It has the deposit of a record held until the run is pruned, and pays a
    /// contest's bond if a quorum finds the accused innocent.
    ///
    /// # Errors
    /// What the chain refuses ([`SubmitError::Failed`], by name): `NotOwner` and `SelfReport`; `WorkerUnknown`
    /// and `NotMember`, `VerifierUnknown` and `VerifierUnreachable` of who has nothing at stake here any more;
    /// `JoinedLater` and `RoundNotAnchored` of a round that it had no part in; `RunOver`. Or a node that does not
    /// answer.
    pub async fn report(
        &self,
        key: &NodeKey,
        run: &RunId,
        accusation: &Accusation,
        evidence_digest: Digest,
    ) -> Result<Submission, SubmitError> {
        let known = async |state: &ChainState| Ok(state.dispute(run, accusation).await?.is_some());
        let (id, evidence) = (*run.as_bytes(), Convert::convert(evidence_digest));
        match accusation {
            Accusation::Worker { worker, round, kind } => {
                let kind = Convert::convert(*kind);
                let report = call().report_fault(id, account(worker), round.0, kind, evidence);
                self.submit_unless(key, &report, known).await
            }
            Accusation::Verifier { verifier, worker, round } => {
                let (verifier, worker) = (account(verifier), account(worker));
                let report = call().report_verifier(id, verifier, worker, round.0, evidence);
                self.submit_unless(key, &report, known).await
            }
        }
    }

    /// The accused objects, and has the run's contest bond held: it comes back, unless a quorum of verifiers and most of
    /// those who vote find it guilty.
    ///
    /// # Errors
    /// What the chain refuses ([`SubmitError::Failed`], by name): `FaultUnknown`; `NotContestable` where it was
    /// decided; `WindowOver` after the contest window. [`SubmitError::MissingMoney`] of an account that has less
    /// than the bond. Or a node that does not answer.
    pub async fn contest(
        &self,
        key: &NodeKey,
        run: &RunId,
        accusation: &Accusation,
        evidence_digest: Digest,
    ) -> Result<Submission, SubmitError> {
        let contested = async |state: &ChainState| {
            Ok(state.dispute(run, accusation).await?.is_some_and(|found| found.is_contested()))
        };
        let (id, evidence) = (*run.as_bytes(), Convert::convert(evidence_digest));
        match accusation {
            Accusation::Worker { round, .. } => {
                let contest = call().contest_fault(id, round.0, evidence);
                self.submit_unless(key, &contest, contested).await
            }
            Accusation::Verifier { worker, round, .. } => {
                let contest = call().contest_verifier_fault(id, account(worker), round.0, evidence);
                self.submit_unless(key, &contest, contested).await
            }
        }
    }

    /// What this verifier finds of the accused.
    ///
    /// # Errors
    /// What the chain refuses ([`SubmitError::Failed`], by name): `FaultUnknown`; `VerifierUnknown` and
    /// `VerifierInactive`; `JoinedLater` of a verifier that was none before the round, and `RoundNotAnchored` of a
    /// round of which nobody can say so; `SelfReport`; `AlreadyVoted` otherwise; `FaultDecided`; and `WindowOver`
    /// for a vote on what was contested that comes too late. Or a node that does not answer.
    pub async fn vote(
        &self,
        key: &NodeKey,
        run: &RunId,
        accusation: &Accusation,
        finds: Finding,
    ) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let voted = async |state: &ChainState| {
            let found = state.dispute(run, accusation).await?;
            Ok(found.is_some_and(|found| found.votes.of(&me) == Some(finds)))
        };
        let (id, vote) = (*run.as_bytes(), Convert::convert(finds));
        match accusation {
            Accusation::Worker { worker, round, .. } => {
                let vote = call().vote_on_fault(id, account(worker), round.0, vote);
                self.submit_unless(key, &vote, voted).await
            }
            Accusation::Verifier { verifier, worker, round } => {
                let (verifier, worker) = (account(verifier), account(worker));
                let vote = call().vote_on_verifier(id, verifier, worker, round.0, vote);
                self.submit_unless(key, &vote, voted).await
            }
        }
    }

    /// Has a dispute decided after its window, by what was voted. Anybody may.
    ///
    /// # Errors
    /// What the chain refuses ([`SubmitError::Failed`], by name): `FaultUnknown`, and `WindowOpen` before the block
    /// that the dispute's state names. Or a node that does not answer.
    pub async fn decide(
        &self,
        key: &NodeKey,
        run: &RunId,
        accusation: &Accusation,
    ) -> Result<Submission, SubmitError> {
        let decided = async |state: &ChainState| {
            let found = state.dispute(run, accusation).await?;
            Ok(found.is_some_and(|found| found.decided_from().is_none()))
        };
        let id = *run.as_bytes();
        match accusation {
            Accusation::Worker { worker, round, .. } => {
                let execute = call().execute_fault(id, account(worker), round.0);
                self.submit_unless(key, &execute, decided).await
            }
            Accusation::Verifier { verifier, worker, round } => {
                let (verifier, worker) = (account(verifier), account(worker));
                let execute = call().execute_verifier_fault(id, verifier, worker, round.0);
                self.submit_unless(key, &execute, decided).await
            }
        }
    }
}
