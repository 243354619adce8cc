//! What becomes of a worker whose fault was found, and what the chain is told of it.

use manyhands_proto::message::{Refusal, RefusalCode};
use manyhands_proto::{Balance, Digest, NodeId, Round, Tick};
use serde::{Deserialize, Serialize};

use super::Coordinator;
use super::input::{Effect, Shown};
use super::status::EventKind;
use crate::panel::Case;
use crate::record::{FaultKind, Outcome, Revocation};

/// Showing nothing once may be misfortune, and objecting to it costs little: so often it is a way of life.
pub(super) const HID_MAX: u32 = 3;

/// A fault that the chain has not dealt with yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct PendingFault {
    pub(super) round: Round,
    pub(super) worker: NodeId,
    pub(super) kind: FaultKind,
    evidence: Digest,
    /// What that is made of, unless it is there.
    shown: Option<Shown>,
    /// What else is looked at.
    pub(super) payloads: Vec<Digest>,
}

impl PendingFault {
    pub(super) fn report(&self) -> Effect {
        Effect::ReportFault {
            round: self.round,
            worker: self.worker,
            kind: self.kind,
            evidence: self.evidence,
            shown: self.shown.clone(),
        }
    }
}

impl Coordinator {
    /// What a fault means beyond its round: lost trust and state, a report to the chain, and mostly the end.
    pub(super) fn accuse(&mut self, now: Tick, round: Round, worker: NodeId, outcome: &Outcome) {
        let Some(kind) = outcome.fault() else { return };
        let what = outcome.to_string();
        let mut bars = kind.bars();
        self.start_afresh(worker);
        if let Some(member) = self.membership.get_mut(worker) {
            member.hid += u32::from(kind == FaultKind::Withheld);
            bars |= member.hid >= HID_MAX;
            if bars {
                member.barred = Some(Refusal {
                    code: RefusalCode::Barred,
                    reason: format!("fault in round {round}: {what}"),
                });
            }
        }
        // The coordinator may have found something else first.
        let is_it = |(found, case): &(Outcome, Case)| {
            (case.round(), case.worker()) == (round, worker) && found == outcome
        };
        let found = self.cases.iter().position(is_it);
        let case = found.map(|at| Shown::Case(Box::new(self.cases.swap_remove(at).1)));
        let (evidence, shown) = if let Outcome::CodecFault(fault) = outcome {
            // Kept when the chunk was opened.
            (fault.evidence, None)
        } else {
            let work = || self.round.work(worker).filter(|work| work.round() == round);
            let shown = case.or_else(|| work().map(|work| Shown::Work(Box::new(work))));
            let shown = shown.expect("a fault is what verifiers found, or of the open round");
            (Digest::of(&shown.to_bytes()), Some(shown))
        };
        self.evidence.push((round, evidence));
        let barred = if bars { "is barred, " } else { "" };
        self.history.note(
            now,
            EventKind::Fault,
            format!("worker {} {barred}fault in round {round}: {what}", worker.short()),
        );
        self.history.note_fault(round, worker, what);
        let payloads = match kind {
            FaultKind::Malformed | FaultKind::Codec => self.round.payloads(worker),
            FaultKind::Replay | FaultKind::Withheld => Vec::new(),
        };
        self.faults.push(PendingFault { round, worker, kind, evidence, shown, payloads });
    }

    /// What a merged round is found to be is no reason for a reward: it is forfeit, and the update is to be taken back.
    pub(super) fn take_back(&mut self, now: Tick, round: Round, worker: NodeId, outcome: Outcome) {
        let Some(closed) = self.closed.get_mut(&round) else { return };
        let Some(result) = closed.results.iter().find(|result| result.worker == worker) else {
            return;
        };
        let (was, reward, work) = (result.outcome.clone(), result.reward, result.work);
        if let Some(member) = self.membership.get_mut(worker) {
            member.earned.0 = member.earned.0.saturating_sub(reward.0);
            member.work.0 = member.work.0.saturating_sub(work.0);
        }
        if was == Outcome::Admitted {
            self.revocations.push(Revocation { round, worker });
        }
        if outcome.fault().is_some() {
            self.accuse(now, round, worker, &outcome);
        } else {
            self.start_afresh(worker);
        }
    }

    /// What a worker holds is not gone on from, nor what it makes of that in the open round.
    pub(super) fn start_afresh(&mut self, worker: NodeId) {
        if let Some(member) = self.membership.get_mut(worker) {
            member.start_afresh();
        }
        if self.round.heads.contains_key(&worker) {
            self.round.afresh.insert(worker);
        }
    }

    pub(super) fn handle_fault_settled(
        &mut self,
        now: Tick,
        round: Round,
        worker: NodeId,
        slashed: Balance,
    ) {
        self.faults.retain(|fault| (fault.round, fault.worker) != (round, worker));
        self.history.note_slash(now, round, worker, slashed);
    }
}
