//! The rules on chain: runs, workers, stakes, rounds, faults, claims.
//!
//! A **run** has an owner, who coordinates it, an escrow and terms that never change. **Workers**
//! put down a stake once and join runs; **verifiers** put down a bond per run. The coordinator
//! anchors the digests of each round's sets and commits rounds as Merkle roots of
//! [`RewardLeaf`]s; a commit becomes final after a window in which it can be challenged, and
//! final rounds pay claims.
//!
//! # The rule of payment
//! A leaf carries what its account earned in the run up to its round. A claim pays
//! `earned − already claimed` if
//! 1. the leaf is in the root of a **final** round,
//! 2. that round has **vested**: `round + vesting_rounds <= latest final round`, or the run is
//!    closed and its windows are over, and
//! 3. no fault bars it: once a fault of round `f` is executed at block `b`, the worker's leaves of
//!    rounds `>= f` count only if they were committed after `b`. The coordinator's later totals
//!    leave the faulted round out, so what was earned honestly is paid from those. While a fault
//!    of round `f` is not decided, leaves of rounds `>= f` wait for the decision.
//!
//! # Where the money is
//! All money is on hold under a [`HoldReason`]: stakes, bonds and deposits on their owner's
//! account, a run's escrow on the run's own pot account. `escrow + claimed + refunded ==
//! funded + recovered` holds for every run at every block, and a commit is accepted only if the
//! escrow covers it; `try_state` checks both.
//!
//! # Who decides
//! Nobody is slashed without having joined: a worker's stake is exposed only to runs whose terms
//! it accepted with [`Pallet::join_run`], and covers the minimum stakes of all of them together. A
//! run's id names that run for ever, so that no promise made to it counts in another. The owner, on
//! whose record verdicts are, accuses; verifiers that were there before the round vote on it, for and
//! against. A fault is executed when its worker lets the contest window pass and no quorum speaks for
//! it, or when, contested, more find it guilty than innocent and they are a quorum; it is decided at
//! once where no vote to come could change that. Otherwise it is dismissed; where a quorum found the
//! accused innocent, the owner pays it for that. A
//! verifier answers for what it says about a replay by the same rules, with its whole bond; the others
//! of its run vote on it. Every state that waits for somebody has a call that anybody may make when
//! the time is over.

#![cfg_attr(not(feature = "std"), no_std)]
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

extern crate alloc;

mod disputes;
mod faults;
mod invariants;
mod migrations;
#[cfg(test)]
mod mock;
mod money;
mod rounds;
mod runs;
#[cfg(test)]
mod tests;
pub mod types;
mod verdicts;
pub mod weights;
mod workers;

pub use pallet::*;
pub use types::*;
pub use weights::WeightInfo;

#[cfg_attr(
    not(test),
    expect(
        clippy::expect_used,
        clippy::unreachable,
        reason = "only in code the pallet macros generate; the calls below delegate"
    )
)]
#[frame_support::pallet]
pub mod pallet {
    use frame_support::{
        pallet_prelude::*,
        traits::fungible::{Inspect, Mutate, hold},
    };
    use frame_system::pallet_prelude::*;
    use sp_core::H256;

    use super::{verdicts::Verdict, *};

    /// 2: a verifier's record counts the faults that it is accused of. 3: the owner alone accuses, and
    /// votes have two sides.
    pub(crate) const STORAGE_VERSION: StorageVersion = StorageVersion::new(3);

    #[pallet::pallet]
    #[pallet::storage_version(STORAGE_VERSION)]
    pub struct Pallet<T>(_);

