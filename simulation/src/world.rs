//! The world around the machines: an ordered queue of what happens when.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_proto::message::{
    Distances, Evaluation, LossEffect, Merge, Possession, ReplayEnd, ReplayOutcome, Reply, Request,
    Role, Start, Verdict, Weighing,
};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId, Tick};
use manyhands_rules::coordinator::{
    CodecResult, Compared, Comparison, Coordinator, Effect, Facts, Input, MergeResult, Phase,
};
use manyhands_rules::panel::{Judged, Judgement};
use manyhands_rules::quarantine::step_sequences;
use manyhands_rules::record::{CodecFault, Entropy, RoundRecord};
use manyhands_rules::worker::{self, Exit};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::node::{Node, distance};
use crate::outcome::Outcome;
use crate::scenario::{Adversary, Simulation};

const RUN: RunId = RunId::new([1; 32]);
const DAY_MS: u64 = 86_400_000;
const BLOCK_MS: u64 = 1_000;

/// What happens at a moment.
enum Event {
    /// A node may have something to say.
    Wake(usize),
    Request {
        node: usize,
        life: u32,
        nonce: u64,
        request: Request,
    },
    Reply {
        node: usize,
        life: u32,
        request: Request,
        reply: Option<Reply>,
    },
    Worker {
        node: usize,
        life: u32,
        input: worker::Input,
    },
    /// What the coordinator wanted is done.
    Done {
        effect: Box<Effect>,
        input: Input,
    },
    CoordinatorTimeout,
    Arrive(usize),
    Return(usize),
}

pub(crate) struct World {
    scenario: Simulation,
    random: ChaCha12Rng,
    now: Tick,
    queue: BTreeMap<(Tick, u64), Event>,
    queued: u64,
    coordinator: Coordinator,
    nodes: Vec<Node>,
    nonce: u64,
    inputs: u64,
    journal: Vec<u8>,
    records: Vec<RoundRecord>,
    reported: Vec<(Round, NodeId)>,
    unmasked: BTreeSet<NodeId>,
    /// Rounds that no two machines repeat.
    unstable: BTreeSet<(Round, NodeId)>,
    exits: BTreeMap<NodeId, Exit>,
    thetas: BTreeMap<Round, BTreeSet<Digest>>,
}

impl World {
    pub(crate) fn new(scenario: Simulation) -> Self {
        let mut random = ChaCha12Rng::seed_from_u64(scenario.seed);
        let adversaries =
            scenario.adversaries.iter().map(|&adversary| (Role::Worker, Some(adversary)));
        let honest = (0..scenario.honest + scenario.latecomers).map(|_| (Role::Worker, None));
        let verifiers = (0..scenario.verifiers).map(|_| (Role::Verifier, None));
        let liars = scenario.lying_verifiers.iter().map(|&liar| (Role::Verifier, Some(liar)));
        let nodes: Vec<Node> = honest
            .chain(adversaries)
            .chain(verifiers)
            .chain(liars)
            .zip(1..)
            .map(|((role, adversary), seed)| {
                // From a laptop to a server.
                let tokens_per_second = 500 + random.next_u64() % 4_500;
                Node::new(seed, role, adversary, tokens_per_second)
            })
            .collect();
        let coordinator = Coordinator::new(RUN, scenario.spec.clone(), Tick(0));
        let mut world = Self {
            random,
            now: Tick(0),
            queue: BTreeMap::new(),
            queued: 0,
            coordinator,
            nodes,
            nonce: 0,
            inputs: 0,
            journal: Vec::new(),
            records: Vec::new(),
            reported: Vec::new(),
            unmasked: BTreeSet::new(),
            unstable: BTreeSet::new(),
            exits: BTreeMap::new(),
            thetas: BTreeMap::new(),
            scenario,
        };
        for node in 0..world.nodes.len() {
            let late = (world.scenario.honest..world.scenario.honest + world.scenario.latecomers)
                .contains(&(node as u32));
            // Latecomers arrive when the run is well under way.
            let arrives = if late { 15_000 } else { world.random_ms(1_000) };
            world.after(arrives, Event::Arrive(node));
        }
        world
    }

