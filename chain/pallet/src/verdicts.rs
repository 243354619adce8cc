//! Verdicts: a verifier answers with its whole bond for what it says about a replay.

use frame_support::{dispatch::DispatchResult, ensure, traits::Get};
use sp_runtime::DispatchError;

use crate::{
    AccountId, Config, Digest, Error, Event, FaultState, Finding, HoldReason, Pallet,
    RecoveryReason, Round, Run, RunId, Runs, Verifier, VerifierFault, VerifierFaults, Verifiers,
    Votes,
    disputes::{Paid, Penalty},
    money::subtract,
    rounds::count,
};

/// What a verifier said about a worker's round.
pub(crate) struct Verdict {
    pub(crate) run_id: RunId,
    pub(crate) verifier: AccountId,
    pub(crate) worker: AccountId,
    pub(crate) round: Round,
}

impl Verdict {
    fn key(&self) -> (&AccountId, &AccountId, Round) {
        (&self.verifier, &self.worker, self.round)
    }
}

impl<T: Config> Pallet<T> {
    fn accused_verifier(verdict: &Verdict) -> Result<Verifier, DispatchError> {
        Verifiers::<T>::get(verdict.run_id, &verdict.verifier)
            .ok_or_else(|| Error::<T>::VerifierUnknown.into())
    }

    fn verifier_fault(verdict: &Verdict) -> Result<VerifierFault, DispatchError> {
        VerifierFaults::<T>::get(verdict.run_id, verdict.key())
            .ok_or_else(|| Error::<T>::FaultUnknown.into())
    }

    fn store_verdict(verdict: &Verdict, run: Run, accused: Verifier, fault: VerifierFault) {
        VerifierFaults::<T>::insert(verdict.run_id, verdict.key(), fault);
        Verifiers::<T>::insert(verdict.run_id, &verdict.verifier, accused);
        Runs::<T>::insert(verdict.run_id, run);
    }

    pub(crate) fn do_report_verifier(
        owner: AccountId,
        verdict: Verdict,
        evidence_digest: Digest,
    ) -> DispatchResult {
        let run_id = verdict.run_id;
        let mut run = Self::run(&run_id)?;
        Self::ensure_accuser(&run, &owner, &verdict.verifier)?;
        let mut accused = Self::accused_verifier(&verdict)?;
        let known = VerifierFaults::<T>::contains_key(run_id, verdict.key());
        ensure!(!known, Error::<T>::AlreadyReported);
        Self::ensure_answerable(&run, &accused, &verdict)?;

        let state = Self::open_dispute(&mut run)?;
        accused.open_faults = accused.open_faults.saturating_add(1);
        let fault = VerifierFault {
            evidence_digest,
            deposit: T::RecordDeposit::get(),
            // The accused has no vote on itself.
            jury: run.verifiers.saturating_sub(1),
            votes: Votes::default(),
            reported_at: Self::now(),
            state,
        };
        Self::deposit_event(Event::VerifierReported {
            run: run_id,
            verifier: verdict.verifier.clone(),
            worker: verdict.worker.clone(),
            round: verdict.round,
            evidence_digest,
        });
        Self::store_verdict(&verdict, run, accused, fault);
        Ok(())
    }

    pub(crate) fn do_vote_on_verifier(
        by: AccountId,
        verdict: Verdict,
        finds: Finding,
    ) -> DispatchResult {
        let run_id = verdict.run_id;
        let mut run = Self::run(&run_id)?;
        let mut fault = Self::verifier_fault(&verdict)?;
        let mut accused = Self::accused_verifier(&verdict)?;
        ensure!(by != verdict.verifier, Error::<T>::SelfReport);
        let ballot = (&fault.state, &mut fault.votes);
        Self::vote((&run_id, &run, verdict.round), ballot, (&by, finds))?;
        Self::deposit_event(Event::VerifierFaultVoted {
            run: run_id,
            verifier: verdict.verifier.clone(),
            worker: verdict.worker.clone(),
            round: verdict.round,
            by,
            finds,
        });
        if let Some(decision) = fault.votes.settled(fault.jury, run.terms.fault_quorum) {
            Self::decide_verdict(&mut run, &mut accused, &verdict, (&mut fault, decision))?;
        }
        Self::store_verdict(&verdict, run, accused, fault);
        Ok(())
    }

