use frame_support::{BoundedVec, assert_noop, assert_ok};

use crate::{
    Attribution, CloseReason, Error, Event, PauseReason, RunState, RunTerms, Runs, mock::*,
};

fn state() -> RunState {
    Runs::<Test>::get(RUN).expect("the run exists").state
}

/// The height from which a run closed now is expired.
fn expiry() -> u32 {
    let RunState::Closed { expires_at, .. } = state() else {
        panic!("expected a closed run");
    };
    expires_at
}

#[test]
fn creating_a_run_holds_budget_bond_and_deposit() {
    on_new_chain(|| {
        assert_ok!(Training::create_run(signed(&coordinator()), RUN, terms(), BUDGET));
        let spent = BUDGET + 400 + RUN_DEPOSIT + EXISTENTIAL_DEPOSIT;
        assert_eq!(free(&coordinator()), ENDOWMENT - spent);
        assert_eq!(
            last_events(1),
            vec![Event::RunCreated {
                run: RUN,
                owner: coordinator(),
                config_digest: [9; 32],
                budget: BUDGET,
                bond: 400,
            }]
        );
        assert_noop!(
            Training::create_run(signed(&bob()), RUN, terms(), BUDGET),
            Error::<Test>::RunExists
        );
        assert_noop!(
            Training::create_run(signed(&bob()), [8; 32], terms(), MINIMUM_FUNDING - 1),
            Error::<Test>::FundingTooSmall
        );
    });
}

#[test]
fn contradictory_terms_are_refused_with_their_reason() {
    type Case = (fn(&mut RunTerms), Error<Test>);
    let cases: [Case; 12] = [
        (|terms| terms.fault_quorum = 0, Error::InvalidQuorum),
        (|terms| terms.fault_quorum = 4, Error::InvalidQuorum),
        (|terms| terms.attestation_quorum = 4, Error::InvalidQuorum),
        (|terms| terms.challenge_window = 0, Error::InvalidWindow),
        (|terms| terms.claim_window = 1_001, Error::InvalidWindow),
        (|terms| terms.unbonding_period = 14, Error::UnbondingTooShort),
        (|terms| terms.slashes.replay = 501, Error::SlashAboveStake),
        (|terms| terms.slashes.coordinator = 401, Error::SlashAboveStake),
        (|terms| terms.contest_bond = 301, Error::BondTooSmall),
        (|terms| terms.challenge_bond = 1, Error::BondTooSmall),
        (
            |terms| {
                terms.verifier_bond = 1;
                terms.contest_bond = 1;
            },
            Error::BondTooSmall,
        ),
        (
            |terms| {
                terms.verifiers = BoundedVec::new();
                terms.fault_quorum = 33;
            },
            Error::InvalidQuorum,
        ),
    ];
    on_new_chain(|| {
        for (change, error) in cases {
            let mut changed = terms();
            change(&mut changed);
            let created = Training::create_run(signed(&coordinator()), RUN, changed, BUDGET);
            assert_eq!(created, Err(error.into()));
        }
    });
}

#[test]
fn a_run_without_money_pauses_and_the_next_funder_resumes_it() {
    on_running_chain(terms(), || {
        // 1,100 units at 10 planck each are more than the escrow's 10,000.
        let leaves = Leaves::new(0, &[(alice(), 10_400)]);
        let commitment = leaves.commitment(0, 1_100);
        assert_ok!(Training::commit_round(signed(&coordinator()), RUN, commitment));
        let reason = PauseReason::InsufficientFunds { required: 10_400 };
        assert_eq!(state(), RunState::Paused(reason));
        assert_eq!(last_events(1), vec![Event::RunPaused { run: RUN, reason }]);
        assert_noop!(
            Training::commit_round(signed(&coordinator()), RUN, commitment),
            Error::<Test>::RunNotActive
        );
        assert_noop!(
            Training::resume_run(signed(&coordinator()), RUN),
            Error::<Test>::EscrowTooSmall
        );

        assert_noop!(
            Training::fund_run(signed(&sponsor()), RUN, MINIMUM_FUNDING - 1),
            Error::<Test>::FundingTooSmall
        );
        assert_ok!(Training::fund_run(signed(&sponsor()), RUN, 399));
        assert_eq!(state(), RunState::Paused(reason), "one planck is still missing");
        assert_ok!(Training::fund_run(signed(&anybody()), RUN, 50));
        assert_eq!(state(), RunState::Active);
        assert_ok!(Training::commit_round(signed(&coordinator()), RUN, commitment));
    });
}

