//! The golden values that `oracle/oracle.py` and `oracle/reference.py` worked out on their own: plain Python, no code in common.

use manyhands_gradient::aggregate::{Member, MergePlan};
use manyhands_gradient::codec::{Endpoints, Update, UpdateCodec};
use manyhands_gradient::{Admitted, CHUNK, Layout, OuterState, Revoked, merge};
use manyhands_proto::message::LossEffect;
use manyhands_proto::run_file::{Aggregation, Profile};
use manyhands_proto::{NodeId, TokenCount};
use serde_json::Value;

use crate::support::worker;

const GOLDEN: &str = include_str!("../oracle/golden.json");
const REFERENCE: &str = include_str!("../oracle/reference.json");
/// Of a payload: version, profile, number of chunks.
const HEADER_BYTES: usize = 6;
const TOKENS: [u64; 5] = [30_000, 10_000, 25_000, 25_000, 7];

fn cases(json: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(json).expect("JSON");
    all["cases"].as_array().expect("a list of cases").clone()
}

fn golden(kind: &str) -> Vec<Value> {
    let chosen: Vec<_> = cases(GOLDEN).into_iter().filter(|case| case["kind"] == kind).collect();
    assert!(!chosen.is_empty());
    chosen
}

fn text<'a>(case: &'a Value, field: &str) -> &'a str {
    case[field].as_str().unwrap_or_else(|| panic!("{field} of {case}"))
}

fn named<T: serde::de::DeserializeOwned>(case: &Value, field: &str) -> T {
    serde_json::from_value(case[field].clone()).expect("a name of the run file")
}

fn layout_of(name: &str) -> Layout {
    let big = [("c", vec![3, CHUNK]), ("e", vec![64, CHUNK])];
    let small = [("a", vec![70, 100]), ("b", vec![5]), ("d", vec![4100])];
    let tensors = small.into_iter().chain(big.into_iter().filter(|_| name == "big"));
    let named = tensors.map(|(name, shape)| (name.to_owned(), shape)).collect();
    Layout::from_tensors(named).expect("a layout")
}

/// The oracle's numbers: a linear congruential generator, cubed.
fn draw(layout: &Layout, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed;
    let mut vector = vec![0.0; layout.vector_len()];
    for (chunk, place) in layout.places().iter().enumerate() {
        for value in &mut vector[chunk * CHUNK..][..place.real] {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let unit = ((state >> 40) as i32 - (1 << 23)) as f32 / (1 << 23) as f32;
            *value = (unit * unit) * unit * scale;
        }
    }
    vector
}

fn fnv(bytes: impl IntoIterator<Item = u8>) -> String {
    let hash = bytes.into_iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn fnv_of(vector: &[f32]) -> String {
    fnv(vector.iter().flat_map(|value| value.to_le_bytes()))
}

/// θ_t, θ_H and e_in of a drawn worker.
fn drawn(layout: &Layout, seed: u64) -> [Vec<f32>; 3] {
    let start = draw(layout, seed * 1_000 + 1, 0.5_f32.powi(5));
    let step = draw(layout, seed * 1_000 + 2, 0.5_f32.powi(8));
    let end = start.iter().zip(&step).map(|(start, step)| start - step).collect();
    [start, end, draw(layout, seed * 1_000 + 3, 0.5_f32.powi(9))]
}

/// The same of a worker whose steps are plain to see.
fn plain(layout: &Layout, value: impl Fn(usize) -> f32) -> [Vec<f32>; 3] {
    let zero = vec![0.0; layout.vector_len()];
    let mut start = zero.clone();
    for (chunk, place) in layout.places().iter().enumerate() {
        let first = chunk * CHUNK;
        for (at, start) in (first..).zip(&mut start[first..first + place.real]) {
            *start = value(at);
        }
    }
    [start, zero.clone(), zero]
}

fn encode(
    layout: &Layout,
    profile: Profile,
    [start, end, error]: [Vec<f32>; 3],
) -> (Vec<u8>, Vec<f32>) {
    let mut error = error;
    let codec = UpdateCodec::new(profile, 0.95).expect("a decay");
    let ends = Endpoints { start: &start, end: &end };
    let payload = codec.encode(layout, &mut error, ends).expect("finite");
    (payload.into_bytes(), error)
}

/// What a case begins with.
fn states_of(case: &Value, layout: &Layout) -> [Vec<f32>; 3] {
    match text(case, "input") {
        "drawn" => drawn(layout, case["seed"].as_u64().expect("a seed")),
        "zero" => plain(layout, |_| 0.0),
        "tiny" => plain(layout, |_| 0.5_f32.powi(31)),
        "large" => plain(layout, |at| if at == 1_000 { 1e6 } else { 0.0 }),
        "ties" => plain(layout, |at| if at % 3 == 0 { 0.5 } else { -0.25 }),
        input => panic!("unknown input {input}"),
    }
}

#[test]
fn payloads_and_error_buffers_are_the_oracles() {
    for case in golden("encode") {
        let layout = layout_of(text(&case, "layout"));
        let profile = named(&case, "profile");
        let (payload, error) = encode(&layout, profile, states_of(&case, &layout));
        if let Some(hex) = case["payload"].as_str() {
            let got: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(got, hex, "{case}");
        }
        assert_eq!(payload.len() as u64, case["payload_bytes"], "{case}");
        assert_eq!(fnv(payload.iter().copied()), case["payload_fnv"], "{case}");
        assert_eq!(fnv_of(&error), case["error_fnv"], "{case}");
        Update::parse(&payload, &layout, profile).expect("every golden payload is read");
    }
}

#[test]
fn what_the_codec_is_compared_with_is_the_oracles_too() {
    for case in cases(REFERENCE) {
        let layout = layout_of(text(&case, "layout"));
        let profile = named(&case, "profile");
        let (payload, error) = encode(&layout, profile, states_of(&case, &layout));
        assert_eq!(fnv_of(&error), case["error_fnv"], "{case}");
        if profile == Profile::Flat12 {
            if let Some(hex) = case["payload"].as_str() {
                let got: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(got, hex, "{case}");
            }
            assert_eq!(payload.len() as u64, case["payload_bytes"], "{case}");
            assert_eq!(fnv(payload.iter().copied()), case["payload_fnv"], "{case}");
        } else {
            let content = zstd::decode_all(&payload[HEADER_BYTES..]).expect("a zstd frame");
            assert_eq!(content.len() as u64, case["content_bytes"], "{case}");
            assert_eq!(fnv(content), case["content_fnv"], "{case}");
        }
        let is_read = Update::parse(&payload, &layout, profile).is_ok();
        assert_eq!(is_read, case["refused"] != true, "{case}");
    }
}

fn updates(layout: &Layout, seeds: std::ops::Range<u64>) -> Vec<Update> {
    seeds
        .map(|seed| {
            let (payload, _) = encode(layout, Profile::Standard, drawn(layout, seed));
            Update::parse(&payload, layout, Profile::Standard).expect("an honest payload")
        })
        .collect()
}

fn members<'a>(updates: &'a [Update], tokens: &[u64]) -> Vec<Member<'a>> {
    (1_u8..)
        .zip(updates)
        .zip(tokens)
        .map(|((number, update), &tokens)| Member {
            worker: worker(number),
            tokens: TokenCount(tokens),
            update,
            loss_effect: None,
        })
        .collect()
}

