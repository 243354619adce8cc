use frame_support::{assert_noop, assert_ok};

use crate::{
    AccountId, Attribution, Decision, Error, Event, FaultKind, FaultState, Faults, Forfeits, Runs,
    Suspensions, Verifiers, Votes, Workers, mock::*,
};

fn fault_state(worker: &crate::AccountId, round: u32) -> FaultState {
    Faults::<Test>::get(RUN, (worker, round)).expect("the fault exists").state
}

fn execute(worker: &crate::AccountId, round: u32) -> frame_support::dispatch::DispatchResult {
    Training::execute_fault(signed(&anybody()), RUN, worker.clone(), round)
}

fn contest(worker: &crate::AccountId, round: u32) -> frame_support::dispatch::DispatchResult {
    Training::contest_fault(signed(worker), RUN, round, [6; 32])
}

#[test]
fn two_of_all_three_verifiers_slash_a_cheat_at_once() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(report(&verifier(0), &bob(), 0));
        assert_noop!(report(&verifier(0), &bob(), 0), Error::<Test>::AlreadyVoted);
        assert_eq!(Workers::<Test>::get(bob()).expect("registered").open_faults, 1);
        assert_ok!(report(&verifier(1), &bob(), 0));

        assert_eq!(fault_state(&bob(), 0), FaultState::Executed { slashed: 400 });
        let worker = Workers::<Test>::get(bob()).expect("registered");
        assert_eq!((worker.stake, worker.open_faults), (600, 0));
        // Half of 400, shared by the two who reported it; the rest is the run's.
        assert_eq!(free(&verifier(0)), ENDOWMENT - 300 - RECORD_DEPOSIT + 100);
        assert_eq!(free(&verifier(1)), ENDOWMENT - 300 + 100);
        let run = Runs::<Test>::get(RUN).expect("exists");
        assert_eq!((run.recovered, run.escrow), (200, BUDGET + 200));
        assert_eq!(
            last_events(1),
            vec![Event::WorkerSlashed {
                run: RUN,
                worker: bob(),
                round: 0,
                kind: FaultKind::Replay,
                amount: 400,
                to_reporters: 200,
                to_escrow: 200,
                votes: 2,
            }]
        );
        assert_noop!(report(&verifier(2), &bob(), 0), Error::<Test>::FaultDecided);
        assert_noop!(execute(&bob(), 0), Error::<Test>::FaultDecided);
        assert_noop!(contest(&bob(), 0), Error::<Test>::NotContestable);
    });
}

fn defend(
    by: &AccountId,
    worker: &AccountId,
    round: u32,
) -> frame_support::dispatch::DispatchResult {
    Training::defend_worker(signed(by), RUN, worker.clone(), round)
}

/// A run that anybody may verify, with two more verifiers than the three that are always there.
fn with_two_strangers(story: impl FnOnce([AccountId; 2])) {
    let mut open = terms();
    open.verifiers = Default::default();
    on_running_chain(open, || {
        let strangers = [account(8), account(9)];
        for stranger in &strangers {
            assert_ok!(Training::register_verifier(signed(stranger), RUN));
        }
        story(strangers);
    });
}

#[test]
fn two_bonded_names_take_no_stake_that_the_others_defend() {
    with_two_strangers(|strangers| {
        anchor(0);
        for stranger in &strangers {
            assert_ok!(report(stranger, &bob(), 0));
        }
        // They are a quorum, and not most of the five.
        assert!(matches!(fault_state(&bob(), 0), FaultState::Reported { .. }));
        assert_noop!(execute(&bob(), 0), Error::<Test>::WindowOpen);
        assert_noop!(defend(&strangers[0], &bob(), 0), Error::<Test>::AlreadyVoted);
        let before = free(&bob());
        assert_ok!(contest(&bob(), 0));
        for index in 0..2 {
            assert_ok!(defend(&verifier(index), &bob(), 0));
        }
        assert_eq!(
            last_events(1),
            vec![Event::WorkerDefended {
                run: RUN,
                worker: bob(),
                round: 0,
                verifier: verifier(1),
                votes: 2,
            }]
        );
        check_invariants();
        assert_ok!(defend(&verifier(2), &bob(), 0));
        assert_eq!(fault_state(&bob(), 0), FaultState::Dismissed);
        assert_eq!(free(&bob()), before + 100);
        assert_eq!(Workers::<Test>::get(bob()).expect("registered").stake, STAKE);
        // Who opened it pays.
        assert_eq!(Verifiers::<Test>::get(RUN, &strangers[0]).expect("registered").bond, 200);
        assert_eq!(Verifiers::<Test>::get(RUN, &strangers[1]).expect("registered").bond, 300);
        assert_noop!(defend(&verifier(2), &bob(), 0), Error::<Test>::FaultDecided);
    });
}