#[test]
fn only_the_owner_pauses_resumes_and_ends() {
    on_running_chain(terms(), || {
        assert_noop!(Training::pause_run(signed(&bob()), RUN), Error::<Test>::NotOwner);
        assert_noop!(Training::cancel_run(signed(&bob()), RUN), Error::<Test>::NotOwner);
        assert_noop!(Training::complete_run(signed(&bob()), RUN, [1; 32]), Error::<Test>::NotOwner);
        assert_noop!(
            Training::resume_run(signed(&coordinator()), RUN),
            Error::<Test>::RunNotPaused
        );
        assert_ok!(Training::pause_run(signed(&coordinator()), RUN));
        assert_eq!(state(), RunState::Paused(PauseReason::Owner));
        assert_noop!(Training::pause_run(signed(&coordinator()), RUN), Error::<Test>::RunNotActive);
        assert_ok!(Training::resume_run(signed(&coordinator()), RUN));
        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        for refused in [
            Training::pause_run(signed(&coordinator()), RUN),
            Training::cancel_run(signed(&coordinator()), RUN),
            Training::fund_run(signed(&sponsor()), RUN, BUDGET),
            Training::join_run(signed(&alice()), RUN),
            Training::register_verifier(signed(&verifier(0)), RUN),
            Training::timeout_run(signed(&anybody()), RUN),
        ] {
            assert_eq!(refused, Err(Error::<Test>::RunOver.into()));
        }
    });
}

#[test]
fn a_silent_coordinator_is_timed_out_and_pays() {
    on_running_chain(terms(), || {
        commit_and_finalize(0, &[(alice(), 100)]);
        // The commit was five blocks ago; anchors and pauses are no progress.
        advance(44);
        anchor(1);
        assert_noop!(Training::timeout_run(signed(&anybody()), RUN), Error::<Test>::NotTimedOut);
        advance(1);
        assert_ok!(Training::timeout_run(signed(&anybody()), RUN));
        let run = Runs::<Test>::get(RUN).expect("exists");
        assert_eq!((run.bond, run.recovered), (200, 200));
        assert!(matches!(
            last_events(1).as_slice(),
            [Event::RunClosed {
                reason: CloseReason::TimedOut,
                attribution: Attribution::Coordinator,
                ..
            }]
        ));
    });
}

#[test]
fn a_run_that_ran_out_of_money_times_out_without_a_slash() {
    on_running_chain(terms(), || {
        let commitment = Leaves::new(0, &[(alice(), 10_400)]).commitment(0, 1_100);
        assert_ok!(Training::commit_round(signed(&coordinator()), RUN, commitment));
        advance(50);
        assert_ok!(Training::timeout_run(signed(&anybody()), RUN));
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").bond, 400);
        assert!(matches!(
            last_events(1).as_slice(),
            [Event::RunClosed { attribution: Attribution::Sponsor, .. }]
        ));
    });
}

