//! What a replay's distances follow from, checked by arithmetic: whoever has the evidence and the round's record
//! needs neither a device nor anybody's word.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_gradient::moments8::{Moments, Moments8, parse_chunk};
use manyhands_gradient::replay::{Comparison, End};
use manyhands_gradient::{Layout, vector};
use manyhands_proto::message::{
    Distances, EndState, NumericClass, OpenedEnd, ReplayEnd, ReplayEvidence, Replayed, SignedReplay,
};
use manyhands_proto::run_file::Verification;
use manyhands_proto::tree::{GROUP_BYTES, Openings};
use manyhands_proto::{ChunkIndex, Digest, NodeId, RunId};

use crate::panel::{Case, JUDGES_MAX, Judged, Judgement, Pair, within};

/// What a round started from and is compared on.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub layout: &'a Layout,
    /// θ_t.
    pub start: Digest,
    /// The drawn chunks, ascending.
    pub chunks: &'a [ChunkIndex],
    /// The run asks for the same bits everywhere, so that ends are compared by their digests.
    pub exact: bool,
}

impl<'a> Subject<'a> {
    pub fn of(case: &'a Case, layout: &'a Layout, terms: &Verification) -> Self {
        Self {
            layout,
            start: case.work.assignment.theta,
            chunks: &case.chunks,
            exact: terms.fingerprint.is_some(),
        }
    }
}

/// Whose part of the evidence is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// θ_t is everybody's.
    Start,
    Worker,
    Verifier,
}

/// Evidence that does not lead to what it should.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct EvidenceError {
    pub whose: Whose,
    pub reason: String,
}

/// The groups of an end state's θ that hold these chunks.
pub fn theta_groups(chunks: &[ChunkIndex]) -> Vec<u64> {
    // A chunk of 4,096 values is a group of 16 KiB.
    chunks.iter().map(|chunk| u64::from(chunk.0)).collect()
}

/// The groups of an end state's moments that hold these chunks, ascending.
pub fn moments_groups(chunks: &[ChunkIndex]) -> Vec<u64> {
    let mut groups: Vec<u64> = chunks.iter().flat_map(|chunk| groups_of(*chunk)).collect();
    groups.dedup();
    groups
}

fn groups_of(chunk: ChunkIndex) -> std::ops::RangeInclusive<u64> {
    let range = Moments8::chunk_range(chunk.0 as usize);
    range.start as u64 / GROUP_BYTES..=(range.end as u64 - 1) / GROUP_BYTES
}

/// No evidence over so many chunks is larger.
pub fn bytes_max(layout: &Layout, chunks: usize) -> u64 {
    // Of each chunk three groups of θ and two times two of moments, with up to 64 siblings; beside them two
    // signed statements.
    let siblings = 32 * u64::from(u64::BITS - (layout.vector_len() as u64 * 4).leading_zeros());
    let group = GROUP_BYTES + siblings + 64;
    7 * group * chunks as u64 + 8_192
}

/// The distances of the claimed end from the replayed one, over the drawn chunks; where the same bits are asked for, none
/// or the farthest.
///
/// # Errors
/// [`EvidenceError`], with whose part does not hold.
pub fn distances(
    evidence: &ReplayEvidence,
    subject: Subject<'_>,
) -> Result<Distances, EvidenceError> {
    let closed = match (&evidence.opened, &evidence.replay.replayed.end) {
        (None, ReplayEnd::Nowhere) => Some(Distances::FARTHEST),
        (None, ReplayEnd::At(end)) if subject.exact => {
            let is_same = *end == evidence.commitment.commitment.end();
            Some(if is_same { Distances::NONE } else { Distances::FARTHEST })
        }
        (Some(_), ReplayEnd::At(_)) if !subject.exact => None,
        _ => return Err(of_verifier("chunks of what it did not reach, or none of what it did")),
    };
    if let Some(distances) = closed {
        check_about(evidence)?;
        return Ok(distances);
    }
    let Opened { starts, claimed, replayed } = opened(evidence, subject)?;
    let mut comparison = Comparison::default();
    for (start, (claimed, replayed)) in starts.iter().zip(claimed.iter().zip(&replayed)) {
        comparison.add(start, claimed.end(), replayed.end());
    }
    Ok(comparison.distances())
}

/// What evidence holds, proven.
struct Opened {
    starts: Vec<Vec<f32>>,
    claimed: Vec<EndChunk>,
    replayed: Vec<EndChunk>,
}

fn of_verifier(reason: &str) -> EvidenceError {
    EvidenceError { whose: Whose::Verifier, reason: reason.to_owned() }
}

