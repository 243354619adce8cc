//! A run that is driven by the coordinator's own machine: real payloads, merges and signatures, and
//! noise in the place of training.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_audit::{
    AuditOptions, AuditReport, Evidence, EvidenceError, Finding, Link, Status, Subject, audit_run,
};
use manyhands_chain_client::types::Stage as ChainStage;
use manyhands_gradient::aggregate::Member;
use manyhands_gradient::codec::{Endpoints, Update, UpdateCodec};
use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{
    Admitted, Layout, Merged, OuterState, Revoked, initial_theta, merge, vector,
};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::leaf::{RewardLeaf, merkle_root};
use manyhands_proto::message::{
    Assignment, Beat, Commitment, DeviceKind, Distances, Duty, EndState, Evaluation, Join,
    LossEffect, Merge, NumericClass, OpenedEnd, OpenedEnds, PROTOCOL_VERSION, Possession,
    ReplayEnd, ReplayEvidence, ReplayOutcome, Replayed, Reply, Request, Role, SignedCommitment,
    SignedReplay, Situation, Start, Verdict, Weighing,
};
use manyhands_proto::run_file::{DataSet, RunFile, RunSpec};
use manyhands_proto::tree::Openings;
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId, Tick, TokenCount};
use manyhands_rules::coordinator::{
    CodecCheck, CodecResult, Compared, Comparison, Contribution, Coordinator, Effect, Facts, Input,
    MergeOrder, MergeResult, Phase, Stage,
};
use manyhands_rules::evidence::{self, moments_groups, theta_groups};
use manyhands_rules::panel::Case;
use manyhands_rules::record::{Entropy, FaultKind, RoundRecord};
use manyhands_rules::run_id::run_id;

use crate::chain::{Commit, Fault, TestChain};

pub(crate) fn key(id: u8) -> NodeKey {
    NodeKey::from_seed([id; 32])
}

pub(crate) fn node(id: u8) -> NodeId {
    key(id).node_id()
}

/// A turn hands out what follows from the one before; no chain of these is longer.
const TURNS_ALIKE_MAX: u32 = 6;

/// The coordinator's key.
const OWNER: u8 = 200;

pub(crate) fn owner() -> NodeId {
    node(OWNER)
}

/// Blobs in memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Blobs(pub(crate) BTreeMap<Digest, Vec<u8>>);

impl Blobs {
    pub(crate) fn insert(&mut self, bytes: Vec<u8>) -> Digest {
        let digest = Digest::of(&bytes);
        self.0.insert(digest, bytes);
        digest
    }
}

impl Evidence for Blobs {
    async fn blob(&self, digest: Digest, bytes_max: u64) -> Result<Option<Vec<u8>>, EvidenceError> {
        let Some(bytes) = self.0.get(&digest) else { return Ok(None) };
        if bytes.len() as u64 > bytes_max {
            return Err(EvidenceError::TooLarge { digest, bytes_max, got: bytes.len() as u64 });
        }
        match Digest::of(bytes) {
            got if got == digest => Ok(Some(bytes.clone())),
            got => Err(EvidenceError::Changed { expected: digest, got }),
        }
    }
}

/// Eleven chunks, and sequences enough that the work of a round is some units.
pub(crate) fn run_file(extra: &str) -> RunFile {
    let text = format!(
        r#"
        [run]
        name = "tiny"
        rounds = 5
        workers_min = 2
        [model]
        vocabulary_size = 257
        hidden_size = 8
        layers = 1
        heads = 2
        key_value_heads = 1
        feed_forward_size = 8
        context_length = 8
        [training]
        steps_per_round = 16
        batch_sequences = 4096
        micro_batch_sequences = 2
        learning_rate = 1e-3
        [data]
        dataset = "data"
        [round]
        silence_ms = 3000000
        {extra}
        "#
    );
    RunFile::parse(&text).expect("a good file")
}

