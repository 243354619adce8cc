//! What becomes of verifiers that contradict each other: whoever made its end up is out, and the chain is told.

use manyhands_proto::message::{Refusal, RefusalCode, ReplayEnd};
use manyhands_proto::{Balance, Digest, NodeId, Round, Tick};
use serde::{Deserialize, Serialize};

use super::Coordinator;
use super::input::Effect;
use super::status::EventKind;
use crate::panel::{Case, JUDGES_MAX, Judgement};
use crate::record::FalseEnd;

/// A verifier that so many workers in a row (two, where there are no more) lead nowhere, who lead two others somewhere, is of
/// no use, or lies.
const SHOWN_NOTHING_MAX: usize = 3;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Judges {
    contradictions: Vec<Case>,
    /// What the chain has not dealt with yet, with what shows it.
    undecided: Vec<(FalseEnd, Case)>,
    /// For the next record.
    pub(super) found: Vec<FalseEnd>,
}

impl Judges {
    pub(super) fn is_idle(&self) -> bool {
        self.contradictions.is_empty() && self.undecided.is_empty()
    }

    pub(super) fn wanted(&self) -> impl Iterator<Item = Effect> {
        let compare = self.contradictions.iter().cloned().map(Effect::CompareJudges);
        let report = |(end, case): &(FalseEnd, Case)| Effect::ReportVerifier {
            end: *end,
            case: Box::new(case.clone()),
        };
        compare.chain(self.undecided.iter().map(report))
    }

    /// The rounds of what is before the chain: what shows it is still looked at.
    pub(super) fn disputed(&self) -> impl Iterator<Item = Round> {
        self.undecided.iter().map(|(end, _)| end.round)
    }

    /// Whether what a verifier did is still before the chain: it may not come back meanwhile.
    pub(super) fn undecided_of(&self, verifier: NodeId) -> Option<FalseEnd> {
        self.undecided.iter().map(|(end, _)| *end).find(|it| it.verifier == verifier)
    }
}

impl Coordinator {
    /// Notes a decision in which verifiers contradicted each other. With fewer than three ends nobody can say whose is
    /// made up.
    pub(super) fn note_contradiction(&mut self, case: &Case) {
        let judgements = &case.judgements;
        let accusing = judgements.iter().filter(|it| it.verdict.accuses()).count();
        let all_near = judgements.last().is_some_and(|last| last.near.len() + 1 == JUDGES_MAX);
        if judgements.len() < JUDGES_MAX || accusing == 0 || all_near {
            return;
        }
        self.judges.contradictions.push(case.clone());
    }

    /// Sends verifiers away that never end anywhere, by their word, where others do: each costs two more replays every
    /// time. Nothing is proved, so their bonds stay theirs; one worker alone has nobody sent away.
    pub(super) fn note_words(&mut self, now: Tick, case: &Case, new: &[Judgement]) {
        let ended = |judgement: &Judgement| match judgement.replay.replayed.end {
            ReplayEnd::At(_) => true,
            ReplayEnd::Nowhere | ReplayEnd::Withheld(_) => false,
        };
        let others_ended = case.judgements.iter().filter(|judgement| ended(judgement)).count() >= 2;
        // Workers that agreed on it must not choose who is left to judge them.
        if self.membership.present_verifiers().count() <= JUDGES_MAX {
            return;
        }
        let workers = self.membership.present_workers().count();
        let enough = workers.clamp(2, SHOWN_NOTHING_MAX);
        for judgement in new {
            let verifier = judgement.verifier();
            let Some(member) = self.membership.get_mut(verifier) else { continue };
            if ended(judgement) {
                member.shown_nothing.clear();
            } else if others_ended {
                member.shown_nothing.insert(case.worker());
            }
            let workers = member.shown_nothing.len();
            if workers >= enough && member.barred.is_none() {
                let reason =
                    format!("{workers} workers in a row led it nowhere, and others somewhere");
                let text = format!("verifier {} is sent away: {reason}", verifier.short());
                member.barred = Some(Refusal { code: RefusalCode::Barred, reason });
                member.sent_away = true;
                self.audits.exclude(verifier);
                self.history.note(now, EventKind::Fault, text);
            }
        }
    }

    pub(super) fn handle_judges_compared(
        &mut self,
        now: Tick,
        commitment: Digest,
        liars: Vec<NodeId>,
    ) {
        let waiting = &mut self.judges.contradictions;
        let Some(at) = waiting.iter().position(|it| it.work.commitment.digest() == commitment)
        else {
            return;
        };
        let case = waiting.remove(at);
        let (round, worker) = (case.round(), case.worker());
        if !liars.is_empty() {
            self.evidence.push((round, case.digest()));
        }
        for verifier in liars {
            let what = format!("its replay of round {round} of {} is made up", worker.short());
            if let Some(member) = self.membership.get_mut(verifier) {
                member.barred = Some(Refusal { code: RefusalCode::Barred, reason: what.clone() });
            }
            self.audits.exclude(verifier);
            let text = format!("verifier {} is barred: {what}", verifier.short());
            self.history.note(now, EventKind::Fault, text);
            self.history.note_fault(round, verifier, what);
            let end = FalseEnd { round, worker, verifier };
            self.judges.found.push(end);
            self.judges.undecided.push((end, case.clone()));
        }
    }

    pub(super) fn handle_verifier_settled(&mut self, now: Tick, end: FalseEnd, slashed: Balance) {
        self.judges.undecided.retain(|(it, _)| *it != end);
        self.history.note_slash(now, end.round, end.verifier, slashed);
    }
}
