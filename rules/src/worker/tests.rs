//! What a worker does, told as conversations with its coordinator.

use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    CommitSet, Commitment, DeviceKind, Merge, NumericClass, PROTOCOL_VERSION, Role, Start, Tasks,
    WaitReason,
};
use manyhands_proto::{RunId, TokenCount};

use super::*;

const RUN: RunId = RunId::new([5; 32]);

fn key() -> NodeKey {
    NodeKey::from_seed([3; 32])
}

fn worker(trained: Option<Trained>) -> Worker {
    let join = Join {
        role: Role::Worker,
        version: PROTOCOL_VERSION,
        class: NumericClass::unknown(DeviceKind::Cpu),
        memory_bytes: 1 << 30,
        tokens_per_second: 100,
        addresses: Vec::new(),
        head_rounds: Vec::new(),
    };
    Worker::new(key().node_id(), Identity { join, beat_ms: 100 }, trained)
}

fn assignment(round: u32) -> Assignment {
    Assignment {
        round: Round(round),
        worker: key().node_id(),
        theta: Digest::of(b"theta"),
        class: NumericClass::unknown(DeviceKind::Cpu),
        first_sequence: 0,
        sequences: 8,
        steps: 4,
        first_step: 0,
        start: Start::Fresh,
        left_out: Vec::new(),
        commit_deadline_ms: 1_000,
    }
}

fn trained(round: u32) -> Trained {
    let digest = Digest::of(b"some blob");
    let commitment = Commitment {
        round: Round(round),
        first_sequence: 0,
        payload: digest,
        payload_bytes: 9,
        theta: digest,
        moments: digest,
        error: digest,
        assignment: digest,
        tokens: TokenCount(8 * 32),
        loss: 1.0,
    };
    let commitment = SignedCommitment::sign(&key(), RUN, commitment);
    Trained { assignment: assignment(round), commitment }
}

fn situation(duty: Duty) -> Reply {
    Reply::Situation(Situation { duty, verifiers: Vec::new(), evidence_from: Round(0) })
}

/// Lets the worker speak once and answers with `duty`.
fn tell(worker: &mut Worker, now: u64, duty: Duty) -> (Request, Vec<Effect>) {
    let request = worker.poll_request(Tick(now)).expect("it is time to speak");
    worker.handle_reply(Tick(now), &request, situation(duty));
    (request, worker.poll_effects())
}

#[test]
fn a_round_from_joining_to_the_upload() {
    let mut worker = worker(None);
    let sync = Sync {
        round: Round(0),
        theta: Digest::of(b"theta"),
        theta_bytes: 4,
        merge: None::<Merge>,
        sources: Vec::new(),
    };
    let (request, effects) = tell(&mut worker, 0, Duty::Sync(sync.clone()));
    assert!(matches!(request, Request::Join(_)));
    assert_eq!(effects, [Effect::Sync(sync)]);

    let possession = Possession::prove(Round(0), key().node_id(), b"theta");
    worker.handle(Tick(10), Input::Synced(possession));
    let (request, effects) = tell(&mut worker, 10, Duty::Train(assignment(0)));
    assert!(matches!(request, Request::Beat(beat) if beat.theta == Some(possession)));
    assert_eq!(effects, [Effect::Train(assignment(0))]);

    worker.handle(Tick(500), Input::Trained(trained(0)));
    let wait = Duty::Wait { round: Round(0), reason: WaitReason::Commitments };
    let (request, effects) = tell(&mut worker, 500, wait);
    assert_eq!(request, Request::Commit(trained(0).commitment));
    assert!(effects.is_empty(), "nothing is published before the commitments are closed");

    let without = CommitSet { round: Round(0), entries: Vec::new() };
    let (_, effects) = tell(&mut worker, 600, Duty::Upload(without));
    assert!(effects.is_empty(), "nor for a set that does not hold the commitment");
    let entry = (key().node_id(), trained(0).commitment.digest());
    let set = CommitSet { round: Round(0), entries: vec![entry] };
    let (_, effects) = tell(&mut worker, 700, Duty::Upload(set.clone()));
    assert_eq!(effects, [Effect::Publish { round: Round(0), verifiers: Vec::new() }]);
    let (_, effects) = tell(&mut worker, 800, Duty::Upload(set));
    assert!(effects.is_empty(), "once is enough");
}

