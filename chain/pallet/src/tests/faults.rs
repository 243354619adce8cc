use frame_support::{assert_noop, assert_ok, dispatch::DispatchResult};

use crate::{
    AccountId, Accounts, Error, Event, FaultKind, FaultState, Faults, Finding, Forfeits, Runs,
    Suspensions, Verifiers, Votes, Workers, mock::*,
};

fn fault_state(worker: &AccountId, round: u32) -> FaultState {
    Faults::<Test>::get(RUN, (worker, round)).expect("the fault exists").state
}

fn stake(worker: &AccountId) -> u128 {
    Workers::<Test>::get(worker).expect("registered").stake
}

fn recovered() -> u128 {
    Runs::<Test>::get(RUN).expect("exists").recovered
}

fn owners_bond() -> u128 {
    Runs::<Test>::get(RUN).expect("exists").bond
}

fn execute(worker: &AccountId, round: u32) -> DispatchResult {
    Training::execute_fault(signed(&anybody()), RUN, worker.clone(), round)
}

fn contest(worker: &AccountId, round: u32) -> DispatchResult {
    Training::contest_fault(signed(worker), RUN, round, [6; 32])
}

fn guilty(by: &AccountId, worker: &AccountId, round: u32) -> DispatchResult {
    Training::vote_on_fault(signed(by), RUN, worker.clone(), round, Finding::Guilty)
}

fn innocent(by: &AccountId, worker: &AccountId, round: u32) -> DispatchResult {
    Training::vote_on_fault(signed(by), RUN, worker.clone(), round, Finding::Innocent)
}

/// Reported, and found guilty by two of the three verifiers.
fn convict(worker: &AccountId, round: u32) {
    assert_ok!(report(worker, round));
    for index in 0..2 {
        assert_ok!(guilty(&verifier(index), worker, round));
    }
}

#[test]
fn two_of_all_three_verifiers_slash_a_cheat_at_once() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(report(&bob(), 0));
        assert_noop!(report(&bob(), 0), Error::<Test>::AlreadyReported);
        assert_eq!(Workers::<Test>::get(bob()).expect("registered").open_faults, 1);
        assert_ok!(guilty(&verifier(0), &bob(), 0));
        assert_eq!(
            last_events(1),
            vec![Event::FaultVoted {
                run: RUN,
                worker: bob(),
                round: 0,
                verifier: verifier(0),
                finds: Finding::Guilty,
            }]
        );
        assert_noop!(guilty(&verifier(0), &bob(), 0), Error::<Test>::AlreadyVoted);
        assert_noop!(innocent(&verifier(0), &bob(), 0), Error::<Test>::AlreadyVoted);
        assert_ok!(guilty(&verifier(1), &bob(), 0));

        assert_eq!(fault_state(&bob(), 0), FaultState::Executed { slashed: 400 });
        let worker = Workers::<Test>::get(bob()).expect("registered");
        assert_eq!((worker.stake, worker.open_faults), (600, 0));
        // Half of 400, shared by the two who found it; the rest is the run's.
        assert_eq!(free(&verifier(0)), ENDOWMENT - 300 + 100);
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
        assert_noop!(guilty(&verifier(2), &bob(), 0), Error::<Test>::FaultDecided);
        assert_noop!(report(&bob(), 0), Error::<Test>::AlreadyReported);
        assert_noop!(execute(&bob(), 0), Error::<Test>::FaultDecided);
        assert_noop!(contest(&bob(), 0), Error::<Test>::NotContestable);
    });
}

#[test]
fn the_owner_alone_accuses_and_whom_it_can_reach() {
    on_running_chain(terms(), || {
        assert_noop!(report(&bob(), 0), Error::<Test>::RoundNotAnchored);
        anchor(0);
        for stranger in [verifier(0), alice(), bob(), sponsor()] {
            let reported = Training::report_fault(
                signed(&stranger),
                RUN,
                bob(),
                0,
                FaultKind::Replay,
                [5; 32],
            );
            assert_noop!(reported, Error::<Test>::NotOwner);
        }
        assert_noop!(report(&coordinator(), 0), Error::<Test>::SelfReport);
        assert_noop!(report(&sponsor(), 0), Error::<Test>::WorkerUnknown);
        // A worker that never accepted this run's terms is out of its reach.
        register(&sponsor(), STAKE);
        assert_noop!(report(&sponsor(), 0), Error::<Test>::NotMember);
        advance(1);
        assert_ok!(Training::join_run(signed(&sponsor()), RUN));
        assert_noop!(report(&sponsor(), 0), Error::<Test>::JoinedLater);
        // A round that was committed without an anchor can be reported too. Nobody can say that it was a
        // verifier before it.
        commit_and_finalize(0, &[(alice(), 1)]);
        commit_and_finalize(1, &[(alice(), 1)]);
        assert_ok!(report(&bob(), 1));
        assert_noop!(guilty(&verifier(0), &bob(), 1), Error::<Test>::RoundNotAnchored);
        assert_ok!(Training::leave_run(signed(&alice()), RUN));
        advance(15);
        assert_noop!(report(&alice(), 1), Error::<Test>::NotMember);
        assert_ok!(execute(&bob(), 1));
    });
}

