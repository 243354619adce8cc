//! What members ask for and report: who may, and what follows.

use manyhands_proto::NodeId;
use manyhands_proto::Tick;
use manyhands_proto::message::limits::{ADDRESSES_MAX, VERIFIERS_MAX};
use manyhands_proto::message::{
    Beat, Evaluation, Join, Refusal, RefusalCode, ReplayOutcome, Reply, Request, Role,
    SignedCommitment, Start, Verdict,
};

use super::Coordinator;
use super::faults::{HID_MAX, PendingFault};
use super::input::Facts;
use super::round::Phase;
use super::status::EventKind;
use crate::requirements;

/// Of one member and θ; its word is not looked at any more until the next round.
const WRONG_PROOFS_MAX: u32 = 3;

/// How a message is answered.
pub(super) enum Answer {
    Ready(Reply),
    /// By what there is to do for the sender, once all consequences are drawn.
    Situation(NodeId),
}

pub(super) fn refuse(code: RefusalCode, reason: String) -> Result<(), Refusal> {
    Err(Refusal { code, reason })
}

impl Coordinator {
    /// Answers a request that changes nothing: a look at the run, or the beat of a member that was
    /// heard of a moment ago. None: the request has to go through [`Self::handle`].
    pub fn answer_quietly(&self, now: Tick, from: NodeId, request: &Request) -> Option<Reply> {
        match request {
            Request::Describe => Some(Reply::Description {
                spec: self.spec.canonical_bytes(),
                round: self.round.number,
            }),
            Request::Status => Some(Reply::Status(self.status(now).to_json())),
            Request::Beat(beat) => {
                let member = self.membership.get(from)?;
                let recent = now.since(member.last_seen) < self.spec.round.silence_ms / 4;
                let news = self.is_new_claim(from, beat) || beat.leaving != member.leaving;
                let quiet = member.present && recent && !member.wrong_theta && !news;
                quiet.then(|| self.situation_reply(from))
            }
            Request::Join(_)
            | Request::Commit(_)
            | Request::Verdict(_)
            | Request::Evaluation(_)
            | Request::Weighing(_)
            | Request::Leave => None,
        }
    }

    pub(super) fn handle_message(
        &mut self,
        now: Tick,
        from: NodeId,
        nonce: u64,
        request: Request,
        facts: Facts,
    ) -> Answer {
        if let Some(reply) = self.answer_quietly(now, from, &request) {
            return Answer::Ready(reply);
        }
        let result = match request {
            Request::Join(join) => self.handle_join(now, from, nonce, join, facts),
            request @ (Request::Describe
            | Request::Beat(_)
            | Request::Commit(_)
            | Request::Verdict(_)
            | Request::Evaluation(_)
            | Request::Weighing(_)
            | Request::Leave
            | Request::Status) => self.handle_member(now, from, nonce, request),
        };
        match result {
            Ok(()) => Answer::Situation(from),
            Err(refusal) => Answer::Ready(Reply::Refused(refusal)),
        }
    }

