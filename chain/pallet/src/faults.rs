//! Faults: reports, contests and slashes.

use frame_support::{BoundedVec, dispatch::DispatchResult, ensure, traits::Get};
use sp_runtime::DispatchError;

use crate::{
    AccountId, Anchors, Attribution, Balance, Config, Digest, Error, Event, Fault, FaultKind,
    FaultState, Faults, Forfeit, Forfeits, HoldReason, Pallet, RecoveryReason, Round, Run, RunId,
    RunState, Runs, Stage, Suspension, Suspensions, Verifiers, Worker, Workers,
    money::{add, subtract},
    rounds::count,
};

/// Which fault, of whom.
struct Accusation {
    run_id: RunId,
    worker: AccountId,
    round: Round,
}

impl<T: Config> Pallet<T> {
    pub(crate) fn do_report_fault(
        reporter: AccountId,
        run_id: RunId,
        worker: AccountId,
        round: Round,
        kind: FaultKind,
        evidence_digest: Digest,
    ) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        let accusation = Accusation { run_id, worker, round };
        let mut accused = Self::worker(&accusation.worker)?;
        ensure!(reporter != accusation.worker, Error::<T>::SelfReport);
        let is_verifier = Self::active_verifier(&run_id, &run, &reporter).is_ok();
        ensure!(is_verifier || reporter == run.owner, Error::<T>::NotReporter);
        let role = if is_verifier { Attribution::Verifier } else { Attribution::Coordinator };