    #[pallet::config]
    pub trait Config:
        frame_system::Config<
            RuntimeEvent: From<Event<Self>>,
            AccountId = super::AccountId,
            Hash = H256,
        >
    {
        type RuntimeHoldReason: From<HoldReason>;

        /// The money of stakes, bonds, escrows and rewards.
        type Currency: Inspect<super::AccountId, Balance = Balance>
            + Mutate<super::AccountId>
            + hold::Mutate<super::AccountId, Reason = Self::RuntimeHoldReason>;

        /// Held from a run's owner while the run exists. At least [`Config::RecordDeposit`], which
        /// stays on hold for the record that the run existed.
        #[pallet::constant]
        type RunDeposit: Get<Balance>;

        /// Held for each further record: from the owner for anchors and rounds, from whoever
        /// opens it for a fault, from a worker for its registration.
        #[pallet::constant]
        type RecordDeposit: Get<Balance>;

        /// The least anybody may put into an escrow at once.
        #[pallet::constant]
        type MinimumFunding: Get<Balance>;

        /// The longest window, timeout or unbonding period terms may ask for, in blocks.
        #[pallet::constant]
        type WindowMax: Get<types::BlockNumber>;

        type WeightInfo: WeightInfo;
    }

    /// Why money is on hold.
    #[pallet::composite_enum]
    pub enum HoldReason {
        WorkerStake,
        VerifierBond,
        CoordinatorBond,
        /// On a run's pot account.
        RunEscrow,
        ContestBond,
        ChallengeBond,
        StorageDeposit,
    }

    #[pallet::storage]
    pub type Workers<T: Config> =
        StorageMap<_, Blake2_128Concat, super::AccountId, Worker, OptionQuery>;

    #[pallet::storage]
    pub type Runs<T: Config> = StorageMap<_, Blake2_128Concat, RunId, Run, OptionQuery>;

    /// Who owned each run that was pruned. Its id stays taken: memberships, signatures and leaves
    /// name a run by nothing else, and would count again in a second one of that id.
    #[pallet::storage]
    pub type PrunedRuns<T: Config> =
        StorageMap<_, Blake2_128Concat, RunId, super::AccountId, OptionQuery>;

    /// Outstanding funding by run and funder: the weights of the refund.
    #[pallet::storage]
    pub type Funding<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        super::AccountId,
        Balance,
        ValueQuery,
    >;

    #[pallet::storage]
    pub type Verifiers<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        super::AccountId,
        Verifier,
        OptionQuery,
    >;

    /// Digests of a round's sets, by run and (round, stage).
    #[pallet::storage]
    pub type Anchors<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        (Round, Stage),
        Anchor,
        OptionQuery,
    >;

    /// Committed rounds, by run and the commit's last round.
    #[pallet::storage]
    pub type Rounds<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        Round,
        RoundRecord,
        OptionQuery,
    >;

    /// Open challenges, by run and the commit's last round.
    #[pallet::storage]
    pub type Challenges<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        Round,
        Challenge,
        OptionQuery,
    >;

    /// Faults, open and decided, by run and (worker, round).
    #[pallet::storage]
    pub type Faults<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        (super::AccountId, Round),
        Fault,
        OptionQuery,
    >;

    /// What verifiers are said to have said wrongly, open and decided, by run and (verifier,
    /// worker, round): whose replay of whose round.
    #[pallet::storage]
    pub type VerifierFaults<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        (super::AccountId, super::AccountId, Round),
        VerifierFault,
        OptionQuery,
    >;

    /// Leaves that wait for a worker's undecided faults, by run and worker.
    #[pallet::storage]
    pub type Suspensions<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        super::AccountId,
        Suspension,
        OptionQuery,
    >;

    /// Leaves a slashed worker cannot claim with, by run and worker.
    #[pallet::storage]
    pub type Forfeits<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        super::AccountId,
        Forfeit,
        OptionQuery,
    >;

    /// Cumulative planck paid, by run and account.
    #[pallet::storage]
    pub type Claimed<T: Config> = StorageDoubleMap<
        _,
        Blake2_128Concat,
        RunId,
        Blake2_128Concat,
        super::AccountId,
        Balance,
        ValueQuery,
    >;

