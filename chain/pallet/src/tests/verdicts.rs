use frame_support::{assert_noop, assert_ok, dispatch::DispatchResult};

use crate::{
    AccountId, Attribution, Error, Event, FaultState, RecoveryReason, RunState, Runs, Verifier,
    VerifierFault, VerifierFaults, Verifiers, mock::*,
};

/// Says that a verifier's replay of Bob's round did not end where it says.
fn accuse(reporter: &AccountId, accused: &AccountId, round: u32) -> DispatchResult {
    Training::report_verifier(signed(reporter), RUN, accused.clone(), bob(), round, [5; 32])
}

fn contest(accused: &AccountId, round: u32) -> DispatchResult {
    Training::contest_verifier_fault(signed(accused), RUN, bob(), round, [6; 32])
}

fn execute(accused: &AccountId, round: u32) -> DispatchResult {
    Training::execute_verifier_fault(signed(&anybody()), RUN, accused.clone(), bob(), round)
}

fn fault(accused: &AccountId, round: u32) -> VerifierFault {
    VerifierFaults::<Test>::get(RUN, (accused, bob(), round)).expect("the fault exists")
}

fn record(who: &AccountId) -> Verifier {
    Verifiers::<Test>::get(RUN, who).expect("registered")
}

fn recovered() -> u128 {
    Runs::<Test>::get(RUN).expect("exists").recovered
}

#[test]
fn the_two_others_take_a_verifiers_bond_at_once() {
    let mut odd = terms();
    odd.verifier_bond = 303;
    on_running_chain(odd, || {
        anchor(0);
        let liar = verifier(2);
        assert_ok!(accuse(&verifier(0), &liar, 0));
        assert_noop!(accuse(&verifier(0), &liar, 0), Error::<Test>::AlreadyVoted);
        assert_eq!((record(&liar).open_faults, record(&verifier(0)).open_reports), (1, 1));
        assert_eq!(
            last_events(1),
            vec![Event::VerifierReported {
                run: RUN,
                verifier: liar.clone(),
                worker: bob(),
                round: 0,
                reporter: verifier(0),
                role: Attribution::Verifier,
                evidence_digest: [5; 32],
                votes: 1,
            }]
        );
        check_invariants();
        assert_ok!(accuse(&verifier(1), &liar, 0));

        assert_eq!(fault(&liar, 0).state, FaultState::Executed { slashed: 303 });
        let (accused, accuser) = (record(&liar), record(&verifier(0)));
        assert_eq!((accused.bond, accused.open_faults, accuser.open_reports), (0, 0, 0));
        // Half of 303 is 151, of which each of the two gets 75; what does not divide is the run's.
        assert_eq!(free(&verifier(0)), ENDOWMENT - 303 - RECORD_DEPOSIT + 75);
        assert_eq!(free(&verifier(1)), ENDOWMENT - 303 + 75);
        let run = Runs::<Test>::get(RUN).expect("exists");
        assert_eq!((run.recovered, run.escrow, run.open_disputes), (153, BUDGET + 153, 0));
        let reason = RecoveryReason::VerifierSlashed;
        assert_eq!(
            last_events(2),
            vec![
                Event::EscrowRecovered { run: RUN, from: liar.clone(), amount: 153, reason },
                Event::VerifierSlashed {
                    run: RUN,
                    verifier: liar.clone(),
                    worker: bob(),
                    round: 0,
                    amount: 303,
                    to_reporters: 150,
                    to_escrow: 153,
                    votes: 2,
                }
            ]
        );
        assert_noop!(accuse(&verifier(1), &liar, 0), Error::<Test>::FaultDecided);
        assert_noop!(execute(&liar, 0), Error::<Test>::FaultDecided);
        assert_noop!(contest(&liar, 0), Error::<Test>::NotContestable);
    });
}

#[test]
fn nobody_but_active_verifiers_and_the_owner_accuses_a_verifier() {
    on_running_chain(terms(), || {
        assert_noop!(accuse(&verifier(0), &verifier(2), 0), Error::<Test>::RoundNotAnchored);
        anchor(0);
        for stranger in [alice(), bob(), sponsor()] {
            assert_noop!(accuse(&stranger, &verifier(2), 0), Error::<Test>::NotReporter);
        }
        assert_ok!(Training::retire_verifier(signed(&verifier(0)), RUN));
        assert_noop!(accuse(&verifier(0), &verifier(2), 0), Error::<Test>::NotReporter);
        assert_noop!(accuse(&verifier(1), &sponsor(), 0), Error::<Test>::VerifierUnknown);
        assert_noop!(execute(&verifier(2), 0), Error::<Test>::FaultUnknown);
        assert_noop!(contest(&verifier(2), 0), Error::<Test>::FaultUnknown);
        assert_ok!(accuse(&coordinator(), &verifier(2), 0));
        assert_noop!(accuse(&coordinator(), &verifier(2), 0), Error::<Test>::AlreadyVoted);
        assert_eq!(fault(&verifier(2), 0).votes.guilty.len(), 0);
        // A round that was committed without an anchor can be reported too, and so can one that
        // has retired, for as long as its bond is exposed.
        commit_and_finalize(0, &[(alice(), 1)]);
        commit_and_finalize(1, &[(alice(), 1)]);
        assert_ok!(accuse(&verifier(1), &verifier(0), 1));
    });
}

