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
mod faults;
mod input;
mod judges;
mod membership;
mod phases;
mod requests;
mod round;
mod status;
mod weighing;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use manyhands_proto::message::{Evaluation, Merge, Reply};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, Round, RunId, Tick, WorkUnits};
use serde::{Deserialize, Serialize};

pub use close::late_beacon;
pub use input::{
    CodecCheck, CodecResult, Compared, Comparison, Contribution, Effect, Facts, Input, MergeOrder,
    MergeResult, RevocationOrder, Shown, Stage,
};
pub use round::Phase;
pub use status::{EventKind, MemberStatus, RoundStatus, Status};
pub use weighing::WEIGHERS_MAX;

use self::audits::{Audits, ReplayTask};
use self::close::ClosedRound;
use self::faults::PendingFault;
use self::judges::Judges;
use self::membership::Membership;
use self::requests::Answer;
use self::round::{OpenRound, Parameters, Upload};
use crate::panel::{Case, Judgement, shown_to_all};
use crate::quarantine::Quarantine;
use crate::record::{Check, Draw, Finding, Outcome, Revocation, RoundRecord};
use crate::reward::{self, layout};

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
    judges: Judges,
    /// What verifiers found against workers, until it has an end.
    cases: Vec<(Outcome, Case)>,
    /// Blobs that verdicts of these rounds follow from.
    evidence: Vec<(Round, Digest)>,
    /// By what is on record.
    quarantine: Quarantine,
    /// Whether somebody got less than it could do, as verifiers could not repeat it in time.
    shares_limited: bool,
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
            judges: Judges::default(),
            cases: Vec::new(),
            evidence: Vec::new(),
            quarantine: Quarantine::default(),
            shares_limited: false,
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

    /// The blobs that the open round's merge begins with, and those that replays do.
    pub fn parameters(&self) -> impl Iterator<Item = Digest> {
        let merge = [self.round.theta].into_iter().chain(self.round.residual);
        merge.chain(self.audits.thetas())
    }

    /// Evidence of rounds before this one may be deleted.
    pub fn evidence_from(&self) -> Round {
        let oldest = self.closed.keys().next().copied().unwrap_or(self.round.number);
        let kept = Round(self.round.number.0.saturating_sub(self.spec.run.evidence_rounds));
        kept.min(oldest)
    }

    /// Blobs that verdicts follow from: with whether they are decided, so that anybody may see them. Others of the
    /// kind may be deleted.
    pub fn evidence(&self) -> impl Iterator<Item = (Digest, bool)> {
        let decided = self.evidence.iter().map(|(_, digest)| (*digest, true));
        let undecided = self.audits.evidence().chain(self.round.evidence());
        decided.chain(undecided.map(|digest| (digest, false)))
    }

    /// Updates that somebody is accused of: whoever votes looks at them.
    pub fn disputed_payloads(&self) -> impl Iterator<Item = Digest> {
        self.faults.iter().flat_map(|fault| fault.payloads.iter().copied())
    }

    /// The rounds of what is before the chain.
    fn disputed(&self) -> impl Iterator<Item = Round> {
        self.faults.iter().map(|fault| fault.round).chain(self.judges.disputed())
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
            Input::Compared { id, verifier, result } => {
                self.handle_compared(now, (id, verifier), result);
                None
            }
            Input::JudgesCompared { commitment, liars } => {
                self.handle_judges_compared(now, commitment, liars);
                None
            }
            Input::VerifierSettled { end, slashed } => {
                self.handle_verifier_settled(now, end, slashed);
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

    fn handle_compared(&mut self, now: Tick, (id, verifier): (u64, NodeId), compared: Compared) {
        if let Compared::Unopened(reason) = &compared {
            let text =
                format!("verifier {} does not show where it ended: {reason}", verifier.short());
            self.history.note(now, EventKind::Audit, text);
        }
        let accuses = self.audits.compared(now, (id, verifier), compared, &self.spec.verification);
        if accuses {
            // Others are asked now, and have the whole time.
            self.finish_later(now);
        }
    }

    /// A replay has ended: by what verifiers found, or because nobody could do it.
    fn handle_replayed(&mut self, now: Tick, task: ReplayTask, finding: Option<Finding>) {
        let (round, worker) = (task.signed.commitment.round, task.signed.worker);
        // What one said is on record, paid and counted; that nobody else could look over it changes nothing.
        let known = usize::from(task.looked_over);
        if known > 0 && task.judgements.len() <= known {
            let text = format!("nobody else could look over round {round} of {}", worker.short());
            self.history.note(now, EventKind::Audit, text);
            return;
        }
        let outcome = match &finding {
            Some(Finding::ReplayFault(distances)) => Some(Outcome::ReplayFault(*distances)),
            Some(Finding::Withheld(reason)) => Some(Outcome::Withheld(reason.clone())),
            Some(Finding::Undecided) => {
                let worker = worker.short();
                let text =
                    format!("what verifiers say of round {round} of {worker} decides nothing");
                self.history.note(now, EventKind::Audit, text);
                Some(Outcome::Unverified)
            }
            Some(Finding::Irreproducible) => {
                let text = format!("round {round} of {} cannot be repeated", worker.short());
                self.history.note(now, EventKind::Audit, text);
                Some(Outcome::Irreproducible)
            }
            Some(Finding::ReplayPassed(_) | Finding::CodecPassed | Finding::CodecFault(_)) => None,
            None => {
                let text = format!("no verifier could replay round {round} of {}", worker.short());
                self.history.note(now, EventKind::Audit, text);
                Some(Outcome::Unverified)
            }
        };
        if let Some(finding) = finding {
            let judgements = self.keep_evidence(&task);
            let case = task.case(judgements.clone());
            self.note_contradiction(&case);
            let work = reward::work(&self.spec.model, task.signed.commitment.tokens);
            let new = judgements.get(known..).unwrap_or_default();
            self.note_words(now, &case, new);
            if let Some(fault) = outcome.clone().filter(|outcome| outcome.fault().is_some()) {
                self.cases.push((fault, case));
            }
            for judgement in new.iter().filter(|it| it.verdict.agrees_with(&finding)) {
                self.verifier_work.entry(judgement.verifier()).or_default().0 += work.0;
            }
            let one_word = outcome.is_none() && judgements.len() == 1;
            if outcome.is_none()
                && known == 0
                && shown_to_all(&judgements)
                && let Some(member) = self.membership.get_mut(worker)
            {
                member.credibility.passed();
            }
            self.note_checks([Check { round, worker, finding, judgements }]);
            if one_word {
                self.audits.keep_passed(self.round.number, task.clone());
            }
        }
        if task.before_merge {
            if round == self.round.number {
                self.round.replayed.insert(worker, outcome);
            }
        } else if let Some(outcome) = outcome.filter(|outcome| *outcome != Outcome::Unverified) {
            self.take_back(now, round, worker, outcome);
        }
    }

    /// Where nobody accuses there is nothing to show. Otherwise what the verdicts follow from is kept.
    fn keep_evidence(&mut self, task: &ReplayTask) -> Vec<Judgement> {
        let round = task.replay.assignment.round;
        let mut judgements = task.judgements.clone();
        let accused = judgements.iter().any(|judgement| judgement.verdict.accuses());
        for judgement in &mut judgements {
            let Some(evidence) = judgement.evidence.filter(|_| accused) else {
                judgement.evidence = None;
                continue;
            };
            self.evidence.push((round, evidence));
        }
        judgements
    }

    /// What was found goes into the next record, and is shown.
    fn note_checks(&mut self, found: impl IntoIterator<Item = Check>) {
        let found: Vec<_> = found.into_iter().collect();
        self.history.note_checks(&found);
        self.checks.extend(found);
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
            Stage::Admitted => self.handle_late_entropy(now, round, entropy),
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

#[cfg(test)]
mod tests;
