use frame_support::{BoundedVec, assert_noop, assert_ok};

use crate::{
    AccountId, Anchors, ChallengeClaim, ChallengeOutcome, Challenges, Error, Event, PauseReason,
    RejectReason, RoundState, Rounds, RunState, Runs, Stage, mock::*,
};

fn round_state(round: u32) -> RoundState {
    Rounds::<Test>::get(RUN, round).expect("the round exists").state
}

fn challenge(round: u32) -> frame_support::dispatch::DispatchResult {
    let claim = ChallengeClaim::WrongTheta;
    Training::challenge_round(signed(&anybody()), RUN, round, claim, [6; 32])
}

fn vote(index: u8, round: u32, upheld: bool) -> frame_support::dispatch::DispatchResult {
    Training::resolve_challenge(signed(&verifier(index)), RUN, round, upheld)
}

#[test]
fn each_set_of_a_round_is_anchored_once_by_the_coordinator() {
    on_running_chain(terms(), || {
        let anchor = |who: &AccountId, round, stage, digest| {
            Training::anchor_commitments(signed(who), RUN, round, stage, digest)
        };
        assert_noop!(anchor(&bob(), 0, Stage::Commit, [1; 32]), Error::<Test>::NotOwner);
        assert_ok!(anchor(&coordinator(), 0, Stage::Commit, [1; 32]));
        assert_ok!(anchor(&coordinator(), 0, Stage::Admitted, [2; 32]));
        assert_noop!(
            anchor(&coordinator(), 0, Stage::Commit, [3; 32]),
            Error::<Test>::AlreadyAnchored
        );
        let stored = Anchors::<Test>::get(RUN, (0, Stage::Commit)).expect("anchored");
        assert_eq!((stored.digest, stored.block), ([1; 32], 1));
        commit(0, &[(alice(), 10)]);
        assert_noop!(
            anchor(&coordinator(), 0, Stage::Admitted, [1; 32]),
            Error::<Test>::RoundOutOfOrder
        );
        assert_ok!(Training::pause_run(signed(&coordinator()), RUN));
        assert_noop!(
            anchor(&coordinator(), 1, Stage::Commit, [1; 32]),
            Error::<Test>::RunNotActive
        );
    });
}

#[test]
fn commits_follow_each_other_without_a_gap_and_below_the_price() {
    on_running_chain(terms(), || {
        let commit_as =
            |who: &AccountId, commitment| Training::commit_round(signed(who), RUN, commitment);
        let good = Leaves::new(2, &[(alice(), 1_000)]).commitment(0, 100);
        assert_noop!(commit_as(&bob(), good), Error::<Test>::NotOwner);

        let mut gap = good;
        gap.first_round = 1;
        assert_noop!(commit_as(&coordinator(), gap), Error::<Test>::RoundOutOfOrder);
        let mut empty = good;
        empty.number_of_leaves = 0;
        assert_noop!(commit_as(&coordinator(), empty), Error::<Test>::NoLeaves);
        let mut dear = good;
        dear.work_units = 99;
        assert_noop!(commit_as(&coordinator(), dear), Error::<Test>::RewardAbovePrice);
        let mut last = good;
        last.last_round = u32::MAX;
        assert_noop!(commit_as(&coordinator(), last), Error::<Test>::RoundOutOfOrder);

        // One commit may cover several rounds.
        assert_ok!(commit_as(&coordinator(), good));
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").next_round, 3);
        let backwards = Leaves::new(2, &[(alice(), 1_000)]).commitment(3, 100);
        assert_noop!(commit_as(&coordinator(), backwards), Error::<Test>::RoundOutOfOrder);
        commit(3, &[(alice(), 1_500)]);
    });
}

#[test]
fn at_most_sixteen_commits_wait() {
    on_running_chain(terms(), || {
        for round in 0..16 {
            commit(round, &[(alice(), 10)]);
        }
        let next = Leaves::new(16, &[(alice(), 10)]).commitment(16, 1);
        assert_noop!(
            Training::commit_round(signed(&coordinator()), RUN, next),
            Error::<Test>::TooManyPending
        );
        advance(5);
        assert_ok!(Training::finalize_round(signed(&anybody()), RUN, 0));
        assert_ok!(Training::commit_round(signed(&coordinator()), RUN, next));
    });
}

