//! What a replay's distances follow from, checked by arithmetic: whoever has the evidence and the round's record
//! needs neither a device nor anybody's word.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_gradient::moments8::{Moments, Moments8, parse_chunk};
use manyhands_gradient::replay::{Comparison, End};
use manyhands_gradient::{Layout, vector};
use manyhands_proto::message::{
    Commitment, Distances, EndState, NumericClass, OpenedEnd, ReplayEnd, ReplayEvidence, Replayed,
    SignedReplay,
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

/// The distances of the claimed end from the replayed one, over the drawn chunks.
///
/// # Errors
/// [`EvidenceError`], with whose part does not hold.
pub fn distances(
    evidence: &ReplayEvidence,
    subject: Subject<'_>,
) -> Result<Distances, EvidenceError> {
    if let (None, ReplayEnd::Nowhere) = (&evidence.opened, &evidence.replay.replayed.end) {
        check_about(evidence, subject)?;
        return Ok(Distances::FARTHEST);
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
fn check_about(evidence: &ReplayEvidence, subject: Subject<'_>) -> Result<(), EvidenceError> {
    let ReplayEvidence { commitment, replay, .. } = evidence;
    let (claimed, replayed) = (&commitment.commitment, &replay.replayed);
    let about = (replay.run, replayed.worker, replayed.round, replayed.first_sequence);
    if about != (commitment.run, commitment.worker, claimed.round, claimed.first_sequence) {
        return Err(of_verifier("a replay of another round"));
    }
    if replayed.start != subject.start {
        return Err(of_verifier("a replay from other parameters"));
    }
    Ok(())
}

fn opened(evidence: &ReplayEvidence, subject: Subject<'_>) -> Result<Opened, EvidenceError> {
    check_about(evidence, subject)?;
    let (Some(opened), ReplayEnd::At(end)) = (&evidence.opened, &evidence.replay.replayed.end)
    else {
        return Err(of_verifier("chunks of what it did not reach, or none of what it did"));
    };
    let by = |whose| move |reason| EvidenceError { whose, reason };
    let claimed = &evidence.commitment.commitment;
    let claimed = EndState { theta: claimed.theta, moments: claimed.moments };
    Ok(Opened {
        starts: thetas(&opened.start, subject.start, subject).map_err(by(Whose::Start))?,
        claimed: ends(&opened.claimed, claimed, subject).map_err(by(Whose::Worker))?,
        replayed: ends(&opened.replayed, *end, subject).map_err(by(Whose::Verifier))?,
    })
}

/// Where one of several that repeated the same round ended.
struct Ended {
    class: NumericClass,
    /// As its evidence shows it; where it ended in the worker's own bits, as another's evidence shows the worker's.
    end: EndChunks,
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
    let near = |one: usize, other: usize| {
        let (one, other) = (&ended[one], &ended[other]);
        let pair = Pair { worker: &one.class, verifier: &other.class };
        let from = |claimed: &EndChunks, replayed: &EndChunks| {
            let mut comparison = Comparison::default();
            let ends = claimed.chunks.iter().zip(&replayed.chunks);
            for (start, (claimed, replayed)) in claimed.starts.iter().zip(ends) {
                comparison.add(start, claimed.end(), replayed.end());
            }
            comparison.distances()
        };
        // From either side: the one that did not move is infinitely near to nobody.
        within(&from(&one.end, &other.end), terms, pair)
            || within(&from(&other.end, &one.end), terms, pair)
    };
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
    let Case { commitment, start, chunks, judgements, .. } = case;
    if commitment.run != run || !commitment.verify() {
        return Err("the commitment is not the worker's".to_owned());
    }
    let drawn = (terms.replay_chunks as usize).min(layout.chunk_count());
    if chunks.len() != drawn || !chunks.is_sorted_by(|one, other| one < other) {
        return Err(format!("expected {drawn} chunks, got {}", chunks.len()));
    }
    let about = (run, case.worker(), case.round(), commitment.commitment.first_sequence, *start);
    let is_signed = |judgement: &Judgement| {
        let SignedReplay { run, replayed, .. } = &judgement.replay;
        let Replayed { round, worker, first_sequence, start, .. } = replayed;
        (*run, *worker, *round, *first_sequence, *start) == about && judgement.replay.verify()
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

/// The judgements of a case that anybody can see to be right: accusations by chunks that were opened. That a verifier was
/// shown nothing, or was led nowhere, only itself knows.
pub fn proven(
    case: &Case,
    evidence: &BTreeMap<Digest, ReplayEvidence>,
    layout: &Layout,
    terms: &Verification,
) -> Vec<Judgement> {
    let subject = Subject { layout, start: case.start, chunks: &case.chunks };
    let holds = |judgement: &&Judgement| match &judgement.verdict {
        // Nobody is accused by it.
        Judged::Passed(_) => true,
        Judged::Withheld(_) => false,
        verdict @ Judged::Fault(_) => {
            let shown = own(case, evidence, judgement).filter(|shown| shown.opened.is_some());
            let distances = shown.and_then(|shown| distances(shown, subject).ok());
            distances
                .zip(case.pair(judgement.verifier()))
                .is_some_and(|(distances, pair)| Judged::by(distances, terms, pair) == *verdict)
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
    let is_its = evidence.commitment == case.commitment && evidence.replay == judgement.replay;
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
    let subject = Subject { layout, start: case.start, chunks: &case.chunks };
    let Commitment { theta, moments, .. } = case.commitment.commitment;
    let claimed = EndState { theta, moments };
    let own = |judgement: &Judgement| own(case, evidence, judgement);
    let any = case.judgements.iter().filter_map(own).find(|evidence| evidence.opened.is_some());
    let (mut verifiers, mut ended) = (Vec::new(), Vec::new());
    for judgement in &case.judgements {
        let shown = match own(judgement) {
            Some(own) => end_of(own, Side::Replayed, subject).ok(),
            None if judgement.replay.replayed.end == ReplayEnd::At(claimed) => {
                any.and_then(|other| end_of(other, Side::Claimed, subject).ok())
            }
            None => None,
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
mod tests {
    use std::ops::Range;

    use manyhands_gradient::CHUNK;
    use manyhands_proto::keys::NodeKey;
    use manyhands_proto::message::{DeviceKind, OpenedEnds, SignedCommitment};
    use manyhands_proto::{Round, TokenCount};
    use proptest::prelude::*;

    use super::*;
    use crate::panel::Attendee;

    /// A round that ended, as a worker or a verifier has it.
    struct Ended {
        theta: Vec<f32>,
        moments: Moments8,
    }

    impl Ended {
        fn new(layout: &Layout, seed: f32) -> Self {
            let is_real = |i: usize| i % CHUNK < layout.places()[i / CHUNK].real;
            let value = |i: usize| if is_real(i) { (seed + i as f32).sin() } else { 0.0 };
            let values: Vec<f32> = (0..layout.vector_len()).map(value).collect();
            let moments = Moments {
                second: values.iter().map(|value| value * value).collect(),
                first: values.clone(),
            };
            let moments = Moments8::quantise(layout, &moments, 7).expect("finite");
            Self { theta: values, moments }
        }

        fn digests(&self) -> EndState {
            let theta = vector::digest(&self.theta);
            EndState { theta, moments: Digest::of(self.moments.as_bytes()) }
        }

        fn open(&self, chunks: &[ChunkIndex]) -> OpenedEnd {
            let theta = vector::to_bytes(&self.theta);
            OpenedEnd {
                theta: Openings::of(&theta, &theta_groups(chunks)).expect("its groups"),
                moments: Openings::of(self.moments.as_bytes(), &moments_groups(chunks))
                    .expect("its groups"),
            }
        }
    }

    /// Nine chunks, the last of each tensor with padding.
    fn layout() -> Layout {
        let shapes = vec![("a".to_owned(), vec![5, 5_000]), ("b".to_owned(), vec![5_000])];
        Layout::from_tensors(shapes).expect("a layout")
    }

    fn drawn() -> Vec<ChunkIndex> {
        [0, 2, 3, 8].map(ChunkIndex).to_vec()
    }

    fn part<'a>(theta: &'a [f32], moments: &'a Moments, at: Range<usize>) -> End<'a> {
        let (first_moment, second_moment) =
            (&moments.first[at.clone()], &moments.second[at.clone()]);
        End { theta: &theta[at], first_moment, second_moment }
    }

    /// A replay's evidence, and what is behind it.
    struct Shown {
        layout: Layout,
        start: Ended,
        claimed: Ended,
        replayed: Ended,
        evidence: ReplayEvidence,
    }

    const RUN: RunId = RunId::new([5; 32]);

    fn key(id: u8) -> NodeKey {
        NodeKey::from_seed([id; 32])
    }

    fn signed_by(verifier: u8, end: ReplayEnd, start: Digest) -> SignedReplay {
        let (round, worker) = (Round(3), key(1).node_id());
        let replayed = Replayed { round, worker, first_sequence: 40, start, end };
        SignedReplay::sign(&key(verifier), RUN, replayed)
    }

    fn signed(end: ReplayEnd, start: Digest) -> SignedReplay {
        signed_by(2, end, start)
    }

    fn shown() -> Shown {
        let layout = layout();
        assert_eq!(layout.chunk_count(), 9);
        let [start, claimed, replayed] = [0.0, 0.3, 0.31].map(|seed| Ended::new(&layout, seed));
        let EndState { theta, moments } = claimed.digests();
        let other = Digest::of(b"another blob");
        let commitment = Commitment {
            round: Round(3),
            first_sequence: 40,
            payload: other,
            payload_bytes: 100,
            theta,
            moments,
            error: other,
            tokens: TokenCount(1_000),
            loss: 3.0,
        };
        let evidence = ReplayEvidence {
            commitment: SignedCommitment::sign(&key(1), RUN, commitment),
            replay: signed(ReplayEnd::At(replayed.digests()), start.digests().theta),
            opened: Some(OpenedEnds {
                start: start.open(&drawn()).theta,
                claimed: claimed.open(&drawn()),
                replayed: replayed.open(&drawn()),
            }),
        };
        Shown { layout, start, claimed, replayed, evidence }
    }

    impl Shown {
        fn judge(&self, evidence: &ReplayEvidence) -> Result<Distances, EvidenceError> {
            let start = self.start.digests().theta;
            distances(evidence, Subject { layout: &self.layout, start, chunks: &drawn() })
        }
    }

    #[test]
    fn distances_follow_from_the_drawn_chunks() {
        let shown = shown();
        let mut comparison = Comparison::default();
        let [claimed, replayed] =
            [&shown.claimed, &shown.replayed].map(|it| it.moments.dequantise());
        for chunk in drawn() {
            let at = chunk.0 as usize * CHUNK..(chunk.0 as usize + 1) * CHUNK;
            let claimed = part(&shown.claimed.theta, &claimed, at.clone());
            let replayed = part(&shown.replayed.theta, &replayed, at.clone());
            comparison.add(&shown.start.theta[at], claimed, replayed);
        }
        assert_eq!(shown.judge(&shown.evidence), Ok(comparison.distances()));
        assert!(comparison.distances().delta > 0.0);
    }

    #[test]
    fn whoever_opened_something_else_is_named() {
        let shown = shown();
        let whose = |change: fn(&mut OpenedEnds)| {
            let mut evidence = shown.evidence.clone();
            change(evidence.opened.as_mut().expect("some"));
            shown.judge(&evidence).expect_err("it was changed").whose
        };
        assert_eq!(whose(|it| it.start.groups[1].bytes[5] ^= 1), Whose::Start);
        assert_eq!(whose(|it| it.claimed.theta.length += 1), Whose::Worker);
        assert_eq!(whose(|it| _ = it.claimed.moments.groups.pop()), Whose::Worker);
        assert_eq!(whose(|it| it.claimed.theta.groups.swap(0, 1)), Whose::Worker);
        assert_eq!(whose(|it| it.replayed.theta = it.claimed.theta.clone()), Whose::Verifier);
        assert_eq!(whose(|it| it.replayed.moments.groups[0].bytes[5] ^= 1), Whose::Verifier);
        assert_eq!(whose(|it| it.replayed.theta.groups[0].opening.group = 1), Whose::Verifier);
    }

    #[test]
    fn a_replay_is_of_the_round_that_it_is_held_against() {
        let shown = shown();
        let start = shown.start.digests().theta;
        let refused = |replay: SignedReplay, opened: bool| {
            let opened = shown.evidence.opened.clone().filter(|_| opened);
            let evidence = ReplayEvidence { replay, opened, ..shown.evidence.clone() };
            shown.judge(&evidence).map_err(|error| error.whose)
        };
        let end = ReplayEnd::At(shown.replayed.digests());
        assert_eq!(refused(signed(end.clone(), Digest::of(b"other")), true), Err(Whose::Verifier));
        assert_eq!(refused(signed(end, start), false), Err(Whose::Verifier));
        let nowhere = || signed(ReplayEnd::Nowhere, start);
        assert_eq!(refused(nowhere(), true), Err(Whose::Verifier));
        assert_eq!(refused(nowhere(), false), Ok(Distances::FARTHEST));
        let mut other = nowhere().replayed;
        other.first_sequence += 1;
        let other = SignedReplay::sign(&key(2), RUN, other);
        assert_eq!(refused(other, false), Err(Whose::Verifier));
    }

    #[test]
    fn who_is_far_from_two_that_agree_made_its_end_up() {
        let shown = shown();
        let start = shown.start.digests().theta;
        let subject = Subject { layout: &shown.layout, start, chunks: &drawn() };
        let ended = |seed: f32| {
            let end = Ended::new(&shown.layout, seed);
            let mut evidence = shown.evidence.clone();
            evidence.replay = signed(ReplayEnd::At(end.digests()), start);
            evidence.opened.as_mut().expect("some").replayed = end.open(&drawn());
            let end = end_of(&evidence, Side::Replayed, subject).expect("it is opened");
            super::Ended { class: NumericClass::unknown(DeviceKind::Cpu), end }
        };
        let found = |seeds: &[f32]| {
            let ended: Vec<super::Ended> = seeds.iter().map(|seed| ended(*seed)).collect();
            liars(&ended, &Verification::default())
        };
        assert_eq!(found(&[0.3, 0.3, 0.5]), [2]);
        assert_eq!(found(&[0.5, 0.3, 0.3]), [0]);
        assert!(found(&[0.3, 0.3, 0.3]).is_empty());
        assert!(found(&[0.3, 0.5]).is_empty(), "of two nobody can say which");
        assert!(found(&[0.3, 0.4, 0.5]).is_empty(), "nor of three that all differ");
        // A verifier that did nothing: it is where the round started.
        assert_eq!(found(&[0.3, 0.3, 0.0]), [2]);
    }

    fn terms() -> Verification {
        Verification { replay_chunks: drawn().len() as u32, ..Verification::default() }
    }

    /// Verifiers 2 and 3 found the worker's round to end elsewhere.
    fn two_against(shown: &Shown) -> (Case, BTreeMap<Digest, ReplayEvidence>) {
        let start = shown.start.digests().theta;
        let class = NumericClass::unknown(DeviceKind::Cpu);
        let pair = Pair { worker: &class, verifier: &class };
        let (mut judgements, mut all) = (Vec::new(), BTreeMap::new());
        for verifier in [2, 3] {
            let end = ReplayEnd::At(shown.replayed.digests());
            let replay = signed_by(verifier, end, start);
            let evidence = ReplayEvidence { replay: replay.clone(), ..shown.evidence.clone() };
            let found = shown.judge(&evidence).expect("it leads where it should");
            let verdict = Judged::by(found, &terms(), pair);
            assert!(verdict.accuses());
            let digest = Digest::of(&evidence.to_bytes());
            judgements.push(Judgement { replay, verdict, evidence: Some(digest) });
            all.insert(digest, evidence);
        }
        let attendee = |id| Attendee { verifier: key(id).node_id(), class: class.clone() };
        let case = Case {
            commitment: shown.evidence.commitment.clone(),
            class: class.clone(),
            start,
            chunks: drawn(),
            judgements,
            attending: [2, 3].map(attendee).to_vec(),
        };
        (case, all)
    }

    #[test]
    fn a_case_is_what_its_worker_and_verifiers_signed() {
        let shown = shown();
        let (case, _) = two_against(&shown);
        let again = Case::parse(&case.canonical_bytes()).expect("a case");
        assert_eq!(again, case);
        assert_eq!(check_case(&case, RUN, &shown.layout, &terms()), Ok(()));
        let elsewhere = RunId::new([6; 32]);
        check_case(&case, elsewhere, &shown.layout, &terms()).expect_err("another run's");
        let changes: [fn(&mut Case); 9] = [
            |case| case.commitment.commitment.tokens.0 += 1,
            |case| case.commitment.commitment.first_sequence += 1,
            |case| case.start = Digest::of(b"other parameters"),
            |case| _ = case.chunks.pop(),
            |case| case.chunks.swap(0, 1),
            |case| case.judgements[1] = case.judgements[0].clone(),
            |case| case.judgements[0].replay.signature[3] ^= 1,
            |case| case.judgements[0].replay.replayed.round.0 += 1,
            |case| {
                let end = case.judgements[0].replay.replayed.end.clone();
                case.judgements[0].replay = signed_by(1, end, case.start);
            },
        ];
        for (at, change) in changes.into_iter().enumerate() {
            let mut changed = case.clone();
            change(&mut changed);
            let checked = check_case(&changed, RUN, &shown.layout, &terms());
            assert!(checked.is_err(), "change {at}");
        }
    }

    #[test]
    fn only_what_the_evidence_bears_accuses() {
        let shown = shown();
        let (case, all) = two_against(&shown);
        let accusing = |case: &Case, all: &BTreeMap<Digest, ReplayEvidence>| {
            let proven = proven(case, all, &shown.layout, &terms());
            proven.iter().filter(|judgement| judgement.verdict.accuses()).count()
        };
        assert_eq!(accusing(&case, &all), 2);
        assert_eq!(accusing(&case, &BTreeMap::new()), 0);
        // One of them shows the other's evidence as its own.
        let mut borrowed = case.clone();
        borrowed.judgements[1].evidence = case.judgements[0].evidence;
        assert_eq!(accusing(&borrowed, &all), 1);
        let mut louder = case.clone();
        louder.judgements[0].verdict = Judged::Fault(Distances::FARTHEST);
        assert_eq!(accusing(&louder, &all), 1);
        // Who did not attend has no machine to be compared by.
        let mut absent = case.clone();
        absent.attending.clear();
        assert_eq!(accusing(&absent, &all), 0);
        // A verifier's word that nothing was shown, or that it was led nowhere, shows nothing.
        let reason = "the moments".to_owned();
        let mut withheld = case.clone();
        withheld.judgements[0].replay =
            signed_by(2, ReplayEnd::Withheld(reason.clone()), case.start);
        withheld.judgements[0].verdict = Judged::Withheld(reason);
        assert_eq!(accusing(&withheld, &all), 1);
        let mut nowhere = case.clone();
        let replay = signed_by(2, ReplayEnd::Nowhere, case.start);
        let word = ReplayEvidence {
            replay: replay.clone(),
            opened: None,
            commitment: case.commitment.clone(),
        };
        let digest = Digest::of(&word.to_bytes());
        nowhere.judgements[0] = Judgement {
            replay,
            verdict: Judged::Fault(Distances::FARTHEST),
            evidence: Some(digest),
        };
        let mut with_word = all.clone();
        with_word.insert(digest, word);
        assert_eq!(accusing(&nowhere, &with_word), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// No byte of evidence can be changed: not a value, not a proof, not an index.
        #[test]
        fn mutated_evidence_is_refused(
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<Option<prop::sample::Index>>(),
        ) {
            let shown = shown();
            let good = shown.evidence.to_bytes();
            let mut bytes = good.clone();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(evidence) = ReplayEvidence::parse(&bytes) {
                prop_assert!(shown.judge(&evidence).is_err() || bytes == good);
            }
        }
    }
}
