//! The evidence of a replay: whatever is changed of it, it is refused, and whatever bytes come in its place do no harm.
#![no_main]

use std::alloc::System;
use std::sync::LazyLock;

use cap::Cap;
use libfuzzer_sys::fuzz_target;
use manyhands_gradient::moments8::{Moments, Moments8};
use manyhands_gradient::{Layout, vector};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    Commitment, EndState, OpenedEnd, OpenedEnds, ReplayEnd, ReplayEvidence, Replayed,
    SignedCommitment, SignedReplay,
};
use manyhands_proto::tree::Openings;
use manyhands_proto::{ChunkIndex, Digest, Round, RunId, TokenCount};
use manyhands_rules::evidence::{Subject, distances, moments_groups, theta_groups};

/// An allocation past this aborts: some tens of times the evidence.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 64 << 20);

const RUN: RunId = RunId::new([5; 32]);

/// A round, and the evidence of its replay.
struct Judged {
    layout: Layout,
    chunks: Vec<ChunkIndex>,
    start: Digest,
    evidence: ReplayEvidence,
}

static ROUND: LazyLock<Judged> = LazyLock::new(|| {
    let layout = Layout::from_tensors(vec![("a".to_owned(), vec![5, 5_000])]).expect("a layout");
    let chunks: Vec<ChunkIndex> = [0, 2, 6].map(ChunkIndex).to_vec();
    let ended = |seed: f32| {
        let real = |i: usize| i < 25_000;
        let value = |i: usize| if real(i) { (seed + i as f32).sin() } else { 0.0 };
        let theta: Vec<f32> = (0..layout.vector_len()).map(value).collect();
        let second = theta.iter().map(|value| value * value).collect();
        let moments = Moments { first: theta.clone(), second };
        (theta, Moments8::quantise(&layout, &moments, 7).expect("finite"))
    };
    let open = |(theta, moments): &(Vec<f32>, Moments8)| OpenedEnd {
        theta: Openings::of(&vector::to_bytes(theta), &theta_groups(&chunks)).expect("groups"),
        moments: Openings::of(moments.as_bytes(), &moments_groups(&chunks)).expect("groups"),
    };
    let digests = |(theta, moments): &(Vec<f32>, Moments8)| EndState {
        theta: vector::digest(theta),
        moments: Digest::of(moments.as_bytes()),
    };
    let [begun, claimed, replayed] = [0.0, 0.3, 0.31].map(ended);
    let (worker, verifier) = (NodeKey::from_seed([1; 32]), NodeKey::from_seed([2; 32]));
    let EndState { theta, moments } = digests(&claimed);
    let commitment = Commitment {
        round: Round(3),
        first_sequence: 40,
        payload: theta,
        payload_bytes: 100,
        theta,
        moments,
        error: theta,
        assignment: Digest::of(b"assignment"),
        tokens: TokenCount(1_000),
        loss: 3.0,
    };
    let start = vector::digest(&begun.0);
    let replay = Replayed {
        round: Round(3),
        worker: worker.node_id(),
        assignment: Digest::of(b"assignment"),
        end: ReplayEnd::At(digests(&replayed)),
    };
    let opened = OpenedEnds {
        start: open(&begun).theta,
        claimed: open(&claimed),
        replayed: open(&replayed),
    };
    let evidence = ReplayEvidence {
        commitment: SignedCommitment::sign(&worker, RUN, commitment),
        replay: SignedReplay::sign(&verifier, RUN, replay),
        opened: Some(opened),
    };
    Judged { layout, chunks, start, evidence }
});

/// Changes what the bytes say, three at a time: which part, where, to what.
fn change(opened: &mut OpenedEnds, script: &[u8]) {
    for step in script.chunks_exact(4) {
        let [part, action, place, value] = step.try_into().expect("four");
        let OpenedEnds { start, claimed, replayed } = opened;
        let parts = [
            start,
            &mut claimed.theta,
            &mut claimed.moments,
            &mut replayed.theta,
            &mut replayed.moments,
        ];
        let part = parts.into_iter().nth(usize::from(part) % 5).expect("five");
        let count = part.groups.len().max(1);
        let group = part.groups.get_mut(usize::from(place) % count);
        match (action % 8, group) {
            (0, _) => part.length ^= u64::from(value),
            (1, Some(_)) => _ = part.groups.remove(usize::from(place) % count),
            (2, Some(group)) => group.opening.group ^= u64::from(value),
            (3, Some(group)) => group.bytes.truncate(usize::from(value)),
            (4, Some(group)) => group.opening.siblings.truncate(usize::from(value)),
            (5, Some(group)) => {
                if let Some(byte) = group.bytes.get_mut(usize::from(value) * 60) {
                    *byte ^= 1;
                }
            }
            (6, Some(group)) => {
                let at = usize::from(value) % group.opening.siblings.len().max(1);
                if let Some(sibling) = group.opening.siblings.get_mut(at) {
                    sibling[0] ^= 1;
                }
            }
            (_, Some(group)) => {
                let copy = group.clone();
                part.groups.push(copy);
            }
            (_, None) => {}
        }
    }
}

fuzz_target!(|made_up: &[u8]| {
    let Judged { layout, chunks, start, evidence } = &*ROUND;
    let subject = Subject { layout, start: *start, chunks, exact: false };
    if let Ok(parsed) = ReplayEvidence::parse(made_up) {
        assert_eq!(parsed.to_bytes(), made_up, "one form");
        let _ = distances(&parsed, subject);
    }
    let mut changed = evidence.clone();
    change(changed.opened.as_mut().expect("some"), made_up);
    let held = distances(&changed, subject);
    assert!(held.is_err() || changed == *evidence, "only what was opened is taken");
});
