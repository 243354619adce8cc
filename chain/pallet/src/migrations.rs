//! What a runtime with newer records does to those of an older one, before its first block.

use frame_support::{
    traits::{Get, GetStorageVersion, StorageVersion},
    weights::Weight,
};

use crate::{
    AccountId, Accounts, Attribution, Balance, BlockNumber, Config, Digest, Fault, FaultKind,
    FaultState, Faults, Pallet, Verifier, VerifierFault, VerifierFaults, Verifiers, Votes,
    pallet::STORAGE_VERSION,
};

/// A verifier's record in version 1, field by field: what it had but for `open_faults`.
type VerifierVersion1 = (Balance, BlockNumber, Option<BlockNumber>, u32);

/// A fault in version 2, field by field: with those alone who reported it.
type FaultVersion2 =
    (FaultKind, Digest, AccountId, Attribution, Balance, Accounts, BlockNumber, FaultState);

/// A verifier's fault in version 2.
type VerifierFaultVersion2 =
    (Digest, AccountId, Attribution, Balance, Accounts, BlockNumber, FaultState);

impl<T: Config> Pallet<T> {
    /// Brings the records to this version's form. Returns what it cost.
    pub(crate) fn migrate() -> Weight {
        let reading = T::DbWeight::get().reads(1);
        let version = Self::on_chain_storage_version();
        if version >= STORAGE_VERSION {
            return reading;
        }
        let mut records = 0_u64;
        if version < StorageVersion::new(2) {
            Verifiers::<T>::translate(|_, _, old: VerifierVersion1| {
                let (bond, registered_at, exit_at, open_reports) = old;
                records = records.saturating_add(1);
                Some(Verifier { bond, registered_at, exit_at, open_reports, open_faults: 0 })
            });
        }
        Faults::<T>::translate(|_, _, old: FaultVersion2| {
            records = records.saturating_add(1);
            let (kind, evidence_digest, opened_by, opened_as, deposit, guilty, reported_at, state) =
                old;
            let votes = Votes { guilty, ..Votes::default() };
            Some(Fault {
                kind,
                evidence_digest,
                opened_by,
                opened_as,
                deposit,
                votes,
                reported_at,
                state,
            })
        });
        VerifierFaults::<T>::translate(|_, _, old: VerifierFaultVersion2| {
            records = records.saturating_add(1);
            let (evidence_digest, opened_by, opened_as, deposit, guilty, reported_at, state) = old;
            let votes = Votes { guilty, ..Votes::default() };
            Some(VerifierFault {
                evidence_digest,
                opened_by,
                opened_as,
                deposit,
                votes,
                reported_at,
                state,
            })
        });
        STORAGE_VERSION.put::<Self>();
        let writes = records.saturating_add(1);
        reading.saturating_add(T::DbWeight::get().reads_writes(records, writes))
    }
}