#[test]
fn the_accused_has_no_vote_on_itself() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_noop!(accuse(&verifier(2), &verifier(2), 0), Error::<Test>::SelfReport);
        assert_ok!(accuse(&coordinator(), &verifier(2), 0));
        assert_ok!(accuse(&verifier(0), &verifier(2), 0));
        assert_noop!(accuse(&verifier(2), &verifier(2), 0), Error::<Test>::SelfReport);
        // The owner's report and one vote are no quorum of two.
        assert_eq!(fault(&verifier(2), 0).votes.guilty.to_vec(), [verifier(0)]);
        assert_eq!(record(&verifier(2)).bond, 300);
        // Meanwhile it may accuse another, even the one that accuses it.
        assert_ok!(accuse(&verifier(2), &verifier(0), 0));
    });
}

#[test]
fn silence_lets_the_owners_report_stand() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(accuse(&coordinator(), &verifier(2), 0));
        assert_noop!(execute(&verifier(2), 0), Error::<Test>::WindowOpen);
        advance(4);
        assert_noop!(contest(&verifier(2), 0), Error::<Test>::WindowOver);
        assert_ok!(execute(&verifier(2), 0));
        // No verifier reported it: all of it goes to the run.
        assert_eq!((record(&verifier(2)).bond, recovered()), (0, 300));
    });
}

#[test]
fn a_contested_verdict_without_a_quorum_stands_and_its_accuser_pays() {
    on_running_chain(terms(), || {
        anchor(0);
        let honest = verifier(2);
        assert_ok!(accuse(&verifier(0), &honest, 0));
        let before = free(&honest);
        assert_ok!(contest(&honest, 0));
        assert_eq!(
            last_events(1),
            vec![Event::VerifierFaultContested {
                run: RUN,
                verifier: honest.clone(),
                worker: bob(),
                round: 0,
                evidence_digest: [6; 32],
                bond: 100,
            }]
        );
        assert_noop!(contest(&honest, 0), Error::<Test>::NotContestable);
        assert_eq!(free(&honest), before - 100);
        check_invariants();
        advance(5);
        assert_noop!(execute(&honest, 0), Error::<Test>::WindowOpen);
        advance(1);
        assert_noop!(accuse(&verifier(1), &honest, 0), Error::<Test>::WindowOver);
        assert_ok!(execute(&honest, 0));

        assert_eq!(fault(&honest, 0).state, FaultState::Dismissed);
        assert_eq!(free(&honest), before + 100);
        assert_eq!((record(&honest).bond, record(&honest).open_faults), (300, 0));
        assert_eq!((record(&verifier(0)).bond, record(&verifier(0)).open_reports), (200, 0));
        assert_eq!(
            last_events(1),
            vec![Event::VerifierFaultDismissed {
                run: RUN,
                verifier: honest.clone(),
                worker: bob(),
                round: 0,
                attribution: Attribution::Verifier,
                penalty: 100,
            }]
        );
        assert_noop!(accuse(&verifier(1), &honest, 0), Error::<Test>::FaultDecided);
        // Its bond is no longer full: it may not accuse until it fills it up.
        assert_noop!(accuse(&verifier(0), &honest, 0), Error::<Test>::NotReporter);
    });
}

#[test]
fn an_owner_that_accuses_wrongly_pays_from_its_bond() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(accuse(&coordinator(), &verifier(2), 0));
        assert_ok!(contest(&verifier(2), 0));
        let before = free(&verifier(2));
        advance(6);
        assert_ok!(execute(&verifier(2), 0));
        assert_eq!(free(&verifier(2)), before + 200);
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").bond, 300);
    });
}

