//! Members that want to be trusted, heard or paid more than is due to them.

use std::net::SocketAddr;

use manyhands_proto::message::limits::{ADDRESSES_MAX, VERIFIERS_MAX};
use manyhands_proto::message::{Heading, seal_reply};

use super::*;

/// What every reply has to survive: a limit that is exceeded would silence the coordinator.
fn assert_sealable(world: &World, id: u8) {
    let reply = world.machine.situation_reply(node(id));
    let heading = Heading { run: RUN, round: world.machine.round(), nonce: 1 };
    let sealed = seal_reply(&key(200), heading, Digest::of(b"request"), &reply);
    assert!(sealed.is_ok(), "{sealed:?}");
}

fn is_refused(reply: &Reply, code: RefusalCode) -> bool {
    matches!(reply, Reply::Refused(refusal) if refusal.code == code)
}

#[test]
fn a_member_with_every_address_there_is_room_for_silences_nobody() {
    let mut world = World::new(tests_support::spec());
    let address = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
    let crowded = Join { addresses: (1..=16).map(address).collect(), ..join(Role::Worker) };
    let observed = vec![address(100), address(101)];
    let facts = Facts { stake: Balance(u128::MAX), observed: observed.clone() };
    let request = Request::Join(crowded);
    world.handle(Input::Message { from: node(1), nonce: 1, request, facts });
    world.nonce = 1;
    world.join(2, Role::Worker);
    world.obey(1);
    world.machine.poll_effects().into_iter().for_each(|effect| world.perform(effect));
    let addresses = &world.machine.membership.get(node(1)).expect("a member").addresses;
    assert_eq!(addresses.len(), ADDRESSES_MAX);
    assert!(addresses.starts_with(&observed), "where it was seen counts most");
    assert!(matches!(world.machine.situation_reply(node(2)), Reply::Situation(s)
        if matches!(&s.duty, Duty::Sync(sync) if !sync.sources.is_empty())));
    assert_sealable(&world, 2);
}

#[test]
fn verifiers_have_a_limit_and_what_waits_for_them_does_not_pile_up() {
    let mut spec = tests_support::spec();
    spec.run.rounds = 1_000;
    let mut world = World::new(spec);
    for id in 0..VERIFIERS_MAX as u8 {
        assert!(matches!(world.join(100 + id, Role::Verifier), Reply::Situation(_)));
    }
    assert!(is_refused(&world.join(1, Role::Verifier), RefusalCode::RunIsFull));
    for round in 0..2_000 {
        world.machine.audits.ask_evaluation(Round(round), Digest::of(b"theta"));
    }
    assert_sealable(&world, 100);
    let asked = world.machine.audits.evaluations();
    assert!(asked.len() < 100 && asked[0].round == Round(1_999), "the newest is asked for first");
}

#[test]
fn a_newcomers_word_gives_it_no_more_than_the_usual_share() {
    let mut world = World::new(tests_support::spec());
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    let boaster = Join { tokens_per_second: 1 << 50, ..join(Role::Worker) };
    world.ask(3, Request::Join(boaster));
    while !matches!(world.machine.phase(), Phase::Training { .. }) {
        world.turn(&[1, 2, 3], &[]);
    }
    let shares: BTreeSet<_> =
        world.machine.round.assignments.values().map(|assignment| assignment.sequences).collect();
    assert_eq!(shares.len(), 1, "{shares:?}");

    while world.records.is_empty() {
        world.turn(&[1, 2, 3], &[]);
    }
    let speed = |world: &World| world.machine.membership.get(node(3)).map(|m| m.tokens_per_second);
    let shown = speed(&world);
    assert!(shown < Some(1 << 20), "{shown:?}");
    world.ask(3, Request::Join(Join { tokens_per_second: 1 << 50, ..join(Role::Worker) }));
    assert_eq!(speed(&world), shown, "coming again does not undo what a round has shown");
}

/// Proves θ, and does nothing else.
fn idle(world: &mut World, id: u8) -> Reply {
    let proof = Possession { round: world.machine.round(), proof: Digest::of(&[id]) };
    world.ask(id, Request::Beat(Beat { theta: Some(proof), steps_done: 0, leaving: false }))
}

#[test]
fn a_share_that_nothing_comes_of_is_smaller_the_next_time() {
    let mut spec = tests_support::spec();
    (spec.training.batch_sequences, spec.training.steps_per_round) = (8, 10);
    let mut world = World::new(spec);
    for id in [1, 2, 3] {
        world.join(id, Role::Worker);
    }
    let mut shares = Vec::new();
    while world.machine.round() < Round(2) {
        idle(&mut world, 3);
        world.turn(&[1, 2], &[]);
        let share = world.machine.round.assignments.get(&node(3)).map(|it| it.sequences);
        if let Some(share) = share.filter(|share| shares.last() != Some(share)) {
            shares.push(share);
        }
    }
    assert_eq!(world.outcome(0, 3), &Outcome::NotCommitted);
    assert!(shares.len() > 1 && shares.is_sorted_by(|before, after| after < before), "{shares:?}");
}

