//! Runs: terms, escrow, pauses, the end and what follows it.

use alloc::vec::Vec;

use frame_support::{BoundedVec, dispatch::DispatchResult, ensure, traits::Get};
use sp_runtime::{
    ArithmeticError, DispatchError, Rounding, helpers_128bit::multiply_by_rational_with_rounding,
};

use crate::{
    AccountId, Anchors, Attribution, Balance, Claimed, CloseReason, Config, Error, Event,
    FaultKind, Faults, Forfeits, Funding, HoldReason, Pallet, PauseReason, PrunedRuns,
    RecoveryReason, Rounds, Run, RunId, RunState, RunTerms, Runs, Totals, VERIFIERS_MAX,
    VerifierFaults, Verifiers,
    money::{add, subtract},
};

impl<T: Config> Pallet<T> {
    pub(crate) fn run(run_id: &RunId) -> Result<Run, DispatchError> {
        Runs::<T>::get(run_id).ok_or_else(|| Error::<T>::RunUnknown.into())
    }

    /// A run that is active or paused.
    pub(crate) fn open_run(run_id: &RunId) -> Result<Run, DispatchError> {
        let run = Self::run(run_id)?;
        match run.state {
            RunState::Active | RunState::Paused(_) => Ok(run),
            RunState::Closed { .. } | RunState::Settled => Err(Error::<T>::RunOver.into()),
        }
    }

    fn owned_open_run(run_id: &RunId, who: &AccountId) -> Result<Run, DispatchError> {
        let run = Self::open_run(run_id)?;
        ensure!(run.owner == *who, Error::<T>::NotOwner);
        Ok(run)
    }

    pub(crate) fn owned_active_run(run_id: &RunId, who: &AccountId) -> Result<Run, DispatchError> {
        let run = Self::owned_open_run(run_id, who)?;
        ensure!(run.state == RunState::Active, Error::<T>::RunNotActive);
        Ok(run)
    }

    fn check_terms(terms: &RunTerms) -> DispatchResult {
        let possible = match u32::try_from(terms.verifiers.len()).unwrap_or(u32::MAX) {
            0 => VERIFIERS_MAX,
            invited => invited,
        };
        ensure!((1..=possible).contains(&terms.fault_quorum), Error::<T>::InvalidQuorum);
        ensure!(terms.attestation_quorum <= possible, Error::<T>::InvalidQuorum);

        let windows = [
            terms.challenge_window,
            terms.contest_window,
            terms.resolution_window,
            terms.claim_window,
            terms.idle_timeout,
            terms.unbonding_period,
        ];
        let allowed = 1..=T::WindowMax::get();
        ensure!(windows.iter().all(|window| allowed.contains(window)), Error::<T>::InvalidWindow);
        let decided_after = terms
            .challenge_window
            .saturating_add(terms.contest_window)
            .saturating_add(terms.resolution_window);
        ensure!(terms.unbonding_period >= decided_after, Error::<T>::UnbondingTooShort);

        let kinds =
            [FaultKind::Replay, FaultKind::Codec, FaultKind::Withheld, FaultKind::Equivocation];
        ensure!(
            kinds.iter().all(|kind| terms.slashes.of(*kind) <= terms.minimum_stake),
            Error::<T>::SlashAboveStake
        );
        ensure!(terms.slashes.coordinator <= terms.coordinator_bond, Error::<T>::SlashAboveStake);
        ensure!(
            terms.contest_bond <= terms.verifier_bond
                && terms.contest_bond <= terms.coordinator_bond
                && terms.verifier_bond >= T::RecordDeposit::get()
                && terms.challenge_bond >= T::RecordDeposit::get(),
            Error::<T>::BondTooSmall
        );
        Ok(())
    }

