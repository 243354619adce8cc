//! The decoder of updates: whatever bytes come, it refuses them or reads what the codec would have written, in
//! bounded memory.
//!
//! The first byte chooses profile and layout. In one of two runs the header is put right, and what a dense profile
//! compresses is compressed, so that the fuzzer works on what is behind them; in the other it writes every byte.
#![no_main]

use std::alloc::System;
use std::sync::LazyLock;

use cap::Cap;
use libfuzzer_sys::fuzz_target;
use manyhands_gradient::aggregate::Member;
use manyhands_gradient::codec::{Endpoints, GROUP_CHUNKS, Update, UpdateCodec, payload_bytes_max};
use manyhands_gradient::{Admitted, CHUNK, Layout, OuterState, merge};
use manyhands_proto::run_file::{Aggregation, Profile};
use manyhands_proto::{NodeId, TokenCount};

/// An allocation past this aborts: some tens of times the larger layout's vector.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 32 << 20);

const PROFILES: [Profile; 6] = [
    Profile::Standard,
    Profile::Quality,
    Profile::Wide,
    Profile::DenseFp16,
    Profile::DenseInt8,
    Profile::Flat12,
];

/// Tensors with tails in one group; and more small ones than a group has chunks.
static LAYOUTS: LazyLock<[Layout; 2]> = LazyLock::new(|| {
    let of = |shapes: Vec<Vec<usize>>| {
        let name = |(at, shape)| (format!("{at:03}"), shape);
        Layout::from_tensors(shapes.into_iter().enumerate().map(name).collect()).expect("a layout")
    };
    let mut small = vec![vec![7]; GROUP_CHUNKS];
    small.push(vec![300]);
    [of(vec![vec![70, 60], vec![5], vec![CHUNK]]), of(small)]
});

/// Version, profile and number of chunks, as the codec writes them.
fn header(layout: &Layout, profile: Profile) -> Vec<u8> {
    let zero = vec![0.0; layout.vector_len()];
    encode(layout, profile, &zero)[..6].to_vec()
}

static HEADERS: LazyLock<[[Vec<u8>; 6]; 2]> = LazyLock::new(|| {
    std::array::from_fn(|at| PROFILES.map(|profile| header(&LAYOUTS[at], profile)))
});

fn encode(layout: &Layout, profile: Profile, sent: &[f32]) -> Vec<u8> {
    let codec = UpdateCodec::new(profile, 0.0).expect("a decay");
    let zero = vec![0.0; layout.vector_len()];
    let ends = Endpoints { start: &zero, end: sent };
    codec.encode(layout, &mut zero.clone(), ends).expect("finite").into_bytes()
}

/// A body of this profile and layout, framed as the codec frames it; none if it is too short for that.
fn framed(choice: usize, body: &[u8]) -> Option<Vec<u8>> {
    let (layout, number) = (&LAYOUTS[choice / 6], choice % 6);
    let profile = PROFILES[number];
    let mut bytes = HEADERS[choice / 6][number].clone();
    match (profile, choice / 6) {
        (Profile::Standard | Profile::Quality | Profile::Wide, 0) => {
            // One group: its length is what is left.
            bytes.extend((body.len() as u16).to_le_bytes());
            bytes.extend(body);
        }
        (Profile::Standard | Profile::Quality | Profile::Wide, _) => {
            // Two: the first one's length is the fuzzer's to say.
            let (first, groups) = body.split_first_chunk()?;
            let left = groups.len().saturating_sub(usize::from(u16::from_le_bytes(*first)));
            bytes.extend(first);
            bytes.extend((left as u16).to_le_bytes());
            bytes.extend(groups);
        }
        (Profile::DenseFp16 | Profile::DenseInt8, _) => {
            // The end of a body whose other values are 0.
            let values = layout.places().iter().map(|place| match profile {
                Profile::DenseFp16 => 2 * place.real,
                _ => 4 + place.real,
            });
            let mut raw = vec![0; values.sum::<usize>()];
            let length = body.len().min(raw.len());
            let start = raw.len() - length;
            raw[start..].copy_from_slice(&body[..length]);
            bytes.extend(zstd::bulk::compress(&raw, 3).expect("memory"));
        }
        (Profile::Flat12, _) => bytes.extend(body),
    }
    Some(bytes)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, body)) = bytes.split_first() else { return };
    let choice = usize::from(first >> 1) % (2 * PROFILES.len());
    let (layout, profile) = (&LAYOUTS[choice / 6], PROFILES[choice % 6]);
    let bytes = if first & 1 == 0 { framed(choice, body) } else { Some(body.to_vec()) };
    let Some(bytes) = bytes else { return };
    let Ok(update) = Update::parse(&bytes, layout, profile) else { return };
    assert!(bytes.len() <= payload_bytes_max(layout, profile));
    assert!(update.sent_count(layout) <= layout.vector_len());
    let mut sent = vec![0.0; layout.vector_len()];
    update.subtract_from(layout, &mut sent);
    assert!(sent.iter().all(|value| value.is_finite()));
    // The reference profiles round again what they read.
    if matches!(profile, Profile::Standard | Profile::Quality | Profile::Wide) {
        assert_eq!(encode(layout, profile, &sent), bytes, "an update has one byte string");
    }
    let member = |number| Member {
        worker: NodeId::new([number; 32]),
        tokens: TokenCount(1),
        update: &update,
        loss_effect: None,
    };
    let (mut theta, mut residual) = (vec![0.0; layout.vector_len()], vec![0.0; layout.vector_len()]);
    let state = OuterState { theta: &mut theta, residual: &mut residual };
    let admitted = Admitted { members: &[member(1), member(2)], alpha: 1.0 };
    merge(layout, &Aggregation::default(), admitted, &[], state).expect("what was parsed is merged");
    assert!(theta.iter().chain(&residual).all(|value| value.is_finite()));
});