pub(crate) fn spec(extra: &str) -> RunSpec {
    let file = run_file(extra);
    let layout = Layout::of(&file.model).expect("a small model");
    let theta = vector::digest(&initial_theta(&layout, &file.model, file.run.seed));
    let manifest = Digest::of(b"manifest");
    let mut spec = file.resolve(DataSet {
        manifest,
        train_sequences: 10_000,
        held_out_sequences: 2,
        theta,
        theta_is_given: false,
    });
    spec.chain.price_per_work_unit = Balance(1_000_000);
    spec
}

/// A coordinator and the world around it.
pub(crate) struct World {
    machine: Coordinator,
    layout: Layout,
    now: Tick,
    nonce: u64,
    pub(crate) run: RunId,
    pub(crate) spec: RunSpec,
    /// Where the machine stood after the last turn, and for how many turns.
    stood: (Round, Phase),
    turns_alike: u32,
    thetas: BTreeMap<Digest, Vec<f32>>,
    errors: BTreeMap<u8, Vec<f32>>,
    /// Where rounds ended, and by their digests where verifiers ended.
    ends: BTreeMap<(NodeId, Round), Vec<f32>>,
    replayed: BTreeMap<Digest, Vec<f32>>,
    /// Rounds that a worker does nothing in.
    pub(crate) idle: BTreeSet<(u8, u32)>,
    /// Rounds whose payload a worker keeps to itself.
    pub(crate) unsent: BTreeSet<(u8, u32)>,
    /// Rounds of which a replay comes out elsewhere.
    pub(crate) cheats: BTreeSet<(u8, u32)>,
    /// Rounds of which every replay comes out somewhere else.
    pub(crate) unstable: BTreeSet<(u8, u32)>,
    /// Whose updates verifiers find to raise held-out loss.
    pub(crate) harms: BTreeSet<u8>,
    /// Verifiers that make their replays up.
    pub(crate) liars: BTreeSet<u8>,
    /// Verifiers that every worker tells where its round ended.
    pub(crate) accomplices: BTreeSet<u8>,
    /// Replays that a verifier ends before the world goes on.
    pub(crate) replays_at_once: usize,
    pub(crate) evidence: Blobs,
    pub(crate) chain: TestChain,
    /// None: the run settles on no chain.
    pub(crate) settles: bool,
    pub(crate) records: Vec<RoundRecord>,
}

impl World {
    pub(crate) fn new(spec: RunSpec) -> Self {
        let run = run_id(*TestChain::GENESIS.as_bytes(), owner(), spec.digest());
        Self::of(run, spec, true)
    }

    pub(crate) fn without_chain(mut spec: RunSpec) -> Self {
        spec.chain.kind = manyhands_proto::run_file::ChainKind::None;
        let run = run_id([0; 32], owner(), spec.digest());
        Self::of(run, spec, false)
    }

    fn of(run: RunId, spec: RunSpec, settles: bool) -> Self {
        let layout = Layout::of(&spec.model).expect("a small model");
        let theta = initial_theta(&layout, &spec.model, spec.run.seed);
        Self {
            machine: Coordinator::new(run, spec.clone(), Tick(0)),
            layout,
            now: Tick(0),
            nonce: 0,
            run,
            stood: (Round(0), Phase::Complete),
            turns_alike: 0,
            thetas: BTreeMap::from([(vector::digest(&theta), theta)]),
            errors: BTreeMap::new(),
            ends: BTreeMap::new(),
            replayed: BTreeMap::new(),
            idle: BTreeSet::new(),
            unsent: BTreeSet::new(),
            cheats: BTreeSet::new(),
            unstable: BTreeSet::new(),
            harms: BTreeSet::new(),
            liars: BTreeSet::new(),
            accomplices: BTreeSet::new(),
            replays_at_once: usize::MAX,
            evidence: Blobs::default(),
            chain: TestChain::new(run, owner(), &spec),
            settles,
            spec,
            records: Vec::new(),
        }
    }

