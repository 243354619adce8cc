//! What is too much, too little or not a number, and what no program of ours sends.

use super::*;
use crate::message::limits::{
    ADDRESSES_MAX, COMMIT_SET_ENTRIES_MAX, HEAD_ROUNDS_MAX, REASON_BYTES_MAX, REPLY_BYTES_MAX,
    REQUEST_BYTES_MAX, ROUND_MAX, SOURCES_MAX, SPEC_BYTES_MAX, STATUS_BYTES_MAX, STEPS_MAX,
    TASKS_MAX, VERIFIERS_MAX, WEIGHED_MAX,
};

#[test]
fn what_is_too_large_is_refused_before_it_is_decoded() {
    // Not protobuf at all: a decoder would have said so.
    let request = vec![0xff; REQUEST_BYTES_MAX + 1];
    let expected = OpenError::TooLarge { max: REQUEST_BYTES_MAX, got: request.len() };
    assert_eq!(open_request(&request), Err(expected));
    let reply = vec![0xff; REPLY_BYTES_MAX + 1];
    let expected = OpenError::TooLarge { max: REPLY_BYTES_MAX, got: reply.len() };
    assert_eq!(open_our_reply(&reply), Err(expected));
    assert!(matches!(open_our_reply(&reply[1..]), Err(OpenError::Decode { .. })));
}

#[test]
fn the_largest_replies_fit() {
    let entries: Vec<_> =
        nodes(COMMIT_SET_ENTRIES_MAX).into_iter().map(|node| (node, digest("one"))).collect();
    let set = CommitSet { round: Round(ROUND_MAX), entries };
    let verifiers = nodes(VERIFIERS_MAX);
    let evidence_from = Round(ROUND_MAX);
    let largest = Reply::Situation(Situation { duty: Duty::Upload(set), verifiers, evidence_from });
    for reply in [
        largest,
        Reply::Status(vec![b' '; STATUS_BYTES_MAX]),
        Reply::Description { spec: vec![b' '; SPEC_BYTES_MAX], round: Round(0) },
    ] {
        assert_eq!(open_our_reply(&sealed_reply(&reply)).map(|opened| opened.message), Ok(reply));
    }
    let replay = Replay {
        source: Source { addresses: vec![addresses()[0]; ADDRESSES_MAX], ..replay(HEAD).source },
        ..replay(HEAD)
    };
    let updates = nodes(WEIGHED_MAX).into_iter().map(|node| (node, digest("payload"))).collect();
    let weigh = Some(Weigh { updates, ..weigh() });
    let evaluations = vec![Evaluate { round: Round(4), theta: digest("theta") }; TASKS_MAX];
    let tasks = Tasks { replays: vec![replay; TASKS_MAX], evaluations, weigh };
    let reply = duty(Duty::Tasks(tasks));
    assert_eq!(open_our_reply(&sealed_reply(&reply)).map(|opened| opened.message), Ok(reply));
}