    #[pallet::event]
    #[pallet::generate_deposit(pub(crate) fn deposit_event)]
    pub enum Event<T: Config> {
        WorkerRegistered {
            worker: super::AccountId,
            peer_id: PeerId,
            capability_digest: Digest,
            stake: Balance,
        },
        WorkerUpdated {
            worker: super::AccountId,
            peer_id: PeerId,
            capability_digest: Digest,
        },
        StakeIncreased {
            worker: super::AccountId,
            amount: Balance,
            stake: Balance,
        },
        RunJoined {
            run: RunId,
            worker: super::AccountId,
            stake: Balance,
        },
        RunLeft {
            run: RunId,
            worker: super::AccountId,
            exposed_until: types::BlockNumber,
        },
        ExitAnnounced {
            worker: super::AccountId,
            exit_at: types::BlockNumber,
        },
        StakeWithdrawn {
            worker: super::AccountId,
            amount: Balance,
        },
        VerifierRegistered {
            run: RunId,
            verifier: super::AccountId,
            bond: Balance,
        },
        VerifierRetired {
            run: RunId,
            verifier: super::AccountId,
            exit_at: types::BlockNumber,
        },
        VerifierBondWithdrawn {
            run: RunId,
            verifier: super::AccountId,
            amount: Balance,
        },
        RunCreated {
            run: RunId,
            owner: super::AccountId,
            config_digest: Digest,
            budget: Balance,
            bond: Balance,
        },
        RunFunded {
            run: RunId,
            funder: super::AccountId,
            amount: Balance,
            escrow: Balance,
        },
        /// Planck entered the escrow from a lost stake or bond.
        EscrowRecovered {
            run: RunId,
            from: super::AccountId,
            amount: Balance,
            reason: RecoveryReason,
        },
        RunPaused {
            run: RunId,
            reason: PauseReason,
        },
        RunResumed {
            run: RunId,
            escrow: Balance,
            bond: Balance,
        },
        RunClosed {
            run: RunId,
            reason: CloseReason,
            attribution: Attribution,
            vests_at: types::BlockNumber,
            expires_at: types::BlockNumber,
        },
        CoordinatorSlashed {
            run: RunId,
            coordinator: super::AccountId,
            amount: Balance,
            reason: RecoveryReason,
        },
        FunderRefunded {
            run: RunId,
            funder: super::AccountId,
            contributed: Balance,
            refunded: Balance,
        },
        RunSettled {
            run: RunId,
            bond_returned: Balance,
            left_over: Balance,
        },
        RunPruned {
            run: RunId,
            records: u32,
            finished: bool,
        },
        CommitmentsAnchored {
            run: RunId,
            round: Round,
            stage: Stage,
            digest: Digest,
        },
        RoundCommitted {
            run: RunId,
            commitment: RoundCommitment,
            finalizable_at: types::BlockNumber,
        },
        RoundAttested {
            run: RunId,
            round: Round,
            verifier: super::AccountId,
            attestations: u32,
        },
        RoundChallenged {
            run: RunId,
            round: Round,
            challenger: super::AccountId,
            kind: ChallengeKind,
            evidence_digest: Digest,
            bond: Balance,
        },
        ChallengeVoted {
            run: RunId,
            round: Round,
            verifier: super::AccountId,
            upheld: bool,
        },
        ChallengeResolved {
            run: RunId,
            round: Round,
            challenger: super::AccountId,
            outcome: ChallengeOutcome,
            attribution: Attribution,
            bond: Balance,
            reward: Balance,
        },
        RoundRejected {
            run: RunId,
            round: Round,
            reason: RejectReason,
        },
        RoundFinalized {
            run: RunId,
            round: Round,
            contributions_root: LeafHash,
            total_reward: Balance,
        },
        RewardClaimed {
            run: RunId,
            round: Round,
            worker: super::AccountId,
            amount: Balance,
            cumulative: Balance,
        },
        FaultReported {
            run: RunId,
            worker: super::AccountId,
            round: Round,
            kind: FaultKind,
            evidence_digest: Digest,
        },
        FaultVoted {
            run: RunId,
            worker: super::AccountId,
            round: Round,
            verifier: super::AccountId,
            finds: Finding,
        },
        FaultContested {
            run: RunId,
            worker: super::AccountId,
            round: Round,
            evidence_digest: Digest,
            bond: Balance,
        },
        WorkerSlashed {
            run: RunId,
            worker: super::AccountId,
            round: Round,
            kind: FaultKind,
            amount: Balance,
            to_reporters: Balance,
            to_escrow: Balance,
            votes: u32,
        },
        FaultDismissed {
            run: RunId,
            worker: super::AccountId,
            round: Round,
            kind: FaultKind,
            penalty: Balance,
        },
        VerifierReported {
            run: RunId,
            verifier: super::AccountId,
            worker: super::AccountId,
            round: Round,
            evidence_digest: Digest,
        },
        VerifierFaultVoted {
            run: RunId,
            verifier: super::AccountId,
            worker: super::AccountId,
            round: Round,
            by: super::AccountId,
            finds: Finding,
        },
        VerifierFaultContested {
            run: RunId,
            verifier: super::AccountId,
            worker: super::AccountId,
            round: Round,
            evidence_digest: Digest,
            bond: Balance,
        },
        VerifierSlashed {
            run: RunId,
            verifier: super::AccountId,
            worker: super::AccountId,
            round: Round,
            amount: Balance,
            to_reporters: Balance,
            to_escrow: Balance,
            votes: u32,
        },
        VerifierFaultDismissed {
            run: RunId,
            verifier: super::AccountId,
            worker: super::AccountId,
            round: Round,
            penalty: Balance,
        },
    }

