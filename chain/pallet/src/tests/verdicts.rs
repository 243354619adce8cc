use frame_support::{assert_noop, assert_ok, dispatch::DispatchResult};

use crate::{
    AccountId, Error, Event, FaultState, Finding, RecoveryReason, RunState, Runs, Verifier,
    VerifierFault, VerifierFaults, Verifiers, mock::*,
};

/// The owner says that a verifier's replay of Bob's round did not end where it says.
fn accuse(accused: &AccountId, round: u32) -> DispatchResult {
    Training::report_verifier(signed(&coordinator()), RUN, accused.clone(), bob(), round, [5; 32])
}

fn vote(by: &AccountId, accused: &AccountId, round: u32, finds: Finding) -> DispatchResult {
    Training::vote_on_verifier(signed(by), RUN, accused.clone(), bob(), round, finds)
}

fn contest(accused: &AccountId, round: u32) -> DispatchResult {
    Training::contest_verifier_fault(signed(accused), RUN, bob(), round, [6; 32])
}

fn execute(accused: &AccountId, round: u32) -> DispatchResult {
    Training::execute_verifier_fault(signed(&anybody()), RUN, accused.clone(), bob(), round)
}

/// Accused, and found guilty by the two others.
fn convict(accused: &AccountId, round: u32) {
    assert_ok!(accuse(accused, round));
    for other in (0..3).map(verifier).filter(|other| other != accused) {
        assert_ok!(vote(&other, accused, round, Finding::Guilty));
    }
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
        assert_ok!(accuse(&liar, 0));
        assert_noop!(accuse(&liar, 0), Error::<Test>::AlreadyReported);
        assert_eq!(record(&liar).open_faults, 1);
        assert_eq!(
            last_events(1),
            vec![Event::VerifierReported {
                run: RUN,
                verifier: liar.clone(),
                worker: bob(),
                round: 0,
                evidence_digest: [5; 32],
            }]
        );
        check_invariants();
        assert_ok!(vote(&verifier(0), &liar, 0, Finding::Guilty));
        assert_noop!(vote(&verifier(0), &liar, 0, Finding::Guilty), Error::<Test>::AlreadyVoted);
        assert_eq!(
            last_events(1),
            vec![Event::VerifierFaultVoted {
                run: RUN,
                verifier: liar.clone(),
                worker: bob(),
                round: 0,
                by: verifier(0),
                finds: Finding::Guilty,
            }]
        );
        assert_ok!(vote(&verifier(1), &liar, 0, Finding::Guilty));

        assert_eq!(fault(&liar, 0).state, FaultState::Executed { slashed: 303 });
        let accused = record(&liar);
        assert_eq!((accused.bond, accused.open_faults), (0, 0));
        // Half of 303 is 151, of which each of the two gets 75; what does not divide is the run's.
        assert_eq!(free(&verifier(0)), ENDOWMENT - 303 + 75);
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
        let late = vote(&verifier(1), &liar, 0, Finding::Guilty);
        assert_noop!(late, Error::<Test>::FaultDecided);
        assert_noop!(execute(&liar, 0), Error::<Test>::FaultDecided);
        assert_noop!(contest(&liar, 0), Error::<Test>::NotContestable);
    });
}

#[test]
fn the_owner_alone_accuses_a_verifier_and_it_has_no_vote_on_itself() {
    on_running_chain(terms(), || {
        assert_noop!(accuse(&verifier(2), 0), Error::<Test>::RoundNotAnchored);
        anchor(0);
        for stranger in [alice(), bob(), sponsor(), verifier(0), verifier(2)] {
            let accused =
                Training::report_verifier(signed(&stranger), RUN, verifier(2), bob(), 0, [5; 32]);
            assert_noop!(accused, Error::<Test>::NotOwner);
        }
        assert_noop!(accuse(&sponsor(), 0), Error::<Test>::VerifierUnknown);
        assert_noop!(execute(&verifier(2), 0), Error::<Test>::FaultUnknown);
        assert_noop!(contest(&verifier(2), 0), Error::<Test>::FaultUnknown);
        let early = vote(&verifier(0), &verifier(2), 0, Finding::Guilty);
        assert_noop!(early, Error::<Test>::FaultUnknown);
        assert_ok!(accuse(&verifier(2), 0));
        let own = vote(&verifier(2), &verifier(2), 0, Finding::Innocent);
        assert_noop!(own, Error::<Test>::SelfReport);
        let stranger = vote(&sponsor(), &verifier(2), 0, Finding::Guilty);
        assert_noop!(stranger, Error::<Test>::VerifierUnknown);
        // The owner's word and one vote are no quorum of two.
        assert_ok!(vote(&verifier(0), &verifier(2), 0, Finding::Guilty));
        assert_eq!(record(&verifier(2)).bond, 300);
        // One that has retired can be accused for as long as its bond is exposed, and votes no more.
        assert_ok!(Training::retire_verifier(signed(&verifier(1)), RUN));
        let retired = vote(&verifier(1), &verifier(2), 0, Finding::Guilty);
        assert_noop!(retired, Error::<Test>::VerifierInactive);
        assert_ok!(accuse(&verifier(1), 0));
    });
}

