//! How a round ends: outcomes, merge, record, later audits; and what is wanted meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_proto::message::{Assignment, Flagged, Replay, SignedCommitment, Source};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Balance, Digest, NodeId, Round, Tick, TokenCount, WorkUnits};
use serde::{Deserialize, Serialize};

use super::Coordinator;
use super::audits::Asked;
use super::faults::PendingFault;
use super::input::{
    CodecCheck, Contribution, Effect, MergeOrder, MergeResult, RevocationOrder, Stage,
};
use super::membership::Head;
use super::round::{OpenRound, Parameters, Phase};
use super::status::EventKind;
use super::weighing::Measurement;
use crate::draw::Beacon;
use crate::panel::{self, Attendee};
use crate::record::{
    Draw, Earning, Entropy, Outcome, Revocation, RoundRecord, Weighed, WorkerResult, admitted_set,
    by_round, committed, hiding_is_held_against, loss_effects,
};
use crate::reward;

/// A merged round, kept while its evidence is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ClosedRound {
    pub(super) assignments: BTreeMap<NodeId, Assignment>,
    pub(super) heads: BTreeMap<NodeId, Head>,
    pub(super) commitments: BTreeMap<NodeId, SignedCommitment>,
    pub(super) results: Vec<WorkerResult>,
    /// Workers that were replayed before the merge.
    pub(super) replayed: Vec<NodeId>,
    pub(super) verified: bool,
    pub(super) attending: Vec<Attendee>,
    pub(super) committed: Digest,
    pub(super) admitted_set: Digest,
    /// Known once the admitted set is anchored and two blocks have followed.
    pub(super) entropy: Option<Entropy>,
    /// Known once it is merged.
    pub(super) flagged: Option<Vec<Flagged>>,
    pub(super) drawn: bool,
    pub(super) outer_learning_rate: f32,
    /// Whose parts later merges took back.
    pub(super) revoked: Vec<NodeId>,
    pub(super) weighings: Vec<Weighed>,
}

impl ClosedRound {
    fn contributions(&self) -> Vec<Contribution> {
        let admitted = |worker: &NodeId| {
            self.results.iter().any(|r| r.worker == *worker && r.outcome == Outcome::Admitted)
        };
        let effects = loss_effects(&self.weighings);
        self.commitments
            .iter()
            .filter(|(worker, _)| admitted(worker))
            .map(|(&worker, signed)| Contribution {
                worker,
                payload: signed.commitment.payload,
                tokens: signed.commitment.tokens,
                loss_effect: effects.get(&worker).copied(),
            })
            .collect()
    }
}

impl Coordinator {
    /// What the open round's first draw is over.
    pub(super) fn committed(&self) -> Digest {
        let OpenRound { candidates, sequences_max, attending, .. } = &self.round;
        let work = (&candidates[..], *sequences_max);
        committed(self.last_record, &self.round.commit_set(), work, attending)
    }

    /// What verifiers are asked about a worker's round: `attending` is of whom they are drawn.
    pub(super) fn replay_of(
        &self,
        (assignment, signed): (&Assignment, &SignedCommitment),
        head: Option<&Head>,
        (attending, beacon): (&[Attendee], Beacon),
    ) -> Asked {
        let (worker, terms) = (assignment.worker, &self.spec.verification);
        let replay = Replay {
            id: 0,
            assignment: assignment.clone(),
            head: head.map(|head| head.signed.commitment.clone()),
            source: Source { node: worker, addresses: self.addresses(worker) },
        };
        Asked {
            replay,
            signed: signed.clone(),
            chunks: beacon.replay_chunks(worker, terms.replay_chunks, self.chunk_count),
            panel: panel::panel(beacon, worker, attending),
            classes: attending.to_vec(),
        }
    }

