use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{Commitment, SignedCommitment, Start};
use manyhands_proto::{NodeId, Round, TokenCount};
use proptest::prelude::*;

use super::*;
use crate::record::tests_support::assignment;

const RUN: RunId = RunId::new([5; 32]);

fn key() -> NodeKey {
    NodeKey::from_seed([1; 32])
}

/// Three chunks, the last with padding.
fn layout() -> Layout {
    Layout::from_tensors(vec![("a".to_owned(), vec![10_000])]).expect("a layout")
}

fn vector_of(seed: f32, scale: f32) -> Vec<f32> {
    let layout = layout();
    let real = layout.tensors()[0].range();
    let value = |i: usize| if real.contains(&i) { (seed + i as f32).sin() * scale } else { 0.0 };
    (0..layout.vector_len()).map(value).collect()
}

/// A worker's round, from a head whose sent values return.
struct Done {
    start: Vec<f32>,
    end: Vec<f32>,
    error_in: Vec<f32>,
    error_next: Vec<f32>,
    payload: Vec<u8>,
    returned: Vec<u8>,
    work: Work,
}

fn commitment(
    round: u32,
    payload: &[u8],
    ends: (&[f32], &[f32]),
    assignment: Digest,
) -> Commitment {
    Commitment {
        round: Round(round),
        first_sequence: 40,
        payload: Digest::of(payload),
        payload_bytes: payload.len() as u64,
        theta: vector::digest(ends.0),
        moments: Digest::of(b"moments"),
        error: vector::digest(ends.1),
        assignment,
        tokens: TokenCount(256),
        loss: 3.0,
    }
}

/// What `forge` makes of the payload and e_next is what the worker commits to.
fn done(forge: impl Fn(&mut Vec<u8>, &mut Vec<f32>)) -> Done {
    let (layout, terms) = (layout(), Codec::default());
    let codec = UpdateCodec::new(terms.profile, terms.error_decay).expect("β");
    let encode = |error: &mut Vec<f32>, start: &[f32], end: &[f32]| {
        codec.encode(&layout, error, Endpoints { start, end }).expect("finite").into_bytes()
    };
    let [start, between, end] = [0.0, 0.1, 0.3].map(|seed| vector_of(seed, 1.0));
    let mut error_in = vec![0.0; layout.vector_len()];
    let returned = encode(&mut error_in, &start, &between);
    let head = commitment(2, &returned, (&between, &error_in), Digest::of(b"earlier"));
    let mut error_next = error_in.clone();
    let update = Update::parse(&returned, &layout, terms.profile).expect("its own");
    manyhands_gradient::error_feedback::add_sent(&layout, &mut error_next, &update);
    let mut payload = encode(&mut error_next, &start, &end);
    forge(&mut payload, &mut error_next);
    let from = Start::Head {
        round: Round(2),
        commitment: head.digest_of(RUN, key().node_id()),
        sent_values_returned: true,
        adam_step: 4,
    };
    let assignment = assignment(key().node_id(), vector::digest(&start), from);
    let commitment = commitment(3, &payload, (&end, &error_next), assignment.digest());
    let commitment = SignedCommitment::sign(&key(), RUN, commitment);
    let work = Work { commitment, assignment, head: Some(head) };
    Done { start, end, error_in, error_next, payload, returned, work }
}

impl Done {
    fn open(&self, chunk: u64) -> UpdateEvidence {
        let open = |values: &[f32]| {
            Openings::of(&vector::to_bytes(values), &[chunk]).expect("a chunk of it")
        };
        let opened = OpenedStates {
            start: open(&self.start),
            end: open(&self.end),
            error_in: Some(open(&self.error_in)),
            error_next: open(&self.error_next),
        };
        UpdateEvidence { work: self.work.clone(), opened: Some(opened) }
    }

    fn find(&self, evidence: &UpdateEvidence) -> Result<String, String> {
        let payloads = (Some(&self.payload[..]), Some(&self.returned[..]));
        find_fault(evidence, RUN, (&layout(), &Codec::default()), payloads)
    }
}