#[test]
fn who_does_not_object_is_saved_by_a_quorum_alone() {
    with_two_strangers(|strangers| {
        for round in 0..2 {
            anchor(round);
            assert_ok!(report(&strangers[0], &bob(), round));
            assert_ok!(defend(&verifier(0), &bob(), round));
        }
        assert_ok!(defend(&verifier(1), &bob(), 1));
        advance(4);
        let before = free(&bob());
        assert_ok!(execute(&bob(), 0));
        assert_ok!(execute(&bob(), 1));
        assert_eq!(fault_state(&bob(), 0), FaultState::Executed { slashed: 400 });
        assert_eq!(fault_state(&bob(), 1), FaultState::Dismissed);
        // Wrongly accused, it is paid without having put anything down.
        assert_eq!(free(&bob()), before + 100);
    });
}

#[test]
fn who_became_a_verifier_after_a_round_has_no_vote_on_it() {
    let mut open = terms();
    open.verifiers = Default::default();
    on_running_chain(open, || {
        anchor(0);
        advance(1);
        let late = account(8);
        assert_ok!(Training::register_verifier(signed(&late), RUN));
        assert_noop!(report(&late, &bob(), 0), Error::<Test>::JoinedLater);
        assert_ok!(report(&coordinator(), &bob(), 0));
        assert_noop!(report(&late, &bob(), 0), Error::<Test>::JoinedLater);
        assert_noop!(defend(&late, &bob(), 0), Error::<Test>::JoinedLater);
        anchor(1);
        assert_ok!(report(&late, &bob(), 1));
    });
}

#[test]
fn votes_decide_as_soon_as_no_vote_to_come_could_change_it() {
    let side = |votes: u8| crate::Accounts::truncate_from((0..votes).map(verifier).collect());
    let votes = |guilty, innocent| Votes { guilty: side(guilty), innocent: side(innocent) };
    let settled = |(guilty, innocent), jury| votes(guilty, innocent).settled(jury, 2);
    assert_eq!(settled((1, 0), 1), None);
    assert_eq!(settled((2, 0), 2), Some(Decision::Slash));
    assert_eq!(settled((2, 1), 4), None);
    assert_eq!(settled((3, 1), 5), Some(Decision::Slash));
    assert_eq!(settled((0, 1), 2), None);
    // The rest could only draw level with it, and that acquits.
    assert_eq!(settled((1, 2), 4), Some(Decision::Acquit));
    assert_eq!(settled((0, 2), 5), None);
    // What is settled is what it would have come to.
    for (jury, quorum) in [(1_u8, 1), (2, 1), (3, 2), (5, 2), (6, 3)] {
        for guilty in 0..=jury {
            for innocent in 0..=jury - guilty {
                let Some(decision) = votes(guilty, innocent).settled(jury.into(), quorum) else {
                    continue;
                };
                for more in 0..=jury - guilty - innocent {
                    let rest = jury - guilty - innocent - more;
                    for contested in [true, false] {
                        let end = votes(guilty + more, innocent + rest);
                        let end = end.at_the_end(contested, quorum);
                        assert_eq!(end, decision, "{guilty} to {innocent} of {jury}, {contested}");
                    }
                }
            }
        }
    }
}

#[test]
fn who_has_nothing_to_say_in_a_run_cannot_accuse_or_be_accused() {
    on_running_chain(terms(), || {
        assert_noop!(report(&verifier(0), &bob(), 0), Error::<Test>::RoundNotAnchored);
        anchor(0);
        assert_noop!(report(&sponsor(), &bob(), 0), Error::<Test>::NotReporter);
        assert_noop!(report(&bob(), &bob(), 0), Error::<Test>::SelfReport);
        assert_noop!(report(&verifier(0), &sponsor(), 0), Error::<Test>::WorkerUnknown);
        // A worker that never accepted this run's terms is out of its reach.
        register(&sponsor(), STAKE);
        assert_noop!(report(&verifier(0), &sponsor(), 0), Error::<Test>::NotMember);
        advance(1);
        assert_ok!(Training::join_run(signed(&sponsor()), RUN));
        assert_noop!(report(&verifier(0), &sponsor(), 0), Error::<Test>::JoinedLater);
        // A round that was committed without an anchor can be reported too.
        commit_and_finalize(0, &[(alice(), 1)]);
        commit_and_finalize(1, &[(alice(), 1)]);
        assert_ok!(report(&verifier(0), &bob(), 1));
        let evidence = [5; 32];
        assert_noop!(
            Training::report_fault(signed(&verifier(1)), RUN, bob(), 1, FaultKind::Codec, evidence),
            Error::<Test>::FaultKindMismatch
        );
        assert_ok!(Training::leave_run(signed(&alice()), RUN));
        advance(15);
        assert_noop!(report(&verifier(0), &alice(), 1), Error::<Test>::NotMember);
        assert_ok!(execute(&bob(), 1));
    });
}

