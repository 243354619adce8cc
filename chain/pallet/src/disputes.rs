//! What a worker's fault and a verifier's have in common: who may report it and when, its clock,
//! its contest, and who pays.

use frame_support::{dispatch::DispatchResult, ensure, traits::Get};
use sp_runtime::DispatchError;

use crate::{
    AccountId, Accounts, Anchors, Attribution, Balance, BlockNumber, Config, Digest, Error,
    FaultState, HoldReason, Pallet, RecoveryReason, Round, Run, RunId, RunState, Stage, Verifiers,
    money::{add, subtract},
    rounds::count,
};

/// Who reported first and answers for it, and in which role: [`Attribution::Verifier`] or
/// [`Attribution::Coordinator`].
pub(crate) type Opener<'a> = (&'a AccountId, Attribution);

/// How a dispute ends whose time is over.
pub(crate) enum Decision {
    /// It was not contested.
    Slash,
    /// It was contested with this bond, and no quorum came of it.
    Acquit { bond: Balance },
}

/// What the loser of a dispute has to pay.
pub(crate) struct Penalty<'a> {
    pub(crate) loser: &'a AccountId,
    pub(crate) taken_from: HoldReason,
    pub(crate) amount: Balance,
    pub(crate) reason: RecoveryReason,
    /// The verifiers that reported it.
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
    /// The role in which somebody may report in the run. An active verifier's report is a vote;
    /// the owner's opens a fault and is none.
    pub(crate) fn reporter_role(
        run_id: &RunId,
        run: &Run,
        who: &AccountId,
    ) -> Result<Attribution, DispatchError> {
        if Self::active_verifier(run_id, run, who).is_ok() {
            return Ok(Attribution::Verifier);
        }
        ensure!(*who == run.owner, Error::<T>::NotReporter);
        Ok(Attribution::Coordinator)
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
    pub(crate) fn open_dispute(
        run_id: &RunId,
        run: &mut Run,
        opener: Opener<'_>,
    ) -> Result<FaultState, DispatchError> {
        let (opened_by, opened_as) = opener;
        Self::hold(HoldReason::StorageDeposit, opened_by, T::RecordDeposit::get())?;
        run.open_disputes = run.open_disputes.saturating_add(1);
        if opened_as == Attribution::Verifier {
            Verifiers::<T>::mutate(run_id, opened_by, |verifier| {
                if let Some(verifier) = verifier {
                    verifier.open_reports = verifier.open_reports.saturating_add(1);
                }
            });
        }
        let executable_at = Self::now().saturating_add(run.terms.contest_window);
        Ok(FaultState::Reported { executable_at })
    }

    /// Counts the dispute no longer. Its deposit stays with the record.
    pub(crate) fn close_dispute(run_id: &RunId, run: &mut Run, opener: Opener<'_>) {
        let (opened_by, opened_as) = opener;
        run.open_disputes = run.open_disputes.saturating_sub(1);
        if opened_as == Attribution::Verifier {
            Verifiers::<T>::mutate(run_id, opened_by, |verifier| {
                if let Some(verifier) = verifier {
                    verifier.open_reports = verifier.open_reports.saturating_sub(1);
                }
            });
        }
    }

    /// Ensures that a vote in this state still counts.
    pub(crate) fn ensure_votable(state: &FaultState) -> DispatchResult {
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

    pub(crate) fn vote(voters: &mut Accounts, who: &AccountId) -> DispatchResult {
        ensure!(!voters.contains(who), Error::<T>::AlreadyVoted);
        voters.try_push(who.clone()).map_err(|_| Error::<T>::TooManyVerifiers)?;
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
    pub(crate) fn decision(state: &FaultState) -> Result<Decision, DispatchError> {
        match *state {
            FaultState::Reported { executable_at } => {
                ensure!(Self::now() >= executable_at, Error::<T>::WindowOpen);
                Ok(Decision::Slash)
            }
            FaultState::Contested { bond, resolves_at, .. } => {
                ensure!(Self::now() >= resolves_at, Error::<T>::WindowOpen);
                Ok(Decision::Acquit { bond })
            }
            FaultState::Executed { .. } | FaultState::Dismissed => {
                Err(Error::<T>::FaultDecided.into())
            }
        }
    }

    /// Takes a penalty: the reporters' share of it goes to those who voted, the rest into the
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
        let each = share.checked_div(count(receivers).into()).unwrap_or(0);
        let mut paid: Balance = 0;
        for receiver in receivers {
            paid = add(paid, Self::pay_from_hold(reason, payer, receiver, each)?)?;
        }
        Ok(paid)
    }

    /// The contest stands: the accused gets its bond back and as much from whoever opened the
    /// dispute, if that has it. Returns what the opener paid.
    pub(crate) fn indemnify(
        run_id: &RunId,
        run: &mut Run,
        accused: &AccountId,
        opener: Opener<'_>,
        bond: Balance,
    ) -> Result<Balance, DispatchError> {
        let (accuser, role) = opener;
        Self::release(HoldReason::ContestBond, accused, bond)?;
        if role != Attribution::Verifier {
            let due = bond.min(run.bond);
            let penalty = Self::pay_from_hold(HoldReason::CoordinatorBond, accuser, accused, due)?;
            run.bond = subtract(run.bond, penalty)?;
            return Ok(penalty);
        }
        let Some(mut verifier) = Verifiers::<T>::get(run_id, accuser) else {
            return Ok(0);
        };
        let due = bond.min(verifier.bond);
        let penalty = Self::pay_from_hold(HoldReason::VerifierBond, accuser, accused, due)?;
        verifier.bond = subtract(verifier.bond, penalty)?;
        Verifiers::<T>::insert(run_id, accuser, verifier);
        Ok(penalty)
    }
}
