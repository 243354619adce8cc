//! One round after the other, recomputed from the specification and what earlier records say:
//! assignments, commitments, outcomes and what workers go on from.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_proto::message::{Assignment, Start};
use manyhands_proto::run_file::{Rule, RunSpec};
use manyhands_proto::{Digest, NodeId, Round, RunId};
use manyhands_rules::coordinator::WEIGHERS_MAX;
use manyhands_rules::record::{Check, Finding, Outcome, RoundRecord, Weighed};

use crate::records::{Records, early_checks, late_checks};
use crate::report::{Findings, Link};
use crate::verdicts::Verdicts;

/// What the next round must start from.
pub(crate) struct Walker<'a> {
    run: RunId,
    spec: &'a RunSpec,
    theta: Digest,
    first_sequence: u64,
    heads: BTreeMap<NodeId, Head>,
    verdicts: Verdicts,
}

/// A worker's last commitment, as far as its next assignment names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    round: Round,
    commitment: Digest,
    adam_step: u64,
    sent_values_returned: bool,
}

impl<'a> Walker<'a> {
    pub(crate) fn new(run: RunId, spec: &'a RunSpec) -> Self {
        Self {
            run,
            spec,
            theta: spec.data.theta,
            first_sequence: 0,
            heads: BTreeMap::new(),
            verdicts: Verdicts::default(),
        }
    }

    /// Checks one record and goes on from what it says.
    pub(crate) fn step(
        &mut self,
        records: &Records,
        record: &RoundRecord,
        findings: &mut Findings,
    ) {
        let round = record.round;
        findings.same(Link::Theta.at(round), "θ of the round before", (self.theta, record.theta));
        let assignments = self.assignments(records, record, findings);
        self.check_starts(record, findings);
        self.check_commitments(record, &assignments, findings);
        check_outcomes(record, findings);
        check_weighings(self.spec, record, findings);
        self.verdicts.step(self.spec, records, record, findings);
        self.theta = record.theta_next;
        self.follow(record, &assignments);
    }

    fn assignments(
        &mut self,
        records: &Records,
        record: &RoundRecord,
        findings: &mut Findings,
    ) -> BTreeMap<NodeId, Assignment> {
        let RoundRecord { round, candidates, .. } = record;
        let at = Link::Assignments.at(*round);
        let place = (self.first_sequence, record.first_sequence);
        let limits = self.spec.run.workers_max as usize;
        let ascending = candidates.is_sorted_by(|left, right| left.worker < right.worker);
        let allowed = |worker: &NodeId| {
            self.spec.run.allow.is_empty() || self.spec.run.allow.contains(worker)
        };
        let stranger = candidates.iter().find(|candidate| !allowed(&candidate.worker));
        let trains = round.0 < self.spec.run.rounds;
        let enough = trains != candidates.is_empty()
            && (round.0 > 0 || candidates.len() >= self.spec.run.workers_min as usize);
        let holds = findings.same(at, "first sequence", place)
            & findings.require(
                at,
                ascending && candidates.len() <= limits && enough,
                || {
                    format!(
                        "at most {limits} candidates in worker order, none after the last round"
                    )
                },
                || format!("{} candidates", candidates.len()),
            )
            & stranger.is_none_or(|candidate| {
                findings.failed(at.of(candidate.worker), "an allowed worker", "another");
                false
            });
        if !holds {
            // What follows is still checked, against what the record itself says.
            self.first_sequence = record.first_sequence;
            if !ascending || candidates.len() > limits {
                return BTreeMap::new();
            }
        }
        let assigned = records.plan(self.spec, record);
        let Some(assigned) = assigned else {
            findings.failed(at, "positions that fit 64 bits", "larger ones");
            return BTreeMap::new();
        };
        let sequences: u64 = assigned.iter().map(|a| u64::from(a.sequences)).sum();
        self.first_sequence += sequences;
        assigned.into_iter().map(|assignment| (assignment.worker, assignment)).collect()
    }

    /// A worker goes on from its last commitment, or from nothing: it may have lost its disk.
    fn check_starts(&self, record: &RoundRecord, findings: &mut Findings) {
        for candidate in &record.candidates {
            let Start::Head { round, commitment, sent_values_returned, adam_step } =
                candidate.start
            else {
                continue;
            };
            let named = Head { round, commitment, adam_step, sent_values_returned };
            let known = self.heads.get(&candidate.worker).copied();
            findings.require(
                Link::Assignments.at(record.round).of(candidate.worker),
                known == Some(named),
                || known.map_or("a fresh start".to_owned(), |head| head.to_string()),
                || named.to_string(),
            );
        }
    }