#[test]
fn silence_lets_the_owners_report_stand() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(accuse(&verifier(2), 0));
        assert_noop!(execute(&verifier(2), 0), Error::<Test>::WindowOpen);
        advance(4);
        assert_noop!(contest(&verifier(2), 0), Error::<Test>::WindowOver);
        assert_ok!(execute(&verifier(2), 0));
        // No verifier voted on it: all of it goes to the run.
        assert_eq!((record(&verifier(2)).bond, recovered()), (0, 300));
    });
}

#[test]
fn a_contested_verdict_without_a_quorum_stands_and_nobody_pays() {
    on_running_chain(terms(), || {
        anchor(0);
        let honest = verifier(2);
        assert_ok!(accuse(&honest, 0));
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
        assert_ok!(vote(&verifier(0), &honest, 0, Finding::Guilty));
        advance(5);
        assert_noop!(execute(&honest, 0), Error::<Test>::WindowOpen);
        advance(1);
        let late = vote(&verifier(1), &honest, 0, Finding::Guilty);
        assert_noop!(late, Error::<Test>::WindowOver);
        assert_ok!(execute(&honest, 0));

        assert_eq!(fault(&honest, 0).state, FaultState::Dismissed);
        assert_eq!(free(&honest), before);
        assert_eq!((record(&honest).bond, record(&honest).open_faults), (300, 0));
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").bond, 400);
        assert_eq!(
            last_events(1),
            vec![Event::VerifierFaultDismissed {
                run: RUN,
                verifier: honest.clone(),
                worker: bob(),
                round: 0,
                penalty: 0,
            }]
        );
        assert_noop!(accuse(&honest, 0), Error::<Test>::AlreadyReported);
    });
}

#[test]
fn the_two_others_acquit_at_once() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(accuse(&verifier(2), 0));
        let before = free(&verifier(2));
        for index in 0..2 {
            assert_ok!(vote(&verifier(index), &verifier(2), 0, Finding::Innocent));
        }
        assert_eq!(fault(&verifier(2), 0).state, FaultState::Dismissed);
        assert_eq!(free(&verifier(2)), before + 100);
        assert_eq!(record(&verifier(2)).bond, 300);
    });
}

#[test]
fn a_liar_that_contests_loses_that_bond_too() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(accuse(&verifier(2), 0));
        assert_ok!(contest(&verifier(2), 0));
        for index in 0..2 {
            assert_ok!(vote(&verifier(index), &verifier(2), 0, Finding::Guilty));
        }
        assert_eq!(fault(&verifier(2), 0).state, FaultState::Executed { slashed: 300 });
        // 150 of the bond and the contest bond of 100.
        assert_eq!(recovered(), 250);
        assert_eq!(free(&verifier(2)), ENDOWMENT - 300 - 100);
        assert_eq!(free(&verifier(0)), ENDOWMENT - 300 + 75);
    });
}

#[test]
fn a_second_lie_takes_what_the_first_has_left_and_a_full_bond_when_it_is_filled_up() {
    on_running_chain(terms(), || {
        for round in 0..3 {
            anchor(round);
            assert_ok!(accuse(&verifier(2), round));
            assert_ok!(vote(&verifier(0), &verifier(2), round, Finding::Guilty));
        }
        assert_eq!(record(&verifier(2)).open_faults, 3);
        assert_ok!(vote(&verifier(1), &verifier(2), 0, Finding::Guilty));
        assert_ok!(vote(&verifier(1), &verifier(2), 1, Finding::Guilty));
        assert_eq!(fault(&verifier(2), 1).state, FaultState::Executed { slashed: 0 });
        assert_ok!(Training::register_verifier(signed(&verifier(2)), RUN));
        assert_ok!(vote(&verifier(1), &verifier(2), 2, Finding::Guilty));
        assert_eq!(fault(&verifier(2), 2).state, FaultState::Executed { slashed: 300 });
        assert_eq!(record(&verifier(2)).bond, 0);
    });
}