/// Whether the replay is of the round that the worker committed to.
fn check_about(evidence: &ReplayEvidence) -> Result<(), EvidenceError> {
    let ReplayEvidence { commitment, replay, .. } = evidence;
    let (claimed, replayed) = (&commitment.commitment, &replay.replayed);
    let about = (replay.run, replayed.worker, replayed.round, replayed.assignment);
    if about != (commitment.run, commitment.worker, claimed.round, claimed.assignment) {
        return Err(of_verifier("a replay of another round"));
    }
    Ok(())
}

fn opened(evidence: &ReplayEvidence, subject: Subject<'_>) -> Result<Opened, EvidenceError> {
    check_about(evidence)?;
    let (Some(opened), ReplayEnd::At(end)) = (&evidence.opened, &evidence.replay.replayed.end)
    else {
        return Err(of_verifier("chunks of what it did not reach, or none of what it did"));
    };
    let by = |whose| move |reason| EvidenceError { whose, reason };
    let claimed = evidence.commitment.commitment.end();
    Ok(Opened {
        starts: thetas(&opened.start, subject.start, subject).map_err(by(Whose::Start))?,
        claimed: ends(&opened.claimed, claimed, subject).map_err(by(Whose::Worker))?,
        replayed: ends(&opened.replayed, *end, subject).map_err(by(Whose::Verifier))?,
    })
}

/// Where one of several that repeated the same round ended.
struct Ended {
    class: NumericClass,
    end: Place,
}

enum Place {
    Nowhere,
    /// Where the same bits are asked for.
    Bits(EndState),
    /// As its evidence shows it; where it ended in the worker's own bits, as another's evidence shows the worker's.
    Chunks(EndChunks),
}

impl Ended {
    /// Whether both can be the same round's, by the thresholds of their machines.
    fn is_near(&self, other: &Self, terms: &Verification) -> bool {
        let (one, other_end) = match (&self.end, &other.end) {
            (Place::Nowhere, Place::Nowhere) => return true,
            (Place::Bits(one), Place::Bits(other)) => return one == other,
            (Place::Chunks(one), Place::Chunks(other)) => (one, other),
            (Place::Nowhere | Place::Bits(_) | Place::Chunks(_), _) => return false,
        };
        let pair = Pair { worker: &self.class, verifier: &other.class };
        let from = |claimed: &EndChunks, replayed: &EndChunks| {
            let mut comparison = Comparison::default();
            let ends = claimed.chunks.iter().zip(&replayed.chunks);
            for (start, (claimed, replayed)) in claimed.starts.iter().zip(ends) {
                comparison.add(start, claimed.end(), replayed.end());
            }
            comparison.distances()
        };
        // From either side: the one that did not move is infinitely near to nobody.
        within(&from(one, other_end), terms, pair) || within(&from(other_end, one), terms, pair)
    }
}

/// The drawn chunks of an end state.
struct EndChunks {
    starts: Vec<Vec<f32>>,
    chunks: Vec<EndChunk>,
}

/// Whose end of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Claimed,
    Replayed,
}

/// The chunks of one side of a replay's evidence.
///
/// # Errors
/// As [`distances`]'s; and of a replay that led nowhere there are none.
fn end_of(
    evidence: &ReplayEvidence,
    side: Side,
    subject: Subject<'_>,
) -> Result<EndChunks, EvidenceError> {
    let opened = opened(evidence, subject)?;
    let chunks = match side {
        Side::Claimed => opened.claimed,
        Side::Replayed => opened.replayed,
    };
    Ok(EndChunks { starts: opened.starts, chunks })
}

/// Which of those that repeated the same round made their ends up: whoever is too far from two others, on devices of its
/// own kind, that are not too far from each other. The places in `ended`, ascending.
///
/// A majority near the threshold proves nothing of a single one, so it is ends that are compared, not verdicts.
fn liars(ended: &[Ended], terms: &Verification) -> Vec<usize> {
    let near = |one: usize, other: usize| ended[one].is_near(&ended[other], terms);
    let kind = |of: usize| ended[of].class.device;
    let lies = |of: &usize| {
        // Between kinds of devices an honest round that is unstable ends as far apart as one that was made up.
        let others: Vec<usize> =
            (0..ended.len()).filter(|other| other != of && kind(*other) == kind(*of)).collect();
        let far: Vec<usize> = others.into_iter().filter(|other| !near(*of, *other)).collect();
        far.iter().enumerate().any(|(at, one)| far[at + 1..].iter().any(|two| near(*one, *two)))
    };
    (0..ended.len()).filter(lies).collect()
}

/// No case of a run is larger: a few signed statements, the drawn chunks' numbers, and who was there.
pub fn case_bytes_max(terms: &Verification) -> u64 {
    (1 << 20) + 16 * u64::from(terms.replay_chunks)
}

