//! Any sequence of calls by anybody keeps every invariant, and afterwards all money can be got
//! out again.

use std::{cell::RefCell, collections::BTreeSet};

use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};

use crate::{
    ChallengeClaim, FaultKind, FaultState, Faults, Finding, RunState, Runs, Stage, VerifierFaults,
    Verifiers, Workers, mock::*,
};

#[derive(Clone, Debug)]
enum Action {
    Advance(u32),
    Register(u8, u128),
    Join(u8),
    Leave(u8),
    Exit(u8),
    Withdraw(u8),
    RegisterVerifier(u8),
    RetireVerifier(u8),
    WithdrawBond(u8),
    Fund(u8, u128),
    Pause,
    Resume,
    Complete,
    Cancel,
    Timeout,
    Anchor(u32),
    Commit { rounds: u32, rewards: [u16; 2], units: u64 },
    Attest(u8, u32),
    Challenge(u8, u32),
    Resolve(u8, u32, bool),
    ExpireChallenge(u32),
    Finalize,
    Claim(u32, bool),
    Report(u8, u8, u32),
    Contest(u8, u32),
    Execute(u8, u32),
    Vote { by: u8, worker: u8, round: u32, guilty: bool },
    ReportVerifier { by: u8, verifier: u8, round: u32 },
    ContestVerifier { verifier: u8, round: u32 },
    ExecuteVerifier { verifier: u8, round: u32 },
    VoteOnVerifier { by: u8, verifier: u8, round: u32, guilty: bool },
    Refund(u8),
    Settle,
    Prune(u32),
}

fn action() -> impl Strategy<Value = Action> {
    // Workers are 2 and 3, the coordinator 1, verifiers 10 to 12.
    let worker = 2_u8..4;
    let verifier = 10_u8..13;
    let reporter = prop_oneof![6 => Just(1_u8), 1 => verifier.clone()];
    let round = 0_u32..6;
    // Fewer than there are, so that contests and executions meet what was reported.
    let accused = 0_u32..3;
    prop_oneof![
        6 => (1_u32..8).prop_map(Action::Advance),
        2 => (20_u32..80).prop_map(Action::Advance),
        1 => (2_u8..6, 0_u128..1_200).prop_map(|(who, stake)| Action::Register(who, stake)),
        2 => worker.clone().prop_map(Action::Join),
        1 => worker.clone().prop_map(Action::Leave),
        1 => worker.clone().prop_map(Action::Exit),
        1 => worker.clone().prop_map(Action::Withdraw),
        2 => (10_u8..13).prop_map(Action::RegisterVerifier),
        1 => (10_u8..13).prop_map(Action::RetireVerifier),
        1 => (10_u8..13).prop_map(Action::WithdrawBond),
        1 => (1_u8..6, 0_u128..3_000).prop_map(|(who, amount)| Action::Fund(who, amount)),
        1 => Just(Action::Pause),
        4 => Just(Action::Resume),
        1 => prop_oneof![Just(Action::Complete), Just(Action::Cancel)],
        2 => Just(Action::Timeout),
        3 => round.clone().prop_map(Action::Anchor),
        8 => (1_u32..3, any::<[u16; 2]>(), 0_u64..3_000)
            .prop_map(|(rounds, rewards, units)| Action::Commit { rounds, rewards, units }),
        3 => (10_u8..13, round.clone()).prop_map(|(who, round)| Action::Attest(who, round)),
        2 => (2_u8..13, round.clone()).prop_map(|(who, round)| Action::Challenge(who, round)),
        4 => (10_u8..13, round.clone(), any::<bool>())
            .prop_map(|(who, round, upheld)| Action::Resolve(who, round, upheld)),
        2 => round.clone().prop_map(Action::ExpireChallenge),
        6 => Just(Action::Finalize),
        6 => (round, any::<bool>()).prop_map(|(round, who)| Action::Claim(round, who)),
        5 => (reporter.clone(), worker.clone(), accused.clone())
            .prop_map(|(who, worker, round)| Action::Report(who, worker, round)),
        4 => (worker.clone(), accused.clone()).prop_map(|(who, round)| Action::Contest(who, round)),
        3 => (worker.clone(), accused.clone())
            .prop_map(|(who, round)| Action::Execute(who, round)),
        6 => (verifier.clone(), worker, accused.clone(), any::<bool>()).prop_map(
            |(by, worker, round, guilty)| Action::Vote { by, worker, round, guilty }
        ),
        6 => (verifier.clone(), verifier.clone(), accused.clone(), any::<bool>()).prop_map(
            |(by, verifier, round, guilty)| Action::VoteOnVerifier { by, verifier, round, guilty }
        ),
        5 => (reporter, verifier.clone(), accused.clone())
            .prop_map(|(by, verifier, round)| Action::ReportVerifier { by, verifier, round }),
        6 => (verifier.clone(), accused.clone())
            .prop_map(|(verifier, round)| Action::ContestVerifier { verifier, round }),
        3 => (verifier, accused)
            .prop_map(|(verifier, round)| Action::ExecuteVerifier { verifier, round }),
        4 => (1_u8..6).prop_map(Action::Refund),
        3 => Just(Action::Settle),
        4 => (0_u32..4).prop_map(Action::Prune),
    ]
}

