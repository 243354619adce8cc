//! Faults: reports, contests and slashes.

use frame_support::{dispatch::DispatchResult, ensure, traits::Get};
use sp_runtime::DispatchError;

use crate::{
    AccountId, Config, Digest, Error, Event, Fault, FaultKind, FaultState, Faults, Finding,
    Forfeit, Forfeits, HoldReason, Pallet, RecoveryReason, Round, Run, RunId, RunState, Runs,
    Suspension, Suspensions, Votes, Worker, Workers,
    disputes::{Paid, Penalty},
    money::subtract,
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
        owner: AccountId,
        run_id: RunId,
        worker: AccountId,
        round: Round,
        kind: FaultKind,
        evidence_digest: Digest,
    ) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        let accusation = Accusation { run_id, worker, round };
        Self::ensure_accuser(&run, &owner, &accusation.worker)?;
        let mut accused = Self::worker(&accusation.worker)?;
        let known = Faults::<T>::contains_key(run_id, (&accusation.worker, round));
        ensure!(!known, Error::<T>::AlreadyReported);
        Self::ensure_accountable(&run, &accused, &accusation)?;

        let state = Self::open_dispute(&mut run)?;
        accused.open_faults = accused.open_faults.saturating_add(1);
        Self::suspend_claims(&accusation);
        let fault = Fault {
            kind,
            evidence_digest,
            deposit: T::RecordDeposit::get(),
            jury: run.verifiers,
            votes: Votes::default(),
            reported_at: Self::now(),
            state,
        };
        Self::deposit_event(Event::FaultReported {
            run: run_id,
            worker: accusation.worker.clone(),
            round,
            kind,
            evidence_digest,
        });
        Self::store(&accusation, run, accused, fault);
        Ok(())
    }

    pub(crate) fn do_vote_on_fault(
        verifier: AccountId,
        run_id: RunId,
        worker: AccountId,
        round: Round,
        finds: Finding,
    ) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        let accusation = Accusation { run_id, worker, round };
        let mut accused = Self::worker(&accusation.worker)?;
        let mut fault = Self::fault(&accusation)?;
        ensure!(verifier != accusation.worker, Error::<T>::SelfReport);
        let ballot = (&fault.state, &mut fault.votes);
        Self::vote((&run_id, &run, round), ballot, (&verifier, finds))?;
        Self::deposit_event(Event::FaultVoted {
            run: run_id,
            worker: accusation.worker.clone(),
            round,
            verifier,
            finds,
        });
        if let Some(decision) = fault.votes.settled(fault.jury, run.terms.fault_quorum) {
            Self::decide_fault(&mut run, &mut accused, &accusation, (&mut fault, decision))?;
        }
        Self::store(&accusation, run, accused, fault);
        Ok(())
    }

    fn fault(accusation: &Accusation) -> Result<Fault, DispatchError> {
        let Accusation { run_id, worker, round } = accusation;
        Faults::<T>::get(run_id, (worker, round)).ok_or_else(|| Error::<T>::FaultUnknown.into())
    }

    fn decide_fault(
        run: &mut Run,
        accused: &mut Worker,
        accusation: &Accusation,
        (fault, decision): (&mut Fault, Finding),
    ) -> DispatchResult {
        match decision {
            Finding::Guilty => Self::slash(run, accused, accusation, fault),
            Finding::Innocent => Self::acquit(run, accused, accusation, fault),
        }
    }

    fn store(accusation: &Accusation, run: Run, worker: Worker, fault: Fault) {
        let Accusation { run_id, worker: who, round } = accusation;
        Faults::<T>::insert(run_id, (who, *round), fault);
        Workers::<T>::insert(who, worker);
        Runs::<T>::insert(run_id, run);
    }

    /// Ensures that the worker took part in that round of that run and can still be reached.
    fn ensure_accountable(run: &Run, worker: &Worker, accusation: &Accusation) -> DispatchResult {
        Self::ensure_reportable(run)?;
        let membership = worker
            .memberships
            .iter()
            .find(|membership| membership.run == accusation.run_id)
            .ok_or(Error::<T>::NotMember)?;
        let exposed = membership.exposed_until.is_none_or(|until| Self::now() < until);
        ensure!(exposed, Error::<T>::NotMember);
        Self::ensure_took_part(&accusation.run_id, run, accusation.round, membership.joined_at)
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
        let bond = Self::contest(&run, &worker, &mut fault.state, evidence_digest)?;
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
        let mut fault = Self::fault(&accusation)?;
        let decision = Self::decision(&run, &fault.state, &fault.votes)?;
        Self::decide_fault(&mut run, &mut accused, &accusation, (&mut fault, decision))?;
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
        let penalty = Penalty {
            loser: who,
            taken_from: HoldReason::WorkerStake,
            amount: run.terms.slashes.of(fault.kind).min(worker.stake),
            reason: RecoveryReason::WorkerSlashed,
            voters: &fault.votes.guilty,
            state: fault.state,
        };
        let Paid { total, to_reporters, to_escrow } = Self::collect(run_id, run, &penalty)?;
        worker.stake = subtract(worker.stake, total)?;

        let until_block = Self::now();
        let from_round = Forfeits::<T>::get(run_id, who)
            .map_or(*round, |earlier| earlier.from_round.min(*round));
        Forfeits::<T>::insert(run_id, who, Forfeit { from_round, until_block });
        fault.state = FaultState::Executed { slashed: total };
        Self::end_dispute(run, worker, accusation);
        Self::deposit_event(Event::WorkerSlashed {
            run: *run_id,
            worker: who.clone(),
            round: *round,
            kind: fault.kind,
            amount: total,
            to_reporters,
            to_escrow,
            votes: count(&fault.votes.guilty),
        });
        Ok(())
    }

    /// The worker keeps its stake.
    fn acquit(
        run: &mut Run,
        worker: &mut Worker,
        accusation: &Accusation,
        fault: &mut Fault,
    ) -> DispatchResult {
        let Accusation { run_id, worker: who, round } = accusation;
        let penalty = Self::indemnify(run, who, (&fault.state, &fault.votes))?;
        fault.state = FaultState::Dismissed;
        Self::end_dispute(run, worker, accusation);
        Self::deposit_event(Event::FaultDismissed {
            run: *run_id,
            worker: who.clone(),
            round: *round,
            kind: fault.kind,
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

    fn end_dispute(run: &mut Run, worker: &mut Worker, accusation: &Accusation) {
        worker.open_faults = worker.open_faults.saturating_sub(1);
        run.open_disputes = run.open_disputes.saturating_sub(1);
        Self::resume_claims(run, accusation);
    }
}
