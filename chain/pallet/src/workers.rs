//! Workers and verifiers: stakes, memberships, bonds, and leaving.

use frame_support::{dispatch::DispatchResult, ensure, traits::Get};
use sp_runtime::{DispatchError, SaturatedConversion};

use crate::{
    AccountId, Balance, BlockNumber, Config, Digest, Error, Event, HoldReason, Membership, Pallet,
    PeerId, Run, RunId, RunState, Runs, Verifier, Verifiers, Worker, Workers, money::add,
};

impl<T: Config> Pallet<T> {
    pub(crate) fn now() -> BlockNumber {
        frame_system::Pallet::<T>::block_number().saturated_into()
    }

    pub(crate) fn worker(who: &AccountId) -> Result<Worker, DispatchError> {
        Workers::<T>::get(who).ok_or_else(|| Error::<T>::WorkerUnknown.into())
    }

    pub(crate) fn do_register_worker(
        who: AccountId,
        peer_id: PeerId,
        capability_digest: Digest,
        stake: Balance,
    ) -> DispatchResult {
        ensure!(!Workers::<T>::contains_key(&who), Error::<T>::AlreadyRegistered);
        Self::hold(HoldReason::StorageDeposit, &who, T::RecordDeposit::get())?;
        Self::hold(HoldReason::WorkerStake, &who, stake)?;
        let worker = Worker {
            peer_id: peer_id.clone(),
            capability_digest,
            stake,
            registered_at: Self::now(),
            exit_at: None,
            open_faults: 0,
            memberships: Default::default(),
        };
        Workers::<T>::insert(&who, worker);
        Self::deposit_event(Event::WorkerRegistered {
            worker: who,
            peer_id,
            capability_digest,
            stake,
        });
        Ok(())
    }

    pub(crate) fn do_update_worker(
        who: AccountId,
        peer_id: PeerId,
        capability_digest: Digest,
    ) -> DispatchResult {
        let mut worker = Self::worker(&who)?;
        worker.peer_id = peer_id.clone();
        worker.capability_digest = capability_digest;
        Workers::<T>::insert(&who, worker);
        Self::deposit_event(Event::WorkerUpdated { worker: who, peer_id, capability_digest });
        Ok(())
    }

    pub(crate) fn do_increase_stake(who: AccountId, amount: Balance) -> DispatchResult {
        let mut worker = Self::worker(&who)?;
        ensure!(worker.exit_at.is_none(), Error::<T>::Exiting);
        Self::hold(HoldReason::WorkerStake, &who, amount)?;
        worker.stake = add(worker.stake, amount)?;
        let stake = worker.stake;
        Workers::<T>::insert(&who, worker);
        Self::deposit_event(Event::StakeIncreased { worker: who, amount, stake });
        Ok(())
    }

    pub(crate) fn do_join_run(who: AccountId, run_id: RunId) -> DispatchResult {
        let mut worker = Self::worker(&who)?;
        let run = Self::open_run(&run_id)?;
        let now = Self::now();
        ensure!(worker.exit_at.is_none(), Error::<T>::Exiting);

        worker
            .memberships
            .retain(|membership| membership.run == run_id || Self::is_exposed(membership, now));
        // One stake that answers to several runs must be enough for a fault in each of them.
        let pledged = worker
            .memberships
            .iter()
            .filter(|membership| membership.run != run_id)
            .filter_map(|membership| Runs::<T>::get(membership.run))
            .fold(run.terms.minimum_stake, |sum: Balance, other| {
                sum.saturating_add(other.terms.minimum_stake)
            });
        ensure!(worker.stake >= pledged, Error::<T>::StakeTooSmall);
        let known = worker.memberships.iter_mut().find(|membership| membership.run == run_id);
        match known {
            Some(membership) => {
                ensure!(membership.exposed_until.is_some(), Error::<T>::AlreadyMember);
                membership.exposed_until = None;
            }
            None => worker
                .memberships
                .try_push(Membership { run: run_id, joined_at: now, exposed_until: None })
                .map_err(|_| Error::<T>::TooManyMemberships)?,
        }
        let stake = worker.stake;
        Workers::<T>::insert(&who, worker);
        Self::deposit_event(Event::RunJoined { run: run_id, worker: who, stake });
        Ok(())
    }

    pub(crate) fn do_leave_run(who: AccountId, run_id: RunId) -> DispatchResult {
        let mut worker = Self::worker(&who)?;
        let now = Self::now();
        let membership = worker
            .memberships
            .iter_mut()
            .find(|membership| membership.run == run_id && membership.exposed_until.is_none())
            .ok_or(Error::<T>::NotMember)?;
        let exposed_until = Self::exposure(&run_id, now);
        membership.exposed_until = Some(exposed_until);
        Workers::<T>::insert(&who, worker);
        Self::deposit_event(Event::RunLeft { run: run_id, worker: who, exposed_until });
        Ok(())
    }

    pub(crate) fn do_announce_exit(who: AccountId) -> DispatchResult {
        let mut worker = Self::worker(&who)?;
        ensure!(worker.exit_at.is_none(), Error::<T>::Exiting);
        let now = Self::now();
        let mut exit_at = now;
        for membership in &mut worker.memberships {
            let until = match membership.exposed_until {
                Some(until) => until,
                None => Self::exposure(&membership.run, now),
            };
            membership.exposed_until = Some(until);
            exit_at = exit_at.max(until);
        }
        worker.exit_at = Some(exit_at);
        Workers::<T>::insert(&who, worker);
        Self::deposit_event(Event::ExitAnnounced { worker: who, exit_at });
        Ok(())
    }

