//! What a runtime with newer records does to those of an older one, before its first block.

use frame_support::{
    traits::{Get, GetStorageVersion, StorageVersion},
    weights::Weight,
};

use crate::{
    AccountId, Accounts, Attribution, Balance, BlockNumber, Config, Digest, Fault, FaultKind,
    FaultState, Faults, HoldReason, Pallet, Runs, Verifier, VerifierFault, VerifierFaults,
    Verifiers, Votes, pallet::STORAGE_VERSION,
};

/// A verifier's record in version 1, field by field; the fourth is of no use any more.
type VerifierVersion1 = (Balance, BlockNumber, Option<BlockNumber>, u32);

/// In version 2 it counted its open faults too.
type VerifierVersion2 = (Balance, BlockNumber, Option<BlockNumber>, u32, u32);

/// What both kinds of faults had in version 2: evidence, who opened it and as what, its deposit, who
/// reported it, when, and its state.
type DisputeVersion2 = (Digest, AccountId, Attribution, Balance, Accounts, BlockNumber, FaultState);

impl<T: Config> Pallet<T> {
    /// Brings the records to this version's form. Returns what it cost.
    pub(crate) fn migrate() -> Weight {
        let reading = T::DbWeight::get().reads(1);
        let version = Self::on_chain_storage_version();
        if version >= STORAGE_VERSION {
            return reading;
        }
        let mut records = 0_u64;
        let mut one_more = || records = records.saturating_add(1);
        if version < StorageVersion::new(2) {
            Verifiers::<T>::translate(|_, _, old: VerifierVersion1| {
                one_more();
                let (bond, registered_at, exit_at, _) = old;
                Some(Verifier { bond, registered_at, exit_at, open_faults: 0 })
            });
        } else {
            Verifiers::<T>::translate(|_, _, old: VerifierVersion2| {
                one_more();
                let (bond, registered_at, exit_at, _, open_faults) = old;
                Some(Verifier { bond, registered_at, exit_at, open_faults })
            });
        }
        Faults::<T>::translate(|run, _, (kind, old): (FaultKind, DisputeVersion2)| {
            one_more();
            let (evidence_digest, opened_by, _, deposit, guilty, reported_at, state) = old;
            let (owner, jury) = Runs::<T>::get(run).map(|run| (run.owner, run.verifiers))?;
            let deposit = Self::owners_deposit(&owner, &opened_by, deposit);
            let votes = Votes { guilty, ..Votes::default() };
            Some(Fault { kind, evidence_digest, deposit, jury, votes, reported_at, state })
        });
        VerifierFaults::<T>::translate(|run, _, old: DisputeVersion2| {
            one_more();
            let (evidence_digest, opened_by, _, deposit, guilty, reported_at, state) = old;
            let (owner, jury) = Runs::<T>::get(run).map(|run| (run.owner, run.verifiers))?;
            let deposit = Self::owners_deposit(&owner, &opened_by, deposit);
            let (jury, votes) = (jury.saturating_sub(1), Votes { guilty, ..Votes::default() });
            Some(VerifierFault { evidence_digest, deposit, jury, votes, reported_at, state })
        });
        STORAGE_VERSION.put::<Self>();
        // Of each the record, its run, and the account and holds of a deposit that is given back.
        let touched = records.saturating_mul(4).saturating_add(1);
        reading.saturating_add(T::DbWeight::get().reads_writes(touched, touched))
    }

    /// What the owner has on hold for a record: nothing for what a verifier opened, who gets its own
    /// back.
    fn owners_deposit(owner: &AccountId, opened_by: &AccountId, deposit: Balance) -> Balance {
        if owner == opened_by {
            return deposit;
        }
        // An account whose hold is gone has nothing to get back.
        let _ = Self::release(HoldReason::StorageDeposit, opened_by, deposit);
        0
    }
}