    #[pallet::error]
    pub enum Error<T> {
        // Terms.
        /// A quorum is zero where it must not be, or larger than the verifiers there can be.
        InvalidQuorum,
        /// A window or timeout is zero or longer than the chain's maximum.
        InvalidWindow,
        /// The unbonding period is shorter than the challenge, contest and resolution windows.
        UnbondingTooShort,
        /// A slash is larger than the stake or bond it is taken from.
        SlashAboveStake,
        /// The verifier bond is smaller than the contest bond it must pay, or a bond smaller than
        /// a record's deposit.
        BondTooSmall,
        // Runs.
        RunExists,
        /// A run of this id existed and was pruned: an id names one run for ever.
        RunIdSpent,
        RunUnknown,
        NotOwner,
        /// The call needs an active run.
        RunNotActive,
        /// The call needs a paused run.
        RunNotPaused,
        /// The call needs a run that is not closed.
        RunOver,
        /// The call needs a closed run.
        RunNotClosed,
        /// The call needs a settled run.
        RunNotSettled,
        /// The escrow is still short of what the pause asked for.
        EscrowTooSmall,
        FundingTooSmall,
        /// The run has made progress: its idle timeout is not over.
        NotTimedOut,
        /// Rewards can still be claimed.
        ClaimWindowOpen,
        /// A round, a challenge or a fault of the run is not decided.
        StillPending,
        NothingToRefund,
        FundersNotRefunded,
        // Workers.
        AlreadyRegistered,
        WorkerUnknown,
        /// The stake is smaller than the minimum stakes together of the run and of all other runs
        /// that it is exposed to.
        StakeTooSmall,
        AlreadyMember,
        NotMember,
        TooManyMemberships,
        /// The worker has announced its exit.
        Exiting,
        ExitNotAnnounced,
        /// The stake or bond is still exposed to faults.
        StillUnbonding,
        /// A fault against or reported by the account is not decided.
        DisputeOpen,
        // Verifiers.
        NotInvited,
        VerifierUnknown,
        /// The verifier is retired or its bond is no longer full.
        VerifierInactive,
        TooManyVerifiers,
        AlreadyVoted,
        // Rounds.
        AlreadyAnchored,
        /// The commit does not start where the last one ended, or ends before it starts.
        RoundOutOfOrder,
        TooManyPending,
        NoLeaves,
        /// The reward grows by more than price times work units.
        RewardAbovePrice,
        RoundUnknown,
        /// The round is final, rejected or challenged, and the call needs another state.
        WrongRoundState,
        /// The attestation names another root than the one committed.
        RootMismatch,
        WindowOpen,
        WindowOver,
        /// Too few verifiers have attested the round, and their time is not over.
        QuorumMissing,
        ChallengeUnknown,
        InvalidProof,
        /// The leaf was made for another chain.
        WrongChain,
        ClaimWindowOver,
        /// The round is final but has not vested.
        NotVested,
        /// A fault bars this leaf.
        Forfeited,
        /// A fault that would bar this leaf is not decided.
        FaultUndecided,
        NothingToClaim,
        /// The claims of the run would exceed its final rewards.
        ClaimAboveTotal,
        // Faults.
        FaultUnknown,
        FaultDecided,
        /// The round is neither committed nor anchored.
        RoundNotAnchored,
        /// The worker joined, or a verifier registered, after the round was anchored.
        JoinedLater,
        AlreadyReported,
        /// Nobody accuses itself, votes on itself, or judges what it brought up.
        SelfReport,
        NotContestable,
        /// The verifier has no bond left, or retired so long ago that it may take it back.
        VerifierUnreachable,
    }

