//! A simulated worker or verifier: the real machine, and a device, a disk and manners made up here.

use std::collections::BTreeSet;

use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    Assignment, Commitment, DeviceKind, EndState, Join, NumericClass, PROTOCOL_VERSION, Possession,
    ReplayEnd, Replayed, Role, SignedCommitment, SignedReplay,
};
use manyhands_proto::{Digest, NodeId, Round, RunId, TokenCount};
use manyhands_rules::worker::{Identity, Trained, Worker};

use crate::scenario::Adversary;

pub(crate) struct Node {
    pub(crate) key: NodeKey,
    pub(crate) role: Role,
    pub(crate) adversary: Option<Adversary>,
    pub(crate) tokens_per_second: u64,
    pub(crate) machine: Worker,
    pub(crate) alive: bool,
    /// Counts restarts: what an earlier life started is of no use to this one.
    pub(crate) life: u32,
    /// On disk: the work of the last two rounds.
    pub(crate) trained: Vec<Trained>,
    /// On disk: rounds whose evidence may be read.
    pub(crate) published: BTreeSet<Round>,
}

impl Node {
    pub(crate) fn new(
        seed: u8,
        role: Role,
        adversary: Option<Adversary>,
        tokens_per_second: u64,
    ) -> Self {
        let key = NodeKey::from_seed([seed; 32]);
        let machine = machine(&key, role, tokens_per_second, &[]);
        let (trained, published) = (Vec::new(), BTreeSet::new());
        Self {
            key,
            role,
            adversary,
            tokens_per_second,
            machine,
            alive: true,
            life: 0,
            trained,
            published,
        }
    }

    pub(crate) fn id(&self) -> NodeId {
        self.key.node_id()
    }

    /// `kill -9` and a new start: the machine knows only what the disk holds.
    pub(crate) fn restart(&mut self) {
        self.life += 1;
        self.alive = true;
        self.machine = machine(&self.key, self.role, self.tokens_per_second, &self.trained);
    }

    /// How long the work of an assignment takes.
    pub(crate) fn train_ms(&self, tokens: u64) -> u64 {
        1 + tokens * 1_000 / self.tokens_per_second.max(1)
    }

    /// The work of a round, written to disk.
    pub(crate) fn train(
        &mut self,
        run: RunId,
        assignment: Assignment,
        context_length: u32,
    ) -> Trained {
        let blob = |what: &str| {
            let text = format!("{what} {} {}", assignment.round, self.id());
            Digest::of(text.as_bytes())
        };
        let assigned = u64::from(assignment.sequences) * u64::from(context_length);
        let tokens = match self.adversary {
            Some(Adversary::ClaimsMoreTokens) => 2 * assigned,
            _ => assigned,
        };
        let commitment = Commitment {
            round: assignment.round,
            first_sequence: assignment.first_sequence,
            payload: blob("payload"),
            payload_bytes: 1_000,
            theta: blob("theta"),
            moments: blob("moments"),
            error: blob("error"),
            assignment: assignment.digest(),
            tokens: TokenCount(tokens),
            loss: 3.0,
        };
        let commitment = SignedCommitment::sign(&self.key, run, commitment);
        let trained = Trained { assignment, commitment };
        self.trained.push(trained.clone());
        if self.trained.len() > 2 {
            self.trained.remove(0);
        }
        trained
    }

    /// Repeats another's round.
    pub(crate) fn replay(&self, run: RunId, assignment: &Assignment) -> SignedReplay {
        let (round, worker) = (assignment.round, assignment.worker);
        let blob = Digest::of(format!("replay {round} of {worker} by {}", self.id()).as_bytes());
        let end = match self.adversary {
            Some(Adversary::WasShownNothing) => ReplayEnd::Withheld("nothing".to_owned()),
            Some(_) | None => ReplayEnd::At(EndState { theta: blob, moments: blob }),
        };
        let replayed = Replayed { round, worker, assignment: assignment.digest(), end };
        SignedReplay::sign(&self.key, run, replayed)
    }

    pub(crate) fn possession(&self, round: Round, theta: Digest) -> Possession {
        let theta = match self.adversary {
            Some(Adversary::ClaimsOtherTheta) => Digest::of(b"another theta"),
            _ => theta,
        };
        Possession::prove(round, self.id(), theta.as_bytes())
    }

    /// Whether the evidence of a round can be read from this node now.
    pub(crate) fn serves(&self, round: Round) -> bool {
        self.alive && self.published.contains(&round)
    }
}

/// How far `worker` ended from where `verifier` did.
pub(crate) fn distance(verifier: &Node, worker: &Node) -> f64 {
    // Another order of summation.
    const HONEST: f64 = 1e-5;
    match (verifier.adversary, worker.adversary) {
        // It made its end up.
        (Some(Adversary::AccusesEverybody), _) => 1.4,
        // Whoever cheats told it where it ended.
        (Some(Adversary::PassesEverybody), _) => HONEST,
        (_, Some(Adversary::SkipsSteps)) => 0.2,
        _ => HONEST,
    }
}

fn machine(key: &NodeKey, role: Role, tokens_per_second: u64, trained: &[Trained]) -> Worker {
    let join = Join {
        role,
        version: PROTOCOL_VERSION,
        class: NumericClass::unknown(DeviceKind::Cpu),
        memory_bytes: 1 << 40,
        tokens_per_second,
        addresses: Vec::new(),
        head_rounds: trained.iter().map(|trained| trained.assignment.round).collect(),
    };
    Worker::new(key.node_id(), Identity { join, beat_ms: 500 }, trained.last().cloned())
}
