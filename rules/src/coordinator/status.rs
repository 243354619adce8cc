//! The run as people and programs see it: one value that log, page and command line render.

use std::collections::{BTreeMap, VecDeque};

use manyhands_proto::message::Role;
use manyhands_proto::message::limits::STATUS_BYTES_MAX;
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId, Tick, WorkUnits};
use serde::{Deserialize, Serialize};

use super::Coordinator;
use super::round::OpenRound;
use crate::record::{Check, Outcome, RoundRecord, WorkerResult};

/// Rounds that the status lists; older ones are in the records.
const ROUNDS_MAX: usize = 512;
/// Happenings that the status lists.
const EVENTS_MAX: usize = 200;
/// Checks that the status lists.
const CHECKS_MAX: usize = 100;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub run: RunId,
    pub name: String,
    pub round: Round,
    pub rounds: u32,
    pub phase: String,
    /// How long the phase has lasted.
    pub phase_ms: u64,
    pub theta: Digest,
    pub members: Vec<MemberStatus>,
    /// Oldest first.
    pub history: Vec<RoundStatus>,
    pub faults: Vec<FaultStatus>,
    /// What codec checks and replays found, oldest first.
    pub checks: Vec<Check>,
    /// Oldest first.
    pub events: Vec<Event>,
    pub records_unsettled: usize,
    pub verified: bool,
}