#[test]
fn rounds_become_final_in_order_after_their_window() {
    on_running_chain(terms(), || {
        commit(0, &[(alice(), 10)]);
        commit(1, &[(alice(), 20)]);
        let finalize = |round| Training::finalize_round(signed(&anybody()), RUN, round);
        assert_noop!(finalize(2), Error::<Test>::RoundUnknown);
        assert_noop!(finalize(0), Error::<Test>::WindowOpen);
        advance(5);
        assert_noop!(finalize(1), Error::<Test>::RoundOutOfOrder);
        assert_ok!(finalize(0));
        assert_noop!(finalize(0), Error::<Test>::WrongRoundState);
        assert_ok!(finalize(1));
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").latest_finalized, Some(1));
        assert_noop!(challenge(1), Error::<Test>::WrongRoundState);
    });
}

#[test]
fn a_round_that_needs_attestations_waits_for_the_quorum() {
    let mut attested = terms();
    attested.attestation_quorum = 2;
    on_running_chain(attested, || {
        let root = commit(0, &[(alice(), 10)]).commitment(0, 1).contributions_root;
        let attest = |who: &AccountId, root| Training::attest_round(signed(who), RUN, 0, root);
        assert_noop!(attest(&bob(), root), Error::<Test>::VerifierUnknown);
        assert_noop!(attest(&verifier(0), [0; 32]), Error::<Test>::RootMismatch);
        assert_ok!(attest(&verifier(0), root));
        assert_noop!(attest(&verifier(0), root), Error::<Test>::AlreadyVoted);
        advance(5);
        assert_noop!(
            Training::finalize_round(signed(&anybody()), RUN, 0),
            Error::<Test>::QuorumMissing
        );
        assert_ok!(attest(&verifier(1), root));
        assert_ok!(Training::finalize_round(signed(&anybody()), RUN, 0));
        assert_noop!(attest(&verifier(2), root), Error::<Test>::WrongRoundState);
    });
}

#[test]
fn a_round_nobody_attests_is_rejected_and_can_be_committed_again() {
    let mut attested = terms();
    attested.attestation_quorum = 1;
    on_running_chain(attested, || {
        commit(0, &[(alice(), 10)]);
        commit(1, &[(alice(), 20)]);
        advance(11);
        assert_ok!(Training::finalize_round(signed(&anybody()), RUN, 0));
        assert_eq!(round_state(0), RoundState::Rejected(RejectReason::NotAttested));
        assert_eq!(round_state(1), RoundState::Rejected(RejectReason::EarlierRejected));
        let run = Runs::<Test>::get(RUN).expect("exists");
        assert_eq!(run.state, RunState::Paused(PauseReason::NotAttested));
        assert_eq!((run.next_round, run.committed.reward), (0, 0));
        assert_ok!(Training::resume_run(signed(&coordinator()), RUN));
        let deposit = Runs::<Test>::get(RUN).expect("exists").deposit;
        commit(0, &[(alice(), 12)]);
        let again = Runs::<Test>::get(RUN).expect("exists").deposit;
        assert_eq!(deposit, again, "the record was paid for once");
    });
}