#[test]
fn silence_lets_the_coordinators_report_stand() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(report(&coordinator(), &bob(), 0));
        assert_noop!(report(&coordinator(), &bob(), 0), Error::<Test>::AlreadyVoted);
        assert_noop!(execute(&bob(), 0), Error::<Test>::WindowOpen);
        assert_noop!(execute(&alice(), 0), Error::<Test>::FaultUnknown);
        advance(4);
        assert_noop!(contest(&bob(), 0), Error::<Test>::WindowOver);
        assert_ok!(execute(&bob(), 0));
        // No verifier reported it: all of it goes to the run.
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").recovered, 400);
    });
}

#[test]
fn a_contested_fault_without_a_quorum_is_dismissed_and_its_accuser_pays() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_noop!(contest(&bob(), 0), Error::<Test>::FaultUnknown);
        assert_ok!(report(&verifier(0), &bob(), 0));
        let before = free(&bob());
        assert_ok!(contest(&bob(), 0));
        assert_noop!(contest(&bob(), 0), Error::<Test>::NotContestable);
        assert_eq!(free(&bob()), before - 100);
        assert_ok!(Training::retire_verifier(signed(&verifier(0)), RUN));
        advance(4);
        assert_noop!(execute(&bob(), 0), Error::<Test>::WindowOpen);
        advance(2);
        assert_noop!(report(&verifier(1), &bob(), 0), Error::<Test>::WindowOver);
        assert_ok!(execute(&bob(), 0));

        assert_eq!(free(&bob()), before + 100);
        assert_eq!(Workers::<Test>::get(bob()).expect("registered").stake, STAKE);
        assert!(Forfeits::<Test>::get(RUN, bob()).is_none());
        assert_eq!(Verifiers::<Test>::get(RUN, verifier(0)).expect("registered").bond, 200);
        assert_eq!(
            last_events(1),
            vec![Event::FaultDismissed {
                run: RUN,
                worker: bob(),
                round: 0,
                kind: FaultKind::Replay,
                attribution: Attribution::Verifier,
                penalty: 100,
            }]
        );
        // Its bond is no longer full: it may not vote until it fills it up.
        assert_noop!(report(&verifier(0), &alice(), 0), Error::<Test>::NotReporter);
        assert_ok!(Training::register_verifier(signed(&verifier(0)), RUN));
        assert_ok!(report(&verifier(0), &alice(), 0));
        assert_ok!(report(&verifier(1), &alice(), 0));
    });
}

#[test]
fn a_coordinator_that_accuses_wrongly_pays_from_its_bond() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(report(&coordinator(), &bob(), 0));
        assert_ok!(contest(&bob(), 0));
        let before = free(&bob());
        advance(6);
        assert_ok!(execute(&bob(), 0));
        assert_eq!(free(&bob()), before + 200);
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").bond, 300);
    });
}

#[test]
fn a_lost_contest_costs_the_bond_too() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(report(&coordinator(), &bob(), 0));
        assert_ok!(contest(&bob(), 0));
        assert_ok!(report(&verifier(0), &bob(), 0));
        assert_ok!(report(&verifier(2), &bob(), 0));
        assert_eq!(fault_state(&bob(), 0), FaultState::Executed { slashed: 400 });
        // 200 of the slash and the contest bond of 100.
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").recovered, 300);
        assert_eq!(free(&bob()), ENDOWMENT - STAKE - RECORD_DEPOSIT - 100);
    });
}

#[test]
fn a_stake_is_never_overdrawn() {
    on_running_chain(terms(), || {
        for round in 0..4 {
            anchor(round);
            assert_ok!(report(&verifier(0), &bob(), round));
            assert_ok!(report(&verifier(1), &bob(), round));
        }
        assert_eq!(fault_state(&bob(), 2), FaultState::Executed { slashed: 200 });
        assert_eq!(fault_state(&bob(), 3), FaultState::Executed { slashed: 0 });
        assert_eq!(Workers::<Test>::get(bob()).expect("registered").stake, 0);
    });
}

