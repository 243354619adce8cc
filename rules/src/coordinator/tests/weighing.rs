//! What updates do to held-out loss, as verifiers measure it before a merge.

use super::*;

/// A run whose merges ask for the held-out-loss gate, and in which worker 2 does harm.
fn gated() -> World {
    let mut spec = tests_support::spec();
    spec.aggregation.rules = vec![Rule::LossGate];
    spec.round.silence_ms = 1_000;
    spec.round.check_ms = 2_000;
    let mut world = World::new(spec);
    world.harms.insert(node(2));
    for id in 1..=3 {
        world.join(id, Role::Worker);
    }
    world
}

#[test]
fn a_merge_knows_what_each_update_does_to_held_out_loss() {
    let mut world = gated();
    for id in 7..=9 {
        world.join(id, Role::Verifier);
    }
    world.run(&[1, 2, 3], &[7, 8, 9], 300);
    let merge = &world.merges[0];
    let effects: Vec<_> =
        merge.contributions.iter().map(|it| (it.worker, it.loss_effect)).collect();
    let expected = |&(worker, _): &(NodeId, _)| {
        Some(LossEffect(if worker == node(2) { 1_000_000 } else { -1_000 }))
    };
    assert_eq!(effects.len(), 3);
    assert!(effects.iter().all(|effect| effect.1 == expected(effect)), "{effects:?}");
    let record = &world.records[0];
    assert_eq!(record.weighings.len(), 3);
    assert!(record.weighings.iter().map(|weighed| weighed.verifier).is_sorted());
    assert_eq!(world.outcome(0, 2), &Outcome::Admitted, "the rule, not the door, keeps it out");
}

#[test]
fn a_silent_verifier_holds_no_merge_up() {
    let mut world = gated();
    for id in 7..=9 {
        world.join(id, Role::Verifier);
    }
    // Two of three are enough, one is not.
    world.run(&[1, 2, 3], &[7, 8], 300);
    assert_eq!(world.records[0].weighings.len(), 2);
    let mut world = gated();
    for id in 7..=9 {
        world.join(id, Role::Verifier);
    }
    world.run(&[1, 2, 3], &[7], 600);
    assert_eq!(world.records[0].weighings, []);
    let events = world.machine.status(world.now).events;
    assert!(events.iter().any(|event| event.text.contains("round 0 is merged without loss_gate")));
    assert!(world.merges[0].contributions.iter().all(|it| it.loss_effect.is_none()));
}

/// Turns until verifiers are asked to weigh; nobody has answered then.
fn until_weighing(world: &mut World) -> Weigh {
    for _ in 0..200 {
        if let Some(asked) = world.machine.weigh_task(node(7)) {
            return asked;
        }
        world.turn(&[1, 2, 3], &[]);
        for id in [7, 8, 9] {
            world.ask(id, Request::Beat(Beat { theta: None, steps_done: 0, leaving: false }));
        }
    }
    panic!("nothing is to be weighed");
}

#[test]
fn nobody_weighs_what_it_was_not_asked_to() {
    let mut world = gated();
    world.machine.spec.verification.probation_checks = 0;
    for id in [7, 8, 9] {
        world.join(id, Role::Verifier);
    }
    let asked = until_weighing(&mut world);
    let honest: Vec<_> =
        asked.updates.iter().map(|(worker, _)| (*worker, LossEffect(-1))).collect();
    let mut refused = |id, round, effects: &[(NodeId, LossEffect)]| {
        let effects = effects.to_vec();
        let reply = world.ask(id, Request::Weighing(Weighing { round: Round(round), effects }));
        matches!(&reply, Reply::Refused(refusal) if refusal.code == RefusalCode::NotYourTask)
    };
    assert!(refused(1, 0, &honest), "a worker");
    assert!(refused(7, 1, &honest), "another round");
    assert!(refused(7, 0, &honest[1..]), "not all of them");
    assert!(!refused(7, 0, &honest));
    assert!(refused(7, 0, &honest), "once");
}

#[test]
fn who_opens_nothing_ends_no_measurement() {
    let mut world = gated();
    world.machine.spec.verification.probation_checks = 0;
    world.machine.spec.round.check_ms = 4_000;
    world.machine.spec.round.silence_ms = 60_000;
    world.unopened.insert(node(3));
    for id in [7, 8, 9] {
        world.join(id, Role::Verifier);
    }
    world.run(&[1, 2, 3], &[7, 8, 9], 400);
    let weighed = &world.records[0].weighings;
    assert_eq!(weighed.len(), 3);
    let of: Vec<_> = weighed[0].effects.iter().map(|(worker, _)| *worker).collect();
    assert_eq!(of.len(), 2);
    assert!(!of.contains(&node(3)));
    assert!(matches!(world.outcome(0, 3), Outcome::Withheld(_)));
}

#[test]
fn a_worker_that_came_back_as_a_verifier_does_not_weigh_its_own_update() {
    let mut world = gated();
    world.join(7, Role::Verifier);
    let committed = |world: &World| world.machine.round.commitments.len();
    for _ in 0..50 {
        if committed(&world) == 2 {
            break;
        }
        world.turn(&[1, 2], &[7]);
    }
    assert_eq!(committed(&world), 2);
    world.join(2, Role::Verifier);
    world.run(&[1, 3], &[2, 7], 300);
    assert!(world.records[0].weighings.iter().all(|weighed| weighed.verifier == node(7)));
    assert_eq!(world.records[0].weighings.len(), 1);
}
