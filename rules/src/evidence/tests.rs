use std::ops::Range;

use manyhands_gradient::CHUNK;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    Assignment, Commitment, DeviceKind, OpenedEnds, SignedCommitment, Start, Work,
};
use manyhands_proto::{Round, TokenCount};
use proptest::prelude::*;

use super::*;
use crate::panel::Attendee;
use crate::record::tests_support;

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
    let (first_moment, second_moment) = (&moments.first[at.clone()], &moments.second[at.clone()]);
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

fn assignment(theta: Digest) -> Assignment {
    tests_support::assignment(key(1).node_id(), theta, Start::Fresh)
}

fn signed_by(verifier: u8, end: ReplayEnd, start: Digest) -> SignedReplay {
    let (round, worker) = (Round(3), key(1).node_id());
    let replayed = Replayed { round, worker, assignment: assignment(start).digest(), end };
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
        assignment: assignment(start.digests().theta).digest(),
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
        let subject = Subject { layout: &self.layout, start, chunks: &drawn(), exact: false };
        distances(evidence, subject)
    }
}

#[test]
fn distances_follow_from_the_drawn_chunks() {
    let shown = shown();
    let mut comparison = Comparison::default();
    let [claimed, replayed] = [&shown.claimed, &shown.replayed].map(|it| it.moments.dequantise());
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
    other.assignment = Digest::of(b"another");
    let other = SignedReplay::sign(&key(2), RUN, other);
    assert_eq!(refused(other, false), Err(Whose::Verifier));
}