    pub(crate) fn run(mut self) -> Outcome {
        while !self.is_over() {
            let ((tick, _), event) =
                self.queue.pop_first().expect("somebody always has a next beat");
            self.now = tick;
            assert!(tick.0 < DAY_MS, "the run hangs: {:#?}", self.coordinator.status(tick));
            self.happen(event);
        }
        let ids = |adversarial: bool| {
            let workers = self.nodes.iter().filter(|node| node.role == Role::Worker);
            workers.filter(|node| node.adversary.is_some() == adversarial).map(Node::id).collect()
        };
        Outcome {
            verifiers: self
                .nodes
                .iter()
                .filter(|node| node.role == Role::Verifier)
                .map(Node::id)
                .collect(),
            honest: ids(false),
            adversaries: ids(true),
            status: self.coordinator.status(self.now),
            records: self.records,
            exits: self.exits,
            thetas: self.thetas,
            reported: self.reported,
            unmasked: self.unmasked,
            ended_at: self.now,
            journal: self.journal,
        }
    }

    fn is_over(&self) -> bool {
        let all_gone = self.nodes.iter().all(|node| self.exits.contains_key(&node.id()));
        self.coordinator.phase() == Phase::Complete && all_gone
    }

    fn after(&mut self, delay_ms: u64, event: Event) {
        self.queued += 1;
        self.queue.insert((self.now.after_ms(delay_ms), self.queued), event);
    }

    fn random_ms(&mut self, below: u64) -> u64 {
        self.random.next_u64() % below
    }

