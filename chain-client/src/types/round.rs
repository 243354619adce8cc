//! Anchored sets, committed rounds and challenges to them.

use manyhands_proto::{Balance, Digest, NodeId, Round, WorkUnits};

use super::mirror;

mirror! {
    /// A round's two sets, which must be on chain before its audit draw.
    #[derive(Copy, PartialOrd, Ord)]
    enum Stage {
        /// Who committed to which update.
        Commit,
        /// Whose update was delivered and admitted.
        Admitted,
    }
}

mirror! {
    #[derive(Copy)]
    struct Anchor {
        digest: Digest,
        /// The block that it is in.
        block: u32,
    }
}

mirror! {
    /// One or several consecutive rounds, as the coordinator commits them.
    #[derive(Copy)]
    struct RoundCommitment {
        first_round: Round,
        last_round: Round,
        /// Root of the tree of reward leaves (`proto::leaf`; BLAKE2b-256).
        contributions_root: Digest,
        number_of_leaves: u32,
        /// Digest of θ after `last_round`.
        theta_digest: Digest,
        /// Of these rounds: with the price, the most their reward may be.
        work_units: WorkUnits,
        /// Sum of the leaves' cumulative rewards.
        total_reward: Balance,
        evidence_digest: Digest,
    }
}

mirror! {
    #[derive(Copy)]
    enum RejectReason {
        ChallengeUpheld,
        /// It built on a round that was rejected.
        EarlierRejected,
        NotAttested,
    }
}

mirror! {
    #[derive(Copy)]
    enum RoundState {
        /// Waits for its window.
        Committed,
        Challenged,
        Finalized,
        Rejected(reason: RejectReason),
    }
}

mirror! {
    struct RoundRecord {
        commitment: RoundCommitment,
        /// The totals it built on, restored if it is rejected.
        before: super::Totals,
        /// The block that it is in.
        committed_at: u32,
        /// The first block in which it can become final.
        finalizable_at: u32,
        attestations: Vec<NodeId>,
        state: RoundState,
    }
}

mirror! {
    /// A challenge without its data, as it is stored and reported.
    #[derive(Copy)]
    enum ChallengeKind {
        WrongLeaf,
        OmittedWorker,
        WrongTheta,
        WrongTotals,
    }
}

mirror! {
    struct Challenge {
        challenger: NodeId,
        kind: ChallengeKind,
        evidence_digest: Digest,
        bond: Balance,
        challenged_at: u32,
        resolves_at: u32,
        upheld_by: Vec<NodeId>,
        dismissed_by: Vec<NodeId>,
    }
}

mirror! {
    #[derive(Copy)]
    enum ChallengeOutcome {
        /// The quorum found the challenger right: the round is rejected, the coordinator pays.
        Upheld,
        /// The quorum found the round right: the challenger's bond goes to the run.
        Dismissed,
        /// No quorum in time: the bond goes back.
        Undecided,
        /// An earlier round fell and took this one with it: the bond goes back.
        Superseded,
    }
}
