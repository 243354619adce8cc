use frame_support::{BoundedVec, assert_noop, assert_ok};
use sp_runtime::TokenError;

use crate::{Error, Event, Runs, mock::*};

#[test]
fn a_reward_is_paid_once_however_it_is_claimed() {
    on_running_chain(terms(), || {
        let rounds: Vec<_> = (0..5)
            .map(|round| {
                let earned = u128::from(round + 1) * 100;
                commit_and_finalize(round, &[(alice(), earned), (bob(), earned / 2)])
            })
            .collect();
        let before = free(&alice());
        assert_ok!(rounds[1].claim(&alice()));
        assert_eq!(free(&alice()), before + 200);
        assert_noop!(rounds[1].claim(&alice()), Error::<Test>::NothingToClaim);
        // Backwards: less was earned then than has been paid.
        assert_noop!(rounds[0].claim(&alice()), Error::<Test>::NothingToClaim);
        assert_ok!(rounds[2].claim(&alice()));
        assert_eq!(free(&alice()), before + 300);
        assert_eq!(
            last_events(1),
            vec![Event::RewardClaimed {
                run: RUN,
                round: 2,
                worker: alice(),
                amount: 100,
                cumulative: 300,
            }]
        );
        // Skipping rounds loses nothing.
        let before = free(&bob());
        assert_ok!(rounds[2].claim(&bob()));
        assert_eq!(free(&bob()), before + 150);
        let run = Runs::<Test>::get(RUN).expect("exists");
        assert_eq!((run.claimed, run.escrow), (450, BUDGET - 450));
    });
}

#[test]
fn a_reward_vests_two_rounds_later_or_when_the_closed_runs_windows_are_over() {
    on_running_chain(terms(), || {
        let first = commit(0, &[(alice(), 100)]);
        assert_noop!(first.claim(&alice()), Error::<Test>::WrongRoundState);
        advance(5);
        assert_ok!(Training::finalize_round(signed(&anybody()), RUN, 0));
        assert_noop!(first.claim(&alice()), Error::<Test>::NotVested);
        commit_and_finalize(1, &[(alice(), 200)]);
        assert_noop!(first.claim(&alice()), Error::<Test>::NotVested);
        let last = commit_and_finalize(2, &[(alice(), 300)]);
        assert_ok!(first.claim(&alice()));

        assert_ok!(Training::complete_run(signed(&coordinator()), RUN, [1; 32]));
        advance(14);
        assert_noop!(last.claim(&alice()), Error::<Test>::NotVested);
        advance(1);
        assert_ok!(last.claim(&alice()));
        assert_eq!(Runs::<Test>::get(RUN).expect("exists").claimed, 300);
    });
}

#[test]
fn a_claim_needs_this_chains_leaf_of_this_tree() {
    let mut immediate = terms();
    immediate.vesting_rounds = 0;
    on_running_chain(immediate, || {
        let rewards = [(alice(), 100), (bob(), 200), (verifier(0), 50)];
        let leaves = commit_and_finalize(0, &rewards);
        let submit = |leaf, index, siblings| {
            Training::claim_reward(signed(&anybody()), leaf, index, siblings)
        };
        let (leaf, index, siblings) = leaves.proof(&bob());

        let mut foreign = leaf.clone();
        foreign.genesis_hash = [1; 32];
        assert_noop!(submit(foreign, index, siblings.clone()), Error::<Test>::WrongChain);
        let mut other_run = leaf.clone();
        other_run.run = [8; 32];
        assert_noop!(submit(other_run, index, siblings.clone()), Error::<Test>::RunUnknown);
        let mut later = leaf.clone();
        later.round = 1;
        assert_noop!(submit(later, index, siblings.clone()), Error::<Test>::RoundUnknown);
        let mut greedy = leaf.clone();
        greedy.cumulative_reward = 201;
        assert_noop!(submit(greedy, index, siblings.clone()), Error::<Test>::InvalidProof);
        let mut thief = leaf.clone();
        thief.worker = *anybody().as_ref();
        assert_noop!(submit(thief, index, siblings.clone()), Error::<Test>::InvalidProof);
        assert_noop!(submit(leaf.clone(), index + 1, siblings), Error::<Test>::InvalidProof);
        assert_noop!(submit(leaf, index, BoundedVec::new()), Error::<Test>::InvalidProof);

        for (who, reward) in rewards {
            let before = free(&who);
            assert_ok!(leaves.claim(&who));
            assert_eq!(free(&who), before + reward);
        }
    });
}

#[test]
fn a_coordinator_whose_leaves_exceed_its_total_cannot_spend_more_than_the_total() {
    let mut immediate = terms();
    immediate.vesting_rounds = 0;
    on_running_chain(immediate, || {
        let leaves = Leaves::new(0, &[(alice(), 600), (bob(), 600)]);
        let mut commitment = leaves.commitment(0, 100);
        commitment.total_reward = 1_000;
        assert_ok!(Training::commit_round(signed(&coordinator()), RUN, commitment));
        advance(5);
        assert_ok!(Training::finalize_round(signed(&anybody()), RUN, 0));
        assert_ok!(leaves.claim(&alice()));
        assert_noop!(leaves.claim(&bob()), Error::<Test>::ClaimAboveTotal);
    });
}

#[test]
fn a_reward_below_an_accounts_minimum_waits_until_it_is_enough() {
    let mut immediate = terms();
    immediate.vesting_rounds = 0;
    on_running_chain(immediate, || {
        let newcomer = account(88);
        let small = commit_and_finalize(0, &[(newcomer.clone(), EXISTENTIAL_DEPOSIT - 1)]);
        assert_noop!(small.claim(&newcomer), TokenError::CannotCreate);
        let enough = commit_and_finalize(1, &[(newcomer.clone(), EXISTENTIAL_DEPOSIT)]);
        assert_ok!(enough.claim(&newcomer));
        assert_eq!(free(&newcomer), EXISTENTIAL_DEPOSIT);
    });
}