#[test]
fn those_who_are_no_verifiers_or_have_a_part_in_it_have_no_vote() {
    let mut open = terms();
    open.verifiers = Accounts::default();
    on_running_chain(open, || {
        anchor(0);
        assert_noop!(guilty(&verifier(0), &bob(), 0), Error::<Test>::FaultUnknown);
        assert_ok!(report(&bob(), 0));
        assert_noop!(guilty(&alice(), &bob(), 0), Error::<Test>::VerifierUnknown);
        advance(1);
        for late in [coordinator(), bob(), account(8)] {
            assert_ok!(Training::register_verifier(signed(&late), RUN));
        }
        assert_noop!(guilty(&coordinator(), &bob(), 0), Error::<Test>::SelfReport);
        assert_noop!(innocent(&bob(), &bob(), 0), Error::<Test>::SelfReport);
        // Nobody buys itself a side in a dispute that is there already.
        assert_noop!(innocent(&account(8), &bob(), 0), Error::<Test>::JoinedLater);
        anchor(1);
        assert_ok!(report(&bob(), 1));
        assert_ok!(innocent(&account(8), &bob(), 1));
        assert_ok!(Training::retire_verifier(signed(&verifier(0)), RUN));
        assert_noop!(guilty(&verifier(0), &bob(), 1), Error::<Test>::VerifierInactive);
    });
}

#[test]
fn silence_lets_the_owners_report_stand() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(report(&bob(), 0));
        assert_noop!(execute(&bob(), 0), Error::<Test>::WindowOpen);
        assert_noop!(execute(&alice(), 0), Error::<Test>::FaultUnknown);
        advance(4);
        assert_noop!(contest(&bob(), 0), Error::<Test>::WindowOver);
        assert_ok!(execute(&bob(), 0));
        // No verifier voted on it: all of it goes to the run.
        assert_eq!(recovered(), 400);
    });
}

#[test]
fn a_contested_fault_without_a_quorum_is_dismissed_and_nobody_pays() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_noop!(contest(&bob(), 0), Error::<Test>::FaultUnknown);
        assert_ok!(report(&bob(), 0));
        let before = free(&bob());
        assert_ok!(contest(&bob(), 0));
        assert_noop!(contest(&bob(), 0), Error::<Test>::NotContestable);
        assert_eq!(free(&bob()), before - 100);
        assert_ok!(guilty(&verifier(0), &bob(), 0));
        advance(4);
        assert_noop!(execute(&bob(), 0), Error::<Test>::WindowOpen);
        advance(2);
        assert_noop!(guilty(&verifier(1), &bob(), 0), Error::<Test>::WindowOver);
        assert_ok!(execute(&bob(), 0));

        // Nobody found it innocent either.
        assert_eq!(free(&bob()), before);
        assert_eq!(stake(&bob()), STAKE);
        assert!(Forfeits::<Test>::get(RUN, bob()).is_none());
        assert_eq!(owners_bond(), 400);
        assert_eq!(
            last_events(1),
            vec![Event::FaultDismissed {
                run: RUN,
                worker: bob(),
                round: 0,
                kind: FaultKind::Replay,
                penalty: 0,
            }]
        );
    });
}

#[test]
fn who_does_not_object_is_saved_by_a_quorum_alone() {
    let mut open = terms();
    open.verifiers = Accounts::default();
    on_running_chain(open, || {
        for stranger in [account(8), account(9)] {
            assert_ok!(Training::register_verifier(signed(&stranger), RUN));
        }
        for round in 0..2 {
            anchor(round);
            assert_ok!(report(&bob(), round));
            assert_ok!(guilty(&account(8), &bob(), round));
            assert_ok!(innocent(&verifier(0), &bob(), round));
        }
        assert_ok!(innocent(&verifier(1), &bob(), 1));
        // Two of five are a quorum, and not yet half of them.
        assert!(matches!(fault_state(&bob(), 1), FaultState::Reported { .. }));
        advance(4);
        let before = free(&bob());
        assert_ok!(execute(&bob(), 0));
        assert_ok!(execute(&bob(), 1));
        assert_eq!(fault_state(&bob(), 0), FaultState::Executed { slashed: 400 });
        assert_eq!(fault_state(&bob(), 1), FaultState::Dismissed);
        // Wrongly accused, it is paid without having put anything down.
        assert_eq!(free(&bob()), before + 100);
        assert_eq!(owners_bond(), 300);
    });
}

