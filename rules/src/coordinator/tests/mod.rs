//! The coordinator's machine, told as runs of a few workers whose world always answers.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    Assignment, Beat, Commitment, DeviceKind, Distances, Duty, EndState, Join, LossEffect,
    NumericClass, PROTOCOL_VERSION, Possession, Refusal, RefusalCode, Replay, ReplayEnd,
    ReplayOutcome, Replayed, Request, Role, SignedCommitment, SignedReplay, Situation, Start,
    Verdict, Weigh, Weighing,
};
use manyhands_proto::run_file::Rule;
use manyhands_proto::{Balance, TokenCount};

mod hostile;
mod weighing;

use super::*;
use crate::assignment::{Opening, plan};
use crate::record::tests_support;
use crate::record::{CodecFault, Entropy};

const RUN: RunId = RunId::new([5; 32]);
const PASSED: Distances = Distances { delta: 0.0, first_moment: 0.0, second_moment: 0.0 };

fn key(id: u8) -> NodeKey {
    NodeKey::from_seed([id; 32])
}

fn node(id: u8) -> NodeId {
    key(id).node_id()
}

fn join(role: Role) -> Join {
    Join {
        role,
        version: PROTOCOL_VERSION,
        class: NumericClass::unknown(DeviceKind::Cpu),
        memory_bytes: 1 << 40,
        tokens_per_second: 10_000,
        addresses: Vec::new(),
        head_rounds: (0..100).map(Round).collect(),
    }
}

/// A coordinator and the world around it.
struct World {
    machine: Coordinator,
    now: Tick,
    nonce: u64,
    inputs: Vec<(Tick, Input)>,
    /// Who is silent.
    dead: BTreeSet<u8>,
    /// Whose update a replay refutes.
    cheats: BTreeSet<NodeId>,
    /// Whose updates raise held-out loss.
    harms: BTreeSet<NodeId>,
    /// Who never opens the chunks that are drawn.
    unopened: BTreeSet<NodeId>,
    /// Whose updates do not follow from their states.
    forgers: BTreeSet<NodeId>,
    records: Vec<RoundRecord>,
    reports: Vec<NodeId>,
    merges: Vec<MergeOrder>,
    /// Who took its stake back.
    stakeless: Vec<NodeId>,
    /// Whether the chain deals with faults at all.
    settles_faults: bool,
    /// Whose ends are made up.
    liars: Vec<NodeId>,
}

/// A worker's word that it did what it was assigned and ended at `blob`.
fn committed(id: u8, assignment: &Assignment, blob: Digest) -> SignedCommitment {
    let commitment = Commitment {
        round: assignment.round,
        first_sequence: assignment.first_sequence,
        payload: blob,
        payload_bytes: 100,
        theta: blob,
        moments: blob,
        error: blob,
        assignment: assignment.digest(),
        tokens: TokenCount(u64::from(assignment.sequences) * 32),
        loss: 3.0,
    };
    SignedCommitment::sign(&key(id), RUN, commitment)
}

/// The blob behind a forger's fault.
fn shown_by(worker: NodeId) -> Digest {
    Digest::of(worker.as_bytes())
}

/// A verifier's word that it ended somewhere.
fn verdict(id: u8, task: &Replay) -> Verdict {
    let Assignment { round, worker, .. } = task.assignment;
    let blob = Digest::of(&[id, round.0 as u8]);
    let end = ReplayEnd::At(EndState { theta: blob, moments: blob });
    let assignment = task.assignment.digest();
    let replayed = Replayed { round, worker, assignment, end };
    let signed = SignedReplay::sign(&key(id), RUN, replayed);
    Verdict { id: task.id, outcome: ReplayOutcome::Replayed(signed) }
}

impl World {
    fn new(spec: RunSpec) -> Self {
        Self {
            machine: Coordinator::new(RUN, spec, Tick(0)),
            now: Tick(0),
            nonce: 0,
            inputs: Vec::new(),
            dead: BTreeSet::new(),
            cheats: BTreeSet::new(),
            harms: BTreeSet::new(),
            unopened: BTreeSet::new(),
            forgers: BTreeSet::new(),
            records: Vec::new(),
            reports: Vec::new(),
            merges: Vec::new(),
            stakeless: Vec::new(),
            settles_faults: true,
            liars: Vec::new(),
        }
    }

