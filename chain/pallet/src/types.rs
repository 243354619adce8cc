//! The records, terms and reasons the pallet stores and reports.

use codec::{Decode, DecodeWithMemTracking, Encode, MaxEncodedLen};
use frame_support::{BoundedVec, traits::ConstU32};
pub use manyhands_proto::leaf::{LeafHash, PROOF_LENGTH_MAX, RewardLeaf};
use scale_info::TypeInfo;
use sp_runtime::{AccountId32, Percent};

/// An account; of a node, its ed25519 public key.
pub type AccountId = AccountId32;
/// Planck.
pub type Balance = u128;
/// A block's height.
pub type BlockNumber = u32;
/// A round's number in its run, from 0.
pub type Round = u32;
/// The run's name: 32 bytes chosen by whoever creates it.
pub type RunId = [u8; 32];
/// A digest of something off chain. The pallet compares digests and never computes one.
pub type Digest = [u8; 32];

/// Verifiers of one run: three are drawn for a slash, and 32 leave room for a market of them.
pub const VERIFIERS_MAX: u32 = 32;
/// A libp2p peer id of an ed25519 key is 38 bytes, of any other key at most 64.
pub const PEER_ID_LENGTH_MAX: u32 = 64;
/// Commits that may wait for their windows at once: it bounds what one upheld challenge undoes.
pub const PENDING_COMMITS_MAX: u32 = 16;
/// Runs one account may serve at once.
pub const MEMBERSHIPS_MAX: u32 = 16;

pub type Accounts = BoundedVec<AccountId, ConstU32<VERIFIERS_MAX>>;
pub type PeerId = BoundedVec<u8, ConstU32<PEER_ID_LENGTH_MAX>>;
pub type Siblings = BoundedVec<LeafHash, ConstU32<PROOF_LENGTH_MAX>>;

macro_rules! stored {
    ($(#[$meta:meta])* pub struct $name:ident { $($body:tt)* }) => {
        $(#[$meta])*
        #[derive(
            Clone, PartialEq, Eq, Encode, Decode, DecodeWithMemTracking, MaxEncodedLen, TypeInfo,
            Debug,
        )]
        pub struct $name { $($body)* }
    };
    ($(#[$meta:meta])* pub enum $name:ident { $($body:tt)* }) => {
        $(#[$meta])*
        #[derive(
            Clone, PartialEq, Eq, Encode, Decode, DecodeWithMemTracking, MaxEncodedLen, TypeInfo,
            Debug,
        )]
        pub enum $name { $($body)* }
    };
}

stored! {
    /// What one fault of each kind costs, in planck. A worker never loses more than its stake.
    pub struct SlashTerms {
        pub replay: Balance,
        pub codec: Balance,
        pub withheld: Balance,
        pub equivocation: Balance,
        /// Taken from the coordinator's bond when a challenge is upheld or the run times out.
        pub coordinator: Balance,
        /// The part of a slash that those share who found the accused guilty; the rest is the run's.
        pub reporter_share: Percent,
    }
}

impl SlashTerms {
    pub fn of(&self, kind: FaultKind) -> Balance {
        match kind {
            FaultKind::Replay => self.replay,
            FaultKind::Codec => self.codec,
            FaultKind::Withheld => self.withheld,
            FaultKind::Equivocation => self.equivocation,
        }
    }
}

stored! {
    /// What the parties of a run agree to by joining it. Terms never change.
    pub struct RunTerms {
        /// Digest of the run's file: everything the chain does not need to understand.
        pub config_digest: Digest,
        /// The most a verified work unit may earn, in planck.
        pub price_per_unit: Balance,
        /// A reward is payable once this many later rounds are final.
        pub vesting_rounds: u32,
        /// Blocks during which a committed round can be challenged.
        pub challenge_window: BlockNumber,
        /// Blocks during which the accused can contest a reported fault.
        pub contest_window: BlockNumber,
        /// Blocks the verifiers have to decide a challenge or a contested fault, and to attest.
        pub resolution_window: BlockNumber,
        /// Blocks after the run's end, its windows included, in which rewards can be claimed.
        pub claim_window: BlockNumber,
        /// Blocks without a committed round after which anybody may close the run.
        pub idle_timeout: BlockNumber,
        /// Blocks for which stakes and verifier bonds stay exposed after leaving; at least the
        /// challenge, contest and resolution windows together, or a cheat leaves before its fault.
        pub unbonding_period: BlockNumber,
        /// The stake a worker needs to join, in planck.
        pub minimum_stake: Balance,
        pub coordinator_bond: Balance,
        pub verifier_bond: Balance,
        /// What the accused puts down to contest; the loser pays it.
        pub contest_bond: Balance,
        /// What a challenger puts down; lost to the run when the verifiers vote it down.
        pub challenge_bond: Balance,
        /// Who may verify. Empty: whoever puts down the bond.
        pub verifiers: Accounts,
        /// Verifiers that must attest a round before it can become final; may be 0.
        pub attestation_quorum: u32,
        /// Votes that a side needs to decide a fault or a challenge; at least 1.
        pub fault_quorum: u32,
        pub slashes: SlashTerms,
    }
}