fn config_of(case: &Value) -> Aggregation {
    Aggregation {
        denominator: named(case, "denominator"),
        rules: vec![named(case, "rule")],
        broadcast: Profile::Wide,
        ..Aggregation::default()
    }
}

fn check_weights(case: &Value, layout: &Layout, config: &Aggregation, members: &[Member<'_>]) {
    let plan = MergePlan::new(layout, config, members).expect("a valid set");
    for (at, id) in plan.workers().enumerate() {
        let weight = plan.weight(&id).expect("in the plan");
        assert_eq!(format!("{:08x}", weight.to_bits()), case["weights"][at], "{case}");
        let factors = plan.factors(&id).expect("in the plan");
        for (factor, field) in factors.iter().zip(["factors", "factors_b", "factors_d"]) {
            assert_eq!(u64::from(factor.units()), case[field][at], "{case}");
        }
    }
}

/// The oracle's positions in the set, from 0.
fn workers_of(case: &Value, field: &str) -> Vec<NodeId> {
    let positions = case[field].as_array().expect("positions").iter();
    positions.map(|at| worker(at.as_u64().expect("a position") as u8 + 1)).collect()
}

#[test]
fn merges_and_revocations_are_the_oracles() {
    let layout = layout_of("small");
    let five = updates(&layout, 11..16);
    let three = updates(&layout, 21..24);
    for case in golden("merge").into_iter().chain(golden("revocation")) {
        let config = config_of(&case);
        let mut theta = draw(&layout, 9_001, 0.5_f32.powi(5));
        let mut residual = draw(&layout, 9_002, 0.5_f32.powi(9));
        let mut step = |members: &[Member<'_>], alpha, revoked: &[Revoked<'_>]| {
            let state = OuterState { theta: &mut theta, residual: &mut residual };
            let admitted = Admitted { members, alpha };
            let merged = merge(&layout, &config, admitted, revoked, state).expect("they fit");
            merged.broadcast.into_bytes()
        };
        let mut five = members(&five, &TOKENS);
        if let Some(effects) = case["effects"].as_array() {
            for (member, effect) in five.iter_mut().zip(effects) {
                member.loss_effect = Some(LossEffect(effect.as_i64().expect("a number")));
            }
        }
        let broadcast = if text(&case, "kind") == "merge" {
            check_weights(&case, &layout, &config, &five);
            step(&five, 0.7, &[])
        } else {
            let three = members(&three, &[9; 3]);
            check_weights(&case, &layout, &config, &three);
            if case["earlier_round_applied"] == true {
                step(&five, 0.5, &[]);
            }
            let from = Admitted { members: &five, alpha: 0.5 };
            let (gone, going) = (workers_of(&case, "gone"), workers_of(&case, "going"));
            step(&three, 0.7, &[Revoked { workers: &going, earlier: &gone, from }])
        };
        assert_eq!(broadcast.len() as u64, case["broadcast_bytes"], "{case}");
        assert_eq!(fnv(broadcast), case["broadcast_fnv"], "{case}");
        assert_eq!(fnv_of(&theta), case["theta_fnv"], "{case}");
        assert_eq!(fnv_of(&residual), case["residual_fnv"], "{case}");
    }
}