    /// Workers 1 and 2, and verifier 9, which has just been asked for its first replay.
    fn with_a_replay_asked() -> Self {
        let mut world = Self::new(tests_support::spec());
        world.join(1, Role::Worker);
        world.join(2, Role::Worker);
        world.join(9, Role::Verifier);
        while world.machine.audits.replays_of(node(9)).is_empty() {
            world.turn(&[1, 2], &[]);
            world.ask(9, Request::Beat(Beat { theta: None, steps_done: 0, leaving: false }));
        }
        world
    }

    fn handle(&mut self, input: Input) -> Option<Reply> {
        self.inputs.push((self.now, input.clone()));
        self.machine.handle(self.now, input)
    }

    fn ask(&mut self, id: u8, request: Request) -> Reply {
        self.nonce += 1;
        let facts = Facts { stake: Balance(u128::MAX), observed: Vec::new() };
        let (from, nonce) = (node(id), self.nonce);
        self.handle(Input::Message { from, nonce, request, facts }).expect("a message is answered")
    }

    fn join(&mut self, id: u8, role: Role) -> Reply {
        self.ask(id, Request::Join(join(role)))
    }

    /// Everybody who lives does what it is told, once; then the shell answers what is wanted.
    fn turn(&mut self, workers: &[u8], verifiers: &[u8]) {
        for &id in workers.iter().chain(verifiers) {
            if !self.dead.contains(&id) {
                self.obey(id);
            }
        }
        loop {
            let effects = self.machine.poll_effects();
            if effects.is_empty() {
                break;
            }
            for effect in effects {
                // What came of another may have changed it.
                if self.machine.is_wanted(&effect) {
                    self.perform(effect);
                }
            }
        }
        self.now = self.now.after_ms(100);
        self.handle(Input::Timeout);
    }

    fn obey(&mut self, id: u8) {
        let proof = Possession { round: self.machine.round(), proof: Digest::of(&[id]) };
        let beat = Request::Beat(Beat { theta: Some(proof), steps_done: 0, leaving: false });
        let Reply::Situation(Situation { duty, .. }) = self.ask(id, beat) else { return };
        match duty {
            Duty::Train(assignment) => {
                let blob = Digest::of(&[id, assignment.round.0 as u8]);
                let signed = committed(id, &assignment, blob);
                self.ask(id, Request::Commit(signed));
            }
            Duty::Tasks(tasks) => {
                for replay in tasks.replays {
                    self.ask(id, Request::Verdict(verdict(id, &replay)));
                }
                if let Some(asked) = tasks.weigh {
                    let effect = |&(worker, _): &(NodeId, Digest)| {
                        let harms = self.harms.contains(&worker);
                        (worker, LossEffect(if harms { 1_000_000 } else { -1_000 }))
                    };
                    let effects = asked.updates.iter().map(effect).collect();
                    self.ask(id, Request::Weighing(Weighing { round: asked.round, effects }));
                }
                for asked in tasks.evaluations {
                    let evaluation =
                        Evaluation { round: asked.round, theta: asked.theta, loss: 5.0 };
                    self.ask(id, Request::Evaluation(evaluation));
                }
            }
            Duty::Gathering { .. }
            | Duty::Upload(_)
            | Duty::Wait { .. }
            | Duty::Sync(_)
            | Duty::Complete { .. }
            | Duty::Dismissed(_) => {}
        }
    }

