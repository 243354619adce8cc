//! Whether each recorded verdict is of those who were to judge, says what its distances say, and was decided as
//! they decide.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_gradient::Layout;
use manyhands_proto::message::{
    Commitment, Distances, ReplayEnd, ReplayEvidence, Replayed, SignedReplay, Start, Work,
};
use manyhands_proto::run_file::{RunSpec, Verification};
use manyhands_proto::{ChunkIndex, Digest, NodeId, Round};
use manyhands_rules::coordinator::late_beacon;
use manyhands_rules::draw::Beacon;
use manyhands_rules::evidence::{Subject, bytes_max, distances, false_ends, near};
use manyhands_rules::panel::{
    Case, JUDGES_MAX, Judged, Judgement, Pair, all_is_looked_over, decide, panel, within,
};
use manyhands_rules::record::{Check, FalseEnd, Finding, Outcome, RoundRecord};
use manyhands_rules::reward::layout;

use crate::AuditError;
use crate::evidence::Evidence;
use crate::records::{Fetched, Records, early_checks, fetch, is_kept, late_checks, looked_over};
use crate::report::{At, Findings, Link};

/// Worker-rounds with a verdict on record.
#[derive(Debug, Default)]
pub(crate) struct Verdicts(BTreeSet<(Kind, Round, NodeId)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Codec,
    Replay,
    /// Of a replay that one verifier had let pass.
    SecondLook,
}

impl Verdicts {
    pub(crate) fn step(
        &mut self,
        spec: &RunSpec,
        records: &Records,
        record: &RoundRecord,
        findings: &mut Findings,
    ) {
        let committed: BTreeSet<NodeId> = record.commitments.iter().map(|it| it.worker).collect();
        for check in &record.checks {
            check_place(record, check, &committed, findings);
            if !check.is_of_codec() {
                check_judgements(spec, records, record, check, findings);
            }
        }
        check_drawn(spec, records, record, findings);
        self.check_once(records, record, findings);
    }

    /// A worker-round is checked once, decided once and looked over once: verdicts are paid for, and change the worker's
    /// credibility.
    fn check_once(&mut self, records: &Records, record: &RoundRecord, findings: &mut Findings) {
        for check in &record.checks {
            let kind = match looked_over(records, record, check) {
                _ if check.is_of_codec() => Kind::Codec,
                Some(_) => Kind::SecondLook,
                None => Kind::Replay,
            };
            if self.0.insert((kind, check.round, check.worker)) {
                continue;
            }
            let what = match kind {
                Kind::Codec => "one codec check of a worker's round",
                Kind::Replay => "one decision about a worker's round",
                Kind::SecondLook => "one look over a worker's round",
            };
            let found = format!("another in the record of round {}", record.round);
            findings.failed(Link::Outcomes.at(check.round).of(check.worker), what, found);
        }
    }
}

/// Whether a check belongs where it is recorded.
fn check_place(
    record: &RoundRecord,
    check: &Check,
    committed: &BTreeSet<NodeId>,
    findings: &mut Findings,
) {
    let belongs = match &check.finding {
        Finding::CodecPassed | Finding::CodecFault(_) => check.is_of_codec(),
        Finding::ReplayPassed(_)
        | Finding::ReplayFault(_)
        | Finding::Undecided
        | Finding::Irreproducible => !check.is_of_codec(),
        Finding::Withheld(_) => true,
    };
    let in_time = if check.is_of_codec() {
        check.round == record.round && committed.contains(&check.worker)
    } else {
        check.round <= record.round
    };
    findings.require(
        Link::Outcomes.at(check.round).of(check.worker),
        belongs && in_time,
        || "a codec check by the coordinator, or what verifiers found",
        || format!("another check in the record of round {}", record.round),
    );
}