/// The leaves of every commit so far, by last round, and what they build on.
#[derive(Default)]
struct Book {
    leaves: Vec<(u32, Leaves)>,
    totals: [u128; 2],
}

impl Book {
    fn of(&self, round: u32) -> Option<&Leaves> {
        self.leaves.iter().rev().find(|(last, _)| *last == round).map(|(_, leaves)| leaves)
    }
}

/// Makes one call. Whether it succeeds does not matter here: it must not break anything.
fn perform(action: &Action, book: &mut Book) -> Option<bool> {
    let owner = signed(&coordinator());
    let keeper = signed(&anybody());
    let by = |who: &u8| signed(&account(*who));
    let result = match action {
        Action::Advance(blocks) => {
            advance(*blocks);
            Ok(())
        }
        Action::Register(who, stake) => {
            let peer_id = Default::default();
            Training::register_worker(by(who), peer_id, [0; 32], *stake)
        }
        Action::Join(who) => Training::join_run(by(who), RUN),
        Action::Leave(who) => Training::leave_run(by(who), RUN),
        Action::Exit(who) => Training::announce_exit(by(who)),
        Action::Withdraw(who) => Training::withdraw_stake(by(who)),
        Action::RegisterVerifier(who) => Training::register_verifier(by(who), RUN),
        Action::RetireVerifier(who) => Training::retire_verifier(by(who), RUN),
        Action::WithdrawBond(who) => Training::withdraw_verifier_bond(by(who), RUN),
        Action::Fund(who, amount) => Training::fund_run(by(who), RUN, *amount),
        Action::Pause => Training::pause_run(owner, RUN),
        Action::Resume => Training::resume_run(owner, RUN),
        Action::Complete => Training::complete_run(owner, RUN, [0; 32]),
        Action::Cancel => Training::cancel_run(owner, RUN),
        Action::Timeout => Training::timeout_run(keeper, RUN),
        Action::Anchor(round) => {
            Training::anchor_commitments(owner, RUN, *round, Stage::Commit, [0; 32])
        }
        Action::Commit { rounds, rewards, units } => commit_next(book, *rounds, rewards, *units),
        Action::Attest(who, round) => {
            let root = book
                .of(*round)
                .map_or([0; 32], |leaves| leaves.commitment(0, 0).contributions_root);
            Training::attest_round(by(who), RUN, *round, root)
        }
        Action::Challenge(who, round) => {
            Training::challenge_round(by(who), RUN, *round, ChallengeClaim::WrongTotals, [0; 32])
        }
        Action::Resolve(who, round, upheld) => {
            Training::resolve_challenge(by(who), RUN, *round, *upheld)
        }
        Action::ExpireChallenge(round) => Training::expire_challenge(keeper, RUN, *round),
        Action::Finalize => {
            let run = Runs::<Test>::get(RUN)?;
            Training::finalize_round(keeper, RUN, *run.pending.first()?)
        }
        Action::Claim(round, first) => {
            let who = if *first { alice() } else { bob() };
            book.of(*round)?.claim(&who)
        }
        Action::Report(who, worker, round) => Training::report_fault(
            by(who),
            RUN,
            account(*worker),
            *round,
            FaultKind::Replay,
            [0; 32],
        ),
        Action::Contest(who, round) => Training::contest_fault(by(who), RUN, *round, [0; 32]),
        Action::Execute(who, round) => Training::execute_fault(keeper, RUN, account(*who), *round),
        Action::Vote { by: who, worker, round, guilty } => {
            Training::vote_on_fault(by(who), RUN, account(*worker), *round, finding(*guilty))
        }
        Action::VoteOnVerifier { by: who, verifier, round, guilty } => {
            let (accused, finds) = (account(*verifier), finding(*guilty));
            Training::vote_on_verifier(by(who), RUN, accused, bob(), *round, finds)
        }
        Action::ReportVerifier { by: who, verifier, round } => {
            Training::report_verifier(by(who), RUN, account(*verifier), bob(), *round, [0; 32])
        }
        Action::ContestVerifier { verifier, round } => {
            Training::contest_verifier_fault(by(verifier), RUN, bob(), *round, [0; 32])
        }
        Action::ExecuteVerifier { verifier, round } => {
            Training::execute_verifier_fault(keeper, RUN, account(*verifier), bob(), *round)
        }
        Action::Refund(who) => Training::refund_funder(keeper, RUN, account(*who)),
        Action::Settle => Training::settle_run(keeper, RUN),
        Action::Prune(limit) => Training::prune_run(keeper, RUN, *limit),
    };
    Some(result.is_ok())
}