    #[pallet::call]
    impl<T: Config> Pallet<T> {
        /// Puts down a stake and becomes a worker.
        #[pallet::call_index(0)]
        #[pallet::weight(T::WeightInfo::register_worker())]
        pub fn register_worker(
            origin: OriginFor<T>,
            peer_id: PeerId,
            capability_digest: Digest,
            stake: Balance,
        ) -> DispatchResult {
            Self::do_register_worker(ensure_signed(origin)?, peer_id, capability_digest, stake)
        }

        /// Replaces the worker's address and capabilities.
        #[pallet::call_index(1)]
        #[pallet::weight(T::WeightInfo::update_worker())]
        pub fn update_worker(
            origin: OriginFor<T>,
            peer_id: PeerId,
            capability_digest: Digest,
        ) -> DispatchResult {
            Self::do_update_worker(ensure_signed(origin)?, peer_id, capability_digest)
        }

        #[pallet::call_index(2)]
        #[pallet::weight(T::WeightInfo::increase_stake())]
        pub fn increase_stake(origin: OriginFor<T>, amount: Balance) -> DispatchResult {
            Self::do_increase_stake(ensure_signed(origin)?, amount)
        }

        /// Accepts the run's terms: from now on its faults can cost the worker's stake, which must
        /// cover the minimum stake of every run that it is exposed to.
        #[pallet::call_index(3)]
        #[pallet::weight(T::WeightInfo::join_run())]
        pub fn join_run(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            Self::do_join_run(ensure_signed(origin)?, run)
        }

        /// Leaves one run; the stake stays exposed to it for its unbonding period.
        #[pallet::call_index(4)]
        #[pallet::weight(T::WeightInfo::leave_run())]
        pub fn leave_run(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            Self::do_leave_run(ensure_signed(origin)?, run)
        }

        /// Leaves all runs; the stake can be withdrawn when the last exposure is over.
        #[pallet::call_index(5)]
        #[pallet::weight(T::WeightInfo::announce_exit())]
        pub fn announce_exit(origin: OriginFor<T>) -> DispatchResult {
            Self::do_announce_exit(ensure_signed(origin)?)
        }

        #[pallet::call_index(6)]
        #[pallet::weight(T::WeightInfo::withdraw_stake())]
        pub fn withdraw_stake(origin: OriginFor<T>) -> DispatchResult {
            Self::do_withdraw_stake(ensure_signed(origin)?)
        }

        /// Puts down the run's verifier bond; fills it up after a loss and undoes a retirement.
        #[pallet::call_index(7)]
        #[pallet::weight(T::WeightInfo::register_verifier())]
        pub fn register_verifier(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            Self::do_register_verifier(ensure_signed(origin)?, run)
        }

        #[pallet::call_index(8)]
        #[pallet::weight(T::WeightInfo::retire_verifier())]
        pub fn retire_verifier(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            Self::do_retire_verifier(ensure_signed(origin)?, run)
        }