    fn ask(&mut self, id: u8, request: Request) -> Reply {
        self.nonce += 1;
        let facts = Facts { stake: Balance(u128::MAX), observed: Vec::new() };
        let input = Input::Message { from: node(id), nonce: self.nonce, request, facts };
        self.machine.handle(self.now, input).expect("a message is answered")
    }

    pub(crate) fn join(&mut self, id: u8, role: Role) {
        let join = Join {
            role,
            version: PROTOCOL_VERSION,
            class: NumericClass {
                fingerprint: self.spec.verification.fingerprint,
                ..NumericClass::unknown(DeviceKind::Cpu)
            },
            memory_bytes: 1 << 40,
            tokens_per_second: 10_000_000,
            addresses: Vec::new(),
            head_rounds: (0..100).map(Round).collect(),
        };
        self.ask(id, Request::Join(join));
    }

    /// Runs to the end: workers 1 to `workers`, and verifier 9 if there is to be one.
    pub(crate) fn run_to_the_end(&mut self, workers: u8, verified: bool) {
        for id in 1..=workers {
            self.join(id, Role::Worker);
        }
        if verified {
            self.join(9, Role::Verifier);
        }
        let everybody: Vec<u8> = (1..=workers).chain(verified.then_some(9)).collect();
        self.go_on_to_the_end(&everybody);
    }

    pub(crate) fn run_with_three_verifiers(&mut self) {
        (1..=3).for_each(|id| self.join(id, Role::Worker));
        (7..=9).for_each(|id| self.join(id, Role::Verifier));
        self.go_on_to_the_end(&[1, 2, 3, 7, 8, 9]);
    }

    pub(crate) fn go_on_to_the_end(&mut self, everybody: &[u8]) {
        for _ in 0..500 {
            if self.machine.phase() == Phase::Complete {
                return;
            }
            self.turn(everybody);
        }
        panic!("the run ends, it is in {:?}", self.machine.phase());
    }

    pub(crate) fn is_training(&self) -> bool {
        matches!(self.machine.phase(), Phase::Training { .. })
    }

    pub(crate) fn turn(&mut self, everybody: &[u8]) {
        for &id in everybody {
            self.obey(id);
        }
        loop {
            let effects = self.machine.poll_effects();
            if effects.is_empty() {
                break;
            }
            for effect in effects {
                // What came of another may have changed it.
                if self.machine.is_wanted(&effect)
                    && let Some(input) = self.perform(effect)
                {
                    self.machine.handle(self.now, input);
                }
            }
        }
        self.now = self.now.after_ms(100);
        let stands = (self.machine.round(), self.machine.phase());
        self.turns_alike = if stands == self.stood { self.turns_alike + 1 } else { 0 };
        self.stood = stands;
        // Everybody has done what it will do: a deadline has to pass.
        if self.turns_alike >= TURNS_ALIKE_MAX
            && let Some((wake, _)) = self.machine.poll_timeout(self.now)
        {
            self.now = wake;
            self.machine.handle(self.now, Input::Timeout);
        }
    }