stored! {
    #[derive(Copy)]
    pub enum PauseReason {
        /// The owner's wish.
        Owner,
        /// The escrow is short of what a commit would owe. `required` is the escrow that suffices.
        InsufficientFunds { required: Balance },
        /// A challenge was upheld; the owner must fill up its bond and commit again.
        ChallengeUpheld,
        /// A round's time for attestation ran out; it must be committed again.
        NotAttested,
    }
}

stored! {
    #[derive(Copy)]
    pub enum CloseReason {
        Completed { final_checkpoint: Digest },
        Cancelled,
        TimedOut,
    }
}

stored! {
    /// Whose fault the end of something was.
    #[derive(Copy)]
    pub enum Attribution {
        Nobody,
        Worker,
        Verifier,
        Coordinator,
        Sponsor,
    }
}

stored! {
    #[derive(Copy)]
    pub enum RunState {
        Active,
        Paused(PauseReason),
        /// No more commits. Rewards vest at `vests_at` at the latest and can be claimed until
        /// `expires_at`; then what is left goes back to the funders.
        Closed { reason: CloseReason, vests_at: BlockNumber, expires_at: BlockNumber },
        /// Everything is paid back; only records are left, and anybody may clear them.
        Settled,
    }
}

stored! {
    /// Cumulative rewards of a run as of one commit.
    #[derive(Copy, Default)]
    pub struct Totals {
        /// Sum of the leaves' cumulative rewards. A forfeited reward may make it fall.
        pub reward: Balance,
        /// The highest `reward` so far: what the escrow has to cover.
        pub ceiling: Balance,
    }
}

stored! {
    pub struct Run {
        /// Creates, coordinates and owns the run.
        pub owner: AccountId,
        pub terms: RunTerms,
        pub state: RunState,
        /// Planck on hold in the run's pot.
        pub escrow: Balance,
        /// All that was ever put into the escrow by funders.
        pub funded: Balance,
        /// Funding not yet paid back: the weights of the refund.
        pub funded_outstanding: Balance,
        /// What slashes and lost bonds brought into the escrow.
        pub recovered: Balance,
        pub refunded: Balance,
        /// Sum of all paid claims.
        pub claimed: Balance,
        /// The highest cumulative total of a final round: no more than this can be claimed.
        pub finalized_reward: Balance,
        /// Where the newest commit, final or waiting, has brought the totals.
        pub committed: Totals,
        /// Planck of the owner held as [`HoldReason::StorageDeposit`](crate::HoldReason).
        pub deposit: Balance,
        /// What is left of the coordinator's bond.
        pub bond: Balance,
        pub verifiers: u32,
        /// The first round that is in no commit yet.
        pub next_round: Round,
        /// Last rounds of the commits that wait to become final, oldest first.
        pub pending: BoundedVec<Round, ConstU32<PENDING_COMMITS_MAX>>,
        pub latest_finalized: Option<Round>,
        /// Faults and challenges that are not decided.
        pub open_disputes: u32,
        pub last_progress: BlockNumber,
    }
}

stored! {
    pub struct Membership {
        pub run: RunId,
        pub joined_at: BlockNumber,
        /// Once left: faults of earlier work can be reported before this block.
        pub exposed_until: Option<BlockNumber>,
    }
}

stored! {
    pub struct Worker {
        pub peer_id: PeerId,
        pub capability_digest: Digest,
        /// Planck held as [`HoldReason::WorkerStake`](crate::HoldReason).
        pub stake: Balance,
        pub registered_at: BlockNumber,
        /// The block from which the stake can be withdrawn, once the exit was announced.
        pub exit_at: Option<BlockNumber>,
        pub open_faults: u32,
        pub memberships: BoundedVec<Membership, ConstU32<MEMBERSHIPS_MAX>>,
    }
}