fn finding(guilty: bool) -> Finding {
    if guilty { Finding::Guilty } else { Finding::Innocent }
}

/// Commits the next rounds with totals that may also fall, as after a forfeit.
fn commit_next(
    book: &mut Book,
    rounds: u32,
    rewards: &[u16; 2],
    units: u64,
) -> frame_support::dispatch::DispatchResult {
    let next = Runs::<Test>::get(RUN).map_or(0, |run| run.next_round);
    let last = next + rounds - 1;
    let mut totals = book.totals;
    for (total, reward) in totals.iter_mut().zip(rewards) {
        let change = u128::from(reward % 1_000);
        *total = if reward % 7 == 0 { total.saturating_sub(change) } else { *total + change };
    }
    let leaves = Leaves::new(last, &[(alice(), totals[0]), (bob(), totals[1])]);
    let commitment = leaves.commitment(next, units);
    Training::commit_round(signed(&coordinator()), RUN, commitment)?;
    if Runs::<Test>::get(RUN).is_some_and(|run| run.next_round == last + 1) {
        book.leaves.push((last, leaves));
        book.totals = totals;
    }
    Ok(())
}

/// From any state, calls that anybody may make bring every run to its end; then everybody has
/// its money.
fn wind_down() {
    let keeper = || signed(&anybody());
    advance(60);
    if Runs::<Test>::get(RUN)
        .is_some_and(|run| matches!(run.state, RunState::Active | RunState::Paused(_)))
    {
        Training::timeout_run(keeper(), RUN).expect("an idle run can be timed out");
    }
    let open: Vec<_> = Faults::<Test>::iter_prefix(RUN).collect();
    for ((worker, round), fault) in open {
        if matches!(fault.state, FaultState::Reported { .. } | FaultState::Contested { .. }) {
            Training::execute_fault(keeper(), RUN, worker, round).expect("its window is over");
        }
    }
    let open: Vec<_> = VerifierFaults::<Test>::iter_prefix(RUN).collect();
    for ((verifier, worker, round), fault) in open {
        if matches!(fault.state, FaultState::Reported { .. } | FaultState::Contested { .. }) {
            Training::execute_verifier_fault(keeper(), RUN, verifier, worker, round)
                .expect("its window is over");
        }
    }
    while let Some(run) = Runs::<Test>::get(RUN) {
        let Some(first) = run.pending.first() else { break };
        // Refused where the round was not challenged: then there is nothing to expire.
        let _ = Training::expire_challenge(keeper(), RUN, *first);
        Training::finalize_round(keeper(), RUN, *first).expect("its windows are over");
    }
    advance(100);
    if Runs::<Test>::get(RUN).is_some_and(|run| matches!(run.state, RunState::Closed { .. })) {
        for funder in 1..=13 {
            // Refused where that account did not fund the run.
            let _ = Training::refund_funder(keeper(), RUN, account(funder));
        }
        Training::settle_run(keeper(), RUN).expect("all funders are paid back");
    }
    if Runs::<Test>::get(RUN).is_some() {
        Training::prune_run(keeper(), RUN, 1_000).expect("a settled run can be pruned");
    }
    assert!(Runs::<Test>::get(RUN).is_none());
    for who in (1..=13).map(account) {
        if let Some(worker) = Workers::<Test>::get(&who) {
            if worker.exit_at.is_none() {
                Training::announce_exit(signed(&who)).expect("a worker may always leave");
            }
            Training::withdraw_stake(signed(&who)).expect("no run exposes the stake");
        }
    }
    assert_eq!(Verifiers::<Test>::iter_prefix(RUN).count(), 0);
}