/// Whether what is said in a case of a run is what its worker and verifiers signed.
///
/// # Errors
/// What is not, in words.
pub fn check_case(
    case: &Case,
    run: RunId,
    layout: &Layout,
    terms: &Verification,
) -> Result<(), String> {
    let Case { work, chunks, judgements, .. } = case;
    work.check(run).map_err(|error| error.to_string())?;
    let commitment = &work.commitment;
    let drawn = (terms.replay_chunks as usize).min(layout.chunk_count());
    if chunks.len() != drawn || !chunks.is_sorted_by(|one, other| one < other) {
        return Err(format!("expected {drawn} chunks, got {}", chunks.len()));
    }
    let about = (run, case.worker(), case.round(), commitment.commitment.assignment);
    let is_signed = |judgement: &Judgement| {
        let SignedReplay { run, replayed, .. } = &judgement.replay;
        let Replayed { round, worker, assignment, .. } = replayed;
        (*run, *worker, *round, *assignment) == about && judgement.replay.verify()
    };
    if judgements.len() > JUDGES_MAX || !judgements.iter().all(is_signed) {
        return Err("a replay is not its verifier's, or of another round".to_owned());
    }
    let judges: BTreeSet<NodeId> = judgements.iter().map(Judgement::verifier).collect();
    if judges.len() != judgements.len() || judges.contains(&case.worker()) {
        return Err("somebody judges twice, or itself".to_owned());
    }
    Ok(())
}

/// The verifiers of a case that found a fault before `replay` and ended near it, in the order of their judgements; none
/// where evidence is missing. Replays that led nowhere ended at one place.
pub fn near(
    case: &Case,
    evidence: &BTreeMap<Digest, ReplayEvidence>,
    (replay, shown): (&SignedReplay, &ReplayEvidence),
    layout: &Layout,
    terms: &Verification,
) -> Option<Vec<NodeId>> {
    let subject = Subject::of(case, layout, terms);
    let reached = |verifier: NodeId, shown: &ReplayEvidence| {
        let attendee = case.attending.iter().find(|it| it.verifier == verifier)?;
        check_about(shown).ok()?;
        let end = match &shown.replay.replayed.end {
            ReplayEnd::Nowhere => Place::Nowhere,
            ReplayEnd::At(end) if subject.exact => Place::Bits(*end),
            ReplayEnd::At(_) => Place::Chunks(end_of(shown, Side::Replayed, subject).ok()?),
            ReplayEnd::Withheld(_) => return None,
        };
        Some(Ended { class: attendee.class.clone(), end })
    };
    let own_end = reached(replay.verifier, shown)?;
    let mut near = Vec::new();
    let before = case.judgements.iter().take_while(|it| it.verifier() != replay.verifier);
    for judgement in before.filter(|it| matches!(it.verdict, Judged::Fault(_))) {
        let verifier = judgement.verifier();
        let other = reached(verifier, own(case, evidence, judgement)?)?;
        if own_end.is_near(&other, terms) {
            near.push(verifier);
        }
    }
    Some(near)
}

/// The judgements of a case that anybody can see to be right: accusations by chunks that were opened. That a verifier was
/// shown nothing, or was led nowhere, only itself knows.
pub fn proven(
    case: &Case,
    evidence: &BTreeMap<Digest, ReplayEvidence>,
    layout: &Layout,
    terms: &Verification,
) -> Vec<Judgement> {
    let subject = Subject::of(case, layout, terms);
    let holds = |judgement: &&Judgement| match &judgement.verdict {
        // Nobody is accused by it.
        Judged::Passed(_) => true,
        Judged::Withheld(_) => false,
        verdict @ Judged::Fault(_) => {
            let is_shown = matches!(judgement.replay.replayed.end, ReplayEnd::At(_));
            let shown = own(case, evidence, judgement).filter(|_| is_shown);
            let found = shown.zip(case.pair(judgement.verifier()));
            found.is_some_and(|(shown, pair)| {
                let is_verdict = distances(shown, subject)
                    .is_ok_and(|distances| Judged::by(distances, terms, pair) == *verdict);
                let near = near(case, evidence, (&judgement.replay, shown), layout, terms);
                is_verdict && near.as_ref() == Some(&judgement.near)
            })
        }
    };
    case.judgements.iter().filter(holds).cloned().collect()
}

/// The evidence of a judgement, if it is of this case.
fn own<'a>(
    case: &Case,
    evidence: &'a BTreeMap<Digest, ReplayEvidence>,
    judgement: &Judgement,
) -> Option<&'a ReplayEvidence> {
    let evidence = evidence.get(&judgement.evidence?)?;
    let is_its = evidence.commitment == case.work.commitment && evidence.replay == judgement.replay;
    is_its.then_some(evidence)
}