    /// The checks have ended: says what became of everybody and orders the merge.
    pub(super) fn close_checks(&mut self, now: Tick) {
        for (task, finding) in self.audits.end_before_merge() {
            self.handle_replayed(now, task, Some(finding));
        }
        let found: Vec<_> = self.round.codec_checks().collect();
        self.note_checks(found);
        let workers: Vec<NodeId> = self.round.candidates.iter().map(|c| c.worker).collect();
        let results: Vec<_> = workers.into_iter().map(|worker| self.result(worker)).collect();
        let held_against = hiding_is_held_against(&results);
        if !held_against {
            let number = self.round.number;
            let text =
                format!("round {number}: most workers showed nothing, so none is held to it");
            self.history.note(now, EventKind::Round, text);
        }
        for result in &results {
            self.settle_member(now, result, held_against);
        }
        let round = &self.round;
        let closed = ClosedRound {
            assignments: round.assignments.clone(),
            heads: round.heads.clone(),
            commitments: round.commitments.clone(),
            replayed: round.replayed.keys().copied().collect(),
            verified: round.verified,
            attending: round.attending.clone(),
            committed: self.committed(),
            admitted_set: admitted_set(round.number, &results),
            entropy: None,
            flagged: None,
            drawn: false,
            outer_learning_rate: outer_learning_rate(&self.spec, round.number),
            revoked: Vec::new(),
            weighings: round.measurement.as_ref().map(Measurement::weighed).unwrap_or_default(),
            results,
        };
        let asked = round.measurement.as_ref().is_some_and(|it| !it.updates.is_empty());
        if asked && closed.weighings.is_empty() {
            let text = format!(
                "round {} is merged without loss_gate: too few verifiers answered in time",
                round.number
            );
            self.history.note(now, EventKind::Round, text);
        }
        self.closed.insert(round.number, closed);
        self.enter_merge(now);
    }

    fn enter_merge(&mut self, now: Tick) {
        self.round.enter(Phase::Merging, now);
        if self.merge_order().is_none() {
            self.finish_merge(now, None);
        }
    }

    fn result(&self, worker: NodeId) -> WorkerResult {
        let outcome = self.round.outcome(worker);
        let tokens =
            self.round.commitments.get(&worker).map_or(TokenCount(0), |c| c.commitment.tokens);
        let full = reward::work(&self.spec.model, tokens);
        let paid = reward::reward(&self.spec, full);
        let (work, reward) = match outcome {
            Outcome::Admitted => (full, paid),
            Outcome::Late => (full, reward::late(paid)),
            Outcome::NotCommitted
            | Outcome::NotUploaded
            | Outcome::Malformed(_)
            | Outcome::CodecFault(_)
            | Outcome::ReplayFault(_)
            | Outcome::Withheld(_)
            | Outcome::Unverified
            | Outcome::Irreproducible => (WorkUnits(0), Balance(0)),
        };
        WorkerResult { worker, outcome, work, reward }
    }

    /// What an outcome means for the worker: its pay, its trust and the state it goes on from.
    fn settle_member(&mut self, now: Tick, result: &WorkerResult, hiding_is_held_against: bool) {
        let number = self.round.number;
        let shown = self.shown_speed(result);
        let Some(member) = self.membership.get_mut(result.worker) else { return };
        match shown {
            Some((assumed, Some(speed))) => member.note_speed(assumed, speed),
            Some((assumed, None)) => member.note_nothing_done(assumed),
            None => {}
        }
        member.work.0 += result.work.0;
        member.earned.0 += result.reward.0;
        match &result.outcome {
            Outcome::Admitted => member.note_admitted(),
            Outcome::NotCommitted => {}
            Outcome::Late | Outcome::Unverified => {
                if let Some(head) = &mut member.head {
                    head.sent_values_returned = true;
                }
            }
            Outcome::NotUploaded | Outcome::Withheld(_) if !hiding_is_held_against => {
                member.start_afresh();
            }
            Outcome::Irreproducible => member.start_afresh(),
            fault @ (Outcome::NotUploaded
            | Outcome::Withheld(_)
            | Outcome::Malformed(_)
            | Outcome::CodecFault(_)
            | Outcome::ReplayFault(_)) => {
                let fault = fault.clone();
                self.accuse(now, number, result.worker, &fault);
            }
        }
        self.history.note_outcome(now, number, result);
    }

