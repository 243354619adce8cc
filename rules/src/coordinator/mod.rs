//! The coordinator's machine.
//!
//! # Contract
//! [`Coordinator::handle`] changes the machine and answers a message; [`Coordinator::poll_effects`]
//! gives what it now wants done and has not asked for since it was started;
//! [`Coordinator::poll_timeout`] says when to hand it [`Input::Timeout`], and why. The driver
//! journals an input before it acts on anything that follows from it. The same inputs at the same
//! ticks give the same machine, byte for byte.

mod audits;
mod close;
mod duty;
mod input;
mod membership;
mod round;
mod status;
mod weighing;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use crate::reward::layout;
use manyhands_proto::message::limits::{ADDRESSES_MAX, VERIFIERS_MAX};
use manyhands_proto::message::{
    Beat, Evaluation, Join, Merge, Refusal, RefusalCode, ReplayOutcome, Reply, Request, Role,
    SignedCommitment, Start, Verdict,
};
use manyhands_proto::run_file::{ChainKind, RunSpec};
use manyhands_proto::{Digest, NodeId, Round, RunId, Tick, WorkUnits};
use serde::{Deserialize, Serialize};

pub use audits::within;
pub use close::late_beacon;
pub use input::{
    CodecCheck, CodecResult, Contribution, Effect, ErrorBuffer, Facts, FaultKind, Input,
    MergeOrder, MergeResult, RevocationOrder, Stage,
};
pub use round::Phase;
pub use status::{EventKind, MemberStatus, RoundStatus, Status};
pub use weighing::WEIGHERS_MAX;

use self::audits::{Audits, Ended};
use self::close::{ClosedRound, PendingFault};
use self::membership::{Head, Member, Membership, typical_speed};
use self::round::{OpenRound, Parameters, Upload};
use crate::assignment::{Candidate, Opening, plan};
use crate::draw::Beacon;
use crate::record::{Check, Draw, Finding, Outcome, Revocation, RoundRecord};
use crate::{requirements, reward};

/// Of one member and θ; its word is not looked at any more until the next round.
const WRONG_PROOFS_MAX: u32 = 3;

/// Why the machine asks to be woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WakeReason {
    PhaseDeadline,
    SilentMember,
    VerifierPatience,
}

/// The state of a run. A value: it can be stored, compared and replayed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Coordinator {
    run: RunId,
    spec: RunSpec,
    chunk_count: u32,
    membership: Membership,
    round: OpenRound,
    /// How the open round's θ followed from the one before.
    last_merge: Option<Merge>,
    audits: Audits,
    closed: BTreeMap<Round, ClosedRound>,
    unsettled: VecDeque<RoundRecord>,
    last_record: Digest,
    faults: Vec<PendingFault>,
    revocations: Vec<Revocation>,
    /// What goes into the next record.
    checks: Vec<Check>,
    draws: Vec<Draw>,
    evaluations: Vec<Evaluation>,
    verifier_work: BTreeMap<NodeId, WorkUnits>,
    history: status::History,
    /// Effects that were handed out and not answered. Not part of the state: after a restart
    /// everything wanted is handed out again.
    #[serde(skip)]
    asked: Vec<Effect>,
}

impl Coordinator {
    pub fn new(run: RunId, spec: RunSpec, now: Tick) -> Self {
        let deadline = now.after_ms(spec.round.sync_ms);
        let parameters = Parameters { theta: spec.data.theta, residual: None };
        let round = OpenRound::new(Round(0), parameters, 0, now, deadline);
        let mut machine = Self {
            run,
            chunk_count: layout(&spec.model).chunk_count() as u32,
            membership: Membership::default(),
            round,
            last_merge: None,
            audits: Audits::default(),
            closed: BTreeMap::new(),
            unsettled: VecDeque::new(),
            last_record: spec.digest(),
            faults: Vec::new(),
            revocations: Vec::new(),
            checks: Vec::new(),
            draws: Vec::new(),
            evaluations: Vec::new(),
            verifier_work: BTreeMap::new(),
            history: status::History::default(),
            asked: Vec::new(),
            spec,
        };
        machine.audits.ask_evaluation(Round(0), machine.spec.data.theta);
        machine
    }