#[test]
fn a_verifier_is_given_one_replay_at_a_time_so_waiting_is_nobodys_failure() {
    let mut world = World::new(tests_support::spec());
    for id in [1, 2, 3] {
        world.join(id, Role::Worker);
    }
    world.join(9, Role::Verifier);
    while !matches!(world.machine.phase(), Phase::Checking { deadline: Some(_) }) {
        world.turn(&[1, 2, 3], &[]);
    }
    let given = world.machine.audits.replays_of(node(9));
    assert_eq!(given.len(), 1, "{given:?}");
    assert!(!world.machine.audits.is_idle());
    world.run(&[1, 2, 3], &[9], 20);
    for id in [1, 2, 3] {
        assert_eq!(world.outcome(0, id), &Outcome::Admitted);
    }
}

#[test]
fn who_is_barred_neither_commits_nor_verifies() {
    let mut world = World::new(tests_support::spec());
    for id in [1, 2] {
        world.join(id, Role::Worker);
    }
    world.join(9, Role::Verifier);
    while !matches!(world.machine.phase(), Phase::Training { .. }) {
        world.turn(&[1, 2], &[]);
    }
    let refusal = Refusal { code: RefusalCode::Barred, reason: "a fault".to_owned() };
    for id in [1, 9] {
        let member = world.machine.membership.get_mut(node(id)).expect("a member");
        member.barred = Some(refusal.clone());
    }
    let assignment = world.machine.round.assignments[&node(1)].clone();
    let signed = committed(1, &assignment, Digest::of(b"anything"));
    assert!(is_refused(&world.ask(1, Request::Commit(signed)), RefusalCode::Barred));
    let weighing = Weighing { round: Round(0), effects: Vec::new() };
    assert!(is_refused(&world.ask(9, Request::Weighing(weighing)), RefusalCode::Barred));
    assert_eq!(world.machine.verifiers(), []);
}

#[test]
fn wrong_proofs_are_not_looked_at_for_ever() {
    let mut world = World::new(tests_support::spec());
    world.join(1, Role::Worker);
    let mut looked_at = 0;
    for _ in 0..20 {
        idle(&mut world, 1);
        for effect in world.machine.poll_effects() {
            if let Effect::CheckPossession { round, worker, proof, .. } = effect {
                looked_at += 1;
                world.handle(Input::PossessionChecked { round, worker, proof, holds: false });
            }
        }
    }
    assert_eq!(looked_at, 3);
}

#[test]
fn nobody_is_given_its_own_round_to_judge() {
    let mut spec = tests_support::spec();
    spec.verification.verifiers_min = 1;
    let mut world = World::new(spec);
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    world.join(9, Role::Verifier);
    while !matches!(world.machine.phase(), Phase::Checking { .. }) {
        world.turn(&[1, 2], &[]);
    }
    world.join(1, Role::Verifier);
    world.dead.insert(9);
    world.machine.membership.get_mut(node(9)).expect("a member").present = false;
    world.handle(Input::Timeout);
    let mine = world.machine.audits.replays_of(node(1));
    assert!(mine.iter().all(|replay| replay.assignment.worker != node(1)), "{mine:?}");
}

#[test]
fn who_takes_its_stake_back_is_out_until_it_joins_with_another() {
    let mut world = World::new(tests_support::spec());
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    world.stakeless.push(node(2));
    while world.machine.round() < Round(2) {
        world.turn(&[1, 2], &[]);
    }
    assert_eq!(world.outcome(1, 1), &Outcome::Admitted);
    assert!(world.records[1].candidates.iter().all(|candidate| candidate.worker != node(2)));
    assert!(is_refused(
        &world.ask(2, Request::Beat(Beat { theta: None, steps_done: 0, leaving: false })),
        RefusalCode::NotAMember
    ));
    world.stakeless.clear();
    assert!(matches!(world.join(2, Role::Worker), Reply::Situation(_)));
}

#[test]
fn who_lost_its_state_is_not_waited_for_and_starts_afresh() {
    let mut spec = tests_support::spec();
    spec.run.rounds = 4;
    let mut world = World::new(spec);
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    let in_round_one = |world: &World| {
        world.machine.round() == Round(1) && matches!(world.machine.phase(), Phase::Training { .. })
    };
    while !in_round_one(&world) {
        world.turn(&[1, 2], &[]);
    }
    let began = world.now;
    world.ask(2, Request::Join(Join { head_rounds: Vec::new(), ..join(Role::Worker) }));
    while world.machine.round() == Round(1) {
        world.turn(&[1, 2], &[]);
    }
    assert!(world.now.since(began) < world.machine.spec().round.commit_ms);
    world.run(&[1, 2], &[], 300);
    assert_eq!(world.outcome(1, 2), &Outcome::NotCommitted);
    assert_eq!(world.outcome(2, 2), &Outcome::Admitted);
    let candidate = world.records[2].candidates.iter().find(|c| c.worker == node(2));
    assert_eq!(candidate.expect("a candidate").start, Start::Fresh);
}

