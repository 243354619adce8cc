use manyhands_gradient::moments8::{
    BLOCK, Moments, Moments8, ParseMomentsError, QuantiseError, parse_chunk,
};
use manyhands_gradient::{CHUNK, Layout};
use manyhands_proto::Digest;
use proptest::prelude::*;

use crate::support::{layout, matrix, noise};

/// Moments as Adam has them: v about m², over many decades.
fn moments(layout: &Layout) -> Moments {
    let spread = noise(layout, 11, 1.0);
    let first: Vec<f32> =
        noise(layout, 12, 1e-4).iter().zip(&spread).map(|(m, s)| m * s * s * s).collect();
    let second = first.iter().zip(&spread).map(|(m, s)| m * m * (0.5 + s.abs())).collect();
    Moments { first, second }
}

#[test]
fn moments_never_change_a_bit_and_come_back_within_their_bounds() {
    let layout = layout();
    let Moments { first, second } = moments(&layout);
    let coded = Moments8::quantise(&layout, &moments(&layout), 30).expect("they are finite");
    assert_eq!(Digest::of(coded.as_bytes()).short(), "5c66d6d2");
    let back = coded.dequantise();
    let blocks = |values: &[f32]| -> Vec<Vec<f64>> {
        values.chunks(BLOCK).map(|block| block.iter().map(|v| f64::from(*v)).collect()).collect()
    };
    for (exact, got) in blocks(&first).iter().zip(blocks(&back.first)) {
        let scale = exact.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        for (exact, got) in exact.iter().zip(got) {
            let bound = (exact.abs() * scale).sqrt() / 127.0 + scale / (254.0 * 254.0);
            assert!((exact - got).abs() <= bound * 1.0001, "{exact} became {got}");
        }
    }
    for (exact, got) in blocks(&second).iter().zip(blocks(&back.second)) {
        let scale = exact.iter().fold(0.0_f64, |largest, value| largest.max(*value)).sqrt();
        for (exact, got) in exact.iter().zip(got) {
            assert_eq!(*exact > 0.0, got > 0.0, "what is not 0 stays not 0");
            let (exact, got) = (exact.sqrt(), got.sqrt());
            let bound = 2.0 * (exact * scale).sqrt() / 255.0 + scale / (255.0 * 255.0);
            assert!((exact - got).abs() <= bound * 1.0001, "{exact} became {got}");
            assert!(exact <= got * 4.001);
        }
    }
}

#[test]
fn quantising_again_changes_nothing() {
    let layout = layout();
    let once = Moments8::quantise(&layout, &moments(&layout), 30).expect("they are finite");
    let twice = Moments8::quantise(&layout, &once.dequantise(), 60).expect("they are finite");
    assert!(once == twice);
    assert_eq!(once.dequantise(), twice.dequantise());
}

#[test]
fn a_second_moment_that_changes_slowly_is_followed() {
    let layout = matrix(1);
    let exact = moments(&layout);
    let mut carried = exact.clone();
    let mut decay = 1.0;
    for round in 1..=40 {
        // What a round without gradients leaves at β₂ = .999. The largest of a block holds its scale.
        decay *= 0.97;
        for block in carried.second.chunks_mut(BLOCK) {
            let scale = block.iter().fold(0.0_f32, |largest, v| largest.max(*v));
            block.iter_mut().filter(|v| **v < scale).for_each(|v| *v *= 0.97);
        }
        carried = Moments8::quantise(&layout, &carried, 30 * round).expect("finite").dequantise();
    }
    let (mut followed, mut expected) = (0.0, 0.0);
    for (exact, carried) in exact.second.chunks(BLOCK).zip(carried.second.chunks(BLOCK)) {
        let scale = exact.iter().fold(0.0_f32, |largest, v| largest.max(*v));
        for (exact, carried) in exact.iter().zip(carried) {
            if (1e-5..1e-2).contains(&(exact / scale)) {
                expected += decay * f64::from(exact / scale);
                followed += f64::from(carried / scale);
            }
        }
    }
    let followed = followed / expected;
    assert!((followed - 1.0).abs() < 0.1, "{followed}");
}

