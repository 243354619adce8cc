//! What a worker's fault and a verifier's have in common: who may accuse and vote, and when, its clock,
//! its contest, and who pays.

use frame_support::{dispatch::DispatchResult, ensure, traits::Get};
use sp_runtime::DispatchError;

use crate::{
    AccountId, Accounts, Anchors, Balance, BlockNumber, Config, Digest, Error, FaultState, Finding,
    HoldReason, Pallet, RecoveryReason, Round, Run, RunId, RunState, Stage, Votes,
    money::{add, subtract},
};

/// What the loser of a dispute has to pay.
pub(crate) struct Penalty<'a> {
    pub(crate) loser: &'a AccountId,
    pub(crate) taken_from: HoldReason,
    pub(crate) amount: Balance,
    pub(crate) reason: RecoveryReason,
    /// The verifiers that found against the loser.
    pub(crate) voters: &'a Accounts,
    /// The state in which it was decided.
    pub(crate) state: FaultState,
}

/// What was paid of a [`Penalty`], without the contest bond.
pub(crate) struct Paid {
    pub(crate) total: Balance,
    pub(crate) to_reporters: Balance,
    pub(crate) to_escrow: Balance,
}

impl<T: Config> Pallet<T> {
    /// Ensures that `who` may accuse in the run: its owner alone, on whose record everything else is that
    /// a verdict follows from. Others' accusations would be in the way of it.
    pub(crate) fn ensure_accuser(
        run: &Run,
        who: &AccountId,
        accused: &AccountId,
    ) -> DispatchResult {
        ensure!(*who == run.owner, Error::<T>::NotOwner);
        ensure!(who != accused, Error::<T>::SelfReport);
        Ok(())
    }

    /// Ensures that what was done in the run can still be reported.
    pub(crate) fn ensure_reportable(run: &Run) -> DispatchResult {
        let open = match run.state {
            RunState::Active | RunState::Paused(_) => true,
            RunState::Closed { vests_at, .. } => Self::now() < vests_at,
            RunState::Settled => false,
        };
        ensure!(open, Error::<T>::RunOver);
        Ok(())
    }

    /// Ensures that the round was worked on, and that somebody who came at `since` was there.
    pub(crate) fn ensure_took_part(
        run_id: &RunId,
        run: &Run,
        round: Round,
        since: BlockNumber,
    ) -> DispatchResult {
        match Anchors::<T>::get(run_id, (round, Stage::Commit)) {
            Some(anchor) => ensure!(since <= anchor.block, Error::<T>::JoinedLater),
            None => ensure!(round < run.next_round, Error::<T>::RoundNotAnchored),
        }
        Ok(())
    }

    /// Holds the deposit of the dispute's record and counts it; returns its first state.
    pub(crate) fn open_dispute(run: &mut Run) -> Result<FaultState, DispatchError> {
        Self::hold(HoldReason::StorageDeposit, &run.owner, T::RecordDeposit::get())?;
        run.open_disputes = run.open_disputes.saturating_add(1);
        let executable_at = Self::now().saturating_add(run.terms.contest_window);
        Ok(FaultState::Reported { executable_at })
    }

    /// Ensures that a vote in this state still counts.
    fn ensure_votable(state: &FaultState) -> DispatchResult {
        match state {
            FaultState::Reported { .. } => Ok(()),
            FaultState::Contested { resolves_at, .. } => {
                ensure!(Self::now() < *resolves_at, Error::<T>::WindowOver);
                Ok(())
            }
            FaultState::Executed { .. } | FaultState::Dismissed => {
                Err(Error::<T>::FaultDecided.into())
            }
        }
    }

    /// A verifier's vote about a round. It was a verifier before the round was: nobody buys itself a side
    /// in a dispute that is there already. Of a round that was never anchored nobody can say so.
    pub(crate) fn vote(
        (run_id, run, round): (&RunId, &Run, Round),
        (state, votes): (&FaultState, &mut Votes),
        (who, finds): (&AccountId, Finding),
    ) -> DispatchResult {
        Self::ensure_votable(state)?;
        let verifier = Self::active_verifier(run_id, run, who)?;
        // Nobody judges what it brought up itself.
        ensure!(*who != run.owner, Error::<T>::SelfReport);
        let anchor = Anchors::<T>::get(run_id, (round, Stage::Commit))
            .ok_or(Error::<T>::RoundNotAnchored)?;
        ensure!(verifier.registered_at <= anchor.block, Error::<T>::JoinedLater);
        let voted = votes.guilty.contains(who) || votes.innocent.contains(who);
        ensure!(!voted, Error::<T>::AlreadyVoted);
        let side = match finds {
            Finding::Guilty => &mut votes.guilty,
            Finding::Innocent => &mut votes.innocent,
        };
        side.try_push(who.clone()).map_err(|_| Error::<T>::TooManyVerifiers)?;
        Ok(())
    }

