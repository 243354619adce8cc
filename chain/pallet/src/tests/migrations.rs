use frame_support::{
    storage::unhashed,
    traits::{Hooks, StorageVersion},
};

use crate::{
    Accounts, Attribution, FaultKind, FaultState, Faults, Verifier, VerifierFaults, Verifiers,
    mock::*,
};

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
        assert_eq!(StorageVersion::get::<Training>(), 3);
        Training::on_runtime_upgrade();
        assert_eq!(Verifiers::<Test>::get(RUN, verifier(1)), Some(migrated));
    });
}

#[test]
fn whoever_reported_a_fault_of_an_older_runtime_found_its_accused_guilty() {
    on_running_chain(terms(), || {
        anchor(0);
        frame_support::assert_ok!(report(&verifier(0), &bob(), 0));
        let (guilty, evidence) = (Accounts::truncate_from(vec![verifier(0)]), [5_u8; 32]);
        let (role, state) = (Attribution::Verifier, FaultState::Reported { executable_at: 5 });
        let of_verifier =
            (evidence, verifier(0), role, RECORD_DEPOSIT, guilty.clone(), 1_u32, state);
        let key = (verifier(2), bob(), 0);
        unhashed::put(&VerifierFaults::<Test>::hashed_key_for(RUN, &key), &of_verifier);
        let of_worker = (FaultKind::Replay, of_verifier);
        unhashed::put(&Faults::<Test>::hashed_key_for(RUN, (bob(), 0)), &of_worker);
        StorageVersion::new(2).put::<Training>();
        Training::on_runtime_upgrade();
        let migrated = Faults::<Test>::get(RUN, (bob(), 0)).expect("still there");
        assert_eq!((migrated.votes.guilty, migrated.state), (guilty.clone(), state));
        assert!(migrated.votes.innocent.is_empty());
        assert_eq!((migrated.evidence_digest, migrated.opened_by), (evidence, verifier(0)));
        let migrated = VerifierFaults::<Test>::get(RUN, &key).expect("still there");
        assert_eq!((migrated.votes.guilty, migrated.reported_at), (guilty, 1));
        // Nobody counted it when it was written past the pallet.
        VerifierFaults::<Test>::remove(RUN, &key);
    });
}