    pub(crate) fn do_withdraw_stake(who: AccountId) -> DispatchResult {
        let worker = Self::worker(&who)?;
        let exit_at = worker.exit_at.ok_or(Error::<T>::ExitNotAnnounced)?;
        ensure!(Self::now() >= exit_at, Error::<T>::StillUnbonding);
        ensure!(worker.open_faults == 0, Error::<T>::DisputeOpen);
        Self::release(HoldReason::WorkerStake, &who, worker.stake)?;
        Self::release(HoldReason::StorageDeposit, &who, T::RecordDeposit::get())?;
        Workers::<T>::remove(&who);
        Self::deposit_event(Event::StakeWithdrawn { worker: who, amount: worker.stake });
        Ok(())
    }

    /// Until when somebody who leaves the run now can be held to account for it.
    fn exposure(run_id: &RunId, now: BlockNumber) -> BlockNumber {
        let Some(run) = Runs::<T>::get(run_id) else {
            return now;
        };
        let unbonded = now.saturating_add(run.terms.unbonding_period);
        match run.state {
            RunState::Active | RunState::Paused(_) => unbonded,
            RunState::Closed { vests_at, .. } => unbonded.min(vests_at.max(now)),
            RunState::Settled => now,
        }
    }

    /// Whether a fault of this membership's run can still reach the worker.
    fn is_exposed(membership: &Membership, now: BlockNumber) -> bool {
        match membership.exposed_until {
            Some(until) => now < until,
            None => Self::exposure(&membership.run, now) > now,
        }
    }

    pub(crate) fn do_register_verifier(who: AccountId, run_id: RunId) -> DispatchResult {
        let mut run = Self::open_run(&run_id)?;
        let bond = run.terms.verifier_bond;
        match Verifiers::<T>::get(run_id, &who) {
            Some(mut verifier) => {
                Self::hold(HoldReason::VerifierBond, &who, bond.saturating_sub(verifier.bond))?;
                verifier.bond = verifier.bond.max(bond);
                verifier.exit_at = None;
                Verifiers::<T>::insert(run_id, &who, verifier);
            }
            None => {
                let invited = &run.terms.verifiers;
                ensure!(invited.is_empty() || invited.contains(&who), Error::<T>::NotInvited);
                ensure!(run.verifiers < crate::VERIFIERS_MAX, Error::<T>::TooManyVerifiers);
                Self::hold(HoldReason::VerifierBond, &who, bond)?;
                run.verifiers = run.verifiers.saturating_add(1);
                let verifier =
                    Verifier { bond, registered_at: Self::now(), exit_at: None, open_faults: 0 };
                Verifiers::<T>::insert(run_id, &who, verifier);
                Runs::<T>::insert(run_id, run);
            }
        }
        Self::deposit_event(Event::VerifierRegistered { run: run_id, verifier: who, bond });
        Ok(())
    }

    pub(crate) fn do_retire_verifier(who: AccountId, run_id: RunId) -> DispatchResult {
        let mut verifier = Verifiers::<T>::get(run_id, &who).ok_or(Error::<T>::VerifierUnknown)?;
        ensure!(verifier.exit_at.is_none(), Error::<T>::VerifierInactive);
        let exit_at = Self::exposure(&run_id, Self::now());
        verifier.exit_at = Some(exit_at);
        Verifiers::<T>::insert(run_id, &who, verifier);
        Self::deposit_event(Event::VerifierRetired { run: run_id, verifier: who, exit_at });
        Ok(())
    }

    pub(crate) fn do_withdraw_verifier_bond(who: AccountId, run_id: RunId) -> DispatchResult {
        let verifier = Verifiers::<T>::get(run_id, &who).ok_or(Error::<T>::VerifierUnknown)?;
        let exit_at = verifier.exit_at.ok_or(Error::<T>::ExitNotAnnounced)?;
        ensure!(Self::now() >= exit_at, Error::<T>::StillUnbonding);
        ensure!(verifier.open_faults == 0, Error::<T>::DisputeOpen);
        let mut run = Self::run(&run_id)?;
        Self::remove_verifier(&run_id, &mut run, who, &verifier)?;
        Runs::<T>::insert(run_id, run);
        Ok(())
    }

    pub(crate) fn remove_verifier(
        run_id: &RunId,
        run: &mut Run,
        who: AccountId,
        verifier: &Verifier,
    ) -> DispatchResult {
        Self::release(HoldReason::VerifierBond, &who, verifier.bond)?;
        Verifiers::<T>::remove(run_id, &who);
        run.verifiers = run.verifiers.saturating_sub(1);
        Self::deposit_event(Event::VerifierBondWithdrawn {
            run: *run_id,
            verifier: who,
            amount: verifier.bond,
        });
        Ok(())
    }

    /// The verifier's record if it may vote: its bond is full and it has not retired.
    pub(crate) fn active_verifier(
        run_id: &RunId,
        run: &Run,
        who: &AccountId,
    ) -> Result<Verifier, DispatchError> {
        let verifier = Verifiers::<T>::get(run_id, who).ok_or(Error::<T>::VerifierUnknown)?;
        let active = verifier.exit_at.is_none() && verifier.bond >= run.terms.verifier_bond;
        ensure!(active, Error::<T>::VerifierInactive);
        Ok(verifier)
    }
}