    fn handle_join(
        &mut self,
        now: Tick,
        from: NodeId,
        nonce: u64,
        mut join: Join,
        facts: Facts,
    ) -> Result<(), Refusal> {
        self.membership.note_nonce(from, nonce)?;
        if matches!(self.round.phase, Phase::Finishing { .. } | Phase::Complete) {
            return refuse(RefusalCode::RunIsComplete, "all rounds are trained".to_owned());
        }
        requirements::admit(&self.spec, from, &join, facts.stake)?;
        let undecided = |fault: &&PendingFault| fault.worker == from && fault.kind.bars();
        if let Some(fault) = self.faults.iter().find(undecided) {
            let reason = format!("your fault in round {} is still being settled", fault.round);
            return refuse(RefusalCode::Barred, reason);
        }
        if let Some(end) = self.judges.undecided_of(from) {
            let reason = format!("your replay of round {} is still before the chain", end.round);
            return refuse(RefusalCode::Barred, reason);
        }
        if let Some(earlier) = self.membership.get(from) {
            let (hid, reason) = match join.role {
                Role::Worker => (earlier.hid >= HID_MAX, "you showed nothing of several rounds"),
                Role::Verifier => {
                    (earlier.sent_away, "workers lead you nowhere who lead others somewhere")
                }
            };
            if hid {
                return refuse(RefusalCode::Barred, reason.to_owned());
            }
        }
        self.ensure_room(from, join.role)?;
        // Where it was seen comes first: what it says of itself may fill all places.
        let mut addresses = facts.observed;
        addresses.append(&mut join.addresses);
        addresses.truncate(ADDRESSES_MAX);
        join.addresses = addresses;
        self.history.note(
            now,
            EventKind::Member,
            format!("{} {} joined: {}", join.role.name(), from.short(), join.class),
        );
        let start = self.round.assignments.get(&from).map(|assignment| assignment.start);
        if let Some(Start::Head { round, .. }) = start
            && !join.head_rounds.contains(&round)
        {
            self.round.excused.insert(from);
        }
        self.audits.moved(from, &join.addresses);
        self.membership.join(now, from, nonce, join, self.spec.verification.probation_checks);
        Ok(())
    }

    /// Whether one more of this role, beside `node` itself, has a place.
    fn ensure_room(&self, node: NodeId, role: Role) -> Result<(), Refusal> {
        let (others, places) = match role {
            Role::Worker => {
                let others = self.membership.present_workers().filter(|(other, _)| *other != node);
                (others.count(), self.spec.run.workers_max as usize)
            }
            Role::Verifier => {
                let others =
                    self.membership.present_verifiers().filter(|(other, _)| *other != node);
                (others.count(), VERIFIERS_MAX)
            }
        };
        if others >= places {
            let reason =
                format!("{others} {}s take part, the run has no place for more", role.name());
            return refuse(RefusalCode::RunIsFull, reason);
        }
        Ok(())
    }

    fn handle_member(
        &mut self,
        now: Tick,
        from: NodeId,
        nonce: u64,
        request: Request,
    ) -> Result<(), Refusal> {
        let Some(member) = self.membership.get(from) else {
            return refuse(RefusalCode::NotAMember, format!("node {from} has not joined"));
        };
        if member.must_join {
            let reason = "your stake was not there when it was looked up: join again".to_owned();
            return refuse(RefusalCode::NotAMember, reason);
        }
        let (was_present, role, barred) = (member.present, member.role, member.barred.clone());
        self.membership.note_nonce(from, nonce)?;
        if !was_present {
            self.ensure_room(from, role)?;
        }
        if let Some(member) = self.membership.get_mut(from) {
            member.last_seen = now;
            member.present = true;
        }
        // It is still told why, and may leave; nothing that it did counts.
        if let Some(refusal) = barred
            && !matches!(request, Request::Beat(_) | Request::Leave)
        {
            return Err(refusal);
        }
        match request {
            Request::Beat(beat) => self.handle_beat(from, &beat),
            Request::Commit(signed) => self.handle_commit(now, from, signed),
            Request::Verdict(verdict) => self.handle_verdict(now, from, &verdict),
            Request::Evaluation(evaluation) => self.handle_evaluation(from, evaluation),
            Request::Weighing(weighing) => self.handle_weighing(from, weighing),
            Request::Leave => {
                if let Some(member) = self.membership.get_mut(from) {
                    member.present = false;
                }
                self.history.note(now, EventKind::Member, format!("{} left", from.short()));
                Ok(())
            }
            Request::Join(_) | Request::Describe | Request::Status => Ok(()),
        }
    }

    pub(super) fn is_new_claim(&self, from: NodeId, beat: &Beat) -> bool {
        let Some((member, claim)) = self.membership.get(from).zip(beat.theta) else { return false };
        claim.round == self.round.number
            && member.theta != Some(claim.round)
            // One at a time, and not for ever: each costs a pass over θ.
            && member.claimed.is_none_or(|earlier| earlier.round != claim.round)
            && !member.wrong_theta
            && (member.wrong_proofs.0 != claim.round || member.wrong_proofs.1 < WRONG_PROOFS_MAX)
    }