fn check_judgements(
    spec: &RunSpec,
    records: &Records,
    record: &RoundRecord,
    check: &Check,
    findings: &mut Findings,
) {
    let at = Link::Outcomes.at(check.round).of(check.worker);
    let terms = &spec.verification;
    // Of a round without a draw to judge it by, or that is not on record, other checks tell.
    let Some(of) = records.get(check.round) else { return };
    let Some(signed) = records.commitment(check.round, check.worker) else { return };
    let about = (record.run, check.round, check.worker, signed.commitment.assignment);
    let is_signed = |judgement: &Judgement| {
        let SignedReplay { replayed, run, .. } = &judgement.replay;
        let Replayed { round, worker, assignment, .. } = replayed;
        about == (*run, *round, *worker, *assignment) && judgement.replay.verify()
    };
    // From nothing of the worker's a replay leads somewhere.
    let candidate = of.candidates.iter().find(|candidate| candidate.worker == check.worker);
    let is_fresh = candidate.is_some_and(|candidate| candidate.start == Start::Fresh);
    findings.require(
        at,
        check.judgements.iter().all(is_signed),
        || "replays of this round, each under its verifier's signature",
        || "others",
    );
    findings.require(
        at,
        check.judgements.iter().all(|judgement| {
            let pair = pair_of(of, check.worker, judgement.verifier());
            // Who was not there has no class on record; that is said below.
            pair.is_none_or(|pair| follows(judgement, &signed.commitment, (terms, pair)))
                && (judgement.replay.replayed.end != ReplayEnd::Nowhere || !is_fresh)
        }),
        || "the verdicts that follow from where replays ended, distances and thresholds",
        || "others",
    );
    let Some(beacon) = beacon_of(records, record, of, check) else { return };
    let order = panel(beacon, check.worker, &of.attending);
    let judged: BTreeSet<NodeId> = check.judgements.iter().map(Judgement::verifier).collect();
    let panel_holds = findings.require(
        at,
        of.attending.is_sorted_by(|left, right| left.verifier < right.verifier)
            && judged.len() == check.judgements.len()
            && judged.len() <= JUDGES_MAX
            && judged.iter().all(|verifier| order.contains(verifier)),
        || format!("verdicts of up to {JUDGES_MAX} verifiers that attended"),
        || "others".to_owned(),
    );
    if !panel_holds {
        return;
    }
    let first = looked_over(records, record, check);
    if let Some(first) = first {
        check_second_look(spec, records, first, check, findings);
    }
    let is_second = first.is_some();
    let expected = decide(is_second, &check.judgements, false);
    // One word is not enough where others could have been heard; that nobody could is the coordinator's word.
    let unheard = check.judgements.len() == 1
        && check.judgements[0].verdict.accuses()
        && order.len() > 1
        && check.finding == Finding::Undecided;
    findings.require(
        at,
        expected.as_ref() == Some(&check.finding) || unheard,
        || "what follows from the verdicts",
        || "another decision",
    );
    check_passed_over(at, &order, is_second, check, findings);
}

/// What is looked over is what one verifier let pass, where the draw of the next round has it so.
fn check_second_look(
    spec: &RunSpec,
    records: &Records,
    (record, first): (&RoundRecord, &Check),
    check: &Check,
    findings: &mut Findings,
) {
    let same = |one: &Judgement, other: &Judgement| {
        (&one.replay, &one.verdict) == (&other.replay, &other.verdict)
    };
    let goes_on = match (&first.judgements[..], &check.judgements[..]) {
        ([first], [begin, _, ..]) => same(first, begin),
        _ => false,
    };
    let passed = matches!(first.finding, Finding::ReplayPassed(_));
    let drawn = second_look_drawn(spec, records, record, first) == Some(true);
    findings.require(
        Link::AuditDraw.at(check.round).of(check.worker),
        goes_on && passed && drawn,
        || "a look over what one verifier let pass, drawn by the next round",
        || "another decision",
    );
}

/// Whether another verifier has to look over what is on record; none as long as the draw that says so is not.
fn second_look_drawn(
    spec: &RunSpec,
    records: &Records,
    record: &RoundRecord,
    check: &Check,
) -> Option<bool> {
    if all_is_looked_over(record.round, spec.run.rounds) {
        return Some(true);
    }
    let next = records.get(record.round.next())?;
    let later = records.all.get(next.round.0 as usize..)?.iter();
    let draw = later.flat_map(|record| &record.draws).find(|draw| draw.round == next.round)?;
    let beacon = late_beacon(next.committed(), next.admitted_set(), draw.entropy);
    let share = spec.verification.recheck_per_mille;
    Some(beacon.looks_again(check.round, check.worker, share))
}