#[test]
fn who_is_defended_by_half_of_the_others_keeps_its_bond() {
    on_running_chain(terms(), || {
        let defend =
            |by: &AccountId| Training::defend_verifier(signed(by), RUN, verifier(2), bob(), 0);
        anchor(0);
        assert_noop!(defend(&verifier(0)), Error::<Test>::FaultUnknown);
        let registered = || Training::register_verifier(signed(&sponsor()), RUN);
        assert_noop!(registered(), Error::<Test>::NotInvited);
        assert_ok!(accuse(&verifier(0), &verifier(2), 0));
        assert_noop!(defend(&verifier(2)), Error::<Test>::SelfReport);
        assert_noop!(defend(&verifier(0)), Error::<Test>::AlreadyVoted);
        assert_noop!(defend(&sponsor()), Error::<Test>::VerifierUnknown);
        assert_ok!(defend(&verifier(1)));
        assert_eq!(
            last_events(1),
            vec![Event::VerifierDefended {
                run: RUN,
                verifier: verifier(2),
                worker: bob(),
                round: 0,
                by: verifier(1),
                votes: 1,
            }]
        );
        // One for and one against it are no quorum of two: it is to object.
        assert_ok!(contest(&verifier(2), 0));
        advance(6);
        assert_noop!(defend(&verifier(1)), Error::<Test>::WindowOver);
        assert_ok!(execute(&verifier(2), 0));
        assert_eq!(record(&verifier(2)).bond, 300);
        assert_eq!(record(&verifier(0)).bond, 200);
        assert_noop!(defend(&verifier(1)), Error::<Test>::FaultDecided);
    });
}

#[test]
fn a_liar_that_contests_loses_that_bond_too() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(accuse(&coordinator(), &verifier(2), 0));
        assert_ok!(contest(&verifier(2), 0));
        assert_ok!(accuse(&verifier(0), &verifier(2), 0));
        assert_ok!(accuse(&verifier(1), &verifier(2), 0));
        assert_eq!(fault(&verifier(2), 0).state, FaultState::Executed { slashed: 300 });
        // 150 of the bond and the contest bond of 100.
        assert_eq!(recovered(), 250);
        assert_eq!(free(&verifier(2)), ENDOWMENT - 300 - 100);
        assert_eq!(free(&verifier(0)), ENDOWMENT - 300 + 75);
    });
}

#[test]
fn an_accuser_whose_own_bond_was_taken_has_nothing_to_pay_with() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(accuse(&verifier(0), &verifier(2), 0));
        assert_ok!(contest(&verifier(2), 0));
        assert_ok!(accuse(&verifier(1), &verifier(0), 0));
        assert_ok!(accuse(&verifier(2), &verifier(0), 0));
        assert_eq!(record(&verifier(0)).bond, 0);
        let before = free(&verifier(2));
        advance(6);
        assert_ok!(execute(&verifier(2), 0));
        assert!(matches!(
            last_events(1).as_slice(),
            [Event::VerifierFaultDismissed { penalty: 0, .. }]
        ));
        assert_eq!(free(&verifier(2)), before + 100);
    });
}

#[test]
fn a_second_lie_takes_what_the_first_has_left_and_a_full_bond_when_it_is_filled_up() {
    on_running_chain(terms(), || {
        for round in 0..3 {
            anchor(round);
            assert_ok!(accuse(&verifier(0), &verifier(2), round));
        }
        assert_eq!(record(&verifier(2)).open_faults, 3);
        assert_ok!(accuse(&verifier(1), &verifier(2), 0));
        assert_ok!(accuse(&verifier(1), &verifier(2), 1));
        assert_eq!(fault(&verifier(2), 1).state, FaultState::Executed { slashed: 0 });
        assert_ok!(Training::register_verifier(signed(&verifier(2)), RUN));
        assert_ok!(accuse(&verifier(1), &verifier(2), 2));
        assert_eq!(fault(&verifier(2), 2).state, FaultState::Executed { slashed: 300 });
        assert_eq!(record(&verifier(2)).bond, 0);
    });
}

#[test]
fn a_bond_stays_while_its_verifier_is_accused_or_accuses() {
    on_running_chain(terms(), || {
        let withdraw = |who: &AccountId| Training::withdraw_verifier_bond(signed(who), RUN);
        anchor(0);
        for who in [verifier(1), verifier(2)] {
            assert_ok!(Training::retire_verifier(signed(&who), RUN));
        }
        advance(14);
        // It comes back to accuse, and retires again.
        assert_ok!(Training::register_verifier(signed(&verifier(1)), RUN));
        assert_ok!(accuse(&verifier(1), &verifier(2), 0));
        assert_ok!(Training::retire_verifier(signed(&verifier(1)), RUN));
        advance(1);
        assert_noop!(withdraw(&verifier(2)), Error::<Test>::DisputeOpen);
        assert_ok!(contest(&verifier(2), 0));
        advance(5);
        assert_noop!(withdraw(&verifier(2)), Error::<Test>::DisputeOpen);
        advance(9);
        assert_noop!(withdraw(&verifier(1)), Error::<Test>::DisputeOpen);
        assert_ok!(execute(&verifier(2), 0));
        for who in [verifier(1), verifier(2)] {
            assert_ok!(withdraw(&who));
        }
        assert_eq!(free(&verifier(2)), ENDOWMENT + 100);
        assert_eq!(free(&verifier(1)), ENDOWMENT - 100 - RECORD_DEPOSIT);
    });
}