#[test]
fn an_upheld_challenge_rejects_the_round_and_pays_the_challenger_from_the_bond() {
    on_running_chain(terms(), || {
        commit_and_finalize(0, &[(alice(), 10)]);
        commit(1, &[(alice(), 500)]);
        commit(2, &[(alice(), 600)]);
        assert_ok!(challenge(1));
        assert_noop!(challenge(1), Error::<Test>::WrongRoundState);
        assert_ok!(challenge(2));
        assert_eq!(free(&anybody()), ENDOWMENT - 160);
        advance(5);
        assert_noop!(
            Training::finalize_round(signed(&anybody()), RUN, 1),
            Error::<Test>::WrongRoundState
        );
        assert_noop!(
            Training::resolve_challenge(signed(&bob()), RUN, 1, true),
            Error::<Test>::VerifierUnknown
        );
        assert_noop!(vote(0, 7, true), Error::<Test>::ChallengeUnknown);
        assert_ok!(vote(0, 1, true));
        assert_noop!(vote(0, 1, false), Error::<Test>::AlreadyVoted);
        assert_ok!(vote(1, 1, false));
        assert_ok!(vote(2, 1, true));

        // Half of the coordinator's slash of 200; both challenge bonds came back.
        assert_eq!(free(&anybody()), ENDOWMENT + 100);
        let run = Runs::<Test>::get(RUN).expect("exists");
        assert_eq!((run.bond, run.recovered, run.next_round), (200, 100, 1));
        assert_eq!(run.committed.reward, 10);
        assert_eq!(run.state, RunState::Paused(PauseReason::ChallengeUpheld));
        assert_eq!(round_state(1), RoundState::Rejected(RejectReason::ChallengeUpheld));
        assert_eq!(round_state(2), RoundState::Rejected(RejectReason::EarlierRejected));
        assert!(Challenges::<Test>::get(RUN, 2).is_none());

        // Resuming fills the bond up again.
        assert_ok!(Training::resume_run(signed(&coordinator()), RUN));
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").bond, 400);
        commit_and_finalize(1, &[(alice(), 20)]);
    });
}

#[test]
fn a_dismissed_challenge_costs_its_bond_and_stops_the_clock() {
    on_running_chain(terms(), || {
        commit(0, &[(alice(), 10)]);
        advance(4);
        assert_ok!(challenge(0));
        advance(3);
        assert_ok!(vote(0, 0, false));
        assert_ok!(vote(1, 0, false));
        assert_eq!(free(&anybody()), ENDOWMENT - 80);
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").recovered, 80);
        assert_noop!(
            Training::finalize_round(signed(&anybody()), RUN, 0),
            Error::<Test>::WindowOpen
        );
        advance(1);
        assert_ok!(Training::finalize_round(signed(&anybody()), RUN, 0));
    });
}

#[test]
fn a_challenge_nobody_decides_ends_without_a_loser() {
    on_running_chain(terms(), || {
        commit(0, &[(alice(), 10)]);
        assert_ok!(challenge(0));
        assert_ok!(vote(0, 0, true));
        let expire = || Training::expire_challenge(signed(&bob()), RUN, 0);
        assert_noop!(expire(), Error::<Test>::WindowOpen);
        advance(6);
        assert_noop!(vote(1, 0, true), Error::<Test>::WindowOver);
        assert_ok!(expire());
        assert_noop!(expire(), Error::<Test>::ChallengeUnknown);
        assert_eq!(free(&anybody()), ENDOWMENT);
        assert!(matches!(
            last_events(1).as_slice(),
            [Event::ChallengeResolved { outcome: ChallengeOutcome::Undecided, .. }]
        ));
        assert_noop!(challenge(0), Error::<Test>::WindowOver);
        assert_ok!(Training::finalize_round(signed(&anybody()), RUN, 0));
    });
}

#[test]
fn a_challenged_leaf_must_be_in_the_tree() {
    on_running_chain(terms(), || {
        let leaves = commit(0, &[(alice(), 10), (bob(), 20)]);
        let (leaf, leaf_index, siblings) = leaves.proof(&bob());
        let claim =
            |siblings| ChallengeClaim::WrongLeaf { leaf: leaf.clone(), leaf_index, siblings };
        let submit = |claim| Training::challenge_round(signed(&alice()), RUN, 0, claim, [6; 32]);
        assert_noop!(submit(claim(BoundedVec::new())), Error::<Test>::InvalidProof);
        assert_ok!(submit(claim(siblings)));
        // A verifier that challenges does not judge.
        let other = ChallengeClaim::OmittedWorker { worker: anybody() };
        commit(1, &[(alice(), 20)]);
        assert_ok!(Training::challenge_round(signed(&verifier(0)), RUN, 1, other, [6; 32]));
        assert_noop!(vote(0, 1, true), Error::<Test>::SelfReport);
    });
}