/// Says which replays should have been looked over and were not: that nobody else could is the coordinator's word.
pub(crate) fn check_looked_over(spec: &RunSpec, records: &Records, findings: &mut Findings) {
    let mut waiting = BTreeSet::new();
    for record in &records.all {
        for check in record.checks.iter().filter(|check| !check.is_of_codec()) {
            let key = (check.round, check.worker);
            if looked_over(records, record, check).is_some() {
                waiting.remove(&key);
            } else if matches!(check.finding, Finding::ReplayPassed(_))
                && check.judgements.len() == 1
                && records.get(check.round).is_some_and(|of| of.attending.len() > 1)
                && second_look_drawn(spec, records, record, check) == Some(true)
            {
                waiting.insert(key);
            }
        }
    }
    for (round, worker) in waiting {
        let why = "none on record: it is not done yet, or nobody else could";
        findings.unchecked(Link::AuditDraw.at(round).of(worker), "a second look", why);
    }
}

/// The machines that a worker and a verifier of the round have, as the record says.
fn pair_of(of: &RoundRecord, worker: NodeId, verifier: NodeId) -> Option<Pair<'_>> {
    let candidate = of.candidates.iter().find(|candidate| candidate.worker == worker)?;
    let attendee = of.attending.iter().find(|attendee| attendee.verifier == verifier)?;
    Some(Pair { worker: &candidate.class, verifier: &attendee.class })
}

/// Whether a verdict can be what follows from where the replay ended.
fn follows(
    judgement: &Judgement,
    claimed: &Commitment,
    (terms, pair): (&Verification, Pair<'_>),
) -> bool {
    let claimed = claimed.end();
    let by_threshold = match &judgement.verdict {
        Judged::Passed(distances) => within(distances, terms, pair),
        Judged::Fault(distances) => !within(distances, terms, pair),
        Judged::Withheld(_) => true,
    };
    let is_fault = matches!(judgement.verdict, Judged::Fault(_));
    by_threshold
        && (is_fault || judgement.near.is_empty())
        && match (&judgement.replay.replayed.end, &judgement.verdict) {
            // It ended where the worker did: there is nothing to find, and nothing to show.
            (ReplayEnd::At(end), Judged::Passed(distances)) if *end == claimed => {
                *distances == Distances::NONE && judgement.evidence.is_none()
            }
            // The same bits are asked for: there is nothing between them and others.
            (ReplayEnd::At(end), verdict) if terms.fingerprint.is_some() => {
                *end != claimed
                    && *verdict == Judged::Fault(Distances::FARTHEST)
                    && judgement.evidence.is_some()
            }
            (ReplayEnd::At(end), Judged::Fault(_)) => {
                *end != claimed && judgement.evidence.is_some()
            }
            (ReplayEnd::At(_), Judged::Passed(_) | Judged::Withheld(_)) => true,
            (ReplayEnd::Nowhere, verdict) => {
                *verdict == Judged::Fault(Distances::FARTHEST) && judgement.evidence.is_some()
            }
            (ReplayEnd::Withheld(reason), verdict) => *verdict == Judged::Withheld(reason.clone()),
        }
}

/// Recomputes the distances of what somebody was accused of, and whose ends were made up, from the chunks that were
/// opened.
pub(crate) async fn recompute<E: Evidence>(
    spec: &RunSpec,
    records: &Records,
    evidence: &E,
    complete: bool,
    findings: &mut Findings,
) -> Result<(), AuditError> {
    let layout = layout(&spec.model);
    let (mut shown, mut gone) = (BTreeSet::new(), BTreeSet::new());
    for record in &records.all {
        for check in record.checks.iter().filter(|check| !check.is_of_codec()) {
            if check.judgements.iter().all(|judgement| judgement.evidence.is_none()) {
                continue;
            }
            let Some(decided) = Decided::of(spec, records, record, check, &layout) else {
                continue;
            };
            let blobs = decided.fetch(evidence, findings).await?;
            decided.check_distances(&blobs, findings);
            decided.check_near(&blobs, findings);
            let wanted = check.judgements.iter().filter(|judgement| judgement.evidence.is_some());
            if blobs.len() < wanted.count() {
                gone.insert((check.round, check.worker));
            }
            let ends = false_ends(&decided.case(), &blobs, &layout, &spec.verification);
            shown.extend(ends.into_iter().map(|verifier| {
                let (round, worker) = (check.round, check.worker);
                FalseEnd { round, worker, verifier }
            }));
        }
    }
    let listed: BTreeSet<FalseEnd> =
        records.all.iter().flat_map(|record| &record.false_ends).copied().collect();
    for end in listed.difference(&shown) {
        let at = Link::Outcomes.at(end.round).of(end.verifier);
        if gone.contains(&(end.round, end.worker)) {
            findings.expired(at, "evidence of a replay that was made up");
            continue;
        }
        let what = "evidence of a replay that was made up";
        findings.failed(at, what, "none, or of another verifier");
    }
    for end in shown.difference(&listed) {
        let at = Link::Outcomes.at(end.round).of(end.verifier);
        let what = "a replay that was made up, on record";
        if complete {
            findings.failed(at, what, "none, and the run is complete");
        } else {
            findings.unchecked(at, what, "none yet");
        }
    }
    Ok(())
}

/// Of worker-rounds that a verifier found against, the digest of what they found and what it follows from: what the chain
/// is told.
pub(crate) fn case_digests(
    spec: &RunSpec,
    records: &Records,
) -> BTreeMap<(NodeId, Round), (Finding, Digest)> {
    let layout = layout(&spec.model);
    let mut digests = BTreeMap::new();
    for record in &records.all {
        for check in &record.checks {
            if !check.judgements.iter().any(|judgement| judgement.verdict.accuses()) {
                continue;
            }
            if let Some(decided) = Decided::of(spec, records, record, check, &layout) {
                let digest = decided.case().digest();
                digests.insert((check.worker, check.round), (check.finding.clone(), digest));
            }
        }
    }
    digests
}

/// A decision, and what it follows from.
struct Decided<'a> {
    spec: &'a RunSpec,
    layout: &'a Layout,
    of: &'a RoundRecord,
    check: &'a Check,
    work: Work,
    chunks: Vec<ChunkIndex>,
}