    /// The speed that a worker's share followed from, and the one that it showed: that of a commitment which
    /// came to something. None where the round says nothing about it.
    fn shown_speed(&self, result: &WorkerResult) -> Option<(u64, Option<u64>)> {
        let worker = result.worker;
        let assumed =
            self.round.candidates.iter().find(|it| it.worker == worker)?.tokens_per_second;
        match result.outcome {
            Outcome::Admitted | Outcome::Late => {
                let tokens = self.round.commitments.get(&worker)?.commitment.tokens.0;
                let elapsed_ms = self.round.committed_ms.get(&worker)?;
                Some((assumed, Some(tokens.saturating_mul(1_000) / elapsed_ms)))
            }
            Outcome::NotCommitted | Outcome::NotUploaded => Some((assumed, None)),
            Outcome::Malformed(_)
            | Outcome::CodecFault(_)
            | Outcome::ReplayFault(_)
            | Outcome::Withheld(_)
            | Outcome::Unverified
            | Outcome::Irreproducible => None,
        }
    }

    pub(super) fn handle_late_entropy(&mut self, now: Tick, round: Round, entropy: Entropy) {
        let Some(closed) = self.closed.get_mut(&round) else { return };
        closed.entropy.get_or_insert(entropy);
        self.draw_audits(now, round);
    }

    /// The audit draw over a round, once it is merged and its randomness is known.
    fn draw_audits(&mut self, now: Tick, round: Round) {
        let Some(closed) = self.closed.get_mut(&round) else { return };
        let (Some(entropy), Some(flagged), false) =
            (closed.entropy, closed.flagged.clone(), closed.drawn)
        else {
            return;
        };
        closed.drawn = true;
        let closed = closed.clone();
        self.finish_later(now);
        let beacon = late_beacon(closed.committed, closed.admitted_set, entropy);
        self.draw_second_looks(now, round, beacon);
        let rate = self.spec.verification.audit_rate_per_mille;
        let drawn: Vec<NodeId> = closed
            .results
            .iter()
            .filter(|result| closed.verified && !closed.replayed.contains(&result.worker))
            .filter(|result| {
                let member = self.membership.get(result.worker);
                let drawn =
                    member.is_some_and(|m| beacon.audits(result.worker, m.credibility, rate));
                match result.outcome {
                    Outcome::Admitted => {
                        drawn || flagged.iter().any(|it| it.worker == result.worker)
                    }
                    Outcome::Late => true,
                    Outcome::NotCommitted
                    | Outcome::NotUploaded
                    | Outcome::Malformed(_)
                    | Outcome::CodecFault(_)
                    | Outcome::ReplayFault(_)
                    | Outcome::Withheld(_)
                    | Outcome::Unverified
                    | Outcome::Irreproducible => false,
                }
            })
            .map(|result| result.worker)
            .collect();
        for worker in &drawn {
            let asked = self.replay_of(
                (&closed.assignments[worker], &closed.commitments[worker]),
                closed.heads.get(worker),
                (&closed.attending, beacon),
            );
            self.audits.ask_replay(asked, false);
            self.history.note(
                now,
                EventKind::Audit,
                format!("round {round} of {} is audited", worker.short()),
            );
        }
        self.draws.push(Draw { round, entropy, drawn });
    }

    /// Whether another verifier looks over what is in the record before that of `round`, whose beacon nobody could know when
    /// it was found.
    fn draw_second_looks(&mut self, now: Tick, round: Round, beacon: Beacon) {
        let share = self.spec.verification.recheck_per_mille;
        if let Some(record) = round.0.checked_sub(1) {
            self.look_over(now, Round(record), |of, worker| beacon.looks_again(of, worker, share));
        }
    }

