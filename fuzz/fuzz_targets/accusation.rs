//! What an accusation follows from, as a verifier reads it before it votes: no bytes do harm, and none accuse a worker of
//! what it did not do.
#![no_main]

use std::alloc::System;
use std::collections::BTreeMap;
use std::sync::LazyLock;

use cap::Cap;
use libfuzzer_sys::fuzz_target;
use manyhands_gradient::codec::{Endpoints, UpdateCodec};
use manyhands_gradient::{Layout, vector};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    Assignment, Commitment, DeviceKind, Distances, EndState, NumericClass, OpenedStates, ReplayEnd,
    Replayed, SignedCommitment, SignedReplay, Start, UpdateEvidence, Work,
};
use manyhands_proto::run_file::{Codec, Verification};
use manyhands_proto::tree::Openings;
use manyhands_proto::{ChunkIndex, Digest, Round, RunId, TokenCount};
use manyhands_rules::evidence::{check_case, false_ends, proven};
use manyhands_rules::panel::{Attendee, Case, Judged, Judgement};
use manyhands_rules::update_evidence::find_fault;

/// An allocation past this aborts: some tens of times what is accused with.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 64 << 20);

const RUN: RunId = RunId::new([5; 32]);

/// An honest worker's round, opened, and a case about it.
struct Accused {
    layout: Layout,
    payload: Vec<u8>,
    update: Vec<u8>,
    case: Vec<u8>,
}

static ACCUSED: LazyLock<Accused> = LazyLock::new(|| {
    let layout = Layout::from_tensors(vec![("a".to_owned(), vec![10_000])]).expect("a layout");
    let values = |seed: f32| -> Vec<f32> {
        let value = |i: usize| if i < 10_000 { (seed + i as f32).sin() } else { 0.0 };
        (0..layout.vector_len()).map(value).collect()
    };
    let (worker, verifier) = (NodeKey::from_seed([1; 32]), NodeKey::from_seed([2; 32]));
    let (start, end, terms) = (values(0.0), values(0.3), Codec::default());
    let mut error = vec![0.0; layout.vector_len()];
    let codec = UpdateCodec::new(terms.profile, terms.error_decay).expect("β");
    let ends = Endpoints { start: &start, end: &end };
    let payload = codec.encode(&layout, &mut error, ends).expect("finite").into_bytes();
    let class = NumericClass::unknown(DeviceKind::Cpu);
    let assignment = Assignment {
        round: Round(3),
        worker: worker.node_id(),
        theta: vector::digest(&start),
        class: class.clone(),
        first_sequence: 40,
        sequences: 8,
        steps: 4,
        first_step: 12,
        start: Start::Fresh,
        left_out: Vec::new(),
        commit_deadline_ms: 1_000,
    };
    let commitment = Commitment {
        round: Round(3),
        first_sequence: 40,
        payload: Digest::of(&payload),
        payload_bytes: payload.len() as u64,
        theta: vector::digest(&end),
        moments: Digest::of(b"moments"),
        error: vector::digest(&error),
        assignment: assignment.digest(),
        tokens: TokenCount(256),
        loss: 3.0,
    };
    let commitment = SignedCommitment::sign(&worker, RUN, commitment);
    let replayed = Replayed {
        round: Round(3),
        worker: worker.node_id(),
        assignment: assignment.digest(),
        end: ReplayEnd::At(EndState { theta: assignment.theta, moments: assignment.theta }),
    };
    let work = Work { commitment, assignment, head: None };
    let open = |values: &[f32]| Openings::of(&vector::to_bytes(values), &[1]).expect("a group");
    let opened = OpenedStates {
        start: open(&start),
        end: open(&end),
        error_in: None,
        error_next: open(&error),
    };
    let judgement = Judgement {
        replay: SignedReplay::sign(&verifier, RUN, replayed),
        verdict: Judged::Fault(Distances::FARTHEST),
        evidence: Some(Digest::of(b"evidence")),
        near: Vec::new(),
    };
    let case = Case {
        work: work.clone(),
        chunks: (0..layout.chunk_count() as u32).map(ChunkIndex).collect(),
        judgements: vec![judgement],
        attending: vec![Attendee { verifier: verifier.node_id(), class }],
    };
    let update = UpdateEvidence { work, opened: Some(opened) }.to_bytes();
    Accused { layout, payload, update, case: case.canonical_bytes() }
});

/// Changes a byte for every four: where, and how.
fn changed(bytes: &[u8], script: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for step in script.chunks_exact(4) {
        let [first, second, third, change] = step.try_into().expect("four");
        let at = u32::from_le_bytes([first, second, third, 0]) as usize % bytes.len();
        bytes[at] ^= change;
    }
    bytes
}

fn look_at_update(bytes: &[u8]) {
    let Accused { layout, payload, .. } = &*ACCUSED;
    if let Ok(evidence) = UpdateEvidence::parse(bytes) {
        assert_eq!(evidence.to_bytes(), bytes, "one form");
        let payloads = (Some(&payload[..]), None);
        let found = find_fault(&evidence, RUN, (layout, &Codec::default()), payloads);
        assert!(found.is_err(), "an honest worker is accused: {found:?}");
    }
}

fn look_at_case(bytes: &[u8]) {
    let (layout, terms) = (&ACCUSED.layout, Verification::default());
    if let Ok(case) = Case::parse(bytes) {
        let _ = check_case(&case, RUN, layout, &terms);
        let nothing = BTreeMap::new();
        let proven = proven(&case, &nothing, layout, &terms);
        assert!(proven.iter().all(|judgement| !judgement.verdict.accuses()), "by nothing");
        assert!(false_ends(&case, &nothing, layout, &terms).is_empty(), "by nothing");
    }
}

fuzz_target!(|made_up: &[u8]| {
    look_at_update(made_up);
    look_at_case(made_up);
    look_at_update(&changed(&ACCUSED.update, made_up));
    look_at_case(&changed(&ACCUSED.case, made_up));
});