        #[pallet::call_index(9)]
        #[pallet::weight(T::WeightInfo::withdraw_verifier_bond())]
        pub fn withdraw_verifier_bond(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            Self::do_withdraw_verifier_bond(ensure_signed(origin)?, run)
        }

        /// Creates a run owned by the caller and puts `budget` into its escrow.
        #[pallet::call_index(10)]
        #[pallet::weight(T::WeightInfo::create_run())]
        pub fn create_run(
            origin: OriginFor<T>,
            run: RunId,
            terms: RunTerms,
            budget: Balance,
        ) -> DispatchResult {
            Self::do_create_run(ensure_signed(origin)?, run, terms, budget)
        }

        /// Adds to the escrow; whoever adds gets a share of what is left at the end. Resumes a run
        /// that was paused for want of money.
        #[pallet::call_index(11)]
        #[pallet::weight(T::WeightInfo::fund_run())]
        pub fn fund_run(origin: OriginFor<T>, run: RunId, amount: Balance) -> DispatchResult {
            Self::do_fund_run(ensure_signed(origin)?, run, amount)
        }

        #[pallet::call_index(12)]
        #[pallet::weight(T::WeightInfo::pause_run())]
        pub fn pause_run(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            Self::do_pause_run(ensure_signed(origin)?, run)
        }

        /// Resumes a paused run, filling up the coordinator's bond.
        #[pallet::call_index(13)]
        #[pallet::weight(T::WeightInfo::resume_run())]
        pub fn resume_run(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            Self::do_resume_run(ensure_signed(origin)?, run)
        }

        /// Ends the run before its time. Committed rounds still become final and are paid.
        #[pallet::call_index(14)]
        #[pallet::weight(T::WeightInfo::cancel_run())]
        pub fn cancel_run(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            Self::do_end_run(ensure_signed(origin)?, run, CloseReason::Cancelled)
        }

        /// Ends the run with its result.
        #[pallet::call_index(15)]
        #[pallet::weight(T::WeightInfo::complete_run())]
        pub fn complete_run(
            origin: OriginFor<T>,
            run: RunId,
            final_checkpoint: Digest,
        ) -> DispatchResult {
            Self::do_end_run(
                ensure_signed(origin)?,
                run,
                CloseReason::Completed { final_checkpoint },
            )
        }

        /// Closes a run whose coordinator has committed nothing for `idle_timeout` blocks.
        /// Anybody may.
        #[pallet::call_index(16)]
        #[pallet::weight(T::WeightInfo::timeout_run())]
        pub fn timeout_run(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            ensure_signed(origin)?;
            Self::do_timeout_run(run)
        }

        /// Pays a funder's share of what is left in an expired run's escrow. Anybody may.
        #[pallet::call_index(17)]
        #[pallet::weight(T::WeightInfo::refund_funder())]
        pub fn refund_funder(
            origin: OriginFor<T>,
            run: RunId,
            funder: super::AccountId,
        ) -> DispatchResult {
            ensure_signed(origin)?;
            Self::do_refund_funder(run, funder)
        }

        /// Returns the coordinator's bond once all funders are paid back. Anybody may.
        #[pallet::call_index(18)]
        #[pallet::weight(T::WeightInfo::settle_run())]
        pub fn settle_run(origin: OriginFor<T>, run: RunId) -> DispatchResult {
            ensure_signed(origin)?;
            Self::do_settle_run(run)
        }

        /// Removes up to `limit` records of a settled run and returns their deposits. Anybody may.
        #[pallet::call_index(19)]
        #[pallet::weight(T::WeightInfo::prune_run(*limit))]
        pub fn prune_run(origin: OriginFor<T>, run: RunId, limit: u32) -> DispatchResult {
            ensure_signed(origin)?;
            Self::do_prune_run(run, limit)
        }