    fn perform(&mut self, effect: Effect) {
        let entropy = |digest: Digest| Entropy { value: digest, block: Some(1) };
        let input = match effect {
            Effect::FetchPayload { round, worker, .. } => {
                Input::PayloadArrived { round, worker, result: Ok(()) }
            }
            Effect::CheckCodec(CodecCheck { worker, .. }) if self.unopened.contains(&worker) => {
                return;
            }
            Effect::CheckCodec(CodecCheck { round, worker, .. }) => {
                let result = if self.forgers.contains(&worker) {
                    let (reason, evidence) = ("chunk 3 differs".to_owned(), shown_by(worker));
                    CodecResult::Fault(CodecFault { reason, evidence })
                } else {
                    CodecResult::Passed
                };
                Input::CodecChecked { round, worker, result }
            }
            Effect::CheckPossession { round, worker, proof, .. } => {
                Input::PossessionChecked { round, worker, proof, holds: true }
            }
            Effect::Compare(Comparison { id, case, replay }) => {
                let cheated = self.cheats.contains(&case.worker());
                let distances = if cheated { Distances { delta: 0.2, ..PASSED } } else { PASSED };
                let evidence = Some(Digest::of(&replay.signature));
                let near = case.judgements.iter().map(Judgement::verifier).collect();
                let result = Compared::Distances { distances, evidence, near };
                Input::Compared { id, verifier: replay.verifier, result }
            }
            Effect::CompareJudges(case) => {
                let commitment = case.work.commitment.digest();
                Input::JudgesCompared { commitment, liars: self.liars.clone() }
            }
            Effect::ReportVerifier { end, .. } => {
                Input::VerifierSettled { end, slashed: Balance(9) }
            }
            Effect::Merge(order) => {
                let round = order.round;
                let theta = Digest::of(&serde_json::to_vec(&order).expect("serialises"));
                let merge = Merge {
                    aggregate: theta,
                    aggregate_bytes: 7,
                    residual: theta,
                    outer_learning_rate: order.outer_learning_rate,
                };
                self.merges.push(order);
                Input::Merged { round, result: MergeResult { merge, theta, flagged: Vec::new() } }
            }
            Effect::CheckStakes { round, .. } => {
                Input::StakesChecked { round, gone: self.stakeless.clone() }
            }
            Effect::Anchor { round, stage, digest } => {
                Input::Entropy { round, stage, entropy: entropy(digest) }
            }
            Effect::Settle(record) => {
                let round = record.round;
                self.records.push(*record);
                Input::Settled { round }
            }
            Effect::ReportFault { .. } if !self.settles_faults => return,
            Effect::ReportFault { round, worker, .. } => {
                self.reports.push(worker);
                Input::FaultSettled { round, worker, slashed: Balance(50) }
            }
            Effect::CompleteRun { .. } => Input::RunCompleted,
        };
        self.handle(input);
    }

    fn run(&mut self, workers: &[u8], verifiers: &[u8], turns: usize) {
        for _ in 0..turns {
            if self.machine.phase() == Phase::Complete {
                break;
            }
            self.turn(workers, verifiers);
        }
    }

    fn outcome(&self, round: usize, id: u8) -> &Outcome {
        let results = &self.records[round].results;
        let result = results.iter().find(|result| result.worker == node(id));
        &result.expect("the worker was a candidate").outcome
    }
}

#[test]
fn two_workers_and_a_verifier_finish_a_run_and_everybody_is_paid() {
    let mut world = World::new(tests_support::spec());
    for id in [1, 2] {
        world.join(id, Role::Worker);
    }
    world.join(9, Role::Verifier);
    world.run(&[1, 2], &[9], 300);
    assert_eq!(world.machine.phase(), Phase::Complete);
    assert!(world.records.len() >= 3);
    for round in 0..3 {
        assert_eq!(world.outcome(round, 1), &Outcome::Admitted);
        assert_eq!(world.outcome(round, 2), &Outcome::Admitted);
    }
    let last = &world.records.last().expect("a record").earnings;
    let accounts: BTreeSet<_> = last.iter().map(|earning| earning.account).collect();
    assert!(accounts.contains(&node(1)) && accounts.contains(&node(2)));
    let history = world.machine.status(world.now).history;
    assert!(history.iter().all(|round| round.held_out_loss == Some(5.0)), "{history:?}");
}

