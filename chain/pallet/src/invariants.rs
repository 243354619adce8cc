//! What must hold after every block, whatever was called.

#![cfg(any(feature = "try-runtime", test))]

use alloc::collections::BTreeMap;

use frame_support::{ensure, traits::Get};
use sp_runtime::TryRuntimeError;

use crate::{
    AccountId, Balance, Challenges, Claimed, Config, FaultState, Faults, Funding, HoldReason,
    Pallet, PrunedRuns, Round, RoundState, Rounds, Run, RunId, RunState, Runs, Suspensions,
    VerifierFaults, Verifiers, Workers,
};

/// What the records say each account has on hold, by purpose.
#[derive(Default)]
struct Expected(BTreeMap<(u8, AccountId), (HoldReasonKey, Balance)>);

#[derive(Clone, Copy)]
enum HoldReasonKey {
    Stake,
    Verifier,
    Coordinator,
    Contest,
    Challenge,
    Deposit,
}

impl HoldReasonKey {
    fn reason(self) -> HoldReason {
        match self {
            Self::Stake => HoldReason::WorkerStake,
            Self::Verifier => HoldReason::VerifierBond,
            Self::Coordinator => HoldReason::CoordinatorBond,
            Self::Contest => HoldReason::ContestBond,
            Self::Challenge => HoldReason::ChallengeBond,
            Self::Deposit => HoldReason::StorageDeposit,
        }
    }
}

impl Expected {
    fn add(&mut self, key: HoldReasonKey, who: &AccountId, amount: Balance) {
        let entry = self.0.entry((key as u8, who.clone())).or_insert((key, 0));
        entry.1 = entry.1.saturating_add(amount);
    }

    /// Adds what a fault's record keeps on hold: the owner's deposit, and the bond of a contest.
    fn add_dispute(
        &mut self,
        accused: &AccountId,
        state: &FaultState,
        (owner, deposit): (&AccountId, Balance),
    ) {
        self.add(HoldReasonKey::Deposit, owner, deposit);
        if let FaultState::Contested { bond, .. } = state {
            self.add(HoldReasonKey::Contest, accused, *bond);
        }
    }
}

impl<T: Config> Pallet<T> {
    /// Checks the conservation of money and the consistency of all records.
    pub(crate) fn do_try_state() -> Result<(), TryRuntimeError> {
        let mut expected = Expected::default();
        let mut open_faults = BTreeMap::<AccountId, u32>::new();
        for (run_id, run) in Runs::<T>::iter() {
            Self::check_escrow(&run_id, &run)?;
            Self::check_rounds(&run_id, &run)?;
            Self::check_suspensions(&run_id)?;
            expected.add(HoldReasonKey::Coordinator, &run.owner, run.bond);
            expected.add(HoldReasonKey::Deposit, &run.owner, run.deposit);
            Self::check_disputes(&run_id, &run, &mut expected, &mut open_faults)?;
        }
        for (run_id, owner) in PrunedRuns::<T>::iter() {
            ensure!(!Runs::<T>::contains_key(run_id), "a pruned run is there again");
            expected.add(HoldReasonKey::Deposit, &owner, T::RecordDeposit::get());
        }
        for (who, worker) in Workers::<T>::iter() {
            expected.add(HoldReasonKey::Stake, &who, worker.stake);
            expected.add(HoldReasonKey::Deposit, &who, T::RecordDeposit::get());
            let faults = open_faults.get(&who).copied().unwrap_or(0);
            ensure!(worker.open_faults == faults, "a worker's open faults are miscounted");
        }
        for ((_, who), (key, amount)) in &expected.0 {
            ensure!(
                Self::held(key.reason(), who) == *amount,
                "an account's hold differs from its records"
            );
        }
        Ok(())
    }

