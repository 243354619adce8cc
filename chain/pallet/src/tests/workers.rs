use frame_support::{BoundedVec, assert_noop, assert_ok};
use sp_runtime::{DispatchError, TokenError};

use crate::{Error, Event, Runs, Verifiers, Workers, mock::*};

#[test]
fn a_worker_registers_grows_its_stake_and_leaves_with_all_of_it() {
    on_new_chain(|| {
        register(&alice(), STAKE);
        assert_eq!(free(&alice()), ENDOWMENT - STAKE - RECORD_DEPOSIT);
        assert_ok!(Training::increase_stake(signed(&alice()), 50));
        assert_eq!(Workers::<Test>::get(alice()).expect("registered").stake, STAKE + 50);

        assert_noop!(Training::withdraw_stake(signed(&alice())), Error::<Test>::ExitNotAnnounced);
        assert_ok!(Training::announce_exit(signed(&alice())));
        assert_noop!(Training::announce_exit(signed(&alice())), Error::<Test>::Exiting);
        assert_noop!(Training::increase_stake(signed(&alice()), 1), Error::<Test>::Exiting);
        // It joined no run, so nothing is exposed.
        assert_ok!(Training::withdraw_stake(signed(&alice())));
        assert_eq!(free(&alice()), ENDOWMENT);
        assert!(Workers::<Test>::get(alice()).is_none());
        assert_eq!(
            last_events(1),
            vec![Event::StakeWithdrawn { worker: alice(), amount: STAKE + 50 }]
        );
    });
}

#[test]
fn registration_refuses_a_second_one_and_money_that_is_not_there() {
    on_new_chain(|| {
        let peer_id = BoundedVec::truncate_from(vec![1]);
        assert_noop!(
            Training::register_worker(signed(&alice()), peer_id.clone(), [0; 32], ENDOWMENT),
            TokenError::FundsUnavailable
        );
        register(&alice(), STAKE);
        assert_noop!(
            Training::register_worker(signed(&alice()), peer_id.clone(), [0; 32], STAKE),
            Error::<Test>::AlreadyRegistered
        );
        assert_noop!(
            Training::register_worker(RuntimeOrigin::root(), peer_id.clone(), [0; 32], STAKE),
            DispatchError::BadOrigin
        );
        assert_noop!(
            Training::update_worker(signed(&bob()), peer_id.clone(), [2; 32]),
            Error::<Test>::WorkerUnknown
        );
        assert_ok!(Training::update_worker(signed(&alice()), peer_id.clone(), [2; 32]));
        let worker = Workers::<Test>::get(alice()).expect("registered");
        assert_eq!((worker.peer_id, worker.capability_digest), (peer_id, [2; 32]));
        assert_noop!(Training::increase_stake(signed(&bob()), 1), Error::<Test>::WorkerUnknown);
    });
}

#[test]
fn joining_needs_the_runs_stake_and_happens_once() {
    on_new_chain(|| {
        register(&alice(), 499);
        assert_noop!(Training::join_run(signed(&alice()), RUN), Error::<Test>::RunUnknown);
        assert_ok!(Training::create_run(signed(&coordinator()), RUN, terms(), BUDGET));
        assert_noop!(Training::join_run(signed(&bob()), RUN), Error::<Test>::WorkerUnknown);
        assert_noop!(Training::join_run(signed(&alice()), RUN), Error::<Test>::StakeTooSmall);
        assert_ok!(Training::increase_stake(signed(&alice()), 1));
        assert_ok!(Training::join_run(signed(&alice()), RUN));
        assert_noop!(Training::join_run(signed(&alice()), RUN), Error::<Test>::AlreadyMember);
        assert_noop!(Training::leave_run(signed(&alice()), [8; 32]), Error::<Test>::NotMember);
        assert_ok!(Training::leave_run(signed(&alice()), RUN));
        assert_noop!(Training::leave_run(signed(&alice()), RUN), Error::<Test>::NotMember);
        assert_ok!(Training::join_run(signed(&alice()), RUN));
    });
}

#[test]
fn one_stake_covers_the_minimum_of_every_run_that_it_is_exposed_to() {
    on_new_chain(|| {
        for index in 0..3 {
            let mut dearer = terms();
            dearer.minimum_stake = 500 + u128::from(index) * 100;
            let created = Training::create_run(signed(&coordinator()), [index; 32], dearer, BUDGET);
            assert_ok!(created);
        }
        let join = |index: u8| Training::join_run(signed(&alice()), [index; 32]);
        register(&alice(), 1_099);
        assert_ok!(join(0));
        assert_noop!(join(1), Error::<Test>::StakeTooSmall);
        assert_ok!(Training::increase_stake(signed(&alice()), 1));
        assert_ok!(join(1));
        assert_noop!(join(2), Error::<Test>::StakeTooSmall);
        // What was left is still exposed, until its faults can no longer be reported.
        assert_ok!(Training::leave_run(signed(&alice()), [0; 32]));
        assert_ok!(Training::increase_stake(signed(&alice()), 200));
        assert_noop!(join(2), Error::<Test>::StakeTooSmall);
        advance(15);
        assert_ok!(join(2));
    });
}