stored! {
    pub struct Verifier {
        /// Planck held as [`HoldReason::VerifierBond`](crate::HoldReason) for this run.
        pub bond: Balance,
        pub registered_at: BlockNumber,
        /// The block from which the bond can be withdrawn, once retired.
        pub exit_at: Option<BlockNumber>,
        /// Faults that it is accused of and that are not decided.
        pub open_faults: u32,
    }
}

stored! {
    /// A round's two sets, which must be on chain before its audit draw.
    #[derive(Copy)]
    pub enum Stage {
        /// Who committed to which update.
        Commit,
        /// Whose update was delivered and admitted.
        Admitted,
    }
}

stored! {
    #[derive(Copy)]
    pub struct Anchor {
        pub digest: Digest,
        pub block: BlockNumber,
    }
}

stored! {
    /// One or several consecutive rounds, as the coordinator commits them.
    #[derive(Copy)]
    pub struct RoundCommitment {
        pub first_round: Round,
        pub last_round: Round,
        /// Root of the tree of [`RewardLeaf`]s.
        pub contributions_root: LeafHash,
        pub number_of_leaves: u32,
        /// Digest of θ after `last_round`.
        pub theta_digest: Digest,
        /// Verified work units of these rounds: with the price, the most their reward may be.
        pub work_units: u64,
        /// Sum of the leaves' cumulative rewards, in planck.
        pub total_reward: Balance,
        pub evidence_digest: Digest,
    }
}

stored! {
    #[derive(Copy)]
    pub enum RejectReason {
        ChallengeUpheld,
        /// It built on a round that was rejected.
        EarlierRejected,
        NotAttested,
    }
}

stored! {
    #[derive(Copy)]
    pub enum RoundState {
        /// Waits for its window.
        Committed,
        Challenged,
        Finalized,
        Rejected(RejectReason),
    }
}

stored! {
    pub struct RoundRecord {
        pub commitment: RoundCommitment,
        /// The totals it built on, restored if it is rejected.
        pub before: Totals,
        pub committed_at: BlockNumber,
        /// The first block in which it can become final.
        pub finalizable_at: BlockNumber,
        pub attestations: Accounts,
        pub state: RoundState,
    }
}

stored! {
    /// What a challenger says is wrong.
    pub enum ChallengeClaim {
        /// This leaf is in the tree and should not be there like this.
        WrongLeaf { leaf: RewardLeaf, leaf_index: u32, siblings: Siblings },
        /// This account's work is missing from the tree.
        OmittedWorker { worker: AccountId },
        WrongTheta,
        WrongTotals,
    }
}

stored! {
    /// [`ChallengeClaim`] without its data, as it is stored and reported.
    #[derive(Copy)]
    pub enum ChallengeKind {
        WrongLeaf,
        OmittedWorker,
        WrongTheta,
        WrongTotals,
    }
}

impl ChallengeClaim {
    pub fn kind(&self) -> ChallengeKind {
        match self {
            Self::WrongLeaf { .. } => ChallengeKind::WrongLeaf,
            Self::OmittedWorker { .. } => ChallengeKind::OmittedWorker,
            Self::WrongTheta => ChallengeKind::WrongTheta,
            Self::WrongTotals => ChallengeKind::WrongTotals,
        }
    }

    /// Hashes in the claim's proof: what its verification costs.
    pub fn proof_length(&self) -> u32 {
        match self {
            Self::WrongLeaf { siblings, .. } => u32::try_from(siblings.len()).unwrap_or(u32::MAX),
            Self::OmittedWorker { .. } | Self::WrongTheta | Self::WrongTotals => 0,
        }
    }
}

stored! {
    pub struct Challenge {
        pub challenger: AccountId,
        pub kind: ChallengeKind,
        pub evidence_digest: Digest,
        pub bond: Balance,
        pub challenged_at: BlockNumber,
        pub resolves_at: BlockNumber,
        pub upheld_by: Accounts,
        pub dismissed_by: Accounts,
    }
}

stored! {
    #[derive(Copy)]
    pub enum ChallengeOutcome {
        /// The quorum found the challenger right: the round is rejected, the coordinator pays.
        Upheld,
        /// The quorum found the round right: the challenger's bond goes to the run.
        Dismissed,
        /// No quorum in time: the bond goes back and the round's clock was not stopped.
        Undecided,
        /// An earlier round was rejected and this one with it: the bond goes back.
        Superseded,
    }
}

stored! {
    /// What a worker did.
    #[derive(Copy)]
    pub enum FaultKind {
        /// The replayed round is further from the claimed one than the run's threshold.
        Replay,
        /// An opened chunk does not give the payload's bytes.
        Codec,
        /// No upload, or no answer to a drawn opening, after a commitment.
        Withheld,
        /// Two different signed messages where there must be one.
        Equivocation,
    }
}