#[test]
fn a_bond_stays_while_its_verifier_is_accused() {
    on_running_chain(terms(), || {
        let withdraw = |who: &AccountId| Training::withdraw_verifier_bond(signed(who), RUN);
        anchor(0);
        assert_ok!(Training::retire_verifier(signed(&verifier(2)), RUN));
        advance(14);
        assert_ok!(accuse(&verifier(2), 0));
        advance(1);
        assert_noop!(withdraw(&verifier(2)), Error::<Test>::DisputeOpen);
        assert_ok!(contest(&verifier(2), 0));
        advance(6);
        assert_noop!(withdraw(&verifier(2)), Error::<Test>::DisputeOpen);
        assert_ok!(execute(&verifier(2), 0));
        assert_ok!(withdraw(&verifier(2)));
        assert_eq!(free(&verifier(2)), ENDOWMENT);
    });
}

#[test]
fn who_left_long_ago_or_came_later_or_has_no_bond_is_out_of_reach() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(Training::retire_verifier(signed(&verifier(2)), RUN));
        advance(15);
        assert_noop!(accuse(&verifier(2), 0), Error::<Test>::VerifierUnreachable);
        assert_ok!(Training::withdraw_verifier_bond(signed(&verifier(2)), RUN));
        assert_noop!(accuse(&verifier(2), 0), Error::<Test>::VerifierUnknown);
        assert_ok!(Training::register_verifier(signed(&verifier(2)), RUN));
        assert_noop!(accuse(&verifier(2), 0), Error::<Test>::JoinedLater);
        anchor(1);
        convict(&verifier(2), 1);
        anchor(2);
        assert_noop!(accuse(&verifier(2), 2), Error::<Test>::VerifierUnreachable);
    });
}

#[test]
fn a_slashed_verifier_has_no_vote_until_its_bond_is_full_again() {
    on_running_chain(terms(), || {
        anchor(0);
        convict(&verifier(2), 0);
        assert_ok!(report(&bob(), 0));
        let judge =
            || Training::vote_on_fault(signed(&verifier(2)), RUN, bob(), 0, Finding::Guilty);
        assert_noop!(judge(), Error::<Test>::VerifierInactive);
        let before = free(&verifier(2));
        assert_ok!(Training::register_verifier(signed(&verifier(2)), RUN));
        assert_eq!((record(&verifier(2)).bond, free(&verifier(2))), (300, before - 300));
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").verifiers, 3);
        assert_ok!(judge());
    });
}

#[test]
fn a_run_is_not_settled_over_an_accused_verifier_and_pruning_returns_the_deposits() {
    on_running_chain(terms(), || {
        anchor(0);
        commit_and_finalize(0, &[(alice(), 100)]);
        convict(&verifier(2), 0);
        let with_deposits = free(&coordinator());
        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        advance(14);
        assert_ok!(accuse(&verifier(1), 0));
        advance(1);
        assert_noop!(accuse(&verifier(0), 0), Error::<Test>::RunOver);
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
        assert_eq!(free(&coordinator()), with_deposits - RECORD_DEPOSIT + refunded());

        let prune = |limit: u32| Training::prune_run(signed(&anybody()), RUN, limit);
        // The three verifiers first, then one deposit after the other.
        assert_ok!(prune(3));
        let before = free(&coordinator());
        check_invariants();
        assert_ok!(prune(1));
        assert_eq!(free(&coordinator()), before + RECORD_DEPOSIT);
        check_invariants();
        assert_ok!(prune(1));
        assert_eq!(free(&coordinator()), before + 2 * RECORD_DEPOSIT);
        assert_ok!(prune(10));
        assert!(Runs::<Test>::get(RUN).is_none());
        assert_eq!(VerifierFaults::<Test>::iter().count(), 0);
    });
}

/// What the owner got back of escrow and bond.
fn refunded() -> u128 {
    Runs::<Test>::get(RUN).expect("exists").refunded + 400
}