#[test]
fn who_is_far_from_two_that_agree_made_its_end_up() {
    let shown = shown();
    let start = shown.start.digests().theta;
    let subject = Subject { layout: &shown.layout, start, chunks: &drawn(), exact: false };
    let ended = |seed: f32| {
        let end = Ended::new(&shown.layout, seed);
        let mut evidence = shown.evidence.clone();
        evidence.replay = signed(ReplayEnd::At(end.digests()), start);
        evidence.opened.as_mut().expect("some").replayed = end.open(&drawn());
        let end = end_of(&evidence, Side::Replayed, subject).expect("it is opened");
        super::Ended { class: NumericClass::unknown(DeviceKind::Cpu), end: Place::Chunks(end) }
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
        let near = judgements.iter().map(Judgement::verifier).collect();
        judgements.push(Judgement { replay, verdict, evidence: Some(digest), near });
        all.insert(digest, evidence);
    }
    let attendee = |id| Attendee { verifier: key(id).node_id(), class: class.clone() };
    let case = Case {
        work: Work {
            commitment: shown.evidence.commitment.clone(),
            assignment: assignment(start),
            head: None,
        },
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
    let changes: [fn(&mut Case); 10] = [
        |case| case.work.commitment.commitment.tokens.0 += 1,
        |case| case.work.commitment.commitment.first_sequence += 1,
        |case| case.work.assignment.theta = Digest::of(b"other parameters"),
        |case| case.work.assignment.steps -= 1,
        |case| _ = case.chunks.pop(),
        |case| case.chunks.swap(0, 1),
        |case| case.judgements[1] = case.judgements[0].clone(),
        |case| case.judgements[0].replay.signature[3] ^= 1,
        |case| case.judgements[0].replay.replayed.round.0 += 1,
        |case| {
            let end = case.judgements[0].replay.replayed.end.clone();
            case.judgements[0].replay = signed_by(1, end, case.work.assignment.theta);
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
        signed_by(2, ReplayEnd::Withheld(reason.clone()), case.work.assignment.theta);
    withheld.judgements[0].verdict = Judged::Withheld(reason);
    assert_eq!(accusing(&withheld, &all), 0, "it names an end near its own that there is not");
    withheld.judgements[1].near.clear();
    assert_eq!(accusing(&withheld, &all), 1);
    let mut nowhere = case.clone();
    let replay = signed_by(2, ReplayEnd::Nowhere, case.work.assignment.theta);
    let word = ReplayEvidence {
        replay: replay.clone(),
        opened: None,
        commitment: case.work.commitment.clone(),
    };
    let digest = Digest::of(&word.to_bytes());
    let verdict = Judged::Fault(Distances::FARTHEST);
    nowhere.judgements[0] = Judgement { replay, verdict, evidence: Some(digest), near: Vec::new() };
    nowhere.judgements[1].near.clear();
    let mut with_word = all.clone();
    with_word.insert(digest, word);
    assert_eq!(accusing(&nowhere, &with_word), 1);
}

#[test]
fn where_the_same_bits_are_asked_for_digests_say_it_all() {
    let shown = shown();
    let (opened, _) = two_against(&shown);
    let exact = Verification { fingerprint: Some(Digest::of(b"bits")), ..terms() };
    let end_of = |id: u8| match id {
        2 | 3 => ReplayEnd::At(shown.replayed.digests()),
        _ => ReplayEnd::At(shown.start.digests()),
    };
    let mut case = Case { judgements: Vec::new(), ..opened };
    let attendee =
        |id| Attendee { verifier: key(id).node_id(), class: case.work.assignment.class.clone() };
    case.attending = (2..=4).map(attendee).collect();
    let mut all = BTreeMap::new();
    for id in 2..=4 {
        let replay = signed_by(id, end_of(id), case.work.assignment.theta);
        let commitment = case.work.commitment.clone();
        let evidence = ReplayEvidence { commitment, replay: replay.clone(), opened: None };
        let subject = Subject::of(&case, &shown.layout, &exact);
        assert_eq!(distances(&evidence, subject), Ok(Distances::FARTHEST));
        let with_chunks =
            ReplayEvidence { opened: shown.evidence.opened.clone(), ..evidence.clone() };
        distances(&with_chunks, subject).expect_err("there is one form of it");
        let near = near(&case, &all, (&replay, &evidence), &shown.layout, &exact);
        let digest = Digest::of(&evidence.to_bytes());
        all.insert(digest, evidence);
        case.judgements.push(Judgement {
            replay,
            verdict: Judged::Fault(Distances::FARTHEST),
            evidence: Some(digest),
            near: near.expect("all is there"),
        });
    }
    let near: Vec<usize> = case.judgements.iter().map(|it| it.near.len()).collect();
    assert_eq!(near, [0, 1, 0]);
    assert_eq!(proven(&case, &all, &shown.layout, &exact).len(), 3);
    let liars = false_ends(&case, &BTreeMap::new(), &shown.layout, &exact);
    assert_eq!(liars, [key(4).node_id()], "two others came to the same bits");
    // A worker's own bits are nobody's fault.
    let same = ReplayEnd::At(case.work.commitment.commitment.end());
    let replay = signed_by(2, same, case.work.assignment.theta);
    let own = ReplayEvidence { replay, opened: None, commitment: case.work.commitment.clone() };
    let subject = Subject::of(&case, &shown.layout, &exact);
    assert_eq!(distances(&own, subject), Ok(Distances::NONE));
}

#[test]
fn ends_are_near_others_or_of_their_own() {
    let shown = shown();
    let (case, mut all) = two_against(&shown);
    let start = case.work.assignment.theta;
    let ended = |verifier, seed| {
        let end = Ended::new(&shown.layout, seed);
        let replay = signed_by(verifier, ReplayEnd::At(end.digests()), start);
        let mut evidence = ReplayEvidence { replay, ..shown.evidence.clone() };
        evidence.opened.as_mut().expect("some").replayed = end.open(&drawn());
        evidence
    };
    let mut case = case;
    let attendee =
        |id| Attendee { verifier: key(id).node_id(), class: case.work.assignment.class.clone() };
    case.attending = (2..=5).map(attendee).collect();
    let near = |case: &Case, all: &BTreeMap<Digest, ReplayEvidence>, third: &ReplayEvidence| {
        super::near(case, all, (&third.replay, third), &shown.layout, &terms())
    };
    let both: Vec<NodeId> = [2, 3].map(|id| key(id).node_id()).to_vec();
    // Where both of the others ended, and somewhere else.
    assert_eq!(near(&case, &all, &ended(4, 0.31)), Some(both));
    assert_eq!(near(&case, &all, &ended(4, 0.7)), Some(Vec::new()));
    assert_eq!(near(&case, &all, &ended(6, 0.31)), None, "of a machine that nobody knows");
    // What led nowhere is near what led nowhere.
    let nowhere = |verifier| ReplayEvidence {
        commitment: case.work.commitment.clone(),
        replay: signed_by(verifier, ReplayEnd::Nowhere, start),
        opened: None,
    };
    assert_eq!(near(&case, &all, &nowhere(4)), Some(Vec::new()));
    let (word, verdict) = (nowhere(4), Judged::Fault(Distances::FARTHEST));
    let digest = Digest::of(&word.to_bytes());
    let replay = word.replay.clone();
    let mut with_word = case.clone();
    with_word.judgements.push(Judgement {
        replay,
        verdict,
        evidence: Some(digest),
        near: Vec::new(),
    });
    assert_eq!(near(&with_word, &all, &nowhere(5)), None, "its evidence is not there");
    all.insert(digest, word);
    assert_eq!(near(&with_word, &all, &nowhere(5)), Some(vec![key(4).node_id()]));
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