    pub(crate) fn do_create_run(
        owner: AccountId,
        run_id: RunId,
        terms: RunTerms,
        budget: Balance,
    ) -> DispatchResult {
        ensure!(!Runs::<T>::contains_key(run_id), Error::<T>::RunExists);
        ensure!(!PrunedRuns::<T>::contains_key(run_id), Error::<T>::RunIdSpent);
        ensure!(budget >= T::MinimumFunding::get(), Error::<T>::FundingTooSmall);
        Self::check_terms(&terms)?;

        let deposit = T::RunDeposit::get();
        let bond = terms.coordinator_bond;
        let config_digest = terms.config_digest;
        Self::hold(HoldReason::StorageDeposit, &owner, deposit)?;
        Self::hold(HoldReason::CoordinatorBond, &owner, bond)?;
        Self::open_pot(&run_id, &owner)?;
        let mut run = Run {
            owner: owner.clone(),
            terms,
            state: RunState::Active,
            escrow: 0,
            funded: 0,
            funded_outstanding: 0,
            recovered: 0,
            refunded: 0,
            claimed: 0,
            finalized_reward: 0,
            committed: Totals::default(),
            deposit,
            bond,
            verifiers: 0,
            next_round: 0,
            pending: BoundedVec::new(),
            latest_finalized: None,
            open_disputes: 0,
            last_progress: Self::now(),
        };
        Self::fund_escrow(&run_id, &mut run, &owner, budget)?;
        Funding::<T>::insert(run_id, &owner, budget);
        Runs::<T>::insert(run_id, run);
        Self::deposit_event(Event::RunCreated { run: run_id, owner, config_digest, budget, bond });
        Ok(())
    }

    pub(crate) fn do_fund_run(funder: AccountId, run_id: RunId, amount: Balance) -> DispatchResult {
        let mut run = Self::open_run(&run_id)?;
        ensure!(amount >= T::MinimumFunding::get(), Error::<T>::FundingTooSmall);
        Self::fund_escrow(&run_id, &mut run, &funder, amount)?;
        let contributed = add(Funding::<T>::get(run_id, &funder), amount)?;
        Funding::<T>::insert(run_id, &funder, contributed);
        Self::deposit_event(Event::RunFunded { run: run_id, funder, amount, escrow: run.escrow });

        if let RunState::Paused(PauseReason::InsufficientFunds { required }) = run.state
            && run.escrow >= required
        {
            Self::activate(&run_id, &mut run);
        }
        Runs::<T>::insert(run_id, run);
        Ok(())
    }

    pub(crate) fn pause(run_id: &RunId, run: &mut Run, reason: PauseReason) {
        run.state = RunState::Paused(reason);
        Self::deposit_event(Event::RunPaused { run: *run_id, reason });
    }

    fn activate(run_id: &RunId, run: &mut Run) {
        run.state = RunState::Active;
        Self::deposit_event(Event::RunResumed { run: *run_id, escrow: run.escrow, bond: run.bond });
    }

    pub(crate) fn do_pause_run(who: AccountId, run_id: RunId) -> DispatchResult {
        let mut run = Self::owned_active_run(&run_id, &who)?;
        Self::pause(&run_id, &mut run, PauseReason::Owner);
        Runs::<T>::insert(run_id, run);
        Ok(())
    }

    pub(crate) fn do_resume_run(who: AccountId, run_id: RunId) -> DispatchResult {
        let mut run = Self::owned_open_run(&run_id, &who)?;
        let RunState::Paused(reason) = run.state else {
            return Err(Error::<T>::RunNotPaused.into());
        };
        if let PauseReason::InsufficientFunds { required } = reason {
            ensure!(run.escrow >= required, Error::<T>::EscrowTooSmall);
        }
        let missing = run.terms.coordinator_bond.saturating_sub(run.bond);
        Self::hold(HoldReason::CoordinatorBond, &who, missing)?;
        run.bond = add(run.bond, missing)?;
        Self::activate(&run_id, &mut run);
        Runs::<T>::insert(run_id, run);
        Ok(())
    }