    fn obey(&mut self, id: u8) {
        let proof = Possession { round: self.machine.round(), proof: Digest::of(&[id]) };
        let beat = Request::Beat(Beat { theta: Some(proof), steps_done: 0, leaving: false });
        let Reply::Situation(Situation { duty, .. }) = self.ask(id, beat) else { return };
        match duty {
            Duty::Train(assignment) if !self.idle.contains(&(id, assignment.round.0)) => {
                let commitment = self.train(id, &assignment);
                let signed = SignedCommitment::sign(&key(id), self.run, commitment);
                self.ask(id, Request::Commit(signed));
            }
            Duty::Tasks(tasks) => {
                for replay in tasks.replays.into_iter().take(self.replays_at_once) {
                    let signed = self.replay(id, &replay.assignment);
                    let outcome = ReplayOutcome::Replayed(signed);
                    self.ask(id, Request::Verdict(Verdict { id: replay.id, outcome }));
                }
                if let Some(asked) = tasks.weigh {
                    let effect = |&(worker, _): &(NodeId, Digest)| {
                        let harms = self.harms.iter().any(|&id| node(id) == worker);
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
            // A dismissed worker stays away.
            Duty::Train(_)
            | Duty::Gathering { .. }
            | Duty::Upload(_)
            | Duty::Wait { .. }
            | Duty::Sync(_)
            | Duty::Complete { .. }
            | Duty::Dismissed(_) => {}
        }
    }

    /// Where the worker's round ended; of one that cheated, somewhere else.
    fn replay(&mut self, verifier: u8, assignment: &Assignment) -> SignedReplay {
        let Assignment { round, worker, theta: start, .. } = *assignment;
        let mut end = self.ends[&(worker, round)].clone();
        let cheats = |&(id, cheated): &(u8, u32)| (node(id), Round(cheated)) == (worker, round);
        let goes_on = |end: &mut Vec<f32>, start: &[f32], share: f32| {
            end.iter_mut().zip(start).for_each(|(end, start)| *end += share * (*end - start));
        };
        if self.liars.contains(&verifier) {
            end.iter_mut().filter(|value| **value != 0.0).for_each(|value| *value += 1e-3);
        } else if self.cheats.iter().any(cheats) && !self.accomplices.contains(&verifier) {
            goes_on(&mut end, &self.thetas[&start], 0.5);
        } else if self.unstable.iter().any(cheats) {
            goes_on(&mut end, &self.thetas[&start], f32::from(verifier));
        }
        let theta = vector::digest(&end);
        self.replayed.insert(theta, end);
        let moments = Digest::of(Moments8::zero(&self.layout).as_bytes());
        let end = ReplayEnd::At(EndState { theta, moments });
        let replayed = Replayed { round, worker, assignment: assignment.digest(), end };
        SignedReplay::sign(&key(verifier), self.run, replayed)
    }

    /// As the coordinator's shell does it.
    fn compare(&mut self, order: Comparison) -> Input {
        let Comparison { id, case, replay } = order;
        let (commitment, chunks) = (case.work.commitment.clone(), case.chunks.clone());
        let (verifier, start) = (replay.verifier, case.work.assignment.theta);
        let ReplayEnd::At(end) = replay.replayed.end else { panic!("replays end somewhere") };
        let EndState { theta, moments } = end;
        let claimed = &commitment.commitment;
        if (theta, moments) == (claimed.theta, claimed.moments) {
            let (distances, near) = (Distances::NONE, Vec::new());
            let result = Compared::Distances { distances, evidence: None, near };
            return Input::Compared { id, verifier, result };
        }
        let open = |vector: &[f32]| {
            Openings::of(&vector::to_bytes(vector), &theta_groups(&chunks)).expect("its groups")
        };
        let moments = Moments8::zero(&self.layout);
        let moments =
            Openings::of(moments.as_bytes(), &moments_groups(&chunks)).expect("its groups");
        let ended = |vector: &[f32]| OpenedEnd { theta: open(vector), moments: moments.clone() };
        let opened = OpenedEnds {
            start: open(&self.thetas[&start]),
            claimed: ended(&self.ends[&(commitment.worker, claimed.round)]),
            replayed: ended(&self.replayed[&theta]),
        };
        // Where the same bits are asked for, digests say it all.
        let opened = Some(opened).filter(|_| self.spec.verification.fingerprint.is_none());
        let shown = ReplayEvidence { commitment, replay, opened };
        let subject = evidence::Subject::of(&case, &self.layout, &self.spec.verification);
        let distances = evidence::distances(&shown, subject).expect("it leads where it should");
        let (blobs, terms) = (self.shown(&case), &self.spec.verification);
        let near = evidence::near(&case, &blobs, (&shown.replay, &shown), &self.layout, terms)
            .expect("all is there");
        let evidence = Some(self.evidence.insert(shown.to_bytes()));
        Input::Compared { id, verifier, result: Compared::Distances { distances, evidence, near } }
    }

    fn shown(&self, case: &Case) -> BTreeMap<Digest, ReplayEvidence> {
        let digests = case.judgements.iter().filter_map(|judgement| judgement.evidence);
        let blob = |digest: Digest| {
            let parsed = ReplayEvidence::parse(&self.evidence.0[&digest]);
            (digest, parsed.expect("it was made here"))
        };
        digests.map(blob).collect()
    }

    fn compare_judges(&self, case: &Case) -> Input {
        let blobs = self.shown(case);
        let terms = &self.spec.verification;
        let liars = evidence::false_ends(case, &blobs, &self.layout, terms);
        Input::JudgesCompared { commitment: case.work.commitment.digest(), liars }
    }

    /// Noise that depends on worker and round, encoded as an update.
    fn train(&mut self, id: u8, assignment: &Assignment) -> Commitment {
        let start = self.thetas[&assignment.theta].clone();
        let mut end = start.clone();
        for tensor in self.layout.tensors() {
            for index in tensor.range() {
                // Mixed well: updates that encode to the same payload would be one blob.
                let place = index as u32 ^ u32::from(id) << 16 ^ assignment.round.0 << 24;
                let seed = place.wrapping_mul(2_654_435_761);
                let noise = (seed ^ seed >> 15).wrapping_mul(2_246_822_519) >> 8;
                end[index] += (noise as f32 / 16_777_216.0 - 0.5) * 0.01;
            }
        }
        let zeros = || vec![0.0; self.layout.vector_len()];
        let mut error = match assignment.start {
            Start::Fresh => zeros(),
            Start::Head { .. } => self.errors.remove(&id).unwrap_or_else(zeros),
        };
        let codec = UpdateCodec::new(self.spec.codec.profile, self.spec.codec.error_decay)
            .expect("a decay below 1");
        let ends = Endpoints { start: &start, end: &end };
        let payload = codec.encode(&self.layout, &mut error, ends).expect("finite");
        let commitment = Commitment {
            round: assignment.round,
            first_sequence: assignment.first_sequence,
            payload: payload.digest(),
            payload_bytes: payload.as_bytes().len() as u64,
            theta: vector::digest(&end),
            moments: Digest::of(Moments8::zero(&self.layout).as_bytes()),
            error: vector::digest(&error),
            assignment: assignment.digest(),
            tokens: TokenCount(
                u64::from(assignment.sequences) * u64::from(self.spec.model.context_length),
            ),
            loss: 3.0,
        };
        self.errors.insert(id, error);
        self.ends.insert((node(id), assignment.round), end);
        self.evidence.insert(payload.into_bytes());
        commitment
    }

    fn perform(&mut self, effect: Effect) -> Option<Input> {
        Some(match effect {
            Effect::FetchPayload { round, worker, .. } => {
                if self.unsent.iter().any(|&(id, r)| (node(id), r) == (worker, round.0)) {
                    return None;
                }
                Input::PayloadArrived { round, worker, result: Ok(()) }
            }
            Effect::CheckCodec(CodecCheck { round, worker, .. }) => {
                Input::CodecChecked { round, worker, result: CodecResult::Passed }
            }
            Effect::CheckPossession { round, worker, proof, .. } => {
                Input::PossessionChecked { round, worker, proof, holds: true }
            }
            Effect::Compare(order) => self.compare(order),
            Effect::CompareJudges(case) => self.compare_judges(&case),
            Effect::ReportVerifier { end, case } => {
                self.chain.slashed_verifiers.push((end, case.digest()));
                Input::VerifierSettled { end, slashed: Balance(100) }
            }
            Effect::Merge(order) => self.merge(&order),
            Effect::CheckStakes { round, .. } => Input::StakesChecked { round, gone: Vec::new() },
            Effect::Anchor { round, stage, digest } => {
                let entropy = self.entropy(round, stage, digest);
                Input::Entropy { round, stage, entropy }
            }
            Effect::Settle(record) => {
                let round = record.round;
                self.records.push(*record);
                self.settle();
                Input::Settled { round }
            }
            Effect::ReportFault { round, worker, kind, evidence, .. } => {
                let kind = match kind {
                    FaultKind::Replay => 0,
                    FaultKind::Malformed | FaultKind::Codec => 1,
                    FaultKind::Withheld => 2,
                };
                self.chain
                    .faults
                    .insert((worker, round.0), Fault { kind, evidence, slashed: Some(50) });
                Input::FaultSettled { round, worker, slashed: Balance(50) }
            }
            Effect::CompleteRun { theta } => {
                self.chain.final_theta = Some(theta);
                Input::RunCompleted
            }
        })
    }

    fn entropy(&mut self, round: Round, stage: Stage, digest: Digest) -> Entropy {
        if !self.settles {
            let signature = key(OWNER).sign(digest.as_bytes());
            return Entropy { value: Digest::of(&signature), block: None };
        }
        let stage = match stage {
            Stage::Commitments => ChainStage::Commit,
            Stage::Admitted => ChainStage::Admitted,
        };
        let block = self.chain.anchor(round, stage, digest) + 2;
        Entropy { value: TestChain::hash_of(block), block: Some(block) }
    }

    fn updates(&self, contributions: &[Contribution]) -> Vec<(Contribution, Update)> {
        contributions
            .iter()
            .map(|contribution| {
                let bytes = &self.evidence.0[&contribution.payload];
                let update = Update::parse(bytes, &self.layout, self.spec.codec.profile);
                (*contribution, update.expect("a good payload"))
            })
            .collect()
    }

    fn merge(&mut self, order: &MergeOrder) -> Input {
        let own = self.updates(&order.contributions);
        let back: Vec<_> =
            order.revocations.iter().map(|back| self.updates(&back.contributions)).collect();
        let own = view(&own);
        let back: Vec<_> = back.iter().map(|updates| view(updates)).collect();
        let revoked: Vec<Revoked<'_>> = order
            .revocations
            .iter()
            .zip(&back)
            .map(|(order, members)| Revoked {
                workers: &order.workers,
                earlier: &order.earlier,
                from: Admitted { members, alpha: order.outer_learning_rate },
            })
            .collect();
        let alpha = order.outer_learning_rate;
        let own = Admitted { members: &own, alpha };
        let mut theta = self.thetas[&order.theta].clone();
        let mut residual = match order.residual {
            None => vec![0.0; theta.len()],
            Some(digest) => vector::floats(&self.evidence.0[&digest]),
        };
        let state = OuterState { theta: &mut theta, residual: &mut residual };
        let Merged { broadcast, flagged } =
            merge(&self.layout, &self.spec.aggregation, own, &revoked, state)
                .expect("updates merge");
        let broadcast = broadcast.into_bytes();
        let aggregate_bytes = broadcast.len() as u64;
        let aggregate = self.evidence.insert(broadcast);
        let residual = self.evidence.insert(vector::to_bytes(&residual));
        self.evidence.insert(vector::to_bytes(&theta));
        let digest = vector::digest(&theta);
        self.thetas.insert(digest, theta);
        let merge = Merge { aggregate, aggregate_bytes, residual, outer_learning_rate: alpha };
        Input::Merged { round: order.round, result: MergeResult { merge, theta: digest, flagged } }
    }

    /// Makes blobs and commits of the records, from the first to the last.
    pub(crate) fn settle(&mut self) {
        self.chain.commits.clear();
        let mut first = 0;
        for index in 0..self.records.len() {
            self.evidence.insert(self.records[index].canonical_bytes());
            if !self.records[index].earnings.is_empty() {
                let commit = self.commit(first..=index);
                self.chain.commits.insert(index as u32, commit);
                first = index + 1;
            }
        }
    }

    fn commit(&self, rounds: std::ops::RangeInclusive<usize>) -> Commit {
        let last = &self.records[*rounds.end()];
        let evidence = last.digest();
        let leaves: Vec<RewardLeaf> = last
            .earnings
            .iter()
            .map(|earning| RewardLeaf {
                genesis_hash: *TestChain::GENESIS.as_bytes(),
                run: *self.run.as_bytes(),
                round: last.round.0,
                worker: *earning.account.as_bytes(),
                work_units: self.records[rounds.clone()]
                    .iter()
                    .flat_map(|record| &record.earnings)
                    .filter(|other| other.account == earning.account)
                    .map(|other| other.work.0)
                    .sum(),
                cumulative_reward: earning.cumulative.0,
                evidence_digest: *evidence.as_bytes(),
            })
            .collect();
        let hashes: Vec<_> = leaves.iter().map(RewardLeaf::hash).collect();
        Commit {
            first_round: *rounds.start() as u32,
            last_round: last.round.0,
            root: merkle_root(&hashes),
            leaves: leaves.len() as u32,
            theta: last.theta_next,
            work: leaves.iter().map(|leaf| leaf.work_units).sum(),
            total: leaves.iter().map(|leaf| leaf.cumulative_reward).sum(),
            evidence,
            finalized: true,
        }
    }

    /// Pays an account what the newest leaf says.
    pub(crate) fn claim(&mut self, id: u8) {
        let last = self.records.last().expect("a record");
        let earning = last.earnings.iter().find(|earning| earning.account == node(id));
        let amount = earning.expect("it earned").cumulative.0;
        self.chain.claims.insert(node(id), amount);
        self.chain.escrow -= amount;
    }

    /// A coordinator that changes what it recorded, and then makes all digests, sets and commits anew,
    /// so that only what does not follow from the rest gives it away.
    pub(crate) fn rewrite(&mut self, round: usize, change: impl FnOnce(&mut RoundRecord)) {
        change(&mut self.records[round]);
        for index in round + 1..self.records.len() {
            self.records[index].previous = self.records[index - 1].digest();
        }
        self.settle();
    }

    pub(crate) fn audit_with(&self, options: &AuditOptions) -> AuditReport {
        let spec = self.spec.canonical_bytes();
        let chain = self.settles.then_some(&self.chain);
        let subject = Subject { run: self.run, spec: &spec, evidence: &self.evidence, chain };
        block_on(audit_run(subject, options, &mut |_| {})).expect("evidence and chain answer")
    }

    pub(crate) fn audit(&self) -> AuditReport {
        let newest_record = self.records.last().map(RoundRecord::digest);
        self.audit_with(&AuditOptions { newest_record, ..AuditOptions::default() })
    }
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(future)
}

fn view(updates: &[(Contribution, Update)]) -> Vec<Member<'_>> {
    updates
        .iter()
        .map(|(of, update)| Member {
            worker: of.worker,
            tokens: of.tokens,
            update,
            loss_effect: of.loss_effect,
        })
        .collect()
}

/// What the stories ask of a report.
pub(crate) trait Report {
    fn failures(&self) -> impl Iterator<Item = &Finding>;

    fn status(&self, link: Link) -> Status;

    /// Whether something of the link, in that round, is named as not checked.
    fn is_unchecked(&self, link: Link, round: Option<Round>) -> bool;
}

impl Report for AuditReport {
    fn failures(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.status == Status::Failed)
    }

    fn status(&self, link: Link) -> Status {
        let summary = self.links.iter().find(|summary| summary.link == link);
        summary.expect("a report has every link").status
    }

    fn is_unchecked(&self, link: Link, round: Option<Round>) -> bool {
        self.findings
            .iter()
            .any(|f| (f.link, f.round, f.status) == (link, round, Status::Unchecked))
    }
}