#[test]
fn a_faulted_round_pays_nothing_and_honest_rounds_are_paid_from_the_next_total() {
    on_running_chain(terms(), || {
        let honest = commit_and_finalize(0, &[(alice(), 100), (bob(), 100)]);
        let faulty = commit_and_finalize(1, &[(alice(), 200), (bob(), 200)]);
        let unaware = commit_and_finalize(2, &[(alice(), 300), (bob(), 300)]);
        assert_ok!(report(&verifier(0), &bob(), 1));
        assert_ok!(report(&verifier(1), &bob(), 1));
        // Committed in the block of the slash: the coordinator may not have seen it.
        let same_block = commit(3, &[(alice(), 400), (bob(), 400)]);
        advance(5);
        assert_ok!(Training::finalize_round(signed(&anybody()), RUN, 3));
        // Aware: round 1 is left out of Bob's total, which falls behind Alice's by 100.
        let aware = commit_and_finalize(4, &[(alice(), 500), (bob(), 400)]);
        commit_and_finalize(5, &[(alice(), 600), (bob(), 500)]);
        let last = commit_and_finalize(6, &[(alice(), 700), (bob(), 600)]);

        let before = free(&bob());
        assert_noop!(faulty.claim(&bob()), Error::<Test>::Forfeited);
        assert_noop!(unaware.claim(&bob()), Error::<Test>::Forfeited);
        assert_noop!(same_block.claim(&bob()), Error::<Test>::Forfeited);
        assert_ok!(honest.claim(&bob()));
        assert_eq!(free(&bob()), before + 100);
        assert_ok!(aware.claim(&bob()));
        assert_eq!(free(&bob()), before + 400);
        // Alice is not concerned.
        assert_ok!(faulty.claim(&alice()));

        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        advance(15);
        assert_ok!(last.claim(&bob()));
        assert_ok!(last.claim(&alice()));
        assert_eq!(free(&bob()), before + 600);
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").claimed, 1_300);
    });
}

#[test]
fn what_a_fault_would_forfeit_is_not_paid_before_it_is_decided() {
    on_running_chain(terms(), || {
        let honest = commit_and_finalize(0, &[(alice(), 100), (bob(), 100)]);
        let accused = commit_and_finalize(1, &[(alice(), 200), (bob(), 200)]);
        let later = commit_and_finalize(2, &[(alice(), 300), (bob(), 300)]);
        for round in 3..5 {
            let earned = u128::from(round + 1) * 100;
            commit_and_finalize(round, &[(alice(), earned), (bob(), earned)]);
        }
        assert_ok!(report(&verifier(0), &bob(), 1));
        let before = free(&bob());
        assert_noop!(accused.claim(&bob()), Error::<Test>::FaultUndecided);
        assert_noop!(later.claim(&bob()), Error::<Test>::FaultUndecided);
        // What was earned before is his whatever is decided, and Alice's is hers.
        assert_ok!(honest.claim(&bob()));
        assert_ok!(accused.claim(&alice()));
        advance(4);
        assert_noop!(later.claim(&bob()), Error::<Test>::FaultUndecided);
        assert_ok!(execute(&bob(), 1));
        assert_noop!(later.claim(&bob()), Error::<Test>::Forfeited);
        assert_eq!(free(&bob()), before + 100);
        assert!(Suspensions::<Test>::get(RUN, bob()).is_none());
    });
}

#[test]
fn an_acquitted_worker_has_the_whole_time_to_claim_what_waited() {
    on_running_chain(terms(), || {
        let leaves = commit_and_finalize(0, &[(alice(), 100), (bob(), 100)]);
        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        advance(14);
        assert_ok!(report(&verifier(0), &bob(), 0));
        assert_ok!(contest(&bob(), 0));
        // Nobody decides it before the claims would have been over.
        advance(21);
        assert_noop!(leaves.claim(&alice()), Error::<Test>::ClaimWindowOver);
        assert_ok!(execute(&bob(), 0));
        assert_eq!(fault_state(&bob(), 0), FaultState::Dismissed);
        advance(19);
        assert_ok!(leaves.claim(&bob()));
    });
}

#[test]
fn faults_can_be_reported_until_a_closed_runs_windows_are_over() {
    on_running_chain(terms(), || {
        commit_and_finalize(0, &[(alice(), 100)]);
        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        advance(14);
        assert_ok!(report(&verifier(0), &bob(), 0));
        advance(1);
        assert_noop!(report(&verifier(0), &alice(), 0), Error::<Test>::RunOver);
        // A second vote on what is open still counts, and the slash finds its escrow.
        assert_ok!(report(&verifier(1), &bob(), 0));
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").recovered, 200);
    });
}