    /// One way over the network: 10 to 90 ms, or never.
    fn delay(&mut self) -> Option<u64> {
        let lost = self.random_ms(100) < self.scenario.loss_percent;
        let delay = 10 + self.random_ms(80);
        (!lost).then_some(delay)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive(node) => self.after(0, Event::Wake(node)),
            Event::Return(node) => {
                self.nodes[node].restart();
                self.after(0, Event::Wake(node));
            }
            Event::Wake(node) => self.wake(node),
            Event::Request { node, life, nonce, request } => {
                let from = self.nodes[node].id();
                let facts = Facts { stake: Balance(u128::MAX), observed: Vec::new() };
                let input = Input::Message { from, nonce, request: request.clone(), facts };
                let reply = self.tell_coordinator(input);
                let delay = self.delay();
                // The asker gives up after a while when the answer is lost.
                let (delay, reply) = match delay {
                    Some(delay) => (delay, reply),
                    None => (2_000, None),
                };
                self.after(delay, Event::Reply { node, life, request, reply });
            }
            Event::Reply { node, life, request, reply } => {
                let now = self.now;
                if self.is_living(node, life) {
                    let machine = &mut self.nodes[node].machine;
                    match reply {
                        Some(reply) => machine.handle_reply(now, &request, reply),
                        None => machine.handle_no_reply(now),
                    }
                    self.after(0, Event::Wake(node));
                }
            }
            Event::Worker { node, life, input } => {
                let now = self.now;
                if self.is_living(node, life) {
                    self.nodes[node].machine.handle(now, input);
                    self.after(0, Event::Wake(node));
                }
            }
            Event::Done { effect, input } => {
                // As the real driver does: what happened meanwhile may have changed what is to be done.
                if self.coordinator.is_wanted(&effect) {
                    self.tell_coordinator(input);
                }
            }
            Event::CoordinatorTimeout => {
                self.tell_coordinator(Input::Timeout);
            }
        }
    }

    fn is_living(&self, node: usize, life: u32) -> bool {
        self.nodes[node].alive && self.nodes[node].life == life
    }

    /// Lets a node say one thing and start what it wants started.
    fn wake(&mut self, index: usize) {
        if !self.nodes[index].alive || self.exits.contains_key(&self.nodes[index].id()) {
            return;
        }
        for effect in self.nodes[index].machine.poll_effects() {
            self.start(index, effect);
        }
        let now = self.now;
        let life = self.nodes[index].life;
        match self.nodes[index].machine.poll_request(now) {
            Some(request) => {
                self.nonce += 1;
                let nonce = self.nonce;
                match self.delay() {
                    Some(delay) => {
                        self.after(delay, Event::Request { node: index, life, nonce, request })
                    }
                    None => {
                        self.after(2_000, Event::Reply { node: index, life, request, reply: None })
                    }
                }
            }
            None => {
                if let Some(tick) = self.nodes[index].machine.poll_timeout() {
                    self.after(tick.since(now).max(1), Event::Wake(index));
                }
            }
        }
    }

    fn start(&mut self, index: usize, effect: worker::Effect) {
        let life = self.nodes[index].life;
        let context_length = self.scenario.spec.model.context_length;
        let (delay, input) = match effect {
            worker::Effect::Sync(sync) => {
                let possession = self.nodes[index].possession(sync.round, sync.theta);
                if self.nodes[index].adversary.is_none() {
                    self.thetas.entry(sync.round).or_default().insert(sync.theta);
                }
                (200, worker::Input::Synced(possession))
            }
            worker::Effect::Train(assignment) => {
                let tokens = u64::from(assignment.sequences) * u64::from(context_length);
                let delay = self.nodes[index].train_ms(tokens);
                if index == 0 && self.scenario.crashes.contains(&assignment.round.0) {
                    self.scenario.crashes.retain(|round| *round != assignment.round.0);
                    self.nodes[index].alive = false;
                    self.after(delay / 2 + 10_000, Event::Return(index));
                    return;
                }
                let spec = &self.scenario.spec;
                let mut sequences =
                    (0..assignment.steps).flat_map(|step| step_sequences(spec, &assignment, step));
                if sequences.any(|number| self.scenario.unstable.contains(&number)) {
                    self.unstable.insert((assignment.round, assignment.worker));
                }
                let trained = self.nodes[index].train(RUN, assignment, context_length);
                (delay, worker::Input::Trained(trained))
            }
            worker::Effect::Publish { round, .. } => {
                self.nodes[index].published.insert(round);
                return;
            }
            worker::Effect::Replay(task) => {
                let assignment = &task.assignment;
                let tokens = u64::from(assignment.sequences) * u64::from(context_length);
                let worker = self.nodes.iter().find(|node| node.id() == assignment.worker);
                let worker = worker.expect("tasks are about nodes that exist");
                let head = match assignment.start {
                    Start::Fresh => None,
                    Start::Head { round, .. } => Some(round),
                };
                let outcome = if head.is_none_or(|head| worker.serves(head)) {
                    ReplayOutcome::Replayed(self.nodes[index].replay(RUN, assignment))
                } else {
                    ReplayOutcome::Failed("the worker cannot be reached".to_owned())
                };
                let verdict = Verdict { id: task.id, outcome };
                (self.nodes[index].train_ms(tokens), worker::Input::Replayed(verdict))
            }
            worker::Effect::Evaluate(task) => {
                let evaluation = Evaluation { round: task.round, theta: task.theta, loss: 4.0 };
                (100, worker::Input::Evaluated(evaluation))
            }
            worker::Effect::Weigh(task) => {
                let effects =
                    task.updates.iter().map(|(worker, _)| (*worker, LossEffect(-1_000))).collect();
                (100, worker::Input::Weighed(Weighing { round: task.round, effects }))
            }
            worker::Effect::Abort => (50, worker::Input::Failed),
            worker::Effect::Exit(exit) => {
                self.exits.insert(self.nodes[index].id(), exit);
                return;
            }
        };
        self.after(delay, Event::Worker { node: index, life, input });
    }

    fn tell_coordinator(&mut self, input: Input) -> Option<Reply> {
        self.inputs += 1;
        if self.scenario.coordinator_restarts_every.is_some_and(|n| self.inputs.is_multiple_of(n)) {
            // Killed: what was asked of the world and not answered is asked again.
            let snapshot = serde_json::to_vec(&self.coordinator).expect("a machine serialises");
            self.coordinator = serde_json::from_slice(&snapshot).expect("and comes back");
        }
        let line = serde_json::to_vec(&(self.now, &input)).expect("an input serialises");
        self.journal.extend(line);
        let reply = self.coordinator.handle(self.now, input);
        for effect in self.coordinator.poll_effects() {
            self.perform(effect);
        }
        if let Some((tick, _)) = self.coordinator.poll_timeout(self.now) {
            self.after(tick.since(self.now), Event::CoordinatorTimeout);
        }
        reply
    }

    fn node(&self, id: NodeId) -> &Node {
        let node = self.nodes.iter().find(|node| node.id() == id);
        node.expect("the coordinator knows only nodes that joined")
    }

    fn perform(&mut self, effect: Effect) {
        let wanted = Box::new(effect.clone());
        let (delay, input) = match effect {
            Effect::FetchPayload { round, worker, .. } => {
                let node = self.node(worker);
                let result = match node.adversary {
                    Some(Adversary::NeverUploads) => return,
                    Some(Adversary::SendsNonsense) => Err("not an update".to_owned()),
                    Some(_) | None => Ok(()),
                };
                // It keeps trying while the worker is away.
                let delay = if node.serves(round) { 300 } else { 3_000 };
                (delay, Input::PayloadArrived { round, worker, result })
            }
            Effect::CheckCodec(check) => {
                let result = match self.node(check.worker).adversary {
                    Some(Adversary::NeverOpens) => return,
                    Some(Adversary::ForgesPayload) => {
                        let reason = "chunk 3 differs".to_owned();
                        CodecResult::Fault(CodecFault { reason, evidence: Digest::of(b"chunk 3") })
                    }
                    Some(_) | None => CodecResult::Passed,
                };
                (200, Input::CodecChecked { round: check.round, worker: check.worker, result })
            }
            Effect::Compare(Comparison { id, case, replay }) => {
                let (worker, verifier) = (self.node(case.worker()), self.node(replay.verifier));
                let is_unstable = self.unstable.contains(&(case.round(), case.worker()));
                let result = if worker.adversary == Some(Adversary::NeverOpens) {
                    Compared::Withheld("its end was not opened".to_owned())
                } else if let ReplayEnd::Withheld(reason) = &replay.replayed.end {
                    Compared::Withheld(reason.clone())
                } else {
                    let delta = if is_unstable { 0.3 } else { distance(verifier, worker) };
                    let distances = Distances { delta, first_moment: delta, second_moment: delta };
                    let lies = |judge: &Node| judge.adversary == Some(Adversary::AccusesEverybody);
                    let faults =
                        case.judgements.iter().filter(|it| matches!(it.verdict, Judged::Fault(_)));
                    let judges = faults.map(Judgement::verifier);
                    let near = judges
                        .filter(|judge| !is_unstable && !lies(verifier) && !lies(self.node(*judge)))
                        .collect();
                    let evidence = Some(Digest::of(&replay.signature));
                    Compared::Distances { distances, evidence, near }
                };
                (400, Input::Compared { id, verifier: replay.verifier, result })
            }
            Effect::CompareJudges(case) => {
                let judges = case.judgements.iter().map(Judgement::verifier);
                let worker = self.node(case.worker());
                let lies = |judge: &NodeId| match self.node(*judge).adversary {
                    Some(Adversary::AccusesEverybody) => true,
                    Some(Adversary::PassesEverybody) => worker.adversary.is_some(),
                    Some(_) | None => false,
                };
                let (commitment, liars) =
                    (case.work.commitment.digest(), judges.filter(lies).collect());
                (300, Input::JudgesCompared { commitment, liars })
            }
            Effect::ReportVerifier { end, .. } => {
                self.unmasked.insert(end.verifier);
                (10 * BLOCK_MS, Input::VerifierSettled { end, slashed: Balance(1) })
            }
            Effect::CheckPossession { round, worker, theta, proof } => {
                let expected = Possession::prove(round, worker, theta.as_bytes());
                let holds = expected.proof == proof;
                (50, Input::PossessionChecked { round, worker, proof, holds })
            }
            Effect::CheckStakes { round, .. } => {
                (100, Input::StakesChecked { round, gone: Vec::new() })
            }
            Effect::Merge(order) => {
                let bytes = serde_json::to_vec(&order).expect("an order serialises");
                let (round, theta) = (order.round, Digest::of(&bytes));
                let merge = Merge {
                    aggregate: theta,
                    aggregate_bytes: 100,
                    residual: theta,
                    outer_learning_rate: order.outer_learning_rate,
                };
                (
                    500,
                    Input::Merged {
                        round,
                        result: MergeResult { merge, theta, flagged: Vec::new() },
                    },
                )
            }
            Effect::Anchor { round, stage, digest } => {
                let block = Some((self.now.0 / BLOCK_MS) as u32 + 3);
                let entropy =
                    Entropy { value: Digest::derive("simulated block", digest.as_bytes()), block };
                (3 * BLOCK_MS, Input::Entropy { round, stage, entropy })
            }
            Effect::Settle(record) => {
                let round = record.round;
                if self.records.iter().all(|known| known.round != round) {
                    self.records.push(*record);
                }
                (2 * BLOCK_MS, Input::Settled { round })
            }
            Effect::ReportFault { round, worker, .. } => {
                if !self.reported.contains(&(round, worker)) {
                    self.reported.push((round, worker));
                }
                (10 * BLOCK_MS, Input::FaultSettled { round, worker, slashed: Balance(1) })
            }
            Effect::CompleteRun { .. } => (BLOCK_MS, Input::RunCompleted),
        };
        self.after(delay, Event::Done { effect: wanted, input });
    }
}