#[test]
fn evidence_is_asked_for_while_an_audit_waits_and_not_for_ever() {
    let mut spec = tests_support::spec();
    spec.run.rounds = 40;
    // Or each merge would wait for the verifier, and its time for a replay be over with it.
    spec.aggregation.rules = Vec::new();
    spec.verification.probation_checks = 0;
    spec.verification.audit_rate_per_mille = 1_000;
    let mut world = World::new(spec);
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    world.join(9, Role::Verifier);
    let wanted_from = |world: &World| {
        let Reply::Situation(situation) = world.machine.situation_reply(node(1)) else {
            panic!("a member has a situation")
        };
        situation.evidence_from
    };
    // The verifier beats, and does nothing else.
    let idle = |world: &mut World| {
        world.turn(&[1, 2], &[]);
        world.ask(9, Request::Beat(Beat { theta: None, steps_done: 0, leaving: false }));
    };
    while world.machine.round() < Round(10) {
        idle(&mut world);
    }
    assert_eq!(wanted_from(&world), Round(0), "nothing of round 0 may be thrown away yet");
    while world.machine.round() < Round(30) {
        idle(&mut world);
    }
    assert_eq!(wanted_from(&world), Round(15));
    assert_eq!(world.outcome(0, 1), &Outcome::Admitted, "a slow verifier costs a worker nothing");
}

#[test]
fn work_for_an_opening_of_a_round_that_is_no_more_is_not_taken_for_other_work() {
    let mut spec = tests_support::spec();
    (spec.run.workers_min, spec.round.silence_ms) = (1, 1_000);
    let mut world = World::new(spec);
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    while !matches!(world.machine.phase(), Phase::Training { .. }) {
        world.turn(&[1, 2], &[]);
    }
    let of = |world: &World, id: u8| world.machine.round.assignments.get(&node(id)).cloned();
    let second = if of(&world, 1).expect("assigned").first_sequence == 0 { 2 } else { 1 };
    let before = of(&world, second).expect("assigned");

    // The coordinator hears of nobody for a while; then of one of them.
    world.now = world.now.after_ms(2_000);
    world.handle(Input::Timeout);
    assert!(matches!(world.machine.phase(), Phase::Gathering { .. }));
    world.obey(second);
    world.machine.poll_effects().into_iter().for_each(|effect| world.perform(effect));
    assert!(matches!(world.machine.phase(), Phase::Gathering { .. }), "the other may come too");
    world.now = world.now.after_ms(world.machine.spec().round.sync_ms);
    let beat = Beat { theta: None, steps_done: 0, leaving: false };
    world.ask(second, Request::Beat(beat));
    world.handle(Input::Timeout);
    let after = of(&world, second).expect("assigned anew");
    assert_ne!(after.first_sequence, before.first_sequence);

    let old = committed(second, &before, Digest::of(b"the old work"));
    assert!(is_refused(&world.ask(second, Request::Commit(old)), RefusalCode::NotAssigned));
}

#[test]
fn a_worker_that_came_back_elsewhere_is_replayed_where_it_is() {
    let mut world = World::with_a_replay_asked();
    let old = world.machine.audits.replays_of(node(9));
    let worker = old[0].assignment.worker;
    let id = if worker == node(1) { 1 } else { 2 };
    let there = SocketAddr::from(([10, 0, 0, 9], 7));
    world.ask(id, Request::Join(Join { addresses: vec![there], ..join(Role::Worker) }));
    let new = world.machine.audits.replays_of(node(9));
    let moved = new.iter().find(|replay| replay.assignment.worker == worker).expect("still asked");
    assert_eq!(moved.source.addresses, [there]);
    let verdict = verdict(9, &old[0]);
    assert!(!is_refused(&world.ask(9, Request::Verdict(verdict)), RefusalCode::NotYourTask));
}

#[test]
fn a_worker_that_leaves_is_given_no_more_work_and_not_waited_for() {
    let mut spec = tests_support::spec();
    spec.run.rounds = 4;
    let mut world = World::new(spec);
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    while world.machine.round() < Round(1) {
        world.turn(&[1, 2], &[]);
    }
    world.ask(2, Request::Beat(Beat { theta: None, steps_done: 0, leaving: true }));
    while world.machine.round() < Round(3) {
        world.turn(&[1], &[]);
        world.ask(2, Request::Beat(Beat { theta: None, steps_done: 0, leaving: true }));
    }
    assert!(world.records[2].candidates.iter().all(|candidate| candidate.worker != node(2)));
}