#[test]
fn a_worker_of_sixteen_runs_must_leave_one_for_good_to_join_another() {
    on_new_chain(|| {
        register(&alice(), 17 * 500);
        for index in 0..17 {
            let created =
                Training::create_run(signed(&coordinator()), [index; 32], terms(), BUDGET);
            assert_ok!(created);
        }
        for index in 0..16 {
            assert_ok!(Training::join_run(signed(&alice()), [index; 32]));
        }
        assert_noop!(
            Training::join_run(signed(&alice()), [16; 32]),
            Error::<Test>::TooManyMemberships
        );
        assert_ok!(Training::leave_run(signed(&alice()), [0; 32]));
        assert_noop!(
            Training::join_run(signed(&alice()), [16; 32]),
            Error::<Test>::TooManyMemberships
        );
        advance(15);
        assert_ok!(Training::join_run(signed(&alice()), [16; 32]));
    });
}

#[test]
fn a_stake_stays_until_its_last_exposure_is_over() {
    on_running_chain(terms(), || {
        assert_ok!(Training::announce_exit(signed(&alice())));
        advance(14);
        assert_noop!(Training::withdraw_stake(signed(&alice())), Error::<Test>::StillUnbonding);
        assert_noop!(Training::join_run(signed(&alice()), RUN), Error::<Test>::Exiting);
        advance(1);
        assert_ok!(Training::withdraw_stake(signed(&alice())));
        assert_eq!(free(&alice()), ENDOWMENT);
    });
}

#[test]
fn an_open_fault_keeps_the_stake() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(Training::announce_exit(signed(&alice())));
        advance(14);
        assert_ok!(report(&alice(), 0));
        advance(1);
        assert_noop!(Training::withdraw_stake(signed(&alice())), Error::<Test>::DisputeOpen);
        advance(3);
        assert_ok!(Training::execute_fault(signed(&anybody()), RUN, alice(), 0));
        assert_ok!(Training::withdraw_stake(signed(&alice())));
        assert_eq!(free(&alice()), ENDOWMENT - 400);
    });
}

#[test]
fn verifiers_are_invited_bonded_and_released() {
    on_new_chain(|| {
        assert_ok!(Training::create_run(signed(&coordinator()), RUN, terms(), BUDGET));
        assert_noop!(
            Training::register_verifier(signed(&anybody()), RUN),
            Error::<Test>::NotInvited
        );
        assert_noop!(
            Training::retire_verifier(signed(&verifier(0)), RUN),
            Error::<Test>::VerifierUnknown
        );
        assert_ok!(Training::register_verifier(signed(&verifier(0)), RUN));
        assert_eq!(free(&verifier(0)), ENDOWMENT - 300);
        assert_noop!(
            Training::withdraw_verifier_bond(signed(&verifier(0)), RUN),
            Error::<Test>::ExitNotAnnounced
        );
        assert_ok!(Training::retire_verifier(signed(&verifier(0)), RUN));
        assert_noop!(
            Training::retire_verifier(signed(&verifier(0)), RUN),
            Error::<Test>::VerifierInactive
        );
        assert_noop!(
            Training::withdraw_verifier_bond(signed(&verifier(0)), RUN),
            Error::<Test>::StillUnbonding
        );
        // It may change its mind.
        assert_ok!(Training::register_verifier(signed(&verifier(0)), RUN));
        assert_eq!(free(&verifier(0)), ENDOWMENT - 300);
        assert_ok!(Training::retire_verifier(signed(&verifier(0)), RUN));
        advance(15);
        assert_ok!(Training::withdraw_verifier_bond(signed(&verifier(0)), RUN));
        assert_noop!(
            Training::withdraw_verifier_bond(signed(&verifier(0)), RUN),
            Error::<Test>::VerifierUnknown
        );
        assert_eq!(free(&verifier(0)), ENDOWMENT);
        assert!(Verifiers::<Test>::get(RUN, verifier(0)).is_none());
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").verifiers, 0);
    });
}

#[test]
fn an_open_run_takes_as_many_verifiers_as_its_votes_can_count() {
    on_new_chain(|| {
        let mut open = terms();
        open.verifiers = Default::default();
        open.verifier_bond = 100;
        assert_ok!(Training::create_run(signed(&coordinator()), RUN, open, BUDGET));
        for index in 0..32 {
            let who = account(100 + index);
            let sent = Balances::transfer_allow_death(signed(&sponsor()), who.clone(), 200);
            assert_ok!(sent);
            assert_ok!(Training::register_verifier(signed(&who), RUN));
        }
        assert_noop!(
            Training::register_verifier(signed(&anybody()), RUN),
            Error::<Test>::TooManyVerifiers
        );
    });
}
