//! Verdicts: a verifier answers with its whole bond for what it says about a replay.

use frame_support::{dispatch::DispatchResult, ensure, traits::Get};
use sp_runtime::DispatchError;

use crate::{
    AccountId, Attribution, Config, Decision, Digest, Error, Event, FaultState, HoldReason, Pallet,
    RecoveryReason, Round, Run, RunId, Runs, Verifier, VerifierFault, VerifierFaults, Verifiers,
    Votes,
    disputes::{Opener, Paid, Penalty},
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
        reporter: AccountId,
        verdict: Verdict,
        evidence_digest: Digest,
    ) -> DispatchResult {
        let run_id = verdict.run_id;
        let mut run = Self::run(&run_id)?;
        let mut accused = Self::accused_verifier(&verdict)?;
        ensure!(reporter != verdict.verifier, Error::<T>::SelfReport);
        let role = Self::reporter_role(&run_id, &run, &reporter)?;
        let is_verifier = role == Attribution::Verifier;

        let mut fault = match VerifierFaults::<T>::get(run_id, verdict.key()) {
            Some(fault) => {
                // The coordinator's word opens a fault; repeated, it adds nothing.
                ensure!(is_verifier, Error::<T>::AlreadyVoted);
                Self::ensure_votable(&fault.state)?;
                fault
            }
            None => {
                Self::ensure_answerable(&run, &accused, &verdict)?;
                let opener = (&reporter, role);
                Self::open_verifier_fault(
                    &mut run,
                    &mut accused,
                    &verdict,
                    opener,
                    evidence_digest,
                )?
            }
        };
        if is_verifier {
            let about = (&run_id, &run, verdict.round);
            Self::vote(about, &mut fault.votes, (&reporter, Decision::Slash))?;
        }
        let votes = count(&fault.votes.guilty);
        Self::deposit_event(Event::VerifierReported {
            run: run_id,
            verifier: verdict.verifier.clone(),
            worker: verdict.worker.clone(),
            round: verdict.round,
            reporter,
            role,
            evidence_digest,
            votes,
        });
        Self::decide_verdict_if_settled(&mut run, &mut accused, &verdict, &mut fault)?;
        Self::store_verdict(&verdict, run, accused, fault);
        Ok(())
    }

    pub(crate) fn do_defend_verifier(by: AccountId, verdict: Verdict) -> DispatchResult {
        let run_id = verdict.run_id;
        let mut run = Self::run(&run_id)?;
        let mut fault = Self::verifier_fault(&verdict)?;
        let mut accused = Self::accused_verifier(&verdict)?;
        ensure!(by != verdict.verifier, Error::<T>::SelfReport);
        Self::ensure_votable(&fault.state)?;
        let about = (&run_id, &run, verdict.round);
        Self::vote(about, &mut fault.votes, (&by, Decision::Acquit))?;
        Self::deposit_event(Event::VerifierDefended {
            run: run_id,
            verifier: verdict.verifier.clone(),
            worker: verdict.worker.clone(),
            round: verdict.round,
            by,
            votes: count(&fault.votes.innocent),
        });
        Self::decide_verdict_if_settled(&mut run, &mut accused, &verdict, &mut fault)?;
        Self::store_verdict(&verdict, run, accused, fault);
        Ok(())
    }

    /// Decides the fault once no vote to come could change it.
    fn decide_verdict_if_settled(
        run: &mut Run,
        accused: &mut Verifier,
        verdict: &Verdict,
        fault: &mut VerifierFault,
    ) -> DispatchResult {
        // The accused has no vote on itself.
        let jury = run.verifiers.saturating_sub(1);
        match fault.votes.settled(jury, run.terms.fault_quorum) {
            Some(decision) => Self::decide_verdict(run, accused, verdict, (fault, decision)),
            None => Ok(()),
        }
    }

    fn decide_verdict(
        run: &mut Run,
        accused: &mut Verifier,
        verdict: &Verdict,
        (fault, decision): (&mut VerifierFault, Decision),
    ) -> DispatchResult {
        match decision {
            Decision::Slash => Self::slash_verifier(run, accused, verdict, fault),
            Decision::Acquit => Self::acquit_verifier(run, accused, verdict, fault),
        }
    }

    /// Ensures that the verifier was one in that round, and that its bond can still be reached.
    fn ensure_answerable(run: &Run, accused: &Verifier, verdict: &Verdict) -> DispatchResult {
        Self::ensure_reportable(run)?;
        let exposed = accused.exit_at.is_none_or(|exit_at| Self::now() < exit_at);
        ensure!(exposed && accused.bond > 0, Error::<T>::VerifierUnreachable);
        Self::ensure_took_part(&verdict.run_id, run, verdict.round, accused.registered_at)
    }

    fn open_verifier_fault(
        run: &mut Run,
        accused: &mut Verifier,
        verdict: &Verdict,
        opener: Opener<'_>,
        evidence_digest: Digest,
    ) -> Result<VerifierFault, DispatchError> {
        let (opened_by, opened_as) = opener;
        let state = Self::open_dispute(&verdict.run_id, run, opener)?;
        accused.open_faults = accused.open_faults.saturating_add(1);
        Ok(VerifierFault {
            evidence_digest,
            opened_by: opened_by.clone(),
            opened_as,
            deposit: T::RecordDeposit::get(),
            votes: Votes::default(),
            reported_at: Self::now(),
            state,
        })
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
        Self::end_verifier_dispute(run, accused, verdict, fault);
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

    /// The verifier is paid a contest's bond by whoever accused it.
    fn acquit_verifier(
        run: &mut Run,
        accused: &mut Verifier,
        verdict: &Verdict,
        fault: &mut VerifierFault,
    ) -> DispatchResult {
        let Verdict { run_id, verifier, worker, round } = verdict;
        let opener = (&fault.opened_by, fault.opened_as);
        let penalty = Self::indemnify(run_id, run, verifier, opener, &fault.state)?;
        fault.state = FaultState::Dismissed;
        Self::end_verifier_dispute(run, accused, verdict, fault);
        Self::deposit_event(Event::VerifierFaultDismissed {
            run: *run_id,
            verifier: verifier.clone(),
            worker: worker.clone(),
            round: *round,
            attribution: fault.opened_as,
            penalty,
        });
        Ok(())
    }

    fn end_verifier_dispute(
        run: &mut Run,
        accused: &mut Verifier,
        verdict: &Verdict,
        fault: &VerifierFault,
    ) {
        accused.open_faults = accused.open_faults.saturating_sub(1);
        Self::close_dispute(&verdict.run_id, run, (&fault.opened_by, fault.opened_as));
    }
}