#[test]
fn fresh_moments_are_zero_and_bytes_come_back() {
    let layout = layout();
    let fresh = Moments8::zero(&layout);
    assert!(fresh.dequantise().second.iter().all(|value| *value == 0.0));
    assert_eq!(Moments8::parse(fresh.as_bytes().to_vec(), &layout).as_ref(), Ok(&fresh));
    let coded = Moments8::quantise(&layout, &moments(&layout), 30).expect("they are finite");
    assert_eq!(Moments8::parse(coded.as_bytes().to_vec(), &layout).as_ref(), Ok(&coded));
    // Two bytes and a thirty-second of a byte per value.
    assert_eq!(coded.as_bytes().len(), 1 + 2 * layout.vector_len() * 260 / 256);
}

#[test]
fn a_chunk_is_read_from_its_bytes_alone() {
    let layout = layout();
    let coded = Moments8::quantise(&layout, &moments(&layout), 30).expect("they are finite");
    let whole = coded.dequantise();
    for chunk in 0..layout.chunk_count() {
        let bytes = &coded.as_bytes()[Moments8::chunk_range(chunk)];
        let opened = parse_chunk(bytes, &layout, chunk).expect("its own bytes");
        let values = chunk * CHUNK..(chunk + 1) * CHUNK;
        assert_eq!(opened.first, whole.first[values.clone()]);
        assert_eq!(opened.second, whole.second[values]);
        let short = parse_chunk(&bytes[1..], &layout, chunk);
        assert!(matches!(short, Err(ParseMomentsError::Length { .. })));
        let mut other = bytes.to_vec();
        other[3] = 0xff;
        let refused = parse_chunk(&other, &layout, chunk);
        assert!(matches!(refused, Err(ParseMomentsError::Scale { .. })), "{refused:?}");
    }
}

#[test]
fn moments_that_are_none_are_refused() {
    let layout = matrix(1);
    let mut poisoned = moments(&layout);
    poisoned.first[300] = f32::NAN;
    assert_eq!(
        Moments8::quantise(&layout, &poisoned, 1),
        Err(QuantiseError::NotFinite { block: 1 })
    );
    let mut negative = moments(&layout);
    negative.second.fill(-1.0);
    assert_eq!(
        Moments8::quantise(&layout, &negative, 1),
        Err(QuantiseError::Negative { block: 0 })
    );
    let good = Moments8::quantise(&layout, &moments(&layout), 1).expect("they are finite");
    let parse = |bytes: Vec<u8>| Moments8::parse(bytes, &layout);
    assert!(matches!(parse(vec![]), Err(ParseMomentsError::Length { got: 0, .. })));
    let with = |at: usize, value: u8| {
        let mut bytes = good.as_bytes().to_vec();
        bytes[at] = value;
        parse(bytes)
    };
    assert!(matches!(with(0, 7), Err(ParseMomentsError::Version { got: 7 })));
    assert!(matches!(with(4, 0xff), Err(ParseMomentsError::Scale { block: 0, .. })));
    assert!(matches!(with(5, 0x80), Err(ParseMomentsError::Code { block: 0, got: 128 })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn mutated_moments_are_refused_or_stay_what_they_are(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let layout = Layout::from_tensors(vec![("a".to_owned(), vec![300])]).expect("valid");
        let good = Moments8::quantise(&layout, &moments(&layout), 1).expect("finite");
        let mut bytes = good.into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(moments) = Moments8::parse(bytes.clone(), &layout) {
            prop_assert_eq!(moments.as_bytes(), &bytes);
            prop_assert!(moments.dequantise().second.iter().all(|v| *v >= 0.0 && v.is_finite()));
        }
    }
}
