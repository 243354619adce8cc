//! What a runtime with newer records does to those of an older one, before its first block.

use frame_support::{
    traits::{Get, GetStorageVersion},
    weights::Weight,
};

use crate::{Balance, BlockNumber, Config, Pallet, Verifier, Verifiers, pallet::STORAGE_VERSION};

/// A verifier's record in version 1, field by field: what it had but for `open_faults`.
type VerifierVersion1 = (Balance, BlockNumber, Option<BlockNumber>, u32);

impl<T: Config> Pallet<T> {
    /// Brings the records to this version's form. Returns what it cost.
    pub(crate) fn migrate() -> Weight {
        let reading = T::DbWeight::get().reads(1);
        if Self::on_chain_storage_version() >= STORAGE_VERSION {
            return reading;
        }
        let mut records = 0_u64;
        Verifiers::<T>::translate(|_, _, old: VerifierVersion1| {
            let (bond, registered_at, exit_at, open_reports) = old;
            records = records.saturating_add(1);
            Some(Verifier { bond, registered_at, exit_at, open_reports, open_faults: 0 })
        });
        STORAGE_VERSION.put::<Self>();
        let writes = records.saturating_add(1);
        reading.saturating_add(T::DbWeight::get().reads_writes(records, writes))
    }
}