#[test]
fn at_the_end_everybody_is_paid_back_to_the_planck_and_nothing_is_left() {
    on_running_chain(terms(), || {
        assert_ok!(Training::fund_run(signed(&sponsor()), RUN, 5_000));
        let leaves = commit_and_finalize(0, &[(alice(), 700), (bob(), 300)]);
        anchor(1);
        assert_noop!(
            Training::refund_funder(signed(&anybody()), RUN, sponsor()),
            Error::<Test>::RunNotClosed
        );
        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        assert_noop!(
            Training::refund_funder(signed(&anybody()), RUN, sponsor()),
            Error::<Test>::ClaimWindowOpen
        );
        advance(15);
        assert_ok!(leaves.claim(&alice()));
        System::set_block_number(expiry());
        // Bob slept through the claim window: his 300 go back to the funders.
        assert_noop!(leaves.claim(&bob()), Error::<Test>::ClaimWindowOver);
        assert_noop!(
            Training::refund_funder(signed(&anybody()), RUN, bob()),
            Error::<Test>::NothingToRefund
        );
        assert_noop!(
            Training::settle_run(signed(&anybody()), RUN),
            Error::<Test>::FundersNotRefunded
        );
        assert_ok!(Training::refund_funder(signed(&anybody()), RUN, sponsor()));
        check_invariants();
        assert_ok!(Training::refund_funder(signed(&anybody()), RUN, coordinator()));
        // 14,300 were left of 15,000: a third of it, rounded down, and the rest.
        assert_eq!(free(&sponsor()), ENDOWMENT - 5_000 + 4_766);
        assert_noop!(
            Training::prune_run(signed(&anybody()), RUN, 10),
            Error::<Test>::RunNotSettled
        );
        assert_ok!(Training::settle_run(signed(&anybody()), RUN));
        assert_noop!(Training::settle_run(signed(&anybody()), RUN), Error::<Test>::RunNotClosed);
        check_invariants();

        assert_ok!(Training::prune_run(signed(&anybody()), RUN, 2));
        assert!(Runs::<Test>::get(RUN).is_some());
        check_invariants();
        assert_ok!(Training::prune_run(signed(&anybody()), RUN, 10));
        assert!(Runs::<Test>::get(RUN).is_none());
        // Only the deposit for the record that the id is taken stays.
        assert_eq!(free(&coordinator()), ENDOWMENT - 10_000 + 9_534 - RECORD_DEPOSIT);
        assert_eq!(free(&verifier(0)), ENDOWMENT);
        for worker in [alice(), bob()] {
            assert_ok!(Training::announce_exit(signed(&worker)));
            assert_ok!(Training::withdraw_stake(signed(&worker)));
        }
        let total: u128 = (1..=13).map(|index| free(&account(index))).sum();
        assert_eq!(total, 13 * ENDOWMENT - RECORD_DEPOSIT, "no planck was made or lost");
    });
}

/// Ends the run and removes every record of it.
fn bury() {
    assert_ok!(Training::cancel_run(signed(&coordinator()), RUN));
    System::set_block_number(expiry());
    assert_ok!(Training::refund_funder(signed(&anybody()), RUN, coordinator()));
    assert_ok!(Training::settle_run(signed(&anybody()), RUN));
    assert_ok!(Training::prune_run(signed(&anybody()), RUN, 10));
    assert!(Runs::<Test>::get(RUN).is_none());
}

#[test]
fn a_runs_id_is_never_that_of_another_run() {
    on_running_chain(terms(), || {
        // Alice never left: her membership names nothing but the id.
        bury();
        for who in [coordinator(), bob()] {
            let again = Training::create_run(signed(&who), RUN, terms(), BUDGET);
            assert_noop!(again, Error::<Test>::RunIdSpent);
        }
        assert_ok!(Training::create_run(signed(&coordinator()), [8; 32], terms(), BUDGET));
        check_invariants();
        // So nobody can accuse her in a run that she never joined, and her stake is hers.
        assert_noop!(report(&alice(), 0), Error::<Test>::RunUnknown);
        assert_ok!(Training::announce_exit(signed(&alice())));
        assert_ok!(Training::withdraw_stake(signed(&alice())));
        assert_eq!(free(&alice()), ENDOWMENT);
    });
}

#[test]
fn a_funder_whose_account_is_gone_holds_nobody_up() {
    on_running_chain(terms(), || {
        let ghost = account(77);
        assert_ok!(Balances::transfer_allow_death(signed(&sponsor()), ghost.clone(), 5_000));
        assert_ok!(Training::fund_run(signed(&ghost), RUN, 60));
        let rest = free(&ghost);
        assert_ok!(Balances::transfer_allow_death(signed(&ghost), sponsor(), rest));
        // Nearly everything is earned, so the ghost's share is below an account's minimum.
        let leaves = Leaves::new(0, &[(alice(), 10_000)]);
        let commitment = leaves.commitment(0, 1_000);
        assert_ok!(Training::commit_round(signed(&coordinator()), RUN, commitment));
        advance(5);
        assert_ok!(Training::finalize_round(signed(&anybody()), RUN, 0));
        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        advance(15);
        assert_ok!(leaves.claim(&alice()));
        System::set_block_number(expiry());
        assert_ok!(Training::refund_funder(signed(&anybody()), RUN, coordinator()));
        assert_ok!(Training::refund_funder(signed(&anybody()), RUN, ghost.clone()));
        assert_eq!(free(&ghost), 0);
        assert_ok!(Training::settle_run(signed(&anybody()), RUN));
        assert!(matches!(last_events(1).as_slice(), [Event::RunSettled { left_over: 1.., .. }]));
        check_invariants();
    });
}