#[test]
fn who_leaves_after_its_vote_leaves_the_jury_as_large_as_it_was() {
    let mut open = terms();
    open.verifiers = Accounts::default();
    on_running_chain(open, || {
        let party = [account(6), account(7), account(8), account(9)];
        for stranger in &party {
            assert_ok!(Training::register_verifier(signed(stranger), RUN));
        }
        commit_and_finalize(0, &[(alice(), 100)]);
        anchor(1);
        commit_and_finalize(1, &[(alice(), 100)]);
        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        assert_ok!(report(&bob(), 1));
        assert_ok!(contest(&bob(), 1));
        for stranger in &party[..3] {
            assert_ok!(guilty(stranger, &bob(), 1));
        }
        advance(5);
        for honest in 0..3 {
            assert_ok!(innocent(&verifier(honest), &bob(), 1));
        }
        for stranger in &party[..3] {
            assert_ok!(Training::retire_verifier(signed(stranger), RUN));
        }
        // Four of seven are a majority of seven only.
        assert!(matches!(fault_state(&bob(), 1), FaultState::Contested { .. }));
        assert_eq!(Faults::<Test>::get(RUN, (bob(), 1)).expect("open").jury, 7);
        assert_ok!(innocent(&party[3], &bob(), 1));
        assert_eq!(fault_state(&bob(), 1), FaultState::Dismissed);
    });
}

#[test]
fn votes_decide_as_soon_as_no_vote_to_come_could_change_it() {
    let side = |votes: u8| Accounts::truncate_from((0..votes).map(verifier).collect());
    let votes = |guilty, innocent| Votes { guilty: side(guilty), innocent: side(innocent) };
    let settled = |(guilty, innocent), jury| votes(guilty, innocent).settled(jury, 2);
    assert_eq!(settled((1, 0), 1), None);
    assert_eq!(settled((2, 0), 2), Some(Finding::Guilty));
    assert_eq!(settled((2, 1), 4), None);
    assert_eq!(settled((3, 1), 5), Some(Finding::Guilty));
    assert_eq!(settled((0, 1), 2), None);
    // The rest could only draw level with it, and that acquits.
    assert_eq!(settled((1, 2), 4), Some(Finding::Innocent));
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
fn a_lost_contest_costs_the_bond_too() {
    on_running_chain(terms(), || {
        anchor(0);
        assert_ok!(report(&bob(), 0));
        assert_ok!(contest(&bob(), 0));
        assert_ok!(guilty(&verifier(0), &bob(), 0));
        assert_ok!(guilty(&verifier(2), &bob(), 0));
        assert_eq!(fault_state(&bob(), 0), FaultState::Executed { slashed: 400 });
        // 200 of the slash and the contest bond of 100.
        assert_eq!(recovered(), 300);
        assert_eq!(free(&bob()), ENDOWMENT - STAKE - RECORD_DEPOSIT - 100);
    });
}

#[test]
fn half_of_the_verifiers_acquit_at_once_and_no_bond_pays_more_than_it_has() {
    let mut poor = terms();
    poor.slashes.coordinator = 0;
    poor.coordinator_bond = 100;
    on_running_chain(poor, || {
        let before = free(&bob());
        for round in 0..2 {
            anchor(round);
            assert_ok!(report(&bob(), round));
            assert_ok!(contest(&bob(), round));
            assert_ok!(innocent(&verifier(0), &bob(), round));
            assert_ok!(innocent(&verifier(1), &bob(), round));
            assert_eq!(fault_state(&bob(), round), FaultState::Dismissed);
        }
        assert_eq!((free(&bob()), owners_bond()), (before + 100, 0));
        assert_eq!(Verifiers::<Test>::get(RUN, verifier(0)).expect("registered").bond, 300);
    });
}

#[test]
fn a_stake_is_never_overdrawn() {
    on_running_chain(terms(), || {
        for round in 0..4 {
            anchor(round);
            convict(&bob(), round);
        }
        assert_eq!(fault_state(&bob(), 2), FaultState::Executed { slashed: 200 });
        assert_eq!(fault_state(&bob(), 3), FaultState::Executed { slashed: 0 });
        assert_eq!(stake(&bob()), 0);
    });
}

#[test]
fn a_faulted_round_pays_nothing_and_honest_rounds_are_paid_from_the_next_total() {
    on_running_chain(terms(), || {
        anchor(1);
        let honest = commit_and_finalize(0, &[(alice(), 100), (bob(), 100)]);
        let faulty = commit_and_finalize(1, &[(alice(), 200), (bob(), 200)]);
        let unaware = commit_and_finalize(2, &[(alice(), 300), (bob(), 300)]);
        convict(&bob(), 1);
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
        assert_ok!(report(&bob(), 1));
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
        assert_ok!(report(&bob(), 0));
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
        anchor(0);
        commit_and_finalize(0, &[(alice(), 100)]);
        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        advance(14);
        assert_ok!(report(&bob(), 0));
        assert_ok!(guilty(&verifier(0), &bob(), 0));
        advance(1);
        assert_noop!(report(&alice(), 0), Error::<Test>::RunOver);
        // A second vote on what is open still counts, and the slash finds its escrow.
        assert_ok!(guilty(&verifier(1), &bob(), 0));
        assert_eq!(recovered(), 200);
    });
}