    /// Has those looked over that `drawn` says of what is in the record of `record`.
    fn look_over(&mut self, now: Tick, record: Round, drawn: impl Fn(Round, NodeId) -> bool) {
        let again = self.audits.look_over(now, record, drawn);
        if !again.is_empty() {
            self.finish_later(now);
        }
        for (of, worker) in again {
            let text = format!("another verifier looks over round {of} of {}", worker.short());
            self.history.note(now, EventKind::Audit, text);
        }
    }

    /// The merge is done (or there was nothing to merge): records the round and opens the next.
    pub(super) fn finish_merge(&mut self, now: Tick, result: Option<MergeResult>) {
        let number = self.round.number;
        let (merge, theta_next, flagged) = match result {
            Some(MergeResult { merge, theta, flagged }) => (Some(merge), theta, flagged),
            None => (None, self.round.theta, Vec::new()),
        };
        let residual = merge.map_or(self.round.residual, |merge| Some(merge.residual));
        let parameters = Parameters { theta: theta_next, residual };
        let revocations =
            if merge.is_some() { std::mem::take(&mut self.revocations) } else { Vec::new() };
        if let Some(closed) = self.closed.get_mut(&number) {
            closed.flagged = Some(flagged);
        }
        for (of, workers) in by_round(&revocations) {
            if let Some(closed) = self.closed.get_mut(&of) {
                closed.revoked.extend(workers);
            }
        }
        let record = self.record(theta_next, merge, revocations);
        self.last_record = record.digest();
        self.quarantine.follow(&self.spec, &record, |check| {
            let signed = self.closed.get(&check.round)?.commitments.get(&check.worker)?;
            Some(&signed.commitment)
        });
        self.history.note_round(now, &self.round, &record);
        for Flagged { worker, signal } in &record.flagged {
            let worker = worker.short();
            let text = format!("round {number} of {worker} is audited: its update {signal}");
            self.history.note(now, EventKind::Audit, text);
        }
        self.unsettled.push_back(record);
        self.last_merge = merge;

        let assigned: u64 = self.round.assignments.values().map(|a| u64::from(a.sequences)).sum();
        let first_sequence = self.round.first_sequence + assigned;
        let next = number.next();
        let deadline = now.after_ms(self.spec.round.sync_ms);
        self.round = OpenRound::new(next, parameters, first_sequence, now, deadline);
        let last = next.0 >= self.spec.run.rounds;
        if last {
            let deadline = self.finishing_deadline(now);
            self.round.enter(Phase::Finishing { deadline }, now);
        }
        let kept = next.0.saturating_sub(self.spec.run.evidence_rounds);
        self.audits.forget_evaluations_before(Round(kept));
        if last || next.0.is_multiple_of(self.spec.verification.evaluate_every_rounds) {
            self.audits.ask_evaluation(next, theta_next);
        }
        self.closed.retain(|round, _| round.0 >= kept);
        self.audits.forget_passed_before(Round(kept.saturating_sub(1)));
        let disputed: BTreeSet<Round> = self.disputed().collect();
        self.evidence.retain(|(round, _)| round.0 >= kept || disputed.contains(round));
        self.cases.retain(|(_, case)| case.round().0 >= kept);
        self.draw_audits(now, number);
        if panel::all_is_looked_over(number, self.spec.run.rounds) {
            self.look_over(now, number, |_, _| true);
        }
    }