    /// Checks what is counted of a run's disputes, and adds what they and the bonds of its
    /// verifiers hold. Counts the open faults of workers, who answer to more runs than one.
    fn check_disputes(
        run_id: &RunId,
        run: &Run,
        expected: &mut Expected,
        open_faults: &mut BTreeMap<AccountId, u32>,
    ) -> Result<(), TryRuntimeError> {
        let mut disputes = 0_u32;
        let mut accused_verifiers = BTreeMap::<AccountId, u32>::new();
        for ((worker, _), fault) in Faults::<T>::iter_prefix(run_id) {
            expected.add_dispute(&worker, &fault.state, (&run.owner, fault.deposit));
            if is_open(&fault.state) {
                disputes = disputes.saturating_add(1);
                increment(open_faults, &worker);
            }
        }
        for ((verifier, _, _), fault) in VerifierFaults::<T>::iter_prefix(run_id) {
            expected.add_dispute(&verifier, &fault.state, (&run.owner, fault.deposit));
            if is_open(&fault.state) {
                disputes = disputes.saturating_add(1);
                increment(&mut accused_verifiers, &verifier);
            }
        }
        for (_, challenge) in Challenges::<T>::iter_prefix(run_id) {
            disputes = disputes.saturating_add(1);
            expected.add(HoldReasonKey::Challenge, &challenge.challenger, challenge.bond);
        }
        ensure!(disputes == run.open_disputes, "a run's open disputes are miscounted");

        let mut verifiers = 0_u32;
        for (who, verifier) in Verifiers::<T>::iter_prefix(run_id) {
            verifiers = verifiers.saturating_add(1);
            expected.add(HoldReasonKey::Verifier, &who, verifier.bond);
            let faults = accused_verifiers.remove(&who).unwrap_or(0);
            ensure!(verifier.open_faults == faults, "a verifier's open faults are miscounted");
        }
        ensure!(verifiers == run.verifiers, "a run's verifiers are miscounted");
        ensure!(accused_verifiers.is_empty(), "a verifier of an open dispute is gone");
        Ok(())
    }

    fn check_escrow(run_id: &RunId, run: &Run) -> Result<(), TryRuntimeError> {
        let pot = Self::pot_account(run_id);
        ensure!(
            Self::held(HoldReason::RunEscrow, &pot) == run.escrow,
            "the pot's hold differs from the escrow"
        );
        let came_in = run.funded.saturating_add(run.recovered);
        let went_out = run.claimed.saturating_add(run.refunded);
        ensure!(
            came_in == run.escrow.saturating_add(went_out),
            "escrow + claimed + refunded differs from funded + recovered"
        );
        let claimed = Claimed::<T>::iter_prefix_values(run_id).fold(0, Balance::saturating_add);
        let pruning = run.state == RunState::Settled;
        ensure!(pruning || claimed == run.claimed, "the claims do not add up");
        let funding = Funding::<T>::iter_prefix_values(run_id).fold(0, Balance::saturating_add);
        ensure!(funding == run.funded_outstanding, "the funding does not add up");
        ensure!(run.claimed <= run.finalized_reward, "more was claimed than is final");
        ensure!(run.finalized_reward <= run.committed.ceiling, "more is final than was committed");
        let owed = run.committed.ceiling.saturating_sub(run.claimed);
        ensure!(
            run.refunded > 0 || pruning || owed <= run.escrow,
            "the escrow does not cover what was committed"
        );
        Ok(())
    }

    fn check_suspensions(run_id: &RunId) -> Result<(), TryRuntimeError> {
        // By worker: undecided faults, and the lowest round of them.
        let mut undecided = BTreeMap::<AccountId, (u32, Round)>::new();
        for ((worker, round), fault) in Faults::<T>::iter_prefix(run_id) {
            if is_open(&fault.state) {
                let (count, lowest) = undecided.entry(worker).or_insert((0, round));
                *count = count.saturating_add(1);
                *lowest = round.min(*lowest);
            }
        }
        for (worker, suspension) in Suspensions::<T>::iter_prefix(run_id) {
            let (count, lowest) = undecided.remove(&worker).unwrap_or_default();
            ensure!(suspension.open_faults == count && count > 0, "a suspension is miscounted");
            ensure!(suspension.from_round <= lowest, "an undecided fault suspends too little");
        }
        ensure!(undecided.is_empty(), "an undecided fault suspends nothing");
        Ok(())
    }

    fn check_rounds(run_id: &RunId, run: &Run) -> Result<(), TryRuntimeError> {
        let mut previous = run.latest_finalized;
        for pending in &run.pending {
            ensure!(previous.is_none_or(|round| round < *pending), "pending rounds out of order");
            previous = Some(*pending);
            let record = Rounds::<T>::get(run_id, pending).ok_or("a pending round is missing")?;
            let challenged = Challenges::<T>::contains_key(run_id, pending);
            let state = if challenged { RoundState::Challenged } else { RoundState::Committed };
            ensure!(record.state == state, "a pending round is in the wrong state");
        }
        ensure!(
            previous.is_none_or(|round| round < run.next_round),
            "the next round was committed already"
        );
        for (round, record) in Rounds::<T>::iter_prefix(run_id) {
            let waits = matches!(record.state, RoundState::Committed | RoundState::Challenged);
            ensure!(waits == run.pending.contains(&round), "a waiting round is not pending");
        }
        Ok(())
    }
}

fn is_open(state: &FaultState) -> bool {
    matches!(state, FaultState::Reported { .. } | FaultState::Contested { .. })
}

fn increment(counts: &mut BTreeMap<AccountId, u32>, who: &AccountId) {
    let count = counts.entry(who.clone()).or_default();
    *count = count.saturating_add(1);
}
