use frame_support::{
    assert_ok,
    storage::unhashed,
    traits::{Hooks, StorageVersion},
};

use crate::{
    Accounts, Attribution, FaultKind, FaultState, Faults, Runs, Verifier, VerifierFaults,
    Verifiers, mock::*,
};

const BOB_REPORTED: FaultState = FaultState::Reported { executable_at: 5 };

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
        let migrated = Verifier { bond: 300, registered_at: 1, exit_at: Some(20), open_faults: 0 };
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
        for accused in [alice(), bob()] {
            assert_ok!(report(&accused, 0));
        }
        for index in 0..3 {
            let old = (300_u128, 1_u32, None::<u32>, 0_u32, 0_u32);
            unhashed::put(&Verifiers::<Test>::hashed_key_for(RUN, verifier(index)), &old);
        }
        // Alice was reported by the owner, Bob by a verifier, who has a deposit on hold for it.
        let guilty = Accounts::truncate_from(vec![verifier(0)]);
        let old = |opener, role, voters| {
            let opened = ([5_u8; 32], opener, role, RECORD_DEPOSIT);
            (FaultKind::Replay, opened, voters, 1_u32, BOB_REPORTED)
        };
        let by_owner = old(coordinator(), Attribution::Coordinator, Accounts::default());
        unhashed::put(&Faults::<Test>::hashed_key_for(RUN, (alice(), 0)), &by_owner);
        let by_verifier = old(verifier(0), Attribution::Verifier, guilty.clone());
        unhashed::put(&Faults::<Test>::hashed_key_for(RUN, (bob(), 0)), &by_verifier);
        move_deposit(&verifier(0));
        StorageVersion::new(2).put::<Training>();
        Training::on_runtime_upgrade();

        let jury = Runs::<Test>::get(RUN).expect("exists").verifiers;
        let alices = Faults::<Test>::get(RUN, (alice(), 0)).expect("still there");
        assert_eq!(
            (alices.deposit, alices.jury, alices.votes),
            (RECORD_DEPOSIT, jury, Default::default())
        );
        let bobs = Faults::<Test>::get(RUN, (bob(), 0)).expect("still there");
        assert_eq!((bobs.deposit, bobs.votes.guilty, bobs.state), (0, guilty, BOB_REPORTED));
        assert!(bobs.votes.innocent.is_empty());
        assert_eq!(free(&verifier(0)), ENDOWMENT - 300, "its deposit is back");
        check_invariants();
    });
}

#[test]
fn a_verifiers_fault_of_an_older_runtime_has_the_others_as_its_jury() {
    on_running_chain(terms(), || {
        anchor(0);
        let accused = (verifier(2), bob(), 0);
        let report =
            Training::report_verifier(signed(&coordinator()), RUN, verifier(2), bob(), 0, [5; 32]);
        assert_ok!(report);
        for index in 0..3 {
            let faults = u32::from(index == 2);
            let old = (300_u128, 1_u32, None::<u32>, 0_u32, faults);
            unhashed::put(&Verifiers::<Test>::hashed_key_for(RUN, verifier(index)), &old);
        }
        let guilty = Accounts::truncate_from(vec![verifier(0)]);
        let opened = ([5_u8; 32], coordinator(), Attribution::Coordinator, RECORD_DEPOSIT);
        let old = (opened, guilty.clone(), 1_u32, BOB_REPORTED);
        unhashed::put(&VerifierFaults::<Test>::hashed_key_for(RUN, &accused), &old);
        StorageVersion::new(2).put::<Training>();
        Training::on_runtime_upgrade();
        let migrated = VerifierFaults::<Test>::get(RUN, &accused).expect("still there");
        assert_eq!((migrated.jury, migrated.votes.guilty), (2, guilty));
        assert_eq!((migrated.deposit, migrated.reported_at), (RECORD_DEPOSIT, 1));
    });
}

/// As if somebody else had put down one of the owner's deposits.
fn move_deposit(to: &crate::AccountId) {
    let reason = crate::HoldReason::StorageDeposit;
    Training::release(reason, &coordinator(), RECORD_DEPOSIT).expect("it was held");
    Training::hold(reason, to, RECORD_DEPOSIT).expect("it has as much");
}