#[test]
fn requests_outside_the_limits_are_refused_by_field() {
    let many = vec![addresses()[0]; ADDRESSES_MAX + 1];
    let joined = |change: fn(&mut Join)| {
        let mut join = join();
        change(&mut join);
        refused_request(&Request::Join(join))
    };
    assert_eq!(
        refused_request(&Request::Join(Join { addresses: many, ..join() })),
        "join.addresses"
    );
    assert_eq!(joined(|join| join.class.device_name = "x".repeat(129)), "join.class");
    assert_eq!(joined(|join| join.class.kernels = "\u{1b}[2J".to_owned()), "join.class");
    assert_eq!(joined(|join| join.memory_bytes = u64::MAX), "join.memory_bytes");
    assert_eq!(joined(|join| join.tokens_per_second = u64::MAX), "join.tokens_per_second");
    assert_eq!(joined(|join| join.head_rounds.reverse()), "join.head_rounds");
    let too_many = (0..=HEAD_ROUNDS_MAX as u32).map(Round).collect();
    let crowded = Request::Join(Join { head_rounds: too_many, ..join() });
    assert_eq!(refused_request(&crowded), "join.head_rounds");
    assert_eq!(joined(|join| join.head_rounds = vec![Round(u32::MAX)]), "join.head_rounds");
    let beat = Request::Beat(Beat { theta: None, steps_done: STEPS_MAX + 1, leaving: false });
    assert_eq!(refused_request(&beat), "beat.steps_done");
    let evaluation = Evaluation { round: Round(0), theta: digest("theta"), loss: f64::NAN };
    assert_eq!(refused_request(&Request::Evaluation(evaluation)), "evaluation.loss");
    let mut effects = effects();
    effects.reverse();
    let weighing = Request::Weighing(Weighing { round: Round(0), effects });
    assert_eq!(refused_request(&weighing), "weighing.effects");
    let effects = nodes(WEIGHED_MAX + 1).into_iter().map(|node| (node, LossEffect(0))).collect();
    let weighing = Request::Weighing(Weighing { round: Round(0), effects });
    assert_eq!(refused_request(&weighing), "weighing.effects");
    let diverged = Commitment { loss: f32::INFINITY, ..commitment() };
    let signed = SignedCommitment::sign(&worker(), RUN, diverged);
    assert_eq!(refused_request(&Request::Commit(signed)), "commitment.loss");
    let late = Heading { round: Round(ROUND_MAX + 1), ..heading(1) };
    assert_eq!(refused_field(seal_request(&worker(), late, &Request::Leave)), "envelope.round");
}

#[test]
fn replies_outside_the_limits_are_refused_by_field() {
    let trained = |change: fn(&mut Assignment)| {
        let mut assignment = assignment(HEAD);
        change(&mut assignment);
        refused_reply(&duty(Duty::Train(assignment)))
    };
    assert_eq!(trained(|assignment| assignment.steps = 0), "assignment.steps");
    assert_eq!(trained(|assignment| assignment.steps = STEPS_MAX + 1), "assignment.steps");
    assert_eq!(trained(|assignment| assignment.sequences = 0), "assignment.sequences");
    assert_eq!(trained(|assignment| assignment.sequences = u32::MAX), "assignment.sequences");
    assert_eq!(
        trained(|assignment| assignment.first_sequence = u64::MAX),
        "assignment.first_sequence"
    );
    assert_eq!(trained(|assignment| assignment.first_step = u64::MAX), "assignment.first_step");
    assert_eq!(trained(|assignment| assignment.round = Round(2)), "start.head_round");

    let upload =
        |entries| refused_reply(&duty(Duty::Upload(CommitSet { round: Round(1), entries })));
    let entry = |node| (node, digest("one"));
    let twice = nodes(1).into_iter().chain(nodes(2)).map(entry).collect();
    assert_eq!(upload(twice), "commit_set.entries");
    assert_eq!(upload(nodes(2).into_iter().rev().map(entry).collect()), "commit_set.entries");
    let many = nodes(COMMIT_SET_ENTRIES_MAX + 1).into_iter().map(entry).collect();
    assert_eq!(upload(many), "commit_set.entries");

    let tasked = |change: fn(&mut Tasks)| {
        let mut tasks =
            Tasks { replays: vec![replay(HEAD)], weigh: Some(weigh()), ..Tasks::default() };
        change(&mut tasks);
        refused_reply(&duty(Duty::Tasks(tasks)))
    };
    assert_eq!(tasked(|tasks| tasks.replays = vec![replay(HEAD); TASKS_MAX + 1]), "tasks.replays");
    let evaluations = |tasks: &mut Tasks| tasks.evaluations = vec![evaluate(); TASKS_MAX + 1];
    assert_eq!(tasked(evaluations), "tasks.evaluations");
    let unordered = |tasks: &mut Tasks| tasks.weigh.as_mut().expect("some").updates.reverse();
    assert_eq!(tasked(unordered), "weigh.updates");
    assert_eq!(tasked(|tasks| tasks.replays[0].head = None), "replay.head");

    let synced = |merge, sources| {
        let (round, theta) = (Round(1), digest("theta"));
        refused_reply(&duty(Duty::Sync(Sync { round, theta, theta_bytes: 4, merge, sources })))
    };
    for outer_learning_rate in [0.0, -0.5, 10.5, f32::NAN] {
        let (aggregate, residual) = (digest("a"), digest("r"));
        let merge = Merge { aggregate, aggregate_bytes: 4, residual, outer_learning_rate };
        assert_eq!(synced(Some(merge), vec![]), "merge.outer_learning_rate");
    }
    let source = Source { node: nodes(1)[0], addresses: vec![] };
    assert_eq!(synced(None, vec![source; SOURCES_MAX + 1]), "sync.sources");

    let verifiers = nodes(VERIFIERS_MAX + 1);
    let duty = Duty::Gathering { workers: 0, workers_min: 1 };
    let watched = Situation { duty, verifiers, evidence_from: Round(0) };
    assert_eq!(refused_reply(&Reply::Situation(watched)), "situation.verifiers");
    assert_eq!(refused_reply(&Reply::Status(vec![0; STATUS_BYTES_MAX + 1])), "status");
    let description = Reply::Description { spec: vec![0; SPEC_BYTES_MAX + 1], round: Round(0) };
    assert_eq!(refused_reply(&description), "description.spec");
}