stored! {
    #[derive(Copy)]
    pub enum FaultState {
        /// Can be contested before `executable_at` and executed from then on; votes count until it is.
        Reported { executable_at: BlockNumber },
        /// Can be voted on before `resolves_at` and executed from then on.
        Contested { bond: Balance, evidence_digest: Digest, resolves_at: BlockNumber },
        Executed { slashed: Balance },
        Dismissed,
    }
}

stored! {
    /// How the verifiers of a run voted on what somebody is accused of. Nobody votes twice.
    #[derive(Default)]
    pub struct Votes {
        pub guilty: Accounts,
        pub innocent: Accounts,
    }
}

stored! {
    /// What one verifier, or all of them together, find of somebody who is accused.
    #[derive(Copy)]
    pub enum Finding {
        Guilty,
        Innocent,
    }
}

impl Votes {
    /// What a run's verifiers decided, as soon as no vote that is still to come could change it.
    ///
    /// # Arguments
    /// `jury`: an upper bound of those that can have a vote. `quorum`: votes that a side needs.
    pub fn settled(&self, jury: u32, quorum: u32) -> Option<Finding> {
        let most = |side: &Accounts| {
            let votes = side.len() as u64;
            (votes >= u64::from(quorum)).then_some(votes.saturating_mul(2))
        };
        if most(&self.guilty).is_some_and(|twice| twice > u64::from(jury)) {
            return Some(Finding::Guilty);
        }
        most(&self.innocent)
            .is_some_and(|twice| twice >= u64::from(jury))
            .then_some(Finding::Innocent)
    }

    /// Whether a quorum found the accused innocent.
    pub fn clear(&self, quorum: u32) -> bool {
        self.innocent.len() as u64 >= u64::from(quorum)
    }

    /// What they decided when the time for votes is over. Silence of the accused lets an accusation stand
    /// unless a quorum speaks for it; who objects is to be found guilty by a quorum.
    pub fn at_the_end(&self, contested: bool, quorum: u32) -> Finding {
        let (against, in_favour) = (self.guilty.len(), self.innocent.len());
        let guilty = if contested {
            against as u64 >= u64::from(quorum) && against > in_favour
        } else {
            !(self.clear(quorum) && in_favour >= against)
        };
        if guilty { Finding::Guilty } else { Finding::Innocent }
    }
}

stored! {
    pub struct Fault {
        pub kind: FaultKind,
        pub evidence_digest: Digest,
        /// Planck of the run's owner held as storage deposit.
        pub deposit: Balance,
        /// The run's verifiers when it was reported: no more than these have a vote.
        pub jury: u32,
        pub votes: Votes,
        pub reported_at: BlockNumber,
        pub state: FaultState,
    }
}

stored! {
    /// What a verifier said about the replay of a worker's round, and the run's owner says is not so.
    pub struct VerifierFault {
        pub evidence_digest: Digest,
        /// Planck of the run's owner held as storage deposit.
        pub deposit: Balance,
        /// The run's verifiers beside the accused when it was reported: no more than these have a vote.
        pub jury: u32,
        pub votes: Votes,
        pub reported_at: BlockNumber,
        pub state: FaultState,
    }
}

stored! {
    /// What a worker's undecided faults hold back: its leaves of rounds from `from_round` on.
    #[derive(Copy)]
    pub struct Suspension {
        /// The lowest round accused since nothing was undecided the last time. It does not rise
        /// when the fault of that round alone is dismissed: at worst a leaf waits for the others.
        pub from_round: Round,
        /// Faults that are not decided.
        pub open_faults: u32,
    }
}

stored! {
    /// A slashed worker's leaves that are not payable: those of rounds from `from_round` on whose
    /// commit is not later than block `until_block`.
    #[derive(Copy)]
    pub struct Forfeit {
        pub from_round: Round,
        pub until_block: BlockNumber,
    }
}

impl Forfeit {
    pub fn bars(&self, round: Round, committed_at: BlockNumber) -> bool {
        round >= self.from_round && committed_at <= self.until_block
    }
}

stored! {
    /// Which way planck went out of a hold or into an escrow.
    #[derive(Copy)]
    pub enum RecoveryReason {
        WorkerSlashed,
        ChallengeUpheld,
        ChallengeDismissed,
        ContestLost,
        RunTimedOut,
        VerifierSlashed,
    }
}