    fn check_commitments(
        &self,
        record: &RoundRecord,
        assignments: &BTreeMap<NodeId, Assignment>,
        findings: &mut Findings,
    ) {
        let ascending = record.commitments.is_sorted_by(|left, right| left.worker < right.worker);
        let order = Link::CommitmentSignature.at(record.round);
        findings.require(
            order,
            ascending,
            || "one commitment per worker, in worker order",
            || "another order",
        );
        for signed in &record.commitments {
            let at = order.of(signed.worker);
            let commitment = &signed.commitment;
            let Some(assignment) = assignments.get(&signed.worker) else {
                findings.failed(at, "a commitment of an assigned worker", "one of another");
                continue;
            };
            let tokens =
                u64::from(assignment.sequences) * u64::from(self.spec.model.context_length);
            findings.same(at, "run", (self.run, signed.run));
            findings.same(at, "round", (record.round, commitment.round));
            let first = (assignment.first_sequence, commitment.first_sequence);
            findings.same(at, "first sequence", first);
            let work = (assignment.digest(), commitment.assignment);
            findings.same(at, "assignment", work);
            findings.same(at, "tokens", (tokens, commitment.tokens.0));
            findings.require(at, signed.verify(), || "the worker's signature", || "another");
        }
    }

    /// What each worker's next round starts from.
    fn follow(&mut self, record: &RoundRecord, assignments: &BTreeMap<NodeId, Assignment>) {
        for signed in &record.commitments {
            let Some(assignment) = assignments.get(&signed.worker) else { continue };
            let before = match assignment.start {
                Start::Fresh => 0,
                Start::Head { adam_step, .. } => adam_step,
            };
            let adam_step = before.saturating_add(assignment.steps.into());
            let (round, commitment) = (record.round, signed.digest());
            let head = Head { round, commitment, adam_step, sent_values_returned: false };
            self.heads.insert(signed.worker, head);
        }
        for result in &record.results {
            match result.outcome {
                Outcome::Admitted | Outcome::NotCommitted => {}
                Outcome::Late | Outcome::Unverified => {
                    if let Some(head) = self.heads.get_mut(&result.worker) {
                        head.sent_values_returned = true;
                    }
                }
                Outcome::NotUploaded
                | Outcome::Withheld(_)
                | Outcome::Malformed(_)
                | Outcome::CodecFault(_)
                | Outcome::ReplayFault(_)
                | Outcome::Irreproducible => _ = self.heads.remove(&result.worker),
            }
        }
        for check in late_checks(record) {
            match check.finding {
                Finding::ReplayFault(_) => _ = self.heads.remove(&check.worker),
                // Without blame: a commitment of this very round may have come after it.
                Finding::Withheld(_) | Finding::Irreproducible => {
                    let newer = |head: &Head| head.round == record.round;
                    if !self.heads.get(&check.worker).is_some_and(newer) {
                        self.heads.remove(&check.worker);
                    }
                }
                Finding::CodecPassed
                | Finding::CodecFault(_)
                | Finding::ReplayPassed(_)
                | Finding::Undecided => {}
            }
        }
    }
}

impl std::fmt::Display for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { round, commitment, adam_step, sent_values_returned } = self;
        let named = commitment.short();
        write!(f, "the state {named} of round {round} after {adam_step} steps")?;
        if *sent_values_returned { f.write_str(", sent values returned") } else { Ok(()) }
    }
}

/// What updates do to held-out loss is measured where a rule asks for it, by up to three verifiers, of workers
/// that committed. Whether they measured well cannot be told from a record.
fn check_weighings(spec: &RunSpec, record: &RoundRecord, findings: &mut Findings) {
    let weighings = &record.weighings;
    let asked = spec.aggregation.rules.contains(&Rule::LossGate) && record.verified;
    let verifiers_max = if asked { WEIGHERS_MAX } else { 0 };
    let committed: BTreeSet<NodeId> = record.commitments.iter().map(|it| it.worker).collect();
    let is_sound = |weighed: &Weighed| {
        weighed.effects.is_sorted_by(|left, right| left.0 < right.0)
            && weighed.effects.iter().all(|(worker, _)| committed.contains(worker))
            && record.admitted().all(|merged| {
                weighed.effects.binary_search_by_key(&merged.worker, |effect| effect.0).is_ok()
            })
    };
    findings.require(
        Link::Outcomes.at(record.round),
        weighings.len() <= verifiers_max
            && weighings.is_sorted_by(|left, right| left.verifier < right.verifier)
            && weighings.iter().all(is_sound),
        || format!("all that was merged, weighed by at most {verifiers_max} verifiers"),
        || format!("{} weighings, or of others", weighings.len()),
    );
}