/// Whose ends are made up among those that judged a round, by the evidence that is there: of a verifier that ended in the
/// worker's own bits, another's evidence shows the worker's end.
pub fn false_ends(
    case: &Case,
    evidence: &BTreeMap<Digest, ReplayEvidence>,
    layout: &Layout,
    terms: &Verification,
) -> Vec<NodeId> {
    let subject = Subject::of(case, layout, terms);
    let claimed = case.work.commitment.commitment.end();
    let own = |judgement: &Judgement| own(case, evidence, judgement);
    let any = case.judgements.iter().filter_map(own).find(|evidence| evidence.opened.is_some());
    let (mut verifiers, mut ended) = (Vec::new(), Vec::new());
    for judgement in &case.judgements {
        let shown = match (&judgement.replay.replayed.end, own(judgement)) {
            // Signed, and there is nothing more to it.
            (ReplayEnd::At(end), _) if subject.exact => Some(Place::Bits(*end)),
            (_, Some(own)) => end_of(own, Side::Replayed, subject).ok().map(Place::Chunks),
            (ReplayEnd::At(end), None) if *end == claimed => {
                any.and_then(|other| end_of(other, Side::Claimed, subject).ok()).map(Place::Chunks)
            }
            (ReplayEnd::At(_) | ReplayEnd::Nowhere | ReplayEnd::Withheld(_), None) => None,
        };
        let attendee = case.attending.iter().find(|it| it.verifier == judgement.verifier());
        if let Some((end, attendee)) = shown.zip(attendee) {
            verifiers.push(attendee.verifier);
            ended.push(Ended { class: attendee.class.clone(), end });
        }
    }
    liars(&ended, terms).into_iter().map(|at| verifiers[at]).collect()
}

/// One chunk of an end state.
struct EndChunk {
    theta: Vec<f32>,
    moments: Moments,
}

impl EndChunk {
    fn end(&self) -> End<'_> {
        End::new(&self.theta, &self.moments)
    }
}

fn ends(
    opened: &OpenedEnd,
    digests: EndState,
    subject: Subject<'_>,
) -> Result<Vec<EndChunk>, String> {
    let thetas = thetas(&opened.theta, digests.theta, subject)?;
    let moments = moments(&opened.moments, digests.moments, subject)?;
    Ok(thetas
        .into_iter()
        .zip(moments)
        .map(|(theta, moments)| EndChunk { theta, moments })
        .collect())
}

/// The drawn chunks of a canonical vector.
fn thetas(
    opened: &Openings,
    digest: Digest,
    subject: Subject<'_>,
) -> Result<Vec<Vec<f32>>, String> {
    let length = subject.layout.vector_len() as u64 * 4;
    let groups = proven_groups(opened, digest, (length, &theta_groups(subject.chunks)))?;
    Ok(groups.into_values().map(vector::floats).collect())
}

fn moments(
    opened: &Openings,
    digest: Digest,
    subject: Subject<'_>,
) -> Result<Vec<Moments>, String> {
    let Subject { layout, chunks, .. } = subject;
    let length = Moments8::bytes_len(layout) as u64;
    let groups = proven_groups(opened, digest, (length, &moments_groups(chunks)))?;
    let read = |&chunk: &ChunkIndex| {
        let range = Moments8::chunk_range(chunk.0 as usize);
        let bytes: Vec<u8> =
            groups_of(chunk).flat_map(|group| groups[&group].iter().copied()).collect();
        let start = range.start - (*groups_of(chunk).start() * GROUP_BYTES) as usize;
        parse_chunk(&bytes[start..start + range.len()], layout, chunk.0 as usize)
            .map_err(|error| format!("moments of chunk {}: {error}", chunk.0))
    };
    chunks.iter().map(read).collect()
}

/// The bytes of just these groups of a blob of that length, each proven against its digest.
fn proven_groups<'a>(
    opened: &'a Openings,
    digest: Digest,
    (length, groups): (u64, &[u64]),
) -> Result<BTreeMap<u64, &'a [u8]>, String> {
    if opened.length != length {
        return Err(format!("expected a blob of {length} bytes, got one of {}", opened.length));
    }
    if !opened.groups.iter().map(|group| group.opening.group).eq(groups.iter().copied()) {
        return Err(format!("expected the {} groups that hold the drawn chunks", groups.len()));
    }
    opened.verify(digest).map_err(|error| error.to_string())?;
    let bytes = |group: &'a manyhands_proto::tree::OpenedGroup| {
        (group.opening.group, group.bytes.as_slice())
    };
    Ok(opened.groups.iter().map(bytes).collect())
}

#[cfg(test)]
mod tests;