    pub(crate) fn do_end_run(who: AccountId, run_id: RunId, reason: CloseReason) -> DispatchResult {
        let mut run = Self::owned_open_run(&run_id, &who)?;
        Self::close(&run_id, &mut run, reason, Attribution::Nobody);
        Runs::<T>::insert(run_id, run);
        Ok(())
    }

    pub(crate) fn do_timeout_run(run_id: RunId) -> DispatchResult {
        let mut run = Self::open_run(&run_id)?;
        let times_out_at = run.last_progress.saturating_add(run.terms.idle_timeout);
        ensure!(Self::now() >= times_out_at, Error::<T>::NotTimedOut);
        let out_of_money =
            matches!(run.state, RunState::Paused(PauseReason::InsufficientFunds { .. }));
        let attribution = if out_of_money {
            Attribution::Sponsor
        } else {
            let amount = run.terms.slashes.coordinator;
            Self::slash_coordinator(&run_id, &mut run, None, amount, RecoveryReason::RunTimedOut)?;
            Attribution::Coordinator
        };
        Self::close(&run_id, &mut run, CloseReason::TimedOut, attribution);
        Runs::<T>::insert(run_id, run);
        Ok(())
    }

    fn close(run_id: &RunId, run: &mut Run, reason: CloseReason, attribution: Attribution) {
        // The last commit needs its challenge window, and a fault of its rounds its contest.
        let vests_at = Self::now()
            .saturating_add(run.terms.challenge_window)
            .saturating_add(run.terms.contest_window)
            .saturating_add(run.terms.resolution_window);
        let expires_at = vests_at.saturating_add(run.terms.claim_window);
        run.state = RunState::Closed { reason, vests_at, expires_at };
        Self::deposit_event(Event::RunClosed {
            run: *run_id,
            reason,
            attribution,
            vests_at,
            expires_at,
        });
    }

    /// Takes up to `amount` from the coordinator's bond: a share to whoever showed the fault, the
    /// rest into the escrow. Returns what the former got.
    pub(crate) fn slash_coordinator(
        run_id: &RunId,
        run: &mut Run,
        challenger: Option<&AccountId>,
        amount: Balance,
        reason: RecoveryReason,
    ) -> Result<Balance, DispatchError> {
        let owner = run.owner.clone();
        let amount = amount.min(run.bond);
        let share = run.terms.slashes.reporter_share.mul_floor(amount);
        let rewarded = match challenger {
            Some(challenger) => {
                Self::pay_from_hold(HoldReason::CoordinatorBond, &owner, challenger, share)?
            }
            None => 0,
        };
        let rest = subtract(amount, rewarded)?;
        let from = (HoldReason::CoordinatorBond, &owner);
        let recovered = Self::recover_into_escrow(run_id, run, from, rest, reason)?;
        let slashed = add(rewarded, recovered)?;
        run.bond = subtract(run.bond, slashed)?;
        Self::deposit_event(Event::CoordinatorSlashed {
            run: *run_id,
            coordinator: owner,
            amount: slashed,
            reason,
        });
        Ok(rewarded)
    }

    /// Ensures that a closed run's claims are over and nothing of it is undecided.
    fn ensure_expired(run: &Run) -> DispatchResult {
        let RunState::Closed { expires_at, .. } = run.state else {
            return Err(Error::<T>::RunNotClosed.into());
        };
        ensure!(Self::now() >= expires_at, Error::<T>::ClaimWindowOpen);
        ensure!(run.pending.is_empty() && run.open_disputes == 0, Error::<T>::StillPending);
        Ok(())
    }