    pub fn run(&self) -> RunId {
        self.run
    }

    pub fn spec(&self) -> &RunSpec {
        &self.spec
    }

    pub fn round(&self) -> Round {
        self.round.number
    }

    pub fn phase(&self) -> Phase {
        self.round.phase
    }

    /// θ of the open round.
    pub fn theta(&self) -> Digest {
        self.round.theta
    }

    /// The blobs that the open round's merge begins with.
    pub fn parameters(&self) -> impl Iterator<Item = Digest> {
        [self.round.theta].into_iter().chain(self.round.residual)
    }

    /// Evidence of rounds before this one may be deleted.
    pub fn evidence_from(&self) -> Round {
        let oldest = self.closed.keys().next().copied().unwrap_or(self.round.number);
        let kept = Round(self.round.number.0.saturating_sub(self.spec.run.evidence_rounds));
        kept.min(oldest)
    }

    /// Where a member's data plane may be; nothing of a node that is no member.
    pub fn addresses(&self, node: NodeId) -> Vec<SocketAddr> {
        self.membership.get(node).map(|member| member.addresses.clone()).unwrap_or_default()
    }

    /// Members that may open other members' evidence.
    pub fn verifiers(&self) -> Vec<NodeId> {
        self.membership.present_verifiers().map(|(node, _)| node).collect()
    }

    /// Takes one input and, if it was a message, answers it.
    pub fn handle(&mut self, now: Tick, input: Input) -> Option<Reply> {
        let reply = match input {
            Input::Message { from, nonce, request, facts } => {
                Some(self.handle_message(now, from, nonce, request, facts))
            }
            Input::PayloadArrived { round, worker, result } => {
                self.handle_payload(round, worker, result);
                None
            }
            Input::CodecChecked { round, worker, result } => {
                if round == self.round.number && self.round.commitments.contains_key(&worker) {
                    self.round.note_codec(worker, result);
                }
                None
            }
            Input::PossessionChecked { round, worker, proof, holds } => {
                self.handle_possession(round, worker, proof, holds);
                None
            }
            Input::Merged { round, result } => {
                if round == self.round.number && self.round.phase == Phase::Merging {
                    self.finish_merge(now, Some(result));
                }
                None
            }
            Input::Entropy { round, stage, entropy } => {
                self.handle_entropy(now, round, stage, entropy);
                None
            }
            Input::StakesChecked { round, gone } => {
                self.handle_stakes(now, round, &gone);
                None
            }
            Input::Settled { round } => {
                if self.unsettled.front().is_some_and(|record| record.round == round) {
                    self.unsettled.pop_front();
                }
                None
            }
            Input::FaultSettled { round, worker, slashed } => {
                self.handle_fault_settled(now, round, worker, slashed);
                None
            }
            Input::RunCompleted => {
                if matches!(self.round.phase, Phase::Finishing { .. }) {
                    self.round.enter(Phase::Complete, now);
                    self.history.note(now, EventKind::Run, "the run is complete".to_owned());
                }
                None
            }
            Input::Timeout => None,
        };
        self.advance(now);
        // The reply says what to do after this input, not before it.
        match reply {
            Some(Answer::Situation(node)) => Some(self.situation_reply(node)),
            Some(Answer::Ready(reply)) => Some(reply),
            None => None,
        }
    }

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

