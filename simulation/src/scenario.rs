//! What is simulated, said in a few words.

use std::collections::BTreeSet;

use manyhands_proto::Digest;
use manyhands_proto::run_file::{DataSet, RunFile, RunSpec};

use crate::outcome::Outcome;
use crate::world::World;

/// A worker or verifier that does not do what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adversary {
    /// Trains a part of its steps and invents the rest: a replay comes out elsewhere.
    SkipsSteps,
    /// Its payload does not follow from its committed states.
    ForgesPayload,
    /// Sends bytes that the codec cannot have written.
    SendsNonsense,
    /// Commits, and then uploads nothing.
    NeverUploads,
    /// Uploads, and then opens nothing.
    NeverOpens,
    /// Claims to have learnt from twice what it was assigned.
    ClaimsMoreTokens,
    /// Claims a θ that it does not hold.
    ClaimsOtherTheta,
    /// As a verifier, finds against everybody.
    AccusesEverybody,
    /// As a verifier, finds against nobody.
    PassesEverybody,
    /// As a verifier, says of everybody that it was shown nothing.
    WasShownNothing,
}

/// A scenario; [`Simulation::run`] plays it.
#[derive(Debug, Clone)]
pub struct Simulation {
    pub(crate) seed: u64,
    pub(crate) honest: u32,
    pub(crate) adversaries: Vec<Adversary>,
    pub(crate) verifiers: u32,
    pub(crate) lying_verifiers: Vec<Adversary>,
    /// Of a hundred messages, how many are lost.
    pub(crate) loss_percent: u64,
    /// Workers that crash once, in the round of that number.
    pub(crate) crashes: Vec<u32>,
    /// The coordinator is killed and restarted from its journal before every so many inputs.
    pub(crate) coordinator_restarts_every: Option<u64>,
    /// Training sequences after which no two machines end at the same place.
    pub(crate) unstable: BTreeSet<u64>,
    /// Workers that come in the middle.
    pub(crate) latecomers: u32,
    pub(crate) spec: RunSpec,
}

impl Simulation {
    /// One honest worker, one verifier, three rounds, no trouble.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            honest: 1,
            adversaries: Vec::new(),
            verifiers: 1,
            lying_verifiers: Vec::new(),
            loss_percent: 0,
            crashes: Vec::new(),
            coordinator_restarts_every: None,
            unstable: BTreeSet::new(),
            latecomers: 0,
            spec: spec(seed),
        }
    }

    /// Honest workers that are there from the start.
    #[must_use]
    pub fn workers(mut self, honest: u32) -> Self {
        self.honest = honest;
        self
    }

    #[must_use]
    pub fn adversary(mut self, adversary: Adversary) -> Self {
        self.adversaries.push(adversary);
        self
    }

    /// Honest verifiers.
    #[must_use]
    pub fn verifiers(mut self, verifiers: u32) -> Self {
        self.verifiers = verifiers;
        self
    }

    #[must_use]
    pub fn lying_verifier(mut self, adversary: Adversary) -> Self {
        self.lying_verifiers.push(adversary);
        self
    }

    #[must_use]
    pub fn rounds(mut self, rounds: u32) -> Self {
        self.spec.run.rounds = rounds;
        self
    }

    #[must_use]
    pub fn losing_percent(mut self, percent: u64) -> Self {
        self.loss_percent = percent;
        self
    }

    /// The first honest worker crashes in that round, and comes back with what its disk holds.
    #[must_use]
    pub fn crash_in_round(mut self, round: u32) -> Self {
        self.crashes.push(round);
        self
    }

    #[must_use]
    pub fn restarting_coordinator_every(mut self, inputs: u64) -> Self {
        self.coordinator_restarts_every = Some(inputs);
        self
    }

    /// A training sequence after which no two machines end at the same place.
    #[must_use]
    pub fn unstable_sequence(mut self, number: u64) -> Self {
        self.unstable.insert(number);
        self
    }

    #[must_use]
    pub fn latecomers(mut self, workers: u32) -> Self {
        self.latecomers = workers;
        self
    }

    /// Changes the run's terms.
    #[must_use]
    pub fn terms(mut self, change: impl FnOnce(&mut RunSpec)) -> Self {
        change(&mut self.spec);
        self
    }

    /// The run's terms.
    pub fn spec(&self) -> &RunSpec {
        &self.spec
    }

    /// Plays it with a first round that waits for the honest only: who is refused at the door never
    /// counts as there.
    pub fn run_without_waiting_for_adversaries(self) -> Outcome {
        let workers = self.honest;
        self.play(workers)
    }

    /// Plays the scenario to its end.
    ///
    /// # Panics
    /// When the run does not end in a simulated day: somebody waits for something that never comes.
    pub fn run(self) -> Outcome {
        let workers = self.honest + self.adversaries.len() as u32;
        self.play(workers)
    }

    fn play(mut self, workers_min: u32) -> Outcome {
        self.spec.run.workers_min = workers_min;
        let verifiers = self.verifiers + self.lying_verifiers.len() as u32;
        self.spec.verification.verifiers_min = verifiers;
        World::new(self).run()
    }
}

/// A tiny model, and deadlines of seconds.
fn spec(seed: u64) -> RunSpec {
    let text = r#"
        [run]
        name = "simulated"
        rounds = 3
        [model]
        vocabulary_size = 512
        hidden_size = 32
        layers = 2
        heads = 4
        key_value_heads = 2
        feed_forward_size = 64
        context_length = 32
        [training]
        steps_per_round = 10
        batch_sequences = 8
        micro_batch_sequences = 4
        learning_rate = 1e-3
        [data]
        dataset = "made up"
        [round]
        commit_ms = 20000
        upload_ms = 5000
        check_ms = 20000
        sync_ms = 5000
        silence_ms = 6000
        [verification]
        verifiers_min = 1
        probation_checks = 2
    "#;
    let mut spec =
        RunFile::parse(text).expect("the scenario's own file is good").resolve(DataSet {
            manifest: Digest::of(b"made up"),
            train_sequences: 100_000,
            held_out_sequences: 8,
            theta: Digest::of(b"theta 0"),
            theta_is_given: true,
        });
    spec.run.seed = seed;
    spec
}