fn evaluate() -> Evaluate {
    Evaluate { round: Round(4), theta: digest("theta") }
}

#[test]
fn wire_messages_that_no_program_of_ours_sends_are_refused() {
    let parse = |kind| Request::parse(wire::Request { kind }, RUN, worker().node_id());
    assert_eq!(parse(None), Err(MessageError::Missing { field: "request.kind" }));
    let role = wire::Join { role: 2, ..(&join()).into() };
    let refusal = parse(Some(wire::request::Kind::Join(role))).expect_err("refused").to_string();
    assert_eq!(refusal, "join.role: expected a known role, got 2");
    let addresses = vec!["example.org:1".to_owned()];
    let join = wire::Join { addresses, ..(&join()).into() };
    assert!(parse(Some(wire::request::Kind::Join(join))).is_err());
    let beat =
        wire::Beat { theta_round: None, possession: vec![0; 32], steps_done: 0, leaving: false };
    assert!(parse(Some(wire::request::Kind::Beat(beat))).is_err());
    let verdict = wire::Verdict { id: 1, outcome: None };
    assert!(parse(Some(wire::request::Kind::Verdict(verdict))).is_err());

    assert!(Reply::try_from(wire::Reply { kind: None }).is_err());
    assert!(
        Situation::try_from(wire::Situation { kind: None, verifiers: vec![], evidence_from: 0 })
            .is_err()
    );
    let start = wire::Start { sent_values_returned: true, ..wire::Start::default() };
    assert!(Start::try_from(start).is_err());
    assert!(Refusal::try_from(wire::Refusal { code: 0, reason: String::new() }).is_err());
    let payload = vec![0; 31];
    assert_eq!(
        Commitment::try_from(wire::Commitment { payload, ..(&commitment()).into() }),
        Err(MessageError::Length { field: "commitment.payload", expected: 32, got: 31 })
    );
}

#[test]
fn a_long_explanation_is_cut_between_characters() {
    let reason = format!("x\n{}", "é".repeat(REASON_BYTES_MAX));
    let sealed = sealed_reply(&Reply::Refused(Refusal { code: RefusalCode::Malformed, reason }));
    let opened = open_our_reply(&sealed).expect("opened").message;
    let Reply::Refused(refusal) = opened else { panic!("got {opened:?}") };
    assert_eq!(refusal.reason, format!("x {}", "é".repeat(REASON_BYTES_MAX / 2 - 1)));
}