        /// Puts the digest of a round's set on chain, before anybody can know the audit draw.
        #[pallet::call_index(20)]
        #[pallet::weight(T::WeightInfo::anchor_commitments())]
        pub fn anchor_commitments(
            origin: OriginFor<T>,
            run: RunId,
            round: Round,
            stage: Stage,
            digest: Digest,
        ) -> DispatchResult {
            Self::do_anchor_commitments(ensure_signed(origin)?, run, round, stage, digest)
        }

        /// Commits the rounds from the last commit's end on. If the escrow does not cover them,
        /// the run is paused with that reason instead, and nothing is committed.
        #[pallet::call_index(21)]
        #[pallet::weight(T::WeightInfo::commit_round())]
        pub fn commit_round(
            origin: OriginFor<T>,
            run: RunId,
            commitment: RoundCommitment,
        ) -> DispatchResult {
            Self::do_commit_round(ensure_signed(origin)?, run, commitment)
        }

        /// A verifier's word for a committed root.
        #[pallet::call_index(22)]
        #[pallet::weight(T::WeightInfo::attest_round())]
        pub fn attest_round(
            origin: OriginFor<T>,
            run: RunId,
            round: Round,
            contributions_root: LeafHash,
        ) -> DispatchResult {
            Self::do_attest_round(ensure_signed(origin)?, run, round, contributions_root)
        }

        #[pallet::call_index(23)]
        #[pallet::weight(T::WeightInfo::challenge_round(claim.proof_length()))]
        pub fn challenge_round(
            origin: OriginFor<T>,
            run: RunId,
            round: Round,
            claim: ChallengeClaim,
            evidence_digest: Digest,
        ) -> DispatchResult {
            Self::do_challenge_round(ensure_signed(origin)?, run, round, claim, evidence_digest)
        }

        /// A verifier's vote on an open challenge; the quorum's side decides.
        #[pallet::call_index(24)]
        #[pallet::weight(T::WeightInfo::resolve_challenge())]
        pub fn resolve_challenge(
            origin: OriginFor<T>,
            run: RunId,
            round: Round,
            upheld: bool,
        ) -> DispatchResult {
            Self::do_resolve_challenge(ensure_signed(origin)?, run, round, upheld)
        }

        /// Ends a challenge the verifiers did not decide in time. Anybody may.
        #[pallet::call_index(25)]
        #[pallet::weight(T::WeightInfo::expire_challenge())]
        pub fn expire_challenge(origin: OriginFor<T>, run: RunId, round: Round) -> DispatchResult {
            ensure_signed(origin)?;
            Self::do_expire_challenge(run, round)
        }

        /// Makes the oldest commit final after its window; rejects it, and those after it, if
        /// its time for attestation ran out. Anybody may.
        #[pallet::call_index(26)]
        #[pallet::weight(T::WeightInfo::finalize_round())]
        pub fn finalize_round(origin: OriginFor<T>, run: RunId, round: Round) -> DispatchResult {
            ensure_signed(origin)?;
            Self::do_finalize_round(run, round)
        }

        /// Pays the leaf's worker what it earned and has not been paid. Anybody may.
        #[pallet::call_index(27)]
        #[pallet::weight(T::WeightInfo::claim_reward(siblings.len() as u32))]
        pub fn claim_reward(
            origin: OriginFor<T>,
            leaf: RewardLeaf,
            leaf_index: u32,
            siblings: Siblings,
        ) -> DispatchResult {
            ensure_signed(origin)?;
            Self::do_claim_reward(&leaf, leaf_index, &siblings)
        }

        /// The run's owner says that a worker cheated in a round. Its verifiers vote on it.
        #[pallet::call_index(28)]
        #[pallet::weight(T::WeightInfo::report_fault())]
        pub fn report_fault(
            origin: OriginFor<T>,
            run: RunId,
            worker: super::AccountId,
            round: Round,
            kind: FaultKind,
            evidence_digest: Digest,
        ) -> DispatchResult {
            Self::do_report_fault(ensure_signed(origin)?, run, worker, round, kind, evidence_digest)
        }

