//! Who had to be replayed: credibility from recorded verdicts, probation before the merge, and the
//! draws after it.
//!
//! A record lists the checks and the draws of its time, each in order, but not how the two lists
//! interleave. So a draw holds if it follows from the credibility at some moment of the record's time,
//! not before the moment of the draw before it; the coordinator's choice is no wider than that.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{NodeId, Round};
use manyhands_rules::coordinator::late_beacon;
use manyhands_rules::credibility::Credibility;
use manyhands_rules::panel::shown_to_all;
use manyhands_rules::record::{Draw, Finding, Outcome, RoundRecord};

use crate::records::{Records, close_of, early_checks, is_kept, looked_over};
use crate::report::{Findings, Link};

/// A draw waits for a block two after an anchor; each round waits for such a block of its own, so after
/// this many more rounds it must be there.
const DRAW_ROUNDS_MAX: u32 = 8;

pub(crate) struct Trust<'a> {
    spec: &'a RunSpec,
    members: BTreeMap<NodeId, Credibility>,
    drawn: BTreeSet<Round>,
}

/// Something that changes a worker's credibility.
#[derive(Debug, Clone, Copy)]
enum Event {
    Passed(NodeId),
    Failed(NodeId),
}

impl<'a> Trust<'a> {
    pub(crate) fn new(spec: &'a RunSpec) -> Self {
        Self { spec, members: BTreeMap::new(), drawn: BTreeSet::new() }
    }

    pub(crate) fn step(
        &mut self,
        records: &Records,
        record: &RoundRecord,
        findings: &mut Findings,
    ) {
        for candidate in &record.candidates {
            let newcomer = Credibility::on_probation(self.spec.verification.probation_checks);
            self.members.entry(candidate.worker).or_insert(newcomer);
        }
        let draws = self.sound_draws(records, record, findings);
        // Where nobody uploaded, no check marks the moment at which the outcomes were decided.
        let closes = match close_of(record) {
            Some(close) => close..=close,
            None if record.results.is_empty() => record.checks.len()..=record.checks.len(),
            None => 0..=record.checks.len(),
        };
        let last = *closes.end();
        for close in closes {
            let events = self.events(records, record, close);
            let mut members = self.members.clone();
            let told = follow(self.spec, records, record, &draws, &events, &mut members);
            let holds = told.unexplained.is_none() && told.probation;
            if !holds && close < last {
                continue;
            }
            self.members = members;
            self.report(record, &draws, told, findings);
            break;
        }
    }

