//! Runs, their terms and their money.

use manyhands_proto::{Balance, Digest, NodeId, Round};

use super::mirror;

mirror! {
    /// What one fault of each kind costs. A worker never loses more than its stake.
    struct SlashTerms {
        replay: Balance,
        codec: Balance,
        withheld: Balance,
        equivocation: Balance,
        /// Taken from the coordinator's bond when a challenge is upheld or the run times out.
        coordinator: Balance,
        /// Percent of a slash that goes to those who showed the fault; the rest is the run's.
        reporter_share: u8,
    }
}

mirror! {
    /// What the parties of a run agree to by joining it. Terms never change. Windows and timeouts
    /// are in blocks.
    struct RunTerms {
        /// Digest of the run's file.
        config_digest: Digest,
        /// The most a verified work unit may earn.
        price_per_unit: Balance,
        /// A reward is payable once this many later rounds are final.
        vesting_rounds: u32,
        /// During which a committed round can be challenged.
        challenge_window: u32,
        /// During which the accused can contest a reported fault.
        contest_window: u32,
        /// For the verifiers to decide a challenge or a contested fault, and to attest.
        resolution_window: u32,
        /// After the run's end, its windows included, in which rewards can be claimed.
        claim_window: u32,
        /// Without a committed round, after which anybody may close the run.
        idle_timeout: u32,
        /// For which stakes and verifier bonds stay exposed after leaving; at least the challenge,
        /// contest and resolution windows together.
        unbonding_period: u32,
        /// The stake a worker needs to join.
        minimum_stake: Balance,
        coordinator_bond: Balance,
        verifier_bond: Balance,
        /// What the accused puts down to contest; the loser pays it.
        contest_bond: Balance,
        /// What a challenger puts down; lost to the run when the verifiers vote it down.
        challenge_bond: Balance,
        /// Who may verify. Empty: whoever puts down the bond.
        verifiers: Vec<NodeId>,
        /// Verifiers that must attest a round before it can become final; may be 0.
        attestation_quorum: u32,
        /// Verifiers that decide a fault or a challenge; at least 1.
        fault_quorum: u32,
        slashes: SlashTerms,
    }
}

mirror! {
    /// Why a run stands still.
    #[derive(Copy)]
    enum PauseReason {
        /// The owner's wish.
        Owner,
        /// The escrow is short of what a commit would owe; `required` is the escrow that suffices.
        InsufficientFunds { required: Balance, },
        /// A challenge was upheld; the owner must fill up its bond and commit again.
        ChallengeUpheld,
        /// A round's time for attestation ran out; it must be committed again.
        NotAttested,
    }
}

mirror! {
    /// Why a run ended.
    #[derive(Copy)]
    enum CloseReason {
        Completed { final_checkpoint: Digest, },
        Cancelled,
        TimedOut,
    }
}

mirror! {
    /// Whose fault the end of something was, or in which role somebody acted.
    #[derive(Copy)]
    enum Attribution {
        Nobody,
        Worker,
        Verifier,
        Coordinator,
        Sponsor,
    }
}

mirror! {
    #[derive(Copy)]
    enum RunState {
        Active,
        Paused(reason: PauseReason),
        /// No more commits. Rewards vest at `vests_at` at the latest and can be claimed until
        /// `expires_at`; then what is left goes back to the funders.
        Closed { reason: CloseReason, vests_at: u32, expires_at: u32, },
        /// Everything is paid back; only records are left.
        Settled,
    }
}

mirror! {
    /// Cumulative rewards of a run as of one commit.
    #[derive(Copy)]
    struct Totals {
        /// Sum of the leaves' cumulative rewards. A forfeited reward may make it fall.
        reward: Balance,
        /// The highest `reward` so far: what the escrow has to cover.
        ceiling: Balance,
    }
}

mirror! {
    struct Run {
        /// Creates, coordinates and owns the run.
        owner: NodeId,
        terms: RunTerms,
        state: RunState,
        /// On hold in the run's pot.
        escrow: Balance,
        /// All that was ever put into the escrow by funders.
        funded: Balance,
        /// Funding not yet paid back: the weights of the refund.
        funded_outstanding: Balance,
        /// What slashes and lost bonds brought into the escrow.
        recovered: Balance,
        refunded: Balance,
        /// Sum of all paid claims.
        claimed: Balance,
        /// The highest cumulative total of a final round: no more than this can be claimed.
        finalized_reward: Balance,
        /// Where the newest commit, final or waiting, has brought the totals.
        committed: Totals,
        /// Held from the owner for the run's storage.
        deposit: Balance,
        /// What is left of the coordinator's bond.
        bond: Balance,
        verifiers: u32,
        /// The first round that is in no commit yet.
        next_round: Round,
        /// Last rounds of the commits that wait to become final, oldest first.
        pending: Vec<Round>,
        latest_finalized: Option<Round>,
        /// Faults and challenges that are not decided.
        open_disputes: u32,
        /// The block of the last progress.
        last_progress: u32,
    }
}

mirror! {
    /// Which way money entered a run's escrow.
    #[derive(Copy)]
    enum RecoveryReason {
        WorkerSlashed,
        ChallengeUpheld,
        ChallengeDismissed,
        ContestLost,
        RunTimedOut,
        VerifierSlashed,
    }
}