        let mut fault = match Faults::<T>::get(run_id, (&accusation.worker, round)) {
            Some(fault) => {
                // The coordinator's word opens a fault; repeated, it adds nothing.
                ensure!(is_verifier, Error::<T>::AlreadyVoted);
                Self::ensure_vote_counts(&fault, kind)?;
                fault
            }
            None => {
                Self::ensure_accountable(&run, &accused, &accusation)?;
                Self::open_fault(
                    &mut run,
                    &mut accused,
                    &accusation,
                    (&reporter, role),
                    kind,
                    evidence_digest,
                )?
            }
        };
        if is_verifier {
            ensure!(!fault.verifiers.contains(&reporter), Error::<T>::AlreadyVoted);
            fault.verifiers.try_push(reporter.clone()).map_err(|_| Error::<T>::TooManyVerifiers)?;
        }
        let votes = count(&fault.verifiers);
        Self::deposit_event(Event::FaultReported {
            run: run_id,
            worker: accusation.worker.clone(),
            round,
            kind,
            reporter,
            role,
            evidence_digest,
            votes,
        });
        if votes >= run.terms.fault_quorum {
            Self::slash(&mut run, &mut accused, &accusation, &mut fault)?;
        }
        Self::store(&accusation, run, accused, fault);
        Ok(())
    }

    fn store(accusation: &Accusation, run: Run, worker: Worker, fault: Fault) {
        let Accusation { run_id, worker: who, round } = accusation;
        Faults::<T>::insert(run_id, (who, *round), fault);
        Workers::<T>::insert(who, worker);
        Runs::<T>::insert(run_id, run);
    }

    fn ensure_vote_counts(fault: &Fault, kind: FaultKind) -> DispatchResult {
        ensure!(fault.kind == kind, Error::<T>::FaultKindMismatch);
        match fault.state {
            FaultState::Reported { .. } => Ok(()),
            FaultState::Contested { resolves_at, .. } => {
                ensure!(Self::now() < resolves_at, Error::<T>::WindowOver);
                Ok(())
            }
            FaultState::Executed { .. } | FaultState::Dismissed => {
                Err(Error::<T>::FaultDecided.into())
            }
        }
    }

    /// Ensures that the worker took part in that round of that run and can still be reached.
    fn ensure_accountable(run: &Run, worker: &Worker, accusation: &Accusation) -> DispatchResult {
        let now = Self::now();
        let run_open = match run.state {
            RunState::Active | RunState::Paused(_) => true,
            RunState::Closed { vests_at, .. } => now < vests_at,
            RunState::Settled => false,
        };
        ensure!(run_open, Error::<T>::RunOver);
        let membership = worker
            .memberships
            .iter()
            .find(|membership| membership.run == accusation.run_id)
            .ok_or(Error::<T>::NotMember)?;
        let exposed = membership.exposed_until.is_none_or(|until| now < until);
        ensure!(exposed, Error::<T>::NotMember);
        match Anchors::<T>::get(accusation.run_id, (accusation.round, Stage::Commit)) {
            Some(anchor) => {
                ensure!(membership.joined_at <= anchor.block, Error::<T>::JoinedLater);
            }
            None => ensure!(accusation.round < run.next_round, Error::<T>::RoundNotAnchored),
        }
        Ok(())
    }

    fn open_fault(
        run: &mut Run,
        worker: &mut Worker,
        accusation: &Accusation,
        reporter: (&AccountId, Attribution),
        kind: FaultKind,
        evidence_digest: Digest,
    ) -> Result<Fault, DispatchError> {
        let (opened_by, opened_as) = reporter;
        let deposit = T::RecordDeposit::get();
        let now = Self::now();
        Self::hold(HoldReason::StorageDeposit, opened_by, deposit)?;
        run.open_disputes = run.open_disputes.saturating_add(1);
        worker.open_faults = worker.open_faults.saturating_add(1);
        Self::suspend_claims(accusation);
        if opened_as == Attribution::Verifier {
            Verifiers::<T>::mutate(accusation.run_id, opened_by, |verifier| {
                if let Some(verifier) = verifier {
                    verifier.open_reports = verifier.open_reports.saturating_add(1);
                }
            });
        }
        Ok(Fault {
            kind,
            evidence_digest,
            opened_by: opened_by.clone(),
            opened_as,
            deposit,
            verifiers: BoundedVec::new(),
            reported_at: now,
            state: FaultState::Reported {
                executable_at: now.saturating_add(run.terms.contest_window),
            },
        })
    }

    pub(crate) fn do_contest_fault(
        worker: AccountId,
        run_id: RunId,
        round: Round,
        evidence_digest: Digest,
    ) -> DispatchResult {
        let run = Self::run(&run_id)?;
        let mut fault =
            Faults::<T>::get(run_id, (&worker, round)).ok_or(Error::<T>::FaultUnknown)?;
        let FaultState::Reported { executable_at } = fault.state else {
            return Err(Error::<T>::NotContestable.into());
        };
        let now = Self::now();
        ensure!(now < executable_at, Error::<T>::WindowOver);
        let bond = run.terms.contest_bond;
        Self::hold(HoldReason::ContestBond, &worker, bond)?;
        let resolves_at = now.saturating_add(run.terms.resolution_window);
        fault.state = FaultState::Contested { bond, evidence_digest, resolves_at };
        Faults::<T>::insert(run_id, (&worker, round), fault);
        Self::deposit_event(Event::FaultContested {
            run: run_id,
            worker,
            round,
            evidence_digest,
            bond,
        });
        Ok(())
    }

    pub(crate) fn do_execute_fault(
        run_id: RunId,
        worker: AccountId,
        round: Round,
    ) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        let accusation = Accusation { run_id, worker, round };
        let mut accused = Self::worker(&accusation.worker)?;
        let mut fault = Faults::<T>::get(run_id, (&accusation.worker, round))
            .ok_or(Error::<T>::FaultUnknown)?;
        match fault.state {
            FaultState::Reported { executable_at } => {
                ensure!(Self::now() >= executable_at, Error::<T>::WindowOpen);
                Self::slash(&mut run, &mut accused, &accusation, &mut fault)?;
            }
            FaultState::Contested { bond, resolves_at, .. } => {
                ensure!(Self::now() >= resolves_at, Error::<T>::WindowOpen);
                Self::acquit(&mut run, &mut accused, &accusation, &mut fault, bond)?;
            }
            FaultState::Executed { .. } | FaultState::Dismissed => {
                return Err(Error::<T>::FaultDecided.into());
            }
        }
        Self::store(&accusation, run, accused, fault);
        Ok(())
    }

    /// Takes the fault's price from the worker's stake, and its contest bond if it contested.
    fn slash(
        run: &mut Run,
        worker: &mut Worker,
        accusation: &Accusation,
        fault: &mut Fault,
    ) -> DispatchResult {
        let Accusation { run_id, worker: who, round } = accusation;
        let amount = run.terms.slashes.of(fault.kind).min(worker.stake);
        let to_reporters = Self::reward_reporters(run, who, fault, amount)?;
        let rest = subtract(amount, to_reporters)?;
        let from = (HoldReason::WorkerStake, who);
        let reason = RecoveryReason::WorkerSlashed;
        let to_escrow = Self::recover_into_escrow(run_id, run, from, rest, reason)?;
        let slashed = add(to_reporters, to_escrow)?;
        worker.stake = subtract(worker.stake, slashed)?;
        if let FaultState::Contested { bond, .. } = fault.state {
            let from = (HoldReason::ContestBond, who);
            let reason = RecoveryReason::ContestLost;
            Self::recover_into_escrow(run_id, run, from, bond, reason)?;
        }

        let until_block = Self::now();
        let from_round = Forfeits::<T>::get(run_id, who)
            .map_or(*round, |earlier| earlier.from_round.min(*round));
        Forfeits::<T>::insert(run_id, who, Forfeit { from_round, until_block });
        fault.state = FaultState::Executed { slashed };
        Self::end_dispute(run, worker, accusation, fault);
        Self::deposit_event(Event::WorkerSlashed {
            run: *run_id,
            worker: who.clone(),
            round: *round,
            kind: fault.kind,
            amount: slashed,
            to_reporters,
            to_escrow,
            votes: count(&fault.verifiers),
        });
        Ok(())
    }

    /// Shares the reporters' part of a slash evenly; what does not divide is the run's.
    fn reward_reporters(
        run: &Run,
        worker: &AccountId,
        fault: &Fault,
        amount: Balance,
    ) -> Result<Balance, DispatchError> {
        let share = run.terms.slashes.reporter_share.mul_floor(amount);
        let each = share.checked_div(count(&fault.verifiers).into()).unwrap_or(0);
        let mut paid: Balance = 0;
        for verifier in &fault.verifiers {
            let received = Self::pay_from_hold(HoldReason::WorkerStake, worker, verifier, each)?;
            paid = add(paid, received)?;
        }
        Ok(paid)
    }

    /// The contest stands: the worker gets its bond back and as much from whoever accused it.
    fn acquit(
        run: &mut Run,
        worker: &mut Worker,
        accusation: &Accusation,
        fault: &mut Fault,
        bond: Balance,
    ) -> DispatchResult {
        let Accusation { run_id, worker: who, round } = accusation;
        Self::release(HoldReason::ContestBond, who, bond)?;
        let accuser = &fault.opened_by;
        let penalty = if fault.opened_as == Attribution::Verifier {
            let mut penalty = 0;
            if let Some(mut verifier) = Verifiers::<T>::get(run_id, accuser) {
                let due = bond.min(verifier.bond);
                penalty = Self::pay_from_hold(HoldReason::VerifierBond, accuser, who, due)?;
                verifier.bond = subtract(verifier.bond, penalty)?;
                Verifiers::<T>::insert(run_id, accuser, verifier);
            }
            penalty
        } else {
            let due = bond.min(run.bond);
            let penalty = Self::pay_from_hold(HoldReason::CoordinatorBond, accuser, who, due)?;
            run.bond = subtract(run.bond, penalty)?;
            penalty
        };
        fault.state = FaultState::Dismissed;
        Self::end_dispute(run, worker, accusation, fault);
        Self::deposit_event(Event::FaultDismissed {
            run: *run_id,
            worker: who.clone(),
            round: *round,
            kind: fault.kind,
            attribution: fault.opened_as,
            penalty,
        });
        Ok(())
    }

    /// Holds back what the fault would forfeit: once it is paid, no slash brings it back.
    fn suspend_claims(accusation: &Accusation) {
        let Accusation { run_id, worker, round } = accusation;
        Suspensions::<T>::mutate(run_id, worker, |entry| {
            let suspension = entry.get_or_insert(Suspension { from_round: *round, open_faults: 0 });
            suspension.from_round = suspension.from_round.min(*round);
            suspension.open_faults = suspension.open_faults.saturating_add(1);
        });
    }

    /// Lets go of what was held back when no fault of the worker is undecided any more.
    fn resume_claims(run: &mut Run, accusation: &Accusation) {
        Suspensions::<T>::mutate_exists(accusation.run_id, &accusation.worker, |entry| {
            *entry = entry.and_then(|suspension| {
                let open_faults = suspension.open_faults.saturating_sub(1);
                (open_faults > 0).then_some(Suspension { open_faults, ..suspension })
            });
        });
        // What waited for the decision can still be claimed for the whole time.
        if let RunState::Closed { expires_at, .. } = &mut run.state {
            *expires_at = Self::now().saturating_add(run.terms.claim_window).max(*expires_at);
        }
    }

    fn end_dispute(run: &mut Run, worker: &mut Worker, accusation: &Accusation, fault: &Fault) {
        run.open_disputes = run.open_disputes.saturating_sub(1);
        worker.open_faults = worker.open_faults.saturating_sub(1);
        Self::resume_claims(run, accusation);
        if fault.opened_as == Attribution::Verifier {
            Verifiers::<T>::mutate(accusation.run_id, &fault.opened_by, |verifier| {
                if let Some(verifier) = verifier {
                    verifier.open_reports = verifier.open_reports.saturating_sub(1);
                }
            });
        }
    }
}
