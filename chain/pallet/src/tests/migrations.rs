use frame_support::{
    storage::unhashed,
    traits::{Hooks, StorageVersion},
};

use crate::{Verifier, Verifiers, mock::*};

#[test]
fn a_verifier_of_an_older_runtime_keeps_its_bond_and_is_accused_of_nothing() {
    on_running_chain(terms(), || {
        let old = (300_u128, 1_u32, Some(20_u32), 0_u32);
        unhashed::put(&Verifiers::<Test>::hashed_key_for(RUN, verifier(1)), &old);
        for index in [0, 2] {
            let old = (300_u128, 1_u32, None::<u32>, 0_u32);
            unhashed::put(&Verifiers::<Test>::hashed_key_for(RUN, verifier(index)), &old);
        }
        StorageVersion::new(1).put::<Training>();
        Training::on_runtime_upgrade();
        let migrated = Verifier {
            bond: 300,
            registered_at: 1,
            exit_at: Some(20),
            open_reports: 0,
            open_faults: 0,
        };
        assert_eq!(Verifiers::<Test>::get(RUN, verifier(1)), Some(migrated.clone()));
        assert_eq!(StorageVersion::get::<Training>(), 2);
        Training::on_runtime_upgrade();
        assert_eq!(Verifiers::<Test>::get(RUN, verifier(1)), Some(migrated));
    });
}