    pub(crate) fn do_refund_funder(run_id: RunId, funder: AccountId) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        Self::ensure_expired(&run)?;
        let contributed = Funding::<T>::get(run_id, &funder);
        ensure!(contributed > 0, Error::<T>::NothingToRefund);
        // Of what is left, by what is outstanding: the last funder gets the rest to the planck.
        let share = multiply_by_rational_with_rounding(
            run.escrow,
            contributed,
            run.funded_outstanding,
            Rounding::Down,
        )
        .ok_or(ArithmeticError::Overflow)?;
        let pot = Self::pot_account(&run_id);
        let refunded = Self::pay_from_hold(HoldReason::RunEscrow, &pot, &funder, share)?;
        run.escrow = subtract(run.escrow, refunded)?;
        run.refunded = add(run.refunded, refunded)?;
        run.funded_outstanding = subtract(run.funded_outstanding, contributed)?;
        Funding::<T>::remove(run_id, &funder);
        Runs::<T>::insert(run_id, run);
        Self::deposit_event(Event::FunderRefunded { run: run_id, funder, contributed, refunded });
        Ok(())
    }

    pub(crate) fn do_settle_run(run_id: RunId) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        Self::ensure_expired(&run)?;
        ensure!(run.funded_outstanding == 0, Error::<T>::FundersNotRefunded);
        let owner = run.owner.clone();
        // Only what a funder's vanished account could not receive.
        let left_over = run.escrow;
        Self::pay_from_escrow(&run_id, &mut run, &owner, left_over)?;
        run.refunded = add(run.refunded, left_over)?;
        let bond_returned = run.bond;
        Self::release(HoldReason::CoordinatorBond, &owner, bond_returned)?;
        run.bond = 0;
        run.state = RunState::Settled;
        Runs::<T>::insert(run_id, run);
        Self::deposit_event(Event::RunSettled { run: run_id, bond_returned, left_over });
        Ok(())
    }

    pub(crate) fn do_prune_run(run_id: RunId, limit: u32) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        ensure!(run.state == RunState::Settled, Error::<T>::RunNotSettled);
        let mut left = limit;
        // A settled run has no open disputes, so that no verifier is accused. Collected first: the map
        // must not change under its iterator.
        let verifiers: Vec<_> = Verifiers::<T>::iter_prefix(run_id).take(left as usize).collect();
        for (who, verifier) in verifiers {
            Self::remove_verifier(&run_id, &mut run, who, &verifier)?;
            left = left.saturating_sub(1);
        }
        for (_, fault) in Faults::<T>::drain_prefix(run_id).take(left as usize) {
            Self::release(HoldReason::StorageDeposit, &run.owner, fault.deposit)?;
            left = left.saturating_sub(1);
        }
        for (_, fault) in VerifierFaults::<T>::drain_prefix(run_id).take(left as usize) {
            Self::release(HoldReason::StorageDeposit, &run.owner, fault.deposit)?;
            left = left.saturating_sub(1);
        }
        let drained = Rounds::<T>::drain_prefix(run_id).take(left as usize).count();
        left = left.saturating_sub(u32::try_from(drained).unwrap_or(u32::MAX));
        let drained = Anchors::<T>::drain_prefix(run_id).take(left as usize).count();
        left = left.saturating_sub(u32::try_from(drained).unwrap_or(u32::MAX));
        let drained = Forfeits::<T>::drain_prefix(run_id).take(left as usize).count();
        left = left.saturating_sub(u32::try_from(drained).unwrap_or(u32::MAX));
        let drained = Claimed::<T>::drain_prefix(run_id).take(left as usize).count();
        left = left.saturating_sub(u32::try_from(drained).unwrap_or(u32::MAX));

        // Less than the limit was there: everything is gone.
        let finished = left > 0;
        if finished {
            // The record that the id is taken stays, and its deposit with it.
            let deposit = subtract(run.deposit, T::RecordDeposit::get())?;
            Self::release(HoldReason::StorageDeposit, &run.owner, deposit)?;
            Self::close_pot(&run_id, &run.owner)?;
            Runs::<T>::remove(run_id);
            PrunedRuns::<T>::insert(run_id, run.owner);
        } else {
            Runs::<T>::insert(run_id, run);
        }
        let records = limit.saturating_sub(left);
        Self::deposit_event(Event::RunPruned { run: run_id, records, finished });
        Ok(())
    }
}
