//! Workers, verifiers and faults.

use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};

use super::{RunState, mirror};

mirror! {
    #[derive(Copy)]
    struct Membership {
        run: RunId,
        joined_at: u32,
        /// Once left: faults of earlier work can be reported before this block.
        exposed_until: Option<u32>,
    }
}

mirror! {
    struct Worker {
        peer_id: Vec<u8>,
        capability_digest: Digest,
        stake: Balance,
        registered_at: u32,
        /// The block from which the stake can be withdrawn, once the exit was announced.
        exit_at: Option<u32>,
        open_faults: u32,
        memberships: Vec<Membership>,
    }
}

mirror! {
    #[derive(Copy)]
    struct Verifier {
        /// Held for this run.
        bond: Balance,
        registered_at: u32,
        /// The block from which the bond can be withdrawn, once retired.
        exit_at: Option<u32>,
        /// Faults that it is accused of and that are not decided.
        open_faults: u32,
    }
}

mirror! {
    /// What a worker did.
    #[derive(Copy, PartialOrd, Ord)]
    enum FaultKind {
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

mirror! {
    #[derive(Copy)]
    enum FaultState {
        /// Can be contested before `executable_at` and executed from then on; votes count until it is.
        Reported { executable_at: u32, },
        /// Can be voted on before `resolves_at` and executed from then on.
        Contested { bond: Balance, evidence_digest: Digest, resolves_at: u32, },
        Executed { slashed: Balance, },
        Dismissed,
    }
}

mirror! {
    /// How the verifiers of a run voted on what somebody is accused of.
    struct Votes {
        guilty: Vec<NodeId>,
        innocent: Vec<NodeId>,
    }
}

mirror! {
    /// What one verifier, or all of them together, find of somebody who is accused.
    #[derive(Copy)]
    enum Finding {
        Guilty,
        Innocent,
    }
}

impl Votes {
    /// What that verifier found, if it has voted.
    pub fn of(&self, verifier: &NodeId) -> Option<Finding> {
        if self.guilty.contains(verifier) {
            return Some(Finding::Guilty);
        }
        self.innocent.contains(verifier).then_some(Finding::Innocent)
    }
}

mirror! {
    struct Fault {
        kind: FaultKind,
        evidence_digest: Digest,
        /// Held from the run's owner for the record.
        deposit: Balance,
        /// No more verifiers than these have a vote on it.
        jury: u32,
        votes: Votes,
        reported_at: u32,
        state: FaultState,
    }
}

mirror! {
    /// What a verifier said about the replay of a worker's round, and the run's owner says is not so. Blocks
    /// are block numbers.
    struct VerifierFault {
        evidence_digest: Digest,
        /// Held from the run's owner for the record.
        deposit: Balance,
        /// No more verifiers than these have a vote on it.
        jury: u32,
        votes: Votes,
        /// The block in which it was reported first.
        reported_at: u32,
        state: FaultState,
    }
}

mirror! {
    /// What a worker's undecided faults hold back: its leaves of rounds from `from_round` on.
    #[derive(Copy)]
    struct Suspension {
        from_round: Round,
        /// Faults that are not decided.
        open_faults: u32,
    }
}

mirror! {
    /// A slashed worker's leaves that are not payable: those of rounds from `from_round` on whose
    /// commit is not later than block `until_block`.
    #[derive(Copy)]
    struct Forfeit {
        from_round: Round,
        until_block: u32,
    }
}

impl Forfeit {
    /// Whether it bars the leaf of a round that was committed in that block.
    pub fn bars(&self, round: Round, committed_at: u32) -> bool {
        round >= self.from_round && committed_at <= self.until_block
    }
}

impl Membership {
    /// Whether a fault of its run, which is in this state, can still reach the worker after block
    /// `now`.
    pub(crate) fn is_exposed(&self, state: &RunState, now: u32) -> bool {
        match (self.exposed_until, state) {
            (Some(until), _) => now < until,
            (None, RunState::Active | RunState::Paused(_)) => true,
            (None, RunState::Closed { vests_at, .. }) => now < *vests_at,
            (None, RunState::Settled) => false,
        }
    }
}

impl Worker {
    /// Whether the worker has joined the run and not left it.
    pub fn is_member(&self, run: &RunId) -> bool {
        self.memberships
            .iter()
            .any(|membership| membership.run == *run && membership.exposed_until.is_none())
    }
}
