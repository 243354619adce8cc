//! What happened on chain, in this project's own types.

use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};

use crate::chain::{self, runtime_types::manyhands_chain_pallet::pallet::Event as Chain};
use crate::client::{AtBlock, ReadError, answer};
use crate::types::{
    Attribution, ChallengeKind, ChallengeOutcome, CloseReason, Convert, FaultKind, Finding,
    PauseReason, RecoveryReason, RejectReason, RoundCommitment, Stage,
};

/// The training pallet's name in the runtime.
const PALLET: &str = "Training";

/// Declares the events with the conversion from the pallet's.
macro_rules! events {
    ($($(#[$meta:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {
        /// An event of the training pallet. Blocks are block numbers.
        #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
        #[serde(rename_all = "snake_case", tag = "event")]
        pub enum TrainingEvent {
            $($(#[$meta])* $name { $($field: $type,)* },)*
        }

        impl Convert<Chain> for TrainingEvent {
            fn convert(event: Chain) -> Self {
                match event {
                    $(Chain::$name { $($field,)* } => {
                        Self::$name { $($field: Convert::convert($field),)* }
                    })*
                }
            }
        }
    };
}

events! {
    WorkerRegistered { worker: NodeId, peer_id: Vec<u8>, capability_digest: Digest, stake: Balance, }
    WorkerUpdated { worker: NodeId, peer_id: Vec<u8>, capability_digest: Digest, }
    StakeIncreased { worker: NodeId, amount: Balance, stake: Balance, }
    RunJoined { run: RunId, worker: NodeId, stake: Balance, }
    RunLeft { run: RunId, worker: NodeId, exposed_until: u32, }
    ExitAnnounced { worker: NodeId, exit_at: u32, }
    StakeWithdrawn { worker: NodeId, amount: Balance, }
    VerifierRegistered { run: RunId, verifier: NodeId, bond: Balance, }
    VerifierRetired { run: RunId, verifier: NodeId, exit_at: u32, }
    VerifierBondWithdrawn { run: RunId, verifier: NodeId, amount: Balance, }
    RunCreated { run: RunId, owner: NodeId, config_digest: Digest, budget: Balance, bond: Balance, }
    RunFunded { run: RunId, funder: NodeId, amount: Balance, escrow: Balance, }
    /// Money entered the escrow from a lost stake or bond.
    EscrowRecovered { run: RunId, from: NodeId, amount: Balance, reason: RecoveryReason, }
    RunPaused { run: RunId, reason: PauseReason, }
    RunResumed { run: RunId, escrow: Balance, bond: Balance, }
    RunClosed {
        run: RunId, reason: CloseReason, attribution: Attribution, vests_at: u32, expires_at: u32,
    }
    CoordinatorSlashed { run: RunId, coordinator: NodeId, amount: Balance, reason: RecoveryReason, }
    FunderRefunded { run: RunId, funder: NodeId, contributed: Balance, refunded: Balance, }
    RunSettled { run: RunId, bond_returned: Balance, left_over: Balance, }
    RunPruned { run: RunId, records: u32, finished: bool, }
    CommitmentsAnchored { run: RunId, round: Round, stage: Stage, digest: Digest, }
    RoundCommitted { run: RunId, commitment: RoundCommitment, finalizable_at: u32, }
    RoundAttested { run: RunId, round: Round, verifier: NodeId, attestations: u32, }
    RoundChallenged {
        run: RunId, round: Round, challenger: NodeId, kind: ChallengeKind, evidence_digest: Digest,
        bond: Balance,
    }
    ChallengeVoted { run: RunId, round: Round, verifier: NodeId, upheld: bool, }
    ChallengeResolved {
        run: RunId, round: Round, challenger: NodeId, outcome: ChallengeOutcome,
        attribution: Attribution, bond: Balance, reward: Balance,
    }
    RoundRejected { run: RunId, round: Round, reason: RejectReason, }
    RoundFinalized { run: RunId, round: Round, contributions_root: Digest, total_reward: Balance, }
    RewardClaimed {
        run: RunId, round: Round, worker: NodeId, amount: Balance, cumulative: Balance,
    }
    FaultReported {
        run: RunId, worker: NodeId, round: Round, kind: FaultKind, evidence_digest: Digest,
    }
    FaultVoted { run: RunId, worker: NodeId, round: Round, verifier: NodeId, finds: Finding, }
    FaultContested {
        run: RunId, worker: NodeId, round: Round, evidence_digest: Digest, bond: Balance,
    }
    WorkerSlashed {
        run: RunId, worker: NodeId, round: Round, kind: FaultKind, amount: Balance,
        to_reporters: Balance, to_escrow: Balance, votes: u32,
    }
    FaultDismissed {
        run: RunId, worker: NodeId, round: Round, kind: FaultKind, penalty: Balance,
    }
    VerifierReported {
        run: RunId, verifier: NodeId, worker: NodeId, round: Round, evidence_digest: Digest,
    }
    VerifierFaultVoted {
        run: RunId, verifier: NodeId, worker: NodeId, round: Round, by: NodeId, finds: Finding,
    }
    VerifierFaultContested {
        run: RunId, verifier: NodeId, worker: NodeId, round: Round, evidence_digest: Digest,
        bond: Balance,
    }
    VerifierSlashed {
        run: RunId, verifier: NodeId, worker: NodeId, round: Round, amount: Balance,
        to_reporters: Balance, to_escrow: Balance, votes: u32,
    }
    VerifierFaultDismissed {
        run: RunId, verifier: NodeId, worker: NodeId, round: Round, penalty: Balance,
    }
}

/// Training events of a block, from the phases that are wanted.
pub(crate) async fn training_events(
    at: &AtBlock,
    wanted: impl Fn(subxt::events::Phase) -> bool,
) -> Result<Vec<TrainingEvent>, ReadError> {
    let records = answer(at.events().fetch()).await?;
    let mut events = Vec::new();
    for record in records.iter() {
        let record = record.map_err(undecodable)?;
        if !wanted(record.phase()) || record.pallet_name() != PALLET {
            continue;
        }
        if let chain::Event::Training(event) = record.decode_as().map_err(undecodable)? {
            events.push(TrainingEvent::convert(event));
        }
    }
    Ok(events)
}

fn undecodable(reason: impl std::fmt::Display) -> ReadError {
    ReadError::Undecodable { what: "an event", reason: reason.to_string() }
}