impl<'a> Decided<'a> {
    fn of(
        spec: &'a RunSpec,
        records: &'a Records,
        record: &RoundRecord,
        check: &'a Check,
        layout: &'a Layout,
    ) -> Option<Self> {
        let of = records.get(check.round)?;
        let work = records.work(spec, check.round, check.worker)?;
        let beacon = beacon_of(records, record, of, check)?;
        let (count, of_all) = (spec.verification.replay_chunks, layout.chunk_count() as u32);
        let chunks = beacon.replay_chunks(check.worker, count, of_all);
        Some(Self { spec, layout, of, check, work, chunks })
    }

    fn at(&self) -> At {
        Link::Outcomes.at(self.check.round).of(self.check.worker)
    }

    /// What is still there of the evidence.
    async fn fetch<E: Evidence>(
        &self,
        evidence: &E,
        findings: &mut Findings,
    ) -> Result<BTreeMap<Digest, ReplayEvidence>, AuditError> {
        let mut blobs = BTreeMap::new();
        for digest in self.check.judgements.iter().filter_map(|judgement| judgement.evidence) {
            let wanted = (digest, bytes_max(self.layout, self.chunks.len()));
            match fetch(evidence, findings, self.at(), wanted).await? {
                Fetched::Bytes(bytes) => match ReplayEvidence::parse(&bytes) {
                    Ok(parsed) => _ = blobs.insert(digest, parsed),
                    Err(error) => {
                        findings.failed(self.at(), "evidence of a replay", error.to_string());
                    }
                },
                Fetched::Gone => findings.expired(self.at(), format!("evidence {digest}")),
                Fetched::Wrong => {}
            }
        }
        Ok(blobs)
    }

    fn check_distances(&self, blobs: &BTreeMap<Digest, ReplayEvidence>, findings: &mut Findings) {
        for judgement in &self.check.judgements {
            let blob = judgement.evidence.and_then(|digest| blobs.get(&digest));
            let pair = pair_of(self.of, self.check.worker, judgement.verifier());
            let Some((blob, pair)) = blob.zip(pair) else { continue };
            let found = self.shown(blob, judgement, pair);
            findings.require(
                self.at(),
                found.as_ref() == Ok(&judgement.verdict),
                || found.as_ref().map_or_else(Clone::clone, said),
                || said(&judgement.verdict),
            );
        }
    }

    /// Whether those that found a fault ended near each other as is recorded.
    fn check_near(&self, blobs: &BTreeMap<Digest, ReplayEvidence>, findings: &mut Findings) {
        let (case, terms) = (self.case(), &self.spec.verification);
        let names = |verifiers: &[NodeId]| match verifiers {
            [] => "an end near nobody's".to_owned(),
            some => format!(
                "an end near that of {}",
                some.iter().map(NodeId::short).collect::<Vec<_>>().join(", ")
            ),
        };
        for judgement in &self.check.judgements {
            let is_fault = matches!(judgement.verdict, Judged::Fault(_));
            let blob = judgement.evidence.and_then(|digest| blobs.get(&digest));
            let Some(blob) = blob.filter(|_| is_fault) else { continue };
            // What is missing of the others is said where it was not found.
            let Some(expected) = near(&case, blobs, (&judgement.replay, blob), self.layout, terms)
            else {
                continue;
            };
            findings.require(
                self.at(),
                expected == judgement.near,
                || names(&expected),
                || names(&judgement.near),
            );
        }
    }