        /// The accused worker's objection, with a bond.
        #[pallet::call_index(29)]
        #[pallet::weight(T::WeightInfo::contest_fault())]
        pub fn contest_fault(
            origin: OriginFor<T>,
            run: RunId,
            round: Round,
            evidence_digest: Digest,
        ) -> DispatchResult {
            Self::do_contest_fault(ensure_signed(origin)?, run, round, evidence_digest)
        }

        /// Decides a fault after its window, by what was voted. Anybody may.
        #[pallet::call_index(30)]
        #[pallet::weight(T::WeightInfo::execute_fault())]
        pub fn execute_fault(
            origin: OriginFor<T>,
            run: RunId,
            worker: super::AccountId,
            round: Round,
        ) -> DispatchResult {
            ensure_signed(origin)?;
            Self::do_execute_fault(run, worker, round)
        }

        /// The run's owner says that a verifier's replay of a worker's round did not end where that
        /// verifier says. The others vote on it.
        #[pallet::call_index(31)]
        #[pallet::weight(T::WeightInfo::report_verifier())]
        pub fn report_verifier(
            origin: OriginFor<T>,
            run: RunId,
            verifier: super::AccountId,
            worker: super::AccountId,
            round: Round,
            evidence_digest: Digest,
        ) -> DispatchResult {
            let verdict = Verdict { run_id: run, verifier, worker, round };
            Self::do_report_verifier(ensure_signed(origin)?, verdict, evidence_digest)
        }

        /// The accused verifier's objection, with a bond.
        #[pallet::call_index(32)]
        #[pallet::weight(T::WeightInfo::contest_verifier_fault())]
        pub fn contest_verifier_fault(
            origin: OriginFor<T>,
            run: RunId,
            worker: super::AccountId,
            round: Round,
            evidence_digest: Digest,
        ) -> DispatchResult {
            let verifier = ensure_signed(origin)?;
            let verdict = Verdict { run_id: run, verifier, worker, round };
            Self::do_contest_verifier_fault(verdict, evidence_digest)
        }

        /// Decides what a verifier is accused of after its window, by what was voted. Anybody may.
        #[pallet::call_index(33)]
        #[pallet::weight(T::WeightInfo::execute_verifier_fault())]
        pub fn execute_verifier_fault(
            origin: OriginFor<T>,
            run: RunId,
            verifier: super::AccountId,
            worker: super::AccountId,
            round: Round,
        ) -> DispatchResult {
            ensure_signed(origin)?;
            Self::do_execute_verifier_fault(Verdict { run_id: run, verifier, worker, round })
        }

        /// What a verifier finds of an accused worker.
        #[pallet::call_index(34)]
        #[pallet::weight(T::WeightInfo::vote_on_fault())]
        pub fn vote_on_fault(
            origin: OriginFor<T>,
            run: RunId,
            worker: super::AccountId,
            round: Round,
            finds: Finding,
        ) -> DispatchResult {
            Self::do_vote_on_fault(ensure_signed(origin)?, run, worker, round, finds)
        }

        /// What a verifier finds of another that is accused.
        #[pallet::call_index(35)]
        #[pallet::weight(T::WeightInfo::vote_on_verifier())]
        pub fn vote_on_verifier(
            origin: OriginFor<T>,
            run: RunId,
            verifier: super::AccountId,
            worker: super::AccountId,
            round: Round,
            finds: Finding,
        ) -> DispatchResult {
            let verdict = Verdict { run_id: run, verifier, worker, round };
            Self::do_vote_on_verifier(ensure_signed(origin)?, verdict, finds)
        }
    }

    #[pallet::hooks]
    impl<T: Config> Hooks<BlockNumberFor<T>> for Pallet<T> {
        fn on_runtime_upgrade() -> Weight {
            Self::migrate()
        }

        #[cfg(feature = "try-runtime")]
        fn try_state(_: BlockNumberFor<T>) -> Result<(), sp_runtime::TryRuntimeError> {
            Self::do_try_state()
        }
    }
}