    fn handle_beat(&mut self, from: NodeId, beat: &Beat) -> Result<(), Refusal> {
        let is_new = self.is_new_claim(from, beat);
        let Some(member) = self.membership.get_mut(from) else { return Ok(()) };
        member.steps_done = beat.steps_done;
        // For good: its place may be somebody else's by now.
        member.leaving |= beat.leaving;
        if is_new {
            member.claimed = beat.theta;
        }
        if std::mem::take(&mut member.wrong_theta) {
            let reason = format!("your proof of θ_{} does not match its digest", self.round.number);
            return refuse(RefusalCode::WrongTheta, reason);
        }
        Ok(())
    }

    fn handle_commit(
        &mut self,
        now: Tick,
        from: NodeId,
        signed: SignedCommitment,
    ) -> Result<(), Refusal> {
        let commitment = &signed.commitment;
        let round = &mut self.round;
        if signed.worker != from || signed.run != self.run {
            return refuse(RefusalCode::Malformed, "the commitment is not the sender's".to_owned());
        }
        if commitment.round != round.number {
            let reason =
                format!("round {} is open, you committed {}", round.number, commitment.round);
            return refuse(RefusalCode::WrongRound, reason);
        }
        let Some(assignment) = round.assignments.get(&from) else {
            return refuse(
                RefusalCode::NotAssigned,
                format!("you have no work in round {}", round.number),
            );
        };
        let (assigned, did) = (assignment.digest(), commitment.assignment);
        if (assigned, assignment.first_sequence) != (did, commitment.first_sequence) {
            let reason = format!(
                "your work of round {} is {}, you committed that of {}; it may have opened again",
                round.number,
                assigned.short(),
                did.short()
            );
            return refuse(RefusalCode::NotAssigned, reason);
        }
        if round.commitments.contains_key(&from) {
            return refuse(
                RefusalCode::AlreadyCommitted,
                "your first commitment counts".to_owned(),
            );
        }
        if !matches!(round.phase, Phase::Training { .. }) {
            return refuse(
                RefusalCode::TooLate,
                format!("round {} takes no more commitments", round.number),
            );
        }
        let expected = u64::from(assignment.sequences) * u64::from(self.spec.model.context_length);
        if commitment.tokens.0 != expected {
            let reason = format!(
                "the assignment has {expected} tokens, you committed {}",
                commitment.tokens
            );
            return refuse(RefusalCode::ImplausibleTokens, reason);
        }
        let payload_max = u64::from(self.chunk_count) * 4 * 4_096 + 4_096;
        if commitment.payload_bytes > payload_max {
            let reason = format!(
                "a payload has at most {payload_max} bytes, you committed {}",
                commitment.payload_bytes
            );
            return refuse(RefusalCode::Malformed, reason);
        }
        let elapsed_ms = now.since(round.phase_since).max(1);
        round.committed_ms.insert(from, elapsed_ms);
        round.commitments.insert(from, signed);
        Ok(())
    }

    fn handle_verdict(
        &mut self,
        now: Tick,
        from: NodeId,
        verdict: &Verdict,
    ) -> Result<(), Refusal> {
        self.audits.answer(from, verdict)?;
        if let ReplayOutcome::Failed(reason) = &verdict.outcome {
            let text = format!("verifier {} could not replay: {reason}", from.short());
            self.history.note(now, EventKind::Audit, text);
        }
        Ok(())
    }

    fn handle_evaluation(&mut self, from: NodeId, evaluation: Evaluation) -> Result<(), Refusal> {
        let is_verifier = self.verifiers().contains(&from);
        if !is_verifier || !self.audits.evaluated(evaluation.round, evaluation.theta) {
            let reason =
                format!("the evaluation of round {} was not asked of you", evaluation.round);
            return refuse(RefusalCode::NotYourTask, reason);
        }
        self.history.note_loss(evaluation.round, evaluation.loss);
        self.evaluations.push(evaluation);
        Ok(())
    }
}