    /// The accused objects: holds its contest bond and starts the verifiers' time. Returns the
    /// bond.
    pub(crate) fn contest(
        run: &Run,
        accused: &AccountId,
        state: &mut FaultState,
        evidence_digest: Digest,
    ) -> Result<Balance, DispatchError> {
        let FaultState::Reported { executable_at } = *state else {
            return Err(Error::<T>::NotContestable.into());
        };
        let now = Self::now();
        ensure!(now < executable_at, Error::<T>::WindowOver);
        let bond = run.terms.contest_bond;
        Self::hold(HoldReason::ContestBond, accused, bond)?;
        let resolves_at = now.saturating_add(run.terms.resolution_window);
        *state = FaultState::Contested { bond, evidence_digest, resolves_at };
        Ok(bond)
    }

    /// How the dispute ends now, if its time is over.
    pub(crate) fn decision(
        run: &Run,
        state: &FaultState,
        votes: &Votes,
    ) -> Result<Finding, DispatchError> {
        let (over_at, contested) = match *state {
            FaultState::Reported { executable_at } => (executable_at, false),
            FaultState::Contested { resolves_at, .. } => (resolves_at, true),
            FaultState::Executed { .. } | FaultState::Dismissed => {
                return Err(Error::<T>::FaultDecided.into());
            }
        };
        ensure!(Self::now() >= over_at, Error::<T>::WindowOpen);
        Ok(votes.at_the_end(contested, run.terms.fault_quorum))
    }

    /// Takes a penalty: the voters' share of it goes to those who found the loser guilty, the rest into the
    /// escrow, and so does the bond of a contest that was lost.
    pub(crate) fn collect(
        run_id: &RunId,
        run: &mut Run,
        penalty: &Penalty<'_>,
    ) -> Result<Paid, DispatchError> {
        let Penalty { loser, taken_from, amount, reason, voters, state } = penalty;
        let from = (*taken_from, *loser);
        let share = run.terms.slashes.reporter_share.mul_floor(*amount);
        let to_reporters = Self::share_evenly(from, voters, share)?;
        let rest = subtract(*amount, to_reporters)?;
        let to_escrow = Self::recover_into_escrow(run_id, run, from, rest, *reason)?;
        if let FaultState::Contested { bond, .. } = state {
            let from = (HoldReason::ContestBond, *loser);
            Self::recover_into_escrow(run_id, run, from, *bond, RecoveryReason::ContestLost)?;
        }
        Ok(Paid { total: add(to_reporters, to_escrow)?, to_reporters, to_escrow })
    }

    /// Pays every receiver the same. Returns what was paid: what does not divide is not.
    fn share_evenly(
        from: (HoldReason, &AccountId),
        receivers: &Accounts,
        share: Balance,
    ) -> Result<Balance, DispatchError> {
        let (reason, payer) = from;
        let each = share.checked_div(receivers.len() as Balance).unwrap_or(0);
        let mut paid: Balance = 0;
        for receiver in receivers {
            paid = add(paid, Self::pay_from_hold(reason, payer, receiver, each)?)?;
        }
        Ok(paid)
    }

    /// The accused is not slashed: it gets its bond back, if it contested, and where a quorum found it
    /// innocent a contest's bond from the owner's, if that has it. Nobody is paid for what nobody could
    /// look at. Returns what the owner paid.
    pub(crate) fn indemnify(
        run: &mut Run,
        accused: &AccountId,
        (state, votes): (&FaultState, &Votes),
    ) -> Result<Balance, DispatchError> {
        if let FaultState::Contested { bond, .. } = state {
            Self::release(HoldReason::ContestBond, accused, *bond)?;
        }
        if !votes.clear(run.terms.fault_quorum) {
            return Ok(0);
        }
        let due = run.terms.contest_bond.min(run.bond);
        let penalty = Self::pay_from_hold(HoldReason::CoordinatorBond, &run.owner, accused, due)?;
        run.bond = subtract(run.bond, penalty)?;
        Ok(penalty)
    }
}