impl Status {
    /// As it travels in a message, which has a limit: the oldest rounds are left out if they must be.
    pub fn to_json(&self) -> Vec<u8> {
        let json = |status: &Self| serde_json::to_vec(status).expect("plain structs serialise");
        let mut bytes = json(self);
        let mut shorter = self.clone();
        while bytes.len() > STATUS_BYTES_MAX && !shorter.history.is_empty() {
            shorter.history.drain(..shorter.history.len().div_ceil(2));
            bytes = json(&shorter);
        }
        bytes
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberStatus {
    pub node: NodeId,
    pub role: Role,
    pub class: String,
    pub present: bool,
    pub tokens_per_second: u64,
    pub credibility: u32,
    pub on_probation: bool,
    pub theta_round: Option<Round>,
    pub steps_done: u32,
    pub steps: u32,
    pub rounds_admitted: u32,
    pub work: WorkUnits,
    pub earned: Balance,
    pub barred: Option<String>,
}

/// A round that has ended, or ended void.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundStatus {
    pub round: Round,
    pub admitted: usize,
    pub results: Vec<(NodeId, Outcome)>,
    pub tokens: u64,
    /// Mean of the admitted workers' training losses, as they claimed them.
    pub train_loss: Option<f64>,
    /// Loss of θ_t, the parameters that the round started from.
    pub held_out_loss: Option<f64>,
    pub payload_bytes: u64,
    pub aggregate_bytes: u64,
    pub duration_ms: u64,
    pub train_ms: u64,
    /// How long the first to commit waited for the last, or for the deadline.
    pub waiting_ms_max: u64,
    pub theta_next: Digest,
}

impl RoundStatus {
    /// The share of the round that the worker which waited longest for others spent so.
    pub fn waiting_share_max(&self) -> f64 {
        self.waiting_ms_max as f64 / self.duration_ms.max(1) as f64
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FaultStatus {
    pub round: Round,
    /// Or the verifier that replayed a worker's round.
    pub worker: NodeId,
    pub reason: String,
    /// None while the chain has not dealt with it.
    pub slashed: Option<Balance>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub tick: Tick,
    pub kind: EventKind,
    pub text: String,
}

/// What a happening is about, for whoever shows only some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// Somebody came or went.
    Member,
    /// A round was unusual.
    Round,
    /// A replay was drawn.
    Audit,
    Fault,
    Slash,
    /// The run as a whole.
    Run,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct History {
    rounds: VecDeque<RoundStatus>,
    losses: BTreeMap<Round, f64>,
    faults: Vec<FaultStatus>,
    checks: VecDeque<Check>,
    events: VecDeque<Event>,
}

impl History {
    pub(super) fn note(&mut self, tick: Tick, kind: EventKind, text: String) {
        self.events.push_back(Event { tick, kind, text });
        while self.events.len() > EVENTS_MAX {
            self.events.pop_front();
        }
    }

    pub(super) fn note_loss(&mut self, round: Round, loss: f64) {
        self.losses.insert(round, loss);
        while self.losses.len() > ROUNDS_MAX + 2 {
            self.losses.pop_first();
        }
    }

    pub(super) fn note_outcome(&mut self, now: Tick, round: Round, result: &WorkerResult) {
        if result.outcome != Outcome::Admitted {
            let (worker, why) = (result.worker.short(), &result.outcome);
            let text = format!("round {round}: {worker} is not merged: {why}");
            self.note(now, EventKind::Round, text);
        }
    }

    pub(super) fn note_slash(&mut self, now: Tick, round: Round, worker: NodeId, slashed: Balance) {
        self.note(
            now,
            EventKind::Slash,
            format!("{} was slashed {slashed} for round {round}", worker.short()),
        );
        let fault = self.faults.iter_mut().find(|f| f.round == round && f.worker == worker);
        if let Some(fault) = fault {
            fault.slashed = Some(slashed);
        }
    }

    pub(super) fn note_checks(&mut self, checks: &[Check]) {
        self.checks.extend(checks.iter().cloned());
        let too_many = self.checks.len().saturating_sub(CHECKS_MAX);
        self.checks.drain(..too_many);
    }

    pub(super) fn note_fault(&mut self, round: Round, worker: NodeId, reason: String) {
        self.faults.push(FaultStatus { round, worker, reason, slashed: None });
    }

    pub(super) fn note_round(&mut self, now: Tick, open: &OpenRound, record: &RoundRecord) {
        let admitted: Vec<_> = record
            .commitments
            .iter()
            .filter(|signed| {
                record
                    .results
                    .iter()
                    .any(|r| r.worker == signed.worker && r.outcome == Outcome::Admitted)
            })
            .collect();
        let tokens: u64 = admitted.iter().map(|signed| signed.commitment.tokens.0).sum();
        let loss_sum: f64 = admitted
            .iter()
            .map(|s| f64::from(s.commitment.loss) * s.commitment.tokens.0 as f64)
            .sum();
        self.rounds.push_back(RoundStatus {
            round: record.round,
            admitted: admitted.len(),
            results: record.results.iter().map(|r| (r.worker, r.outcome.clone())).collect(),
            tokens,
            train_loss: (tokens > 0).then(|| loss_sum / tokens as f64),
            held_out_loss: None,
            payload_bytes: admitted.iter().map(|signed| signed.commitment.payload_bytes).sum(),
            aggregate_bytes: record.merge.map_or(0, |merge| merge.aggregate_bytes),
            duration_ms: now.since(open.opened_at),
            train_ms: open.train_ms,
            waiting_ms_max: open.waiting_ms_max(),
            theta_next: record.theta_next,
        });
        while self.rounds.len() > ROUNDS_MAX {
            self.rounds.pop_front();
        }
    }
}

impl Coordinator {
    /// What can be said about the run at `now`.
    pub fn status(&self, now: Tick) -> Status {
        let losses = &self.history.losses;
        let mut history: Vec<_> = self.history.rounds.iter().cloned().collect();
        for round in &mut history {
            round.held_out_loss = losses.get(&round.round).copied();
        }
        Status {
            run: self.run,
            name: self.spec.run.name.clone(),
            round: self.round.number,
            rounds: self.spec.run.rounds,
            phase: self.round.phase.name().to_owned(),
            phase_ms: now.since(self.round.phase_since),
            theta: self.round.theta,
            members: self.membership.iter().map(|(node, m)| self.member_status(node, m)).collect(),
            history,
            faults: self.history.faults.clone(),
            checks: self.history.checks.iter().cloned().collect(),
            events: self.history.events.iter().cloned().collect(),
            records_unsettled: self.unsettled.len(),
            verified: !self.verifiers().is_empty(),
        }
    }

    fn member_status(&self, node: NodeId, member: &super::membership::Member) -> MemberStatus {
        MemberStatus {
            node,
            role: member.role,
            class: member.class.to_string(),
            present: member.present,
            tokens_per_second: member.tokens_per_second,
            credibility: member.credibility.points(),
            on_probation: member.credibility.is_on_probation(),
            theta_round: member.theta,
            steps_done: member.steps_done,
            steps: self.round.assignments.get(&node).map_or(0, |assignment| assignment.steps),
            rounds_admitted: member.rounds_admitted,
            work: member.work,
            earned: member.earned,
            barred: member.barred.as_ref().map(|refusal| refusal.reason.clone()),
        }
    }
}