/// A call's name, for counting.
fn name(action: &Action) -> String {
    let text = format!("{action:?}");
    let end = text.find(|letter: char| !letter.is_alphanumeric()).unwrap_or(text.len());
    text[..end].to_owned()
}

/// Every call of the table above, as [`name`] gives it.
const CALLS: [&str; 34] = [
    "Advance",
    "Register",
    "Join",
    "Leave",
    "Exit",
    "Withdraw",
    "RegisterVerifier",
    "RetireVerifier",
    "WithdrawBond",
    "Fund",
    "Pause",
    "Resume",
    "Complete",
    "Cancel",
    "Timeout",
    "Anchor",
    "Commit",
    "Attest",
    "Challenge",
    "Resolve",
    "ExpireChallenge",
    "Finalize",
    "Claim",
    "Report",
    "Contest",
    "Execute",
    "ReportVerifier",
    "ContestVerifier",
    "ExecuteVerifier",
    "Vote",
    "VoteOnVerifier",
    "Refund",
    "Settle",
    "Prune",
];

#[test]
fn any_calls_keep_the_invariants_and_no_money_is_trapped() {
    let config = ProptestConfig { cases: 160, failure_persistence: None, ..Default::default() };
    // The same sequences each time, so that which calls they reach can be asserted.
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let succeeded = RefCell::new(BTreeSet::new());
    let sequences = (0_u32..2, 0_u32..3, prop::collection::vec(action(), 1..200));
    let outcome = TestRunner::new_with_rng(config, rng).run(&sequences, |sequence| {
        let (attestation_quorum, vesting_rounds, actions) = sequence;
        on_new_chain(|| {
            let mut chosen = terms();
            chosen.attestation_quorum = attestation_quorum;
            chosen.vesting_rounds = vesting_rounds;
            start_run(chosen);
            let mut book = Book::default();
            for action in &actions {
                if perform(action, &mut book) == Some(true) {
                    succeeded.borrow_mut().insert(name(action));
                }
                check_invariants();
            }
            wind_down();
            check_invariants();
            let held: u128 = (1..=13).map(|index| Balances::reserved_balance(account(index))).sum();
            assert_eq!(held, RECORD_DEPOSIT, "money stayed on hold, beside that for the id");
            let total: u128 = (1..=13).map(|index| free(&account(index))).sum();
            assert_eq!(total, 13 * ENDOWMENT - RECORD_DEPOSIT, "money was made or lost");
        });
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
    let succeeded = succeeded.into_inner();
    let never: Vec<_> = CALLS.iter().filter(|call| !succeeded.contains(**call)).collect();
    assert!(never.is_empty(), "no sequence ever did {never:?}");
}