    fn handle_message(
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
        if let Some(fault) = self.faults.iter().find(|fault| fault.worker == from) {
            let reason = format!("your fault in round {} is still being settled", fault.round);
            return refuse(RefusalCode::Barred, reason);
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

    fn is_new_claim(&self, from: NodeId, beat: &Beat) -> bool {
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
        if commitment.first_sequence != assignment.first_sequence {
            let reason = format!(
                "round {} opened again: your work is from position {} on, you committed that from {}",
                round.number, assignment.first_sequence, commitment.first_sequence
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
        if !self.audits.is_given_to(from, verdict.id) {
            return refuse(RefusalCode::NotYourTask, format!("task {} is not yours", verdict.id));
        }
        if let ReplayOutcome::Failed(reason) = &verdict.outcome {
            let text = format!("verifier {} could not replay: {reason}", from.short());
            self.history.note(now, EventKind::Audit, text);
        }
        let answered =
            self.audits.answer(from, verdict.id, &verdict.outcome, &self.spec.verification);
        if let Some((task, ended)) = answered {
            let assignment = &task.replay.assignment;
            let tokens = task.replay.commitment.tokens;
            *self.verifier_work.entry(from).or_default() = WorkUnits(
                self.verifier_work.get(&from).map_or(0, |work| work.0)
                    + reward::work(&self.spec.model, tokens).0,
            );
            let (round, worker) = (assignment.round, assignment.worker);
            self.handle_replayed(now, round, worker, Some(from), task.before_merge, ended);
        }
        Ok(())
    }

    /// A replay has ended, by a verdict or because nobody could do it.
    fn handle_replayed(
        &mut self,
        now: Tick,
        round: Round,
        worker: NodeId,
        verifier: Option<NodeId>,
        before_merge: bool,
        ended: Ended,
    ) {
        let (finding, outcome) = match ended {
            Ended::Passed(distances) => (Some(Finding::ReplayPassed(distances)), None),
            Ended::Fault(distances) => {
                (Some(Finding::ReplayFault(distances)), Some(Outcome::ReplayFault(distances)))
            }
            Ended::Withheld(reason) => {
                (Some(Finding::Withheld(reason.clone())), Some(Outcome::Withheld(reason)))
            }
            Ended::Abandoned => {
                let text = format!("no verifier could replay round {round} of {}", worker.short());
                self.history.note(now, EventKind::Audit, text);
                (None, Some(Outcome::Unverified))
            }
        };
        if let Some(finding) = finding {
            self.note_checks([Check { round, worker, verifier, finding }]);
        }
        if outcome.is_none()
            && let Some(member) = self.membership.get_mut(worker)
        {
            member.credibility.passed();
        }
        if before_merge {
            if round == self.round.number {
                self.round.replayed.insert(worker, outcome);
            }
        } else if let Some(outcome) = outcome.filter(|outcome| *outcome != Outcome::Unverified) {
            self.find_fault_after_merge(now, round, worker, outcome);
        }
    }

    /// What was found goes into the next record, and is shown.
    fn note_checks(&mut self, found: impl IntoIterator<Item = Check>) {
        let found: Vec<_> = found.into_iter().collect();
        self.history.note_checks(&found);
        self.checks.extend(found);
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

    fn handle_payload(&mut self, round: Round, worker: NodeId, result: Result<(), String>) {
        let open = &mut self.round;
        if round != open.number || !open.commitments.contains_key(&worker) {
            return;
        }
        let upload = match (result, open.phase) {
            (Err(reason), _) => Upload::Malformed(reason),
            (Ok(()), Phase::Uploading { .. }) => Upload::InTime,
            (Ok(()), _) => Upload::Late,
        };
        open.uploads.entry(worker).or_insert(upload);
    }

    fn handle_possession(&mut self, round: Round, worker: NodeId, proof: Digest, holds: bool) {
        let Some(member) = self.membership.get_mut(worker) else { return };
        if member.claimed.is_some_and(|claim| claim.round == round && claim.proof == proof) {
            member.claimed = None;
            if holds {
                member.theta = Some(round);
            } else {
                member.wrong_theta = true;
                let before = if member.wrong_proofs.0 == round { member.wrong_proofs.1 } else { 0 };
                member.wrong_proofs = (round, before + 1);
            }
        }
    }

    /// Whoever took its stake back is out until it joins with another: nothing would answer for its
    /// work.
    fn handle_stakes(&mut self, now: Tick, round: Round, gone: &[NodeId]) {
        if round != self.round.number {
            return;
        }
        self.round.stakes_unchecked.clear();
        for &node in gone {
            let Some(member) = self.membership.get_mut(node) else { continue };
            (member.present, member.must_join) = (false, true);
            let text = format!("{} has no stake in the run any more", node.short());
            self.history.note(now, EventKind::Member, text);
            if matches!(self.round.phase, Phase::Training { .. }) {
                self.round.commitments.remove(&node);
            }
        }
    }

    fn handle_entropy(
        &mut self,
        now: Tick,
        round: Round,
        stage: Stage,
        entropy: crate::record::Entropy,
    ) {
        match stage {
            Stage::Commitments if round == self.round.number => {
                self.round.commitments_entropy = Some(entropy);
            }
            Stage::Commitments => {}
            Stage::Admitted => self.draw_audits(now, round, entropy),
        }
    }

    /// Moves on as far as what is known allows.
    fn advance(&mut self, now: Tick) {
        self.membership.expire(now, self.spec.round.silence_ms);
        while self.advance_phase(now) {}
        for task in self.audits.abandon(self.audited_from()) {
            let assignment = &task.replay.assignment;
            let (round, worker) = (assignment.round, assignment.worker);
            self.handle_replayed(now, round, worker, None, task.before_merge, Ended::Abandoned);
        }
        self.audits.distribute(now, &self.verifiers(), self.spec.round.check_ms);
        while self.advance_phase(now) {}
    }

    /// One step from phase to phase; whether there was one.
    fn advance_phase(&mut self, now: Tick) -> bool {
        let times = self.spec.round.clone();
        match self.round.phase {
            Phase::Gathering { deadline } => {
                let open = self.may_open(now >= deadline);
                if open {
                    self.open_round(now);
                }
                open
            }
            Phase::Training { deadline } => {
                let awaited = self.round.assignments.keys().any(|worker| {
                    !self.round.commitments.contains_key(worker)
                        && !self.round.excused.contains(worker)
                        && self.membership.get(*worker).is_some_and(Member::is_at_work)
                });
                if awaited && now < deadline {
                    return false;
                }
                if self.round.commitments.is_empty() {
                    self.reopen_round(now);
                    // Whoever missed the deadline must first be heard of again.
                    return false;
                }
                self.close_commitments();
                let deadline = now.after_ms(times.upload_ms);
                self.round.enter(Phase::Uploading { deadline }, now);
                true
            }
            Phase::Uploading { deadline } => {
                let done = self.round.uploads_missing().next().is_none() || now >= deadline;
                if done {
                    self.round.enter(Phase::Checking { deadline: None }, now);
                }
                done
            }
            Phase::Checking { deadline } => {
                let Some(entropy) = self.round.commitments_entropy else { return false };
                if deadline.is_none() {
                    let deadline = Some(now.after_ms(times.check_ms));
                    self.round.phase = Phase::Checking { deadline };
                }
                self.ask_replays_before_merge(entropy);
                self.ask_weighings(now, entropy);
                let over = deadline.is_some_and(|deadline| now >= deadline);
                let done = self.round.is_checked() && self.is_weighed() || over;
                if done {
                    self.close_checks(now);
                }
                done
            }
            Phase::Merging => false,
            Phase::Finishing { deadline } => self.finish(now, now >= deadline),
            Phase::Complete => false,
        }
    }

    fn may_open(&self, deadline_passed: bool) -> bool {
        let ready = self.membership.ready_workers(self.round.number).count();
        let present = self.membership.present_workers().count();
        let first = self.round.number == Round(0);
        let needed = if first { self.spec.run.workers_min as usize } else { 1 };
        let verifiers = if first { self.spec.verification.verifiers_min as usize } else { 0 };
        // A round that opens again waits for those it had: they may all have been cut off at once.
        let complete = ready == present && ready >= self.round.awaited;
        ready >= needed && self.verifiers().len() >= verifiers && (complete || deadline_passed)
    }

    fn open_round(&mut self, now: Tick) {
        let ready: Vec<_> = self.membership.ready_workers(self.round.number).collect();
        let typical = typical_speed(&ready);
        let candidates: Vec<_> = ready
            .iter()
            .map(|(worker, member)| Candidate {
                worker: *worker,
                tokens_per_second: member.credible_speed(typical),
                class: member.class.clone(),
                start: member.start(),
            })
            .collect();
        let round = &mut self.round;
        let opening = Opening {
            round: round.number,
            theta: round.theta,
            first_sequence: round.first_sequence,
        };
        round.verified = self.membership.present_verifiers().next().is_some();
        round.probation = ready
            .iter()
            .filter(|(_, member)| round.verified && member.credibility.is_on_probation())
            .map(|(worker, _)| *worker)
            .collect();
        round.heads = ready
            .iter()
            .filter_map(|(worker, member)| member.head.clone().map(|head| (*worker, head)))
            .collect();
        round.assignments = plan(&self.spec, opening, &candidates)
            .into_iter()
            .map(|assignment| (assignment.worker, assignment))
            .collect();
        round.candidates = candidates;
        if self.spec.chain.kind == ChainKind::Substrate {
            let verifiers = self.membership.present_verifiers();
            round.stakes_unchecked = verifiers.map(|(node, _)| (node, Role::Verifier)).collect();
            let workers = round.candidates.iter().map(|candidate| (candidate.worker, Role::Worker));
            round.stakes_unchecked.extend(workers);
        }
        round.opened_at = now;
        let deadline = now.after_ms(self.spec.round.commit_ms);
        round.enter(Phase::Training { deadline }, now);
    }

    /// Nobody committed: the same round is tried again with whoever is there then.
    fn reopen_round(&mut self, now: Tick) {
        let OpenRound { number, first_sequence, .. } = self.round;
        let parameters = self.round.parameters();
        let awaited = self.round.candidates.len();
        let text = format!("round {number} opens again: nobody committed");
        self.history.note(now, EventKind::Round, text);
        let deadline = now.after_ms(self.spec.round.sync_ms);
        self.round = OpenRound::new(number, parameters, first_sequence, now, deadline);
        self.round.awaited = awaited;
    }

    /// From here on a commitment is a worker's head, whatever becomes of its update.
    fn close_commitments(&mut self) {
        self.round.verifiers = self.verifiers();
        for (worker, signed) in &self.round.commitments {
            let Some(member) = self.membership.get_mut(*worker) else { continue };
            let assignment = &self.round.assignments[worker];
            let before = match assignment.start {
                Start::Fresh => 0,
                Start::Head { adam_step, .. } => adam_step,
            };
            member.steps_done = 0;
            member.head = Some(Head {
                commitment: signed.commitment.clone(),
                adam_step: before + u64::from(assignment.steps),
                sent_values_returned: false,
            });
        }
    }

    fn ask_replays_before_merge(&mut self, entropy: crate::record::Entropy) {
        let beacon = Beacon::new(self.round.commit_set().digest(), entropy.value);
        let ready: Vec<NodeId> = self
            .round
            .uploaded()
            .filter(|worker| self.round.probation.contains(worker))
            .filter(|worker| self.round.codec.get(worker) == Some(&CodecResult::Passed))
            .filter(|worker| !self.round.replay_asked.contains(worker))
            .collect();
        for worker in ready {
            let assignment = self.round.assignments[&worker].clone();
            let signed = &self.round.commitments[&worker];
            let head = self.round.heads.get(&worker);
            let replay = self.replay_of(assignment, signed, head, beacon);
            self.audits.ask_replay(replay, true);
            self.round.replay_asked.insert(worker);
        }
    }

    /// When to hand in [`Input::Timeout`], and why.
    pub fn poll_timeout(&self, now: Tick) -> Option<(Tick, WakeReason)> {
        let times = &self.spec.round;
        let wakes = [
            (self.round.phase.deadline(), WakeReason::PhaseDeadline),
            (self.membership.next_expiry(times.silence_ms), WakeReason::SilentMember),
            (self.audits.next_timeout(times.check_ms), WakeReason::VerifierPatience),
            (self.weighing_time(), WakeReason::PhaseDeadline),
        ];
        // A deadline that has passed and still waits for somebody is no reason to wake again.
        wakes
            .into_iter()
            .filter_map(|(tick, reason)| tick.map(|tick| (tick, reason)))
            .filter(|(tick, _)| *tick > now)
            .min_by_key(|(tick, _)| *tick)
    }
}

/// How a message is answered.
enum Answer {
    Ready(Reply),
    /// By what there is to do for the sender, once all consequences are drawn.
    Situation(NodeId),
}

fn refuse(code: RefusalCode, reason: String) -> Result<(), Refusal> {
    Err(Refusal { code, reason })
}

#[cfg(test)]
mod tests;