    /// The verdict that evidence shows.
    fn shown(
        &self,
        evidence: &ReplayEvidence,
        judgement: &Judgement,
        pair: Pair<'_>,
    ) -> Result<Judged, String> {
        if evidence.commitment != self.work.commitment || evidence.replay != judgement.replay {
            return Err("evidence of the recorded commitment and replay".to_owned());
        }
        let case = self.case();
        let subject = Subject::of(&case, self.layout, &self.spec.verification);
        let distances = distances(evidence, subject).map_err(|error| error.to_string())?;
        Ok(Judged::by(distances, &self.spec.verification, pair))
    }

    /// As whoever is accused by it, or votes on that, is shown it.
    fn case(&self) -> Case {
        Case {
            work: self.work.clone(),
            chunks: self.chunks.clone(),
            judgements: self.check.judgements.clone(),
            attending: self.of.attending.clone(),
        }
    }
}

fn said(verdict: &Judged) -> String {
    match verdict {
        Judged::Passed(distances) => format!("passed, at a distance of {:e}", distances.delta),
        Judged::Fault(distances) => format!("a fault, at a distance of {:e}", distances.delta),
        Judged::Withheld(reason) => format!("withheld ({reason})"),
    }
}

/// Says where the record shows that drawn verifiers did not judge: that they could not is the coordinator's word.
fn check_passed_over(
    at: At,
    order: &[NodeId],
    is_second: bool,
    check: &Check,
    findings: &mut Findings,
) {
    let missing = decide(is_second, &check.judgements, true).is_none()
        && check.judgements.len() < JUDGES_MAX.min(order.len());
    let first = &order[..JUDGES_MAX.min(order.len())];
    let outside = check.judgements.iter().filter(|it| !first.contains(&it.verifier())).count();
    if missing || outside > 0 {
        let found = format!(
            "{} of {} verifiers, {outside} of them drawn later; the others could not, says the coordinator",
            check.judgements.len(),
            order.len()
        );
        findings.unchecked(at, "the verdicts of those that were drawn first", found);
    }
}

/// The draw that a worker's judges follow from: that over the commitments for what the merge was to wait for, and
/// the one after it for the rest.
fn beacon_of(
    records: &Records,
    record: &RoundRecord,
    of: &RoundRecord,
    check: &Check,
) -> Option<Beacon> {
    let (record, check) = looked_over(records, record, check).unwrap_or((record, check));
    let early = check.round == record.round && early_checks(record).any(|it| it == check);
    if early || is_unverified(of, check.worker) {
        let entropy = of.commitments_entropy?;
        return Some(Beacon::new(of.committed(), entropy.value));
    }
    let draws = records.all.iter().flat_map(|record| &record.draws);
    let draw = draws.into_iter().find(|draw| draw.round == check.round)?;
    Some(late_beacon(of.committed(), of.admitted_set(), draw.entropy))
}

/// Whether the merge did not wait for the verdict on this worker any longer.
fn is_unverified(of: &RoundRecord, worker: NodeId) -> bool {
    let mut results = of.results.iter();
    results.any(|result| result.worker == worker && result.outcome == Outcome::Unverified)
}

/// A replay after the merge is of a drawn worker, or goes on from before it.
fn check_drawn(spec: &RunSpec, records: &Records, record: &RoundRecord, findings: &mut Findings) {
    for check in late_checks(record) {
        let between = check.round.0 as usize..=record.round.0 as usize;
        let mut draws = records.all.get(between).into_iter().flatten().flat_map(|r| &r.draws);
        let drawn =
            draws.any(|draw| draw.round == check.round && draw.drawn.contains(&check.worker));
        let goes_on = records.get(check.round).is_some_and(|of| is_unverified(of, check.worker))
            || looked_over(records, record, check).is_some();
        let kept = is_kept(spec, record.round, check.round);
        findings.require(
            Link::AuditDraw.at(check.round).of(check.worker),
            (drawn || goes_on) && kept,
            || "a replay of a drawn worker",
            || "one that was not drawn",
        );
    }
}