    /// The record's draws that are of a round to be drawn from, and not yet drawn from.
    fn sound_draws<'r>(
        &mut self,
        records: &'r Records,
        record: &'r RoundRecord,
        findings: &mut Findings,
    ) -> Vec<&'r Draw> {
        let mut sound = Vec::new();
        for draw in &record.draws {
            let of = records.get(draw.round).filter(|_| draw.round <= record.round);
            let due = of.is_some_and(|of| !of.results.is_empty());
            let first = self.drawn.insert(draw.round);
            let holds = findings.require(
                Link::AuditDraw.at(draw.round),
                due && first,
                || "one draw for each round",
                || format!("another in the record of round {}", record.round),
            );
            if holds {
                sound.push(draw);
            }
        }
        sound
    }

    /// What changed credibilities in the record's time, in order; the outcomes are decided just
    /// before check `close`. The second number is the event at which they are.
    fn events(&self, records: &Records, record: &RoundRecord, close: usize) -> (Vec<Event>, usize) {
        let mut events = Vec::new();
        let mut closed_at = None;
        for index in 0..=record.checks.len() {
            if index == close {
                closed_at = Some(events.len());
                let failed = record.results.iter().filter(|result| loses_trust(&result.outcome));
                events.extend(failed.map(|result| Event::Failed(result.worker)));
            }
            let Some(check) = record.checks.get(index) else { continue };
            let late = check.round != record.round || index >= close;
            match check.finding {
                // That it passed counted when one had found so.
                Finding::ReplayPassed(_) if looked_over(records, record, check).is_some() => {}
                Finding::ReplayPassed(_) if !shown_to_all(&check.judgements) => {}
                Finding::ReplayPassed(_) => events.push(Event::Passed(check.worker)),
                Finding::ReplayFault(_) | Finding::Withheld(_) | Finding::Irreproducible
                    if late
                        && !check.is_of_codec()
                        && is_kept(self.spec, record.round, check.round) =>
                {
                    events.push(Event::Failed(check.worker));
                }
                Finding::ReplayFault(_)
                | Finding::Withheld(_)
                | Finding::CodecPassed
                | Finding::CodecFault(_)
                | Finding::Undecided
                | Finding::Irreproducible => {}
            }
        }
        let closed_at = closed_at.unwrap_or(events.len());
        (events, closed_at)
    }

    fn report(&self, record: &RoundRecord, draws: &[&Draw], told: Told, findings: &mut Findings) {
        let round = record.round;
        if !record.results.is_empty() {
            findings.require(
                Link::AuditDraw.at(round),
                told.probation,
                || "replays before the merge of exactly those on probation",
                || {
                    let replayed: Vec<_> = early_checks(record).map(|c| c.worker).collect();
                    format!("replays of {}", named(&replayed))
                },
            );
        }
        for (index, draw) in draws.iter().enumerate() {
            let at = Link::AuditDraw.at(draw.round);
            match &told.unexplained {
                Some((first, expected)) if index == *first => {
                    findings.failed(at, named(expected), named(&draw.drawn));
                }
                // After one that does not hold, the moments of the others are not known.
                Some((first, _)) if index > *first => {
                    findings.unchecked(at, "a draw", "the draw before it does not hold");
                }
                Some(_) | None => findings.passed(at),
            }
        }
    }

    /// What is missing in the end: draws that should have been made, and drawn workers without a
    /// verdict.
    pub(crate) fn finish(&self, records: &Records, complete: bool, findings: &mut Findings) {
        let Some(newest) = records.newest() else { return };
        for record in records.trained() {
            let at = Link::AuditDraw.at(record.round);
            if self.drawn.contains(&record.round) {
                continue;
            }
            let overdue = newest.0 > record.round.0.saturating_add(DRAW_ROUNDS_MAX) || complete;
            if overdue {
                findings.failed(at, "a draw of the workers to replay", "none");
            } else {
                findings.unchecked(at, "a draw of the workers to replay", "none on record yet");
            }
        }
        let judged: BTreeSet<(Round, NodeId)> = records
            .all
            .iter()
            .flat_map(|record| &record.checks)
            .filter(|check| !check.is_of_codec())
            .map(|check| (check.round, check.worker))
            .collect();
        for draw in records.all.iter().flat_map(|record| &record.draws) {
            for &worker in
                draw.drawn.iter().filter(|worker| !judged.contains(&(draw.round, **worker)))
            {
                let why = "no verdict on record: it is not done yet, or no verifier could do it";
                findings.unchecked(Link::AuditDraw.at(draw.round).of(worker), "a replay", why);
            }
        }
    }
}

/// Rounds that an unverified finding names; the report counts the others.
const ROUNDS_NAMED_MAX: usize = 8;

/// Says in which rounds no verifier was there, by the coordinator's word: then nobody is drawn, and
/// nothing was replayed. Returns how many there are.
pub(crate) fn check_attended(records: &Records, bonded: u32, findings: &mut Findings) -> u32 {
    let unattended: Vec<Round> =
        records.trained().filter(|record| !record.verified).map(|record| record.round).collect();
    if unattended.is_empty() {
        return 0;
    }
    let mut rounds: Vec<String> =
        unattended.iter().take(ROUNDS_NAMED_MAX).map(ToString::to_string).collect();
    let left_out = unattended.len() - rounds.len();
    if left_out > 0 {
        rounds.push(format!("{left_out} more"));
    }
    let mut why = format!(
        "no verifier, says the coordinator, so that nothing was replayed: {} of {} rounds ({})",
        unattended.len(),
        records.trained().count(),
        rounds.join(", ")
    );
    if bonded > 0 {
        why += &format!("; verifiers with a bond on chain: {bonded}");
    }
    findings.unchecked(Link::AuditDraw.of_run(), "a verifier in every round", why);
    u32::try_from(unattended.len()).unwrap_or(u32::MAX)
}