#[test]
fn records_form_a_chain_from_the_specification_and_positions_never_overlap() {
    let spec = tests_support::spec();
    let mut previous = spec.digest();
    let mut world = World::new(spec);
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    world.run(&[1, 2], &[], 300);
    let mut first_sequence = 0;
    for record in &world.records {
        assert_eq!(record.previous, previous);
        assert_eq!(record.first_sequence, first_sequence);
        let opening = Opening {
            round: record.round,
            theta: record.theta,
            first_sequence,
            left_out: &[],
            sequences_max: record.sequences_max,
        };
        let assignments = plan(world.machine.spec(), opening, &record.candidates);
        first_sequence += assignments.iter().map(|a| u64::from(a.sequences)).sum::<u64>();
        previous = record.digest();
        assert_eq!(RoundRecord::parse(&record.canonical_bytes()).expect("parses"), *record);
    }
}

#[test]
fn a_cheater_on_probation_is_kept_out_reported_and_barred() {
    let mut world = World::new(tests_support::spec());
    for id in [1, 2, 3] {
        world.join(id, Role::Worker);
    }
    world.join(9, Role::Verifier);
    world.cheats.insert(node(2));
    world.run(&[1, 2, 3], &[9], 300);
    assert!(matches!(world.outcome(0, 2), Outcome::ReplayFault(_)));
    assert_eq!(world.outcome(0, 1), &Outcome::Admitted);
    assert_eq!(world.reports, [node(2)]);
    assert!(
        world.merges.iter().all(|merge| merge.contributions.iter().all(|c| c.worker != node(2)))
    );
    assert!(world.records.last().expect("a record").earnings.iter().all(|e| e.account != node(2)));
}

#[test]
fn a_fault_found_after_the_merge_is_revoked_and_its_reward_forfeit() {
    let mut spec = tests_support::spec();
    spec.verification.probation_checks = 0;
    spec.verification.audit_rate_per_mille = 1_000;
    let mut world = World::new(spec);
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    world.join(9, Role::Verifier);
    world.cheats.insert(node(2));
    world.run(&[1, 2], &[9], 300);
    assert_eq!(world.outcome(0, 2), &Outcome::Admitted, "the merge did not wait");
    let revoked: Vec<_> = world.merges.iter().flat_map(|merge| &merge.revocations).collect();
    assert_eq!((revoked[0].round, revoked[0].workers.as_slice()), (Round(0), &[node(2)][..]));
    assert_eq!(revoked[0].contributions.len(), 2);
    assert!(world.reports.contains(&node(2)));
    assert!(world.records.last().expect("a record").earnings.iter().all(|e| e.account != node(2)));
}

#[test]
fn what_two_verifiers_found_is_shown_to_all_that_vote_on_it() {
    let mut spec = tests_support::spec();
    spec.run.rounds = 1;
    let mut world = World::new(spec);
    for id in [1, 2, 3] {
        world.join(id, Role::Worker);
    }
    for id in [7, 8, 9] {
        world.join(id, Role::Verifier);
    }
    world.cheats.insert(node(2));
    world.settles_faults = false;
    world.run(&[1, 2, 3], &[7, 8, 9], 60);
    let record = &world.records[0];
    let found = record.checks.iter().find(|check| matches!(check.finding, Finding::ReplayFault(_)));
    let found = found.expect("the cheat is found");
    assert_eq!((found.worker, found.judgements.len()), (node(2), 2));
    // What the chain is told is the digest of all that the verifiers that are to vote have to see.
    let told = world.machine.wanted().into_iter().find_map(|effect| {
        let Effect::ReportFault { evidence, shown, .. } = effect else { return None };
        let Some(Shown::Case(case)) = shown else { panic!("found by verifiers") };
        Some((evidence, case))
    });
    let (evidence, case) = told.expect("the chain is not through with it");
    assert_eq!(evidence, case.digest());
    assert_eq!((case.worker(), &case.judgements), (node(2), &found.judgements));
    assert_eq!(case.attending, record.attending);
    // Only what somebody was accused with is kept: two replays, and what follows from them.
    let kept: Vec<Digest> = world.machine.evidence().map(|(digest, _)| digest).collect();
    assert_eq!(kept.len(), 3);
    assert!(kept.contains(&evidence));
    let passed = record.checks.iter().filter(|it| matches!(it.finding, Finding::ReplayPassed(_)));
    assert!(passed.flat_map(|check| &check.judgements).all(|it| it.evidence.is_none()));
    assert_eq!(world.outcome(0, 1), &Outcome::Admitted);
}