    fn decide_verdict(
        run: &mut Run,
        accused: &mut Verifier,
        verdict: &Verdict,
        (fault, decision): (&mut VerifierFault, Finding),
    ) -> DispatchResult {
        match decision {
            Finding::Guilty => Self::slash_verifier(run, accused, verdict, fault),
            Finding::Innocent => Self::acquit_verifier(run, accused, verdict, fault),
        }
    }

    /// Ensures that the verifier was one in that round, and that its bond can still be reached.
    fn ensure_answerable(run: &Run, accused: &Verifier, verdict: &Verdict) -> DispatchResult {
        Self::ensure_reportable(run)?;
        let exposed = accused.exit_at.is_none_or(|exit_at| Self::now() < exit_at);
        ensure!(exposed && accused.bond > 0, Error::<T>::VerifierUnreachable);
        Self::ensure_took_part(&verdict.run_id, run, verdict.round, accused.registered_at)
    }

    pub(crate) fn do_contest_verifier_fault(
        verdict: Verdict,
        evidence_digest: Digest,
    ) -> DispatchResult {
        let run = Self::run(&verdict.run_id)?;
        let mut fault = Self::verifier_fault(&verdict)?;
        let bond = Self::contest(&run, &verdict.verifier, &mut fault.state, evidence_digest)?;
        VerifierFaults::<T>::insert(verdict.run_id, verdict.key(), fault);
        let Verdict { run_id, verifier, worker, round } = verdict;
        Self::deposit_event(Event::VerifierFaultContested {
            run: run_id,
            verifier,
            worker,
            round,
            evidence_digest,
            bond,
        });
        Ok(())
    }

    pub(crate) fn do_execute_verifier_fault(verdict: Verdict) -> DispatchResult {
        let mut run = Self::run(&verdict.run_id)?;
        let mut accused = Self::accused_verifier(&verdict)?;
        let mut fault = Self::verifier_fault(&verdict)?;
        let decision = Self::decision(&run, &fault.state, &fault.votes)?;
        Self::decide_verdict(&mut run, &mut accused, &verdict, (&mut fault, decision))?;
        Self::store_verdict(&verdict, run, accused, fault);
        Ok(())
    }

    /// Takes the verifier's whole bond, and its contest bond if it contested. Its record stays: it
    /// may fill the bond up again.
    fn slash_verifier(
        run: &mut Run,
        accused: &mut Verifier,
        verdict: &Verdict,
        fault: &mut VerifierFault,
    ) -> DispatchResult {
        let Verdict { run_id, verifier, worker, round } = verdict;
        let penalty = Penalty {
            loser: verifier,
            taken_from: HoldReason::VerifierBond,
            amount: accused.bond,
            reason: RecoveryReason::VerifierSlashed,
            voters: &fault.votes.guilty,
            state: fault.state,
        };
        let Paid { total, to_reporters, to_escrow } = Self::collect(run_id, run, &penalty)?;
        accused.bond = subtract(accused.bond, total)?;
        fault.state = FaultState::Executed { slashed: total };
        Self::end_verifier_dispute(run, accused);
        Self::deposit_event(Event::VerifierSlashed {
            run: *run_id,
            verifier: verifier.clone(),
            worker: worker.clone(),
            round: *round,
            amount: total,
            to_reporters,
            to_escrow,
            votes: count(&fault.votes.guilty),
        });
        Ok(())
    }

    /// The verifier keeps its bond.
    fn acquit_verifier(
        run: &mut Run,
        accused: &mut Verifier,
        verdict: &Verdict,
        fault: &mut VerifierFault,
    ) -> DispatchResult {
        let Verdict { run_id, verifier, worker, round } = verdict;
        let penalty = Self::indemnify(run, verifier, (&fault.state, &fault.votes))?;
        fault.state = FaultState::Dismissed;
        Self::end_verifier_dispute(run, accused);
        Self::deposit_event(Event::VerifierFaultDismissed {
            run: *run_id,
            verifier: verifier.clone(),
            worker: worker.clone(),
            round: *round,
            penalty,
        });
        Ok(())
    }

    fn end_verifier_dispute(run: &mut Run, accused: &mut Verifier) {
        accused.open_faults = accused.open_faults.saturating_sub(1);
        run.open_disputes = run.open_disputes.saturating_sub(1);
    }
}