/// The outcomes that the recorded checks allow.
fn check_outcomes(record: &RoundRecord, findings: &mut Findings) {
    let at = Link::Outcomes.at(record.round);
    let candidates: Vec<NodeId> = record.candidates.iter().map(|c| c.worker).collect();
    let judged: Vec<NodeId> = record.results.iter().map(|result| result.worker).collect();
    findings.require(
        at,
        candidates == judged,
        || "one result per candidate, in worker order",
        || format!("{} results for {} candidates", judged.len(), candidates.len()),
    );
    let admitted: BTreeSet<NodeId> = record.admitted().map(|result| result.worker).collect();
    let flagged = || record.flagged.iter().map(|it| it.worker);
    findings.require(
        Link::AuditDraw.at(record.round),
        flagged().is_sorted_by(|left, right| left < right)
            && flagged().all(|worker| admitted.contains(&worker)),
        || "merged updates that are worth a closer look, once each, in worker order",
        || format!("{}, or others", record.flagged.len()),
    );
    let committed: BTreeSet<NodeId> = record.commitments.iter().map(|c| c.worker).collect();
    let codec = of_this_round(record.checks.iter().filter(|check| check.is_of_codec()));
    let replays = of_this_round(early_checks(record));
    for result in &record.results {
        let worker = result.worker;
        let known = Known {
            committed: committed.contains(&worker),
            codec: codec.get(&worker).copied(),
            replay: replays.get(&worker).copied(),
        };
        let holds = known.allows(&result.outcome);
        findings.require(at.of(worker), holds, || known.says(), || said(&result.outcome));
    }
}

/// The only finding of each worker; the first if there are more, which is wrong anyway.
fn of_this_round<'a>(checks: impl Iterator<Item = &'a Check>) -> BTreeMap<NodeId, &'a Finding> {
    let mut found = BTreeMap::new();
    for check in checks {
        found.entry(check.worker).or_insert(&check.finding);
    }
    found
}

/// What the record says of one worker's round.
struct Known<'a> {
    committed: bool,
    codec: Option<&'a Finding>,
    replay: Option<&'a Finding>,
}

impl Known<'_> {
    fn allows(&self, outcome: &Outcome) -> bool {
        if !self.committed {
            return *outcome == Outcome::NotCommitted;
        }
        match (self.codec, self.replay) {
            (None, None) => matches!(
                outcome,
                Outcome::NotUploaded | Outcome::Malformed(_) | Outcome::Withheld(_)
            ),
            (Some(Finding::CodecFault(fault)), None) => {
                *outcome == Outcome::CodecFault(fault.clone())
            }
            (Some(Finding::Withheld(reason)), None)
            | (Some(Finding::CodecPassed), Some(Finding::Withheld(reason))) => {
                *outcome == Outcome::Withheld(reason.clone())
            }
            (Some(Finding::CodecPassed), None) => {
                matches!(outcome, Outcome::Admitted | Outcome::Late | Outcome::Unverified)
            }
            (Some(Finding::CodecPassed), Some(Finding::ReplayPassed(_))) => {
                matches!(outcome, Outcome::Admitted | Outcome::Late)
            }
            (Some(Finding::CodecPassed), Some(Finding::ReplayFault(distances))) => {
                *outcome == Outcome::ReplayFault(*distances)
            }
            (Some(Finding::CodecPassed), Some(Finding::Undecided)) => {
                *outcome == Outcome::Unverified
            }
            (Some(Finding::CodecPassed), Some(Finding::Irreproducible)) => {
                *outcome == Outcome::Irreproducible
            }
            (_, Some(_))
            | (
                Some(
                    Finding::ReplayPassed(_)
                    | Finding::ReplayFault(_)
                    | Finding::Undecided
                    | Finding::Irreproducible,
                ),
                None,
            ) => false,
        }
    }

    fn says(&self) -> String {
        let finding = |finding: Option<&Finding>| match finding {
            None => "not done",
            Some(Finding::CodecPassed | Finding::ReplayPassed(_)) => "passed",
            Some(Finding::CodecFault(_) | Finding::ReplayFault(_)) => "a fault",
            Some(Finding::Withheld(_)) => "withheld",
            Some(Finding::Undecided) => "undecided",
            Some(Finding::Irreproducible) => "irreproducible",
        };
        let committed = if self.committed { "committed" } else { "not committed" };
        let (codec, replay) = (finding(self.codec), finding(self.replay));
        format!("what follows from: {committed}, codec check {codec}, replay {replay}")
    }
}

fn said(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Admitted => "admitted".to_owned(),
        Outcome::Late => "late".to_owned(),
        Outcome::NotCommitted => "not committed".to_owned(),
        Outcome::NotUploaded => "not uploaded".to_owned(),
        Outcome::Malformed(reason) => format!("malformed ({reason})"),
        Outcome::CodecFault(fault) => format!("a codec fault ({})", fault.reason),
        Outcome::ReplayFault(distances) => {
            format!("a replay fault (at a distance of {})", distances.delta)
        }
        Outcome::Withheld(reason) => format!("withheld ({reason})"),
        Outcome::Unverified => "unverified".to_owned(),
        Outcome::Irreproducible => "irreproducible".to_owned(),
    }
}