#[test]
fn a_restart_after_training_commits_what_is_on_disk_instead_of_training_again() {
    let mut worker = worker(Some(trained(0)));
    let (_, effects) = tell(&mut worker, 0, Duty::Train(assignment(0)));
    assert!(effects.is_empty());
    assert!(matches!(worker.poll_request(Tick(0)), Some(Request::Commit(_))));

    let mut other = self::worker(Some(trained(0)));
    let (_, effects) = tell(&mut other, 0, Duty::Train(assignment(1)));
    assert_eq!(effects, [Effect::Train(assignment(1))]);
}

#[test]
fn a_lost_reply_is_asked_for_again_a_beat_later() {
    let mut worker = worker(None);
    assert!(worker.poll_request(Tick(0)).is_some());
    worker.handle_no_reply(Tick(0));
    assert_eq!(worker.poll_request(Tick(99)), None);
    assert_eq!(worker.poll_timeout(), Some(Tick(100)));
    assert!(worker.poll_request(Tick(100)).is_some());
}

#[test]
fn training_is_aborted_when_the_round_goes_on_without_us() {
    let mut worker = worker(None);
    tell(&mut worker, 0, Duty::Train(assignment(0)));
    let wait = Duty::Wait { round: Round(0), reason: WaitReason::Checks };
    let (_, effects) = tell(&mut worker, 200, wait);
    assert_eq!(effects, [Effect::Abort]);
}

#[test]
fn weighing_is_aborted_when_the_merge_does_not_wait_for_it_any_more() {
    let mut worker = worker(None);
    let weigh = Weigh { round: Round(0), theta: Digest::of(b"theta"), updates: Vec::new() };
    let tasks = |weigh: Option<Weigh>| Duty::Tasks(Tasks { weigh, ..Tasks::default() });
    let (_, effects) = tell(&mut worker, 0, tasks(Some(weigh.clone())));
    assert_eq!(effects, [Effect::Weigh(weigh.clone())]);
    let (_, effects) = tell(&mut worker, 200, tasks(Some(weigh.clone())));
    assert!(effects.is_empty(), "it is under way");
    let (_, effects) = tell(&mut worker, 400, tasks(None));
    assert_eq!(effects, [Effect::Abort]);
    worker.handle(Tick(450), Input::Failed);
    let next = Weigh { round: Round(1), ..weigh };
    let (_, effects) = tell(&mut worker, 600, tasks(Some(next.clone())));
    assert_eq!(effects, [Effect::Weigh(next)]);
}

#[test]
fn what_a_merge_waits_for_is_not_kept_waiting_by_an_evaluation_or_a_replay() {
    let mut worker = worker(None);
    let evaluations = vec![Evaluate { round: Round(0), theta: Digest::of(b"theta") }];
    let weigh = Weigh { round: Round(1), theta: Digest::of(b"theta"), updates: Vec::new() };
    let tasks = |weigh: Option<Weigh>| {
        Duty::Tasks(Tasks { evaluations: evaluations.clone(), weigh, ..Tasks::default() })
    };
    let (_, effects) = tell(&mut worker, 0, tasks(None));
    assert_eq!(effects, [Effect::Evaluate(evaluations[0].clone())]);
    let (_, effects) = tell(&mut worker, 200, tasks(Some(weigh.clone())));
    assert_eq!(effects, [Effect::Abort]);
    worker.handle(Tick(210), Input::Failed);
    let (_, effects) = tell(&mut worker, 400, tasks(Some(weigh.clone())));
    assert_eq!(effects, [Effect::Weigh(weigh)]);
    worker.handle(Tick(410), Input::Weighed(Weighing { round: Round(1), effects: Vec::new() }));
    let (_, effects) = tell(&mut worker, 600, tasks(None));
    assert_eq!(
        effects,
        [Effect::Evaluate(evaluations[0].clone())],
        "and what was put off is done then"
    );
}

#[test]
fn a_refusal_that_cannot_be_mended_ends_the_worker_with_its_reason() {
    let mut worker = worker(None);
    let request = worker.poll_request(Tick(0)).expect("joins");
    let refusal = Refusal { code: RefusalCode::StakeTooSmall, reason: "too small".to_owned() };
    worker.handle_reply(Tick(0), &request, Reply::Refused(refusal.clone()));
    assert_eq!(worker.poll_effects(), [Effect::Exit(Exit::Refused(refusal))]);
}