    fn record(
        &mut self,
        theta_next: Digest,
        merge: Option<manyhands_proto::message::Merge>,
        revocations: Vec<Revocation>,
    ) -> RoundRecord {
        let verifier_work = std::mem::take(&mut self.verifier_work);
        for (verifier, work) in &verifier_work {
            if let Some(member) = self.membership.get_mut(*verifier) {
                member.work.0 += work.0;
                member.earned.0 += reward::reward(&self.spec, *work).0;
            }
        }
        let round = &self.round;
        let closed = self.closed.get(&round.number);
        let results = closed.map(|closed| closed.results.clone()).unwrap_or_default();
        let weighings = closed.map(|closed| closed.weighings.clone()).unwrap_or_default();
        let flagged = closed.and_then(|closed| closed.flagged.clone()).unwrap_or_default();
        let earnings = self
            .membership
            .iter()
            .filter(|(_, member)| member.earned.0 > 0)
            .map(|(account, member)| {
                // A node that changed its role may have done both.
                let trained = results.iter().find(|result| result.worker == account);
                let trained = trained.map_or(0, |result| result.work.0);
                let verified = verifier_work.get(&account).map_or(0, |work| work.0);
                let work = WorkUnits(trained + verified);
                Earning { account, work, cumulative: member.earned }
            })
            .collect();
        RoundRecord {
            run: self.run,
            round: round.number,
            previous: self.last_record,
            theta: round.theta,
            theta_next,
            first_sequence: round.first_sequence,
            candidates: round.candidates.clone(),
            verified: round.verified,
            attending: round.attending.clone(),
            sequences_max: round.sequences_max,
            commitments: round.commitments.values().cloned().collect(),
            commitments_entropy: round.commitments_entropy,
            results,
            merge,
            flagged,
            revocations,
            checks: std::mem::take(&mut self.checks),
            false_ends: std::mem::take(&mut self.judges.found),
            draws: std::mem::take(&mut self.draws),
            weighings,
            evaluations: std::mem::take(&mut self.evaluations),
            earnings,
        }
    }

    /// What is asked now has the whole time before it.
    pub(super) fn finish_later(&mut self, now: Tick) {
        if matches!(self.round.phase, Phase::Finishing { .. }) {
            let deadline = self.finishing_deadline(now);
            self.round.phase = Phase::Finishing { deadline };
        }
    }

    /// The last audits have this long, from the last draw on.
    fn finishing_deadline(&self, now: Tick) -> Tick {
        now.after_ms(self.spec.round.check_ms.saturating_mul(2))
    }

    /// After the last merge: waits for audits and evaluations, then for the chain.
    pub(super) fn finish(&mut self, now: Tick, over: bool) -> bool {
        let draws_known = self.closed.values().all(|closed| closed.entropy.is_some());
        if over {
            let present = self.verifiers();
            for (task, finding) in self.audits.end_all(&present) {
                self.handle_replayed(now, task, finding);
            }
        } else if !draws_known || !self.audits.is_idle() {
            return false;
        }
        if !self.revocations.is_empty() {
            // A round of its own, without workers, takes back what was found last.
            self.enter_merge(now);
        } else if !self.checks.is_empty()
            || !self.draws.is_empty()
            || !self.evaluations.is_empty()
            || !self.verifier_work.is_empty()
            || !self.judges.found.is_empty()
        {
            // And what was found without a fault belongs on record too.
            self.finish_merge(now, None);
            self.audits.evaluated(self.round.number, self.round.theta);
        } else {
            return false;
        }
        true
    }

    fn may_complete(&self) -> bool {
        matches!(self.round.phase, Phase::Finishing { .. })
            && self.audits.is_idle()
            && self.unsettled.is_empty()
            && self.faults.is_empty()
            && self.judges.is_idle()
            && self.judges.found.is_empty()
            && self.revocations.is_empty()
            && self.closed.values().all(|closed| closed.entropy.is_some())
    }

    /// What the open round merges; none if there is nothing.
    fn merge_order(&self) -> Option<MergeOrder> {
        let round = &self.round;
        let contributions =
            self.closed.get(&round.number).map(ClosedRound::contributions).unwrap_or_default();
        let revocations: Vec<_> = by_round(&self.revocations)
            .into_iter()
            .filter_map(|(number, workers)| {
                let closed = self.closed.get(&number)?;
                Some(RevocationOrder {
                    round: number,
                    workers,
                    earlier: closed.revoked.clone(),
                    contributions: closed.contributions(),
                    outer_learning_rate: closed.outer_learning_rate,
                })
            })
            .collect();
        let anything = !contributions.is_empty() || !revocations.is_empty();
        anything.then(|| MergeOrder {
            round: round.number,
            theta: round.theta,
            residual: round.residual,
            contributions,
            revocations,
            outer_learning_rate: outer_learning_rate(&self.spec, round.number),
        })
    }