/// How a record's draws and replays agree with a course of events.
struct Told {
    /// The workers replayed before the merge are those on probation when the round opened.
    probation: bool,
    /// The first draw that no moment explains, with what would follow from the last one.
    unexplained: Option<(usize, Vec<NodeId>)>,
}

/// Goes through the events, changing `members`.
fn follow(
    spec: &RunSpec,
    records: &Records,
    record: &RoundRecord,
    draws: &[&Draw],
    (events, closed_at): &(Vec<Event>, usize),
    members: &mut BTreeMap<NodeId, Credibility>,
) -> Told {
    let mut probation = false;
    let mut next = 0;
    for moment in 0..=events.len() {
        if moment > 0 {
            apply(members, events[moment - 1]);
        }
        probation |= moment <= *closed_at && fits_probation(record, members);
        while draws.get(next).is_some_and(|draw| drawn(spec, records, draw, members) == draw.drawn)
        {
            next += 1;
        }
    }
    let unexplained = draws.get(next).map(|draw| (next, drawn(spec, records, draw, members)));
    Told { probation, unexplained }
}

fn apply(members: &mut BTreeMap<NodeId, Credibility>, event: Event) {
    let (Event::Passed(worker) | Event::Failed(worker)) = event;
    let Some(credibility) = members.get_mut(&worker) else { return };
    match event {
        Event::Passed(_) => credibility.passed(),
        Event::Failed(_) => credibility.failed(),
    }
}

/// Whether a round that opened now would have waited for just the replays that are on record.
fn fits_probation(record: &RoundRecord, members: &BTreeMap<NodeId, Credibility>) -> bool {
    let replayed: BTreeSet<NodeId> = early_checks(record).map(|check| check.worker).collect();
    record.results.iter().all(|result| {
        let waits = record.verified
            && members.get(&result.worker).is_some_and(Credibility::is_on_probation);
        match &result.outcome {
            Outcome::Admitted
            | Outcome::Late
            | Outcome::ReplayFault(_)
            | Outcome::Irreproducible => waits == replayed.contains(&result.worker),
            Outcome::Unverified => waits,
            // Ended before any replay, or by one: then it was on probation.
            Outcome::NotCommitted
            | Outcome::NotUploaded
            | Outcome::Malformed(_)
            | Outcome::CodecFault(_)
            | Outcome::Withheld(_) => waits || !replayed.contains(&result.worker),
        }
    })
}

/// The draw over `draw.round`, with these credibilities.
fn drawn(
    spec: &RunSpec,
    records: &Records,
    draw: &Draw,
    members: &BTreeMap<NodeId, Credibility>,
) -> Vec<NodeId> {
    let Some(of) = records.get(draw.round) else { return Vec::new() };
    let beacon = late_beacon(of.committed(), of.admitted_set(), draw.entropy);
    let rate = spec.verification.audit_rate_per_mille;
    let replayed: BTreeSet<NodeId> = early_checks(of).map(|check| check.worker).collect();
    let flagged: BTreeSet<NodeId> = of.flagged.iter().map(|it| it.worker).collect();
    of.results
        .iter()
        .filter(|result| of.verified && !replayed.contains(&result.worker))
        .filter(|result| match result.outcome {
            Outcome::Admitted => {
                flagged.contains(&result.worker)
                    || members
                        .get(&result.worker)
                        .is_some_and(|credibility| beacon.audits(result.worker, *credibility, rate))
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
        })
        .map(|result| result.worker)
        .collect()
}

/// As the coordinator's machine has it when it decides an outcome.
fn loses_trust(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::NotUploaded
        | Outcome::Withheld(_)
        | Outcome::Malformed(_)
        | Outcome::CodecFault(_)
        | Outcome::ReplayFault(_)
        | Outcome::Irreproducible => true,
        Outcome::Admitted | Outcome::Late | Outcome::NotCommitted | Outcome::Unverified => false,
    }
}

fn named(workers: &[NodeId]) -> String {
    if workers.is_empty() {
        return "nobody".to_owned();
    }
    let short: Vec<_> = workers.iter().map(NodeId::short).collect();
    format!("workers {}", short.join(", "))
}