#[test]
fn a_chunk_that_does_not_follow_is_a_fault_and_no_other_is() {
    let honest = done(|_, _| {});
    for chunk in 0..3 {
        honest.find(&honest.open(chunk)).expect_err("it follows");
    }
    let forged = done(|_, error_next| error_next[5_000] += 1.0);
    for chunk in 0..3 {
        assert_eq!(forged.find(&forged.open(chunk)).is_ok(), chunk == 1, "chunk {chunk}");
    }
    let nothing_opened = UpdateEvidence { work: forged.work.clone(), opened: None };
    forged.find(&nothing_opened).expect_err("the payload is well-formed");
    let unseen = (None, Some(&forged.returned[..]));
    let terms = Codec::default();
    find_fault(&forged.open(1), RUN, (&layout(), &terms), unseen).expect_err("no payload");
    let unseen = (Some(&forged.payload[..]), None);
    find_fault(&forged.open(1), RUN, (&layout(), &terms), unseen).expect_err("no earlier payload");
}

#[test]
fn bytes_that_no_codec_wrote_are_a_fault_without_any_chunk() {
    let garbage = done(|payload, _| *payload = vec![7; 100]);
    let evidence = UpdateEvidence { work: garbage.work.clone(), opened: None };
    garbage.find(&evidence).expect("a fault");
    // Others than it committed to say nothing of it.
    let payloads = (Some(&b"other bytes"[..]), None);
    find_fault(&evidence, RUN, (&layout(), &Codec::default()), payloads).expect_err("another");
    // What is too long to be a payload need not be seen.
    let mut long = garbage.work;
    let mut commitment = long.commitment.commitment.clone();
    commitment.payload_bytes = 1 << 40;
    long.commitment = SignedCommitment::sign(&key(), RUN, commitment);
    let evidence = UpdateEvidence { work: long, opened: None };
    find_fault(&evidence, RUN, (&layout(), &Codec::default()), (None, None)).expect("a fault");
}

#[test]
fn nobody_is_accused_by_what_it_did_not_sign() {
    let forged = done(|_, error_next| error_next[5_000] += 1.0);
    let changes: [fn(&mut UpdateEvidence); 9] = [
        |it| it.work.commitment.commitment.tokens.0 += 1,
        |it| it.work.commitment.run = RunId::new([6; 32]),
        |it| it.work.assignment.theta = Digest::of(b"other parameters"),
        |it| it.work.assignment.worker = NodeId::new([9; 32]),
        |it| it.work.head = None,
        |it| it.work.head.as_mut().expect("some").loss = 2.0,
        |it| it.opened.as_mut().expect("some").error_in = None,
        |it| it.opened.as_mut().expect("some").end.length += 4,
        |it| {
            let opened = it.opened.as_mut().expect("some");
            opened.error_next = opened.end.clone();
        },
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let mut evidence = forged.open(1);
        change(&mut evidence);
        assert!(forged.find(&evidence).is_err(), "change {at}");
    }
    // States of different chunks.
    let (mut mixed, other) = (forged.open(1), forged.open(2));
    mixed.opened.as_mut().expect("some").error_next = other.opened.expect("some").error_next;
    forged.find(&mixed).expect_err("chunk 2 of one of them");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// No byte of it can be changed so that an honest worker is accused.
    #[test]
    fn changed_bytes_accuse_nobody(place in 0usize..1_000_000, bit in 0u8..8) {
        static HONEST: std::sync::LazyLock<(Done, Vec<u8>)> = std::sync::LazyLock::new(|| {
            let honest = done(|_, _| {});
            let bytes = honest.open(1).to_bytes();
            (honest, bytes)
        });
        let (honest, bytes) = &*HONEST;
        let mut changed = bytes.clone();
        let place = place % changed.len();
        changed[place] ^= 1 << bit;
        if let Ok(evidence) = UpdateEvidence::parse(&changed) {
            prop_assert!(honest.find(&evidence).is_err());
        }
    }
}