#[test]
fn who_left_long_ago_or_came_later_or_has_no_bond_is_out_of_reach() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(Training::retire_verifier(signed(&verifier(2)), RUN));
        advance(15);
        assert_noop!(accuse(&verifier(0), &verifier(2), 0), Error::<Test>::VerifierUnreachable);
        assert_ok!(Training::withdraw_verifier_bond(signed(&verifier(2)), RUN));
        assert_noop!(accuse(&verifier(0), &verifier(2), 0), Error::<Test>::VerifierUnknown);
        assert_ok!(Training::register_verifier(signed(&verifier(2)), RUN));
        assert_noop!(accuse(&verifier(0), &verifier(2), 0), Error::<Test>::JoinedLater);
        anchor(1);
        assert_ok!(accuse(&verifier(0), &verifier(2), 1));
        assert_ok!(accuse(&verifier(1), &verifier(2), 1));
        anchor(2);
        assert_noop!(accuse(&verifier(0), &verifier(2), 2), Error::<Test>::VerifierUnreachable);
    });
}

#[test]
fn a_slashed_verifier_has_no_vote_until_its_bond_is_full_again() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(accuse(&verifier(0), &verifier(2), 0));
        assert_ok!(accuse(&verifier(1), &verifier(2), 0));
        assert_noop!(report(&verifier(2), &bob(), 0), Error::<Test>::NotReporter);
        assert_noop!(accuse(&verifier(2), &verifier(0), 0), Error::<Test>::NotReporter);
        let before = free(&verifier(2));
        assert_ok!(Training::register_verifier(signed(&verifier(2)), RUN));
        assert_eq!((record(&verifier(2)).bond, free(&verifier(2))), (300, before - 300));
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").verifiers, 3);
        assert_ok!(report(&verifier(2), &bob(), 0));
        assert_ok!(accuse(&verifier(2), &verifier(0), 0));
    });
}

#[test]
fn a_run_is_not_settled_over_an_accused_verifier_and_pruning_returns_the_deposits() {
    on_running_chain(terms(), || {
        commit_and_finalize(0, &[(alice(), 100)]);
        assert_ok!(accuse(&verifier(0), &verifier(2), 0));
        assert_ok!(accuse(&verifier(1), &verifier(2), 0));
        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        advance(14);
        assert_ok!(accuse(&verifier(0), &verifier(1), 0));
        advance(1);
        assert_noop!(accuse(&verifier(1), &verifier(0), 0), Error::<Test>::RunOver);
        let RunState::Closed { expires_at, .. } = Runs::<Test>::get(RUN).expect("exists").state
        else {
            panic!("expected a closed run");
        };
        System::set_block_number(expires_at);
        let refund = || Training::refund_funder(signed(&anybody()), RUN, coordinator());
        assert_noop!(refund(), Error::<Test>::StillPending);
        assert_noop!(Training::settle_run(signed(&anybody()), RUN), Error::<Test>::StillPending);
        assert_ok!(execute(&verifier(1), 0));
        assert_ok!(refund());
        assert_ok!(Training::settle_run(signed(&anybody()), RUN));

        let prune = |limit: u32| Training::prune_run(signed(&anybody()), RUN, limit);
        // The three verifiers first, then one deposit after the other.
        let reward = 75 + 150;
        assert_ok!(prune(3));
        assert_eq!(free(&verifier(0)), ENDOWMENT + reward - 2 * RECORD_DEPOSIT);
        check_invariants();
        assert_ok!(prune(1));
        assert_eq!(free(&verifier(0)), ENDOWMENT + reward - RECORD_DEPOSIT);
        check_invariants();
        assert_ok!(prune(10));
        assert_eq!(free(&verifier(0)), ENDOWMENT + reward);
        assert!(Runs::<Test>::get(RUN).is_none());
        assert_eq!(VerifierFaults::<Test>::iter().count(), 0);
    });
}