    /// Everything that is wanted now, read off the state.
    pub(super) fn wanted(&self) -> Vec<Effect> {
        let round = &self.round;
        let mut wanted = Vec::new();
        let claims = self.membership.claims().filter(|(_, claimed, _)| *claimed == round.number);
        wanted.extend(claims.map(|(worker, claimed, proof)| Effect::CheckPossession {
            round: claimed,
            worker,
            theta: round.theta,
            proof,
        }));
        if !round.stakes_unchecked.is_empty() {
            let members = round.stakes_unchecked.clone();
            wanted.push(Effect::CheckStakes { round: round.number, members });
        }
        if matches!(round.phase, Phase::Uploading { .. } | Phase::Checking { .. }) {
            self.want_evidence(&mut wanted);
        }
        wanted.extend(self.audits.comparisons().map(Effect::Compare));
        wanted.extend(self.judges.wanted());
        if round.phase == Phase::Merging {
            wanted.extend(self.merge_order().map(Effect::Merge));
        }
        for (&number, closed) in self.closed.iter().filter(|(_, closed)| closed.entropy.is_none()) {
            let stage = Stage::Admitted;
            wanted.push(Effect::Anchor { round: number, stage, digest: closed.admitted_set });
        }
        wanted
            .extend(self.unsettled.front().map(|record| Effect::Settle(Box::new(record.clone()))));
        wanted.extend(self.faults.iter().map(PendingFault::report));
        if self.may_complete() {
            wanted.push(Effect::CompleteRun { theta: round.theta });
        }
        wanted
    }

    fn want_evidence(&self, wanted: &mut Vec<Effect>) {
        let round = &self.round;
        wanted.extend(round.uploads_missing().map(|(worker, signed)| Effect::FetchPayload {
            round: round.number,
            worker,
            payload: signed.commitment.payload,
            payload_bytes: signed.commitment.payload_bytes,
        }));
        let committed = self.committed();
        let Some(entropy) = round.commitments_entropy else {
            let stage = Stage::Commitments;
            wanted.push(Effect::Anchor { round: round.number, stage, digest: committed });
            return;
        };
        let beacon = Beacon::new(committed, entropy.value);
        for worker in round.codec_missing() {
            let work = round.work(worker).expect("whoever uploaded has committed");
            let round = round.number;
            wanted.push(Effect::CheckCodec(CodecCheck { round, worker, beacon, work }));
        }
    }

    /// What is newly wanted since the last call. An effect that is no longer wanted needs no answer:
    /// [`Self::is_asked`] tells of those under way, and [`Self::is_wanted`] of one that ended.
    pub fn poll_effects(&mut self) -> Vec<Effect> {
        let wanted = self.wanted();
        self.asked.retain(|effect| wanted.contains(effect));
        let new: Vec<_> =
            wanted.into_iter().filter(|effect| !self.asked.contains(effect)).collect();
        self.asked.extend(new.iter().cloned());
        new
    }

    /// Whether an effect that ended is still wanted: what was handled since it was handed out may have changed what
    /// is to be done.
    pub fn is_wanted(&self, effect: &Effect) -> bool {
        self.wanted().contains(effect)
    }

    /// Whether an effect was wanted when [`Self::poll_effects`] was last called.
    pub fn is_asked(&self, effect: &Effect) -> bool {
        self.asked.contains(effect)
    }
}

fn outer_learning_rate(spec: &RunSpec, round: Round) -> f32 {
    manyhands_gradient::outer_learning_rate(&spec.aggregation, round, spec.run.rounds)
}

/// The beacon of audits after the merge: later than both sets.
pub fn late_beacon(committed: Digest, admitted_set: Digest, entropy: Entropy) -> Beacon {
    let mut sets = committed.as_bytes().to_vec();
    sets.extend_from_slice(admitted_set.as_bytes());
    Beacon::new(Digest::derive("manyhands 2026 both sets", &sets), entropy.value)
}