/// Two workers, and verifiers 8 and 9; whatever one lets pass is looked over by the other.
fn looked_over() -> World {
    let mut spec = tests_support::spec();
    spec.run.rounds = 6;
    spec.verification.audit_rate_per_mille = 1_000;
    spec.verification.recheck_per_mille = 1_000;
    let mut world = World::new(spec);
    for id in [1, 2] {
        world.join(id, Role::Worker);
    }
    for id in [8, 9] {
        world.join(id, Role::Verifier);
    }
    world
}

#[test]
fn a_worker_is_asked_to_keep_what_may_be_looked_over_until_it_has_been() {
    let mut world = looked_over();
    let mut told = BTreeMap::new();
    let mut second_looks = 0;
    while world.machine.phase() != Phase::Complete {
        world.turn(&[1, 2], &[8, 9]);
        for id in [1, 2] {
            let beat = Request::Beat(Beat { theta: None, steps_done: 0, leaving: false });
            if let Reply::Situation(situation) = world.ask(id, beat) {
                let newest = told.entry(node(id)).or_insert(Round(0));
                *newest = situation.evidence_from.max(*newest);
            }
        }
        for task in [8, 9].into_iter().flat_map(|id| world.machine.audits.replays_of(node(id))) {
            let Assignment { worker, round, .. } = task.assignment;
            assert!(told.get(&worker).is_none_or(|from| *from <= round), "{round} is gone");
            second_looks += usize::from(round.next() < world.machine.round());
        }
    }
    assert!(second_looks > 0, "some come rounds later");
    let replays = || {
        let checks = world.records.iter().flat_map(|record| &record.checks);
        checks.filter(|check| !check.is_of_codec())
    };
    let (first, second): (Vec<_>, Vec<_>) =
        replays().partition(|check| check.judgements.len() == 1);
    assert_eq!(first.len(), second.len(), "everything was looked over, the last round too");
    let last = replays().map(|check| check.round).max();
    assert_eq!(last, Some(Round(5)));
}

#[test]
fn a_first_verdict_that_is_on_record_stays_whoever_gave_it() {
    let mut world = looked_over();
    let is_second = |world: &World| {
        let tasks = || [8, 9].into_iter().flat_map(|id| world.machine.audits.replays_of(node(id)));
        tasks().any(|task| task.assignment.round.next() < world.machine.round())
    };
    while !is_second(&world) {
        world.turn(&[1, 2], &[]);
        for id in [8, 9] {
            if !is_second(&world) {
                world.obey(id);
            }
        }
    }
    let behind: Vec<_> = world.machine.audits.evidence().collect();
    assert!(!behind.is_empty());
    for id in [8, 9] {
        world.machine.audits.exclude(node(id));
    }
    assert_eq!(world.machine.audits.evidence().collect::<Vec<_>>(), behind);
}

#[test]
fn a_verdict_is_about_the_round_that_was_asked() {
    let mut world = World::with_a_replay_asked();
    let task = world.machine.audits.replays_of(node(9)).remove(0);
    let refused =
        |world: &mut World, verdict: Verdict| match world.ask(9, Request::Verdict(verdict)) {
            Reply::Refused(refusal) => Some(refusal.code),
            Reply::Description { .. } | Reply::Situation(_) | Reply::Status(_) => None,
        };
    let mut other = task.clone();
    other.assignment.theta = Digest::of(b"other parameters");
    assert_eq!(refused(&mut world, verdict(9, &other)), Some(RefusalCode::Malformed));
    other = task.clone();
    other.id += 100;
    assert_eq!(refused(&mut world, verdict(9, &other)), Some(RefusalCode::NotYourTask));
    assert_eq!(refused(&mut world, verdict(9, &task)), None);
    assert_eq!(refused(&mut world, verdict(9, &task)), Some(RefusalCode::NotYourTask), "once");
}