#[test]
fn a_node_that_was_asked_to_stop_does_not_wait_for_a_coordinator_that_is_gone() {
    let mut worker = worker(None);
    let gathering = Duty::Gathering { workers: 1, workers_min: 2 };
    tell(&mut worker, 0, gathering);
    worker.handle(Tick(10), Input::Stop);
    let mut now = 10;
    for _ in 0..3 {
        assert_eq!(worker.poll_request(Tick(now)), Some(Request::Leave));
        worker.handle_no_reply(Tick(now));
        assert_eq!(worker.poll_request(Tick(now)), None, "not again at once");
        now += 1_000;
    }
    assert_eq!(worker.poll_effects(), [Effect::Exit(Exit::Left)]);
}

#[test]
fn a_verifier_that_comes_later_may_open_what_is_open_already() {
    let mut worker = worker(Some(trained(0)));
    let entry = (key().node_id(), trained(0).commitment.digest());
    let set = CommitSet { round: Round(0), entries: vec![entry] };
    tell(&mut worker, 0, Duty::Upload(set));
    let verifiers = vec![NodeId::new([9; 32])];
    let duty = Duty::Wait { round: Round(0), reason: WaitReason::Merge };
    let request = worker.poll_request(Tick(1_000)).expect("a beat");
    let situation = Situation { duty, verifiers: verifiers.clone(), evidence_from: Round(0) };
    worker.handle_reply(Tick(1_000), &request, Reply::Situation(situation));
    assert_eq!(worker.poll_effects(), [Effect::Publish { round: Round(0), verifiers }]);
}

#[test]
fn a_lost_state_is_confessed_by_joining_without_it() {
    let mut worker = worker(Some(trained(0)));
    tell(&mut worker, 0, Duty::Train(assignment(1)));
    worker.handle(Tick(100), Input::HeadLost { round: Round(0) });
    let request = worker.poll_request(Tick(100)).expect("it is time to speak");
    assert!(matches!(request, Request::Join(join) if join.head_rounds.is_empty()));
}

#[test]
fn a_round_that_opens_again_is_trained_again_and_the_old_work_is_not_committed() {
    let mut worker = worker(None);
    tell(&mut worker, 0, Duty::Train(assignment(0)));
    let anew = Assignment { first_sequence: 8, ..assignment(0) };
    let (_, effects) = tell(&mut worker, 100, Duty::Train(anew.clone()));
    assert_eq!(effects, [Effect::Abort]);
    // It was done before it heard of the abort.
    worker.handle(Tick(150), Input::Trained(trained(0)));
    let (request, effects) = tell(&mut worker, 200, Duty::Train(anew.clone()));
    assert!(matches!(request, Request::Beat(_)), "{request:?}");
    assert_eq!(effects, [Effect::Train(anew)]);
}

#[test]
fn a_worker_that_stops_stays_while_its_last_round_may_be_checked() {
    let mut worker = worker(None);
    tell(&mut worker, 0, Duty::Train(assignment(0)));
    worker.handle(Tick(50), Input::Trained(trained(0)));
    worker.handle(Tick(60), Input::Stop);
    let mut hear = |now: u64, evidence_from: u32| {
        let request = worker.poll_request(Tick(now)).expect("it speaks");
        let duty = Duty::Wait { round: Round(1), reason: WaitReason::NextRound };
        let evidence_from = Round(evidence_from);
        let situation = Situation { duty, verifiers: Vec::new(), evidence_from };
        worker.handle_reply(Tick(now), &request, Reply::Situation(situation));
        request
    };
    assert!(matches!(hear(100, 0), Request::Commit(_)));
    assert!(matches!(hear(200, 0), Request::Beat(beat) if beat.leaving));
    assert!(matches!(hear(300, 1), Request::Beat(_)));
    assert_eq!(hear(400, 1), Request::Leave);
    assert_eq!(worker.poll_effects().last(), Some(&Effect::Exit(Exit::Left)));
    assert_eq!(worker.poll_request(Tick(9_999)), None);
}