#[test]
fn what_shows_a_forged_update_is_kept_from_when_it_is_found() {
    let mut world = World::new(tests_support::spec());
    for id in [1, 2] {
        world.join(id, Role::Worker);
    }
    world.join(9, Role::Verifier);
    world.forgers.insert(node(2));
    world.settles_faults = false;
    let of_forger = |world: &World| {
        world.machine.evidence().find(|(digest, _)| *digest == shown_by(node(2))).map(|it| it.1)
    };
    let found = |world: &World| world.machine.round.codec.contains_key(&node(2));
    let mut kept = Vec::new();
    for _ in 0..60 {
        world.turn(&[1, 2], &[9]);
        if found(&world) {
            kept.push(of_forger(&world));
        }
        if !world.records.is_empty() {
            break;
        }
    }
    assert!(kept.iter().all(Option::is_some), "{kept:?}");
    assert!(matches!(world.outcome(0, 2), Outcome::CodecFault(_)));
    assert_eq!(of_forger(&world), Some(true), "everybody may see it");
    let told = world.machine.wanted().into_iter().find_map(|effect| {
        let Effect::ReportFault { evidence, shown, .. } = effect else { return None };
        Some((evidence, shown))
    });
    assert_eq!(told, Some((shown_by(node(2)), None)), "as it is there already");
}

#[test]
fn the_round_closes_without_a_worker_that_died_and_takes_it_back() {
    let mut spec = tests_support::spec();
    spec.run.rounds = 6;
    spec.round.silence_ms = 1_000;
    spec.round.sync_ms = 500;
    let mut world = World::new(spec);
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    while world.machine.round() < Round(1) {
        world.turn(&[1, 2], &[]);
    }
    world.dead.insert(2);
    while world.machine.round() < Round(3) {
        world.turn(&[1, 2], &[]);
    }
    assert_eq!(world.outcome(1, 1), &Outcome::Admitted);
    world.dead.clear();
    world.join(2, Role::Worker);
    world.run(&[1, 2], &[], 300);
    assert_eq!(world.outcome(5, 2), &Outcome::Admitted);
}

#[test]
fn the_journal_alone_gives_the_same_machine_byte_for_byte() {
    let spec = tests_support::spec();
    let mut world = World::new(spec.clone());
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    world.join(9, Role::Verifier);
    world.cheats.insert(node(1));
    world.run(&[1, 2], &[9], 60);
    let mut again = Coordinator::new(RUN, spec, Tick(0));
    for (now, input) in &world.inputs {
        again.handle(*now, input.clone());
    }
    let bytes = |machine: &Coordinator| serde_json::to_vec(machine).expect("serialises");
    assert_eq!(bytes(&again), bytes(&world.machine));
    let restored: Coordinator = serde_json::from_slice(&bytes(&again)).expect("parses");
    assert_eq!(bytes(&restored), bytes(&again));
}

#[test]
fn a_repeated_message_and_a_second_commitment_are_refused_with_their_codes() {
    let mut world = World::new(tests_support::spec());
    world.join(1, Role::Worker);
    world.join(2, Role::Worker);
    let stranger = world.ask(7, Request::Leave);
    assert!(matches!(stranger, Reply::Refused(r) if r.code == RefusalCode::NotAMember));
    let input = Input::Message {
        from: node(1),
        nonce: 1,
        request: Request::Leave,
        facts: Facts::default(),
    };
    let reply = world.handle(input).expect("answered");
    assert!(matches!(reply, Reply::Refused(r) if r.code == RefusalCode::Replayed));
    while !matches!(world.machine.phase(), Phase::Training { .. }) {
        world.turn(&[1, 2], &[]);
    }
    world.obey(1);
    let assignment = world.machine.round.assignments[&node(1)].clone();
    let signed = committed(1, &assignment, Digest::of(b"another"));
    let second = world.ask(1, Request::Commit(signed.clone()));
    assert!(matches!(second, Reply::Refused(r) if r.code == RefusalCode::AlreadyCommitted));
    let another = world.ask(2, Request::Commit(signed));
    assert!(matches!(another, Reply::Refused(r) if r.code == RefusalCode::Malformed));
}
