use std::sync::LazyLock;

use manyhands_gradient::codec::{
    ChunkScratch, CodecMismatch, EncodeError, Endpoints, OpenedChunk, ParseUpdateError, Payload,
    Update, UpdateCodec, payload_bytes_max,
};
use manyhands_gradient::error_feedback::add_sent;
use manyhands_gradient::vector::digest;
use manyhands_gradient::{CHUNK, Layout};
use manyhands_proto::ChunkIndex;
use manyhands_proto::run_file::Profile;
use proptest::prelude::*;

use crate::support::{PROFILES, Trained, codec, encoded, layout, matrix, noise, trained};

#[test]
fn standard_payloads_stay_below_their_budget_on_gaussian_updates() {
    let layout = matrix(512);
    let trained = Trained {
        start: noise(&layout, 1, 0.01),
        end: vec![0.0; layout.vector_len()],
        error: vec![0.0; layout.vector_len()],
    };
    let budgets = [(Profile::Standard, 0.136), (Profile::Quality, 0.239), (Profile::Wide, 0.485)];
    for (profile, bits_max) in budgets {
        let (payload, error) = encoded(&layout, profile, &trained);
        let bits = payload.bits_per_parameter(&layout);
        assert!(bits < bits_max, "{profile:?}: {bits} bits per parameter");

        // What one magnitude for all loses of the chosen values' energy.
        let update = Update::parse(payload.as_bytes(), &layout, profile).expect("it is honest");
        let (mut lost, mut energy) = (0.0, 0.0);
        let mut sent = [0.0; CHUNK];
        for chunk in 0..layout.chunk_count() {
            update.dequantised_chunk(&layout, ChunkIndex(chunk as u32), &mut sent);
            for index in (0..CHUNK).filter(|&index| sent[index] != 0.0) {
                let at = chunk * CHUNK + index;
                lost += f64::from(error[at]).powi(2);
                energy += f64::from(trained.start[at]).powi(2);
            }
        }
        assert!(lost / energy < 0.025, "{profile:?}: {}", lost / energy);
    }
}

#[test]
fn payloads_and_error_buffers_never_change_a_bit() {
    let layout = layout();
    let golden = [
        ("4c215a34", "daa0f475"),
        ("17d28c7d", "4fa92fec"),
        ("2eec88ca", "166df767"),
        ("a6d75cd2", "049b6199"),
        ("89dd3b58", "ff8097fd"),
    ];
    let got = PROFILES.map(|profile| {
        let (payload, error) = encoded(&layout, profile, &trained(&layout, 3));
        (payload.digest().short(), digest(&error).short())
    });
    assert_eq!(got, golden.map(|(payload, error)| (payload.to_owned(), error.to_owned())));
}

#[test]
fn one_thread_and_several_write_the_same_bytes() {
    let layout = matrix(150);
    let with_threads = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| encoded(&layout, Profile::Standard, &trained(&layout, 5)))
    };
    assert!(with_threads(1) == with_threads(5));
}

#[test]
fn what_is_sent_and_what_is_kept_add_up() {
    let layout = layout();
    for profile in PROFILES {
        let trained = trained(&layout, 2);
        let (payload, next) = encoded(&layout, profile, &trained);
        let update = Update::parse(payload.as_bytes(), &layout, profile).expect("it is honest");
        let mut sent = [0.0; CHUNK];
        for (chunk, place) in layout.places().iter().enumerate() {
            assert!(update.dequantised_chunk(&layout, ChunkIndex(chunk as u32), &mut sent));
            let count_max: usize = match profile {
                Profile::Standard => (64_usize * place.real).div_ceil(CHUNK),
                Profile::Quality => (128_usize * place.real).div_ceil(CHUNK),
                Profile::Wide => (320_usize * place.real).div_ceil(CHUNK),
                Profile::DenseFp16 | Profile::DenseInt8 | Profile::Flat12 => place.real,
            };
            let count = sent.iter().filter(|&&value| value != 0.0).count();
            assert!(count <= count_max, "{profile:?} {chunk}: {count} of {count_max}");
            for (index, &sent) in sent.iter().enumerate() {
                let at = chunk * CHUNK + index;
                let error = 0.95 * trained.error[at] + (trained.start[at] - trained.end[at]);
                assert_eq!(next[at].to_bits(), (error - sent).to_bits(), "{profile:?} {at}");
            }
        }
        let past = ChunkIndex(layout.chunk_count() as u32);
        assert!(!update.dequantised_chunk(&layout, past, &mut sent));
    }
}

#[test]
fn nothing_to_say_takes_almost_nothing() {
    let layout = matrix(64);
    let zero = vec![0.0; layout.vector_len()];
    let mut error = zero.clone();
    let ends = Endpoints { start: &zero, end: &zero };
    let payload = codec(Profile::Standard).encode(&layout, &mut error, ends).expect("it is finite");
    // A header, a length, and 11 bits for each chunk.
    assert_eq!(payload.as_bytes().len(), 6 + 2 + 88);
    let update = Update::parse(payload.as_bytes(), &layout, Profile::Standard).expect("honest");
    assert_eq!(update.sent_count(&layout), 0);
    assert_eq!(error, zero);
}

#[test]
fn diverged_training_is_an_error_that_names_the_chunk() {
    let layout = matrix(70);
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
        for profile in PROFILES {
            let mut trained = trained(&layout, 1);
            trained.end[69 * CHUNK + 5] = poison;
            trained.start[69 * CHUNK + 5] = -poison;
            let outcome =
                codec(profile).encode(&layout, &mut trained.error.clone(), trained.ends());
            assert!(matches!(outcome, Err(EncodeError::NotFinite { chunk: 69, .. })), "{poison}");
        }
    }
    assert!(UpdateCodec::new(Profile::Standard, 1.5).is_err());
    assert!(UpdateCodec::new(Profile::Standard, f32::NAN).is_err());
}

#[test]
fn values_beyond_every_scale_stay_in_the_error_buffer() {
    let layout = matrix(1);
    for profile in PROFILES {
        let mut start = vec![0.0; CHUNK];
        start[17] = 1e6;
        start[18] = -1e-13;
        let end = vec![0.0; CHUNK];
        let mut error = vec![0.0; CHUNK];
        let ends = Endpoints { start: &start, end: &end };
        let payload = codec(profile).encode(&layout, &mut error, ends).expect("it is finite");
        let update = Update::parse(payload.as_bytes(), &layout, profile).expect("it is honest");
        assert_eq!(update.sent_count(&layout), 1, "{profile:?}");
        assert!(error[17] > 999_000.0 && error[17] < 1e6);
        assert_eq!(error[18], -1e-13);
    }
}

#[test]
fn an_honest_worker_passes_the_codec_check_on_every_chunk() {
    let layout = layout();
    for profile in PROFILES {
        let trained = trained(&layout, 4);
        let (payload, next) = encoded(&layout, profile, &trained);
        let update = Update::parse(payload.as_bytes(), &layout, profile).expect("it is honest");
        for chunk in 0..layout.chunk_count() {
            let range = chunk * CHUNK..(chunk + 1) * CHUNK;
            let opened = opened(&trained, chunk);
            let error = codec(profile)
                .check_chunk(&layout, &update, ChunkIndex(chunk as u32), opened)
                .expect("it is honest");
            assert_eq!(error, next[range], "{profile:?} {chunk}");
        }
    }
}

#[test]
fn a_worker_that_sends_what_it_did_not_train_fails_the_codec_check() {
    let layout = layout();
    let trained = trained(&layout, 4);
    // It adds its steps twice, as if they were somebody else's too.
    let mut doubled = trained.error.clone();
    for (error, (start, end)) in doubled.iter_mut().zip(trained.start.iter().zip(&trained.end)) {
        *error += start - end;
    }
    let payload = codec(Profile::Standard)
        .encode(&layout, &mut doubled, trained.ends())
        .expect("it is finite");
    let forged =
        Update::parse(payload.as_bytes(), &layout, Profile::Standard).expect("it is well formed");
    let check = |update: &Update, profile, chunk, opened| {
        codec(profile).check_chunk(&layout, update, ChunkIndex(chunk), opened)
    };
    assert!(matches!(
        check(&forged, Profile::Standard, 5, opened(&trained, 5)),
        Err(CodecMismatch::Symbols { chunk: 5, first_difference: Some(_), .. })
    ));
    assert!(matches!(
        check(&forged, Profile::Quality, 5, opened(&trained, 5)),
        Err(CodecMismatch::Profile { .. })
    ));
    assert!(matches!(
        check(&forged, Profile::Standard, u32::MAX, opened(&trained, 5)),
        Err(CodecMismatch::NoSuchChunk { .. })
    ));
    let short = OpenedChunk { error_in: &[0.0], ..opened(&trained, 5) };
    assert!(matches!(
        check(&forged, Profile::Standard, 5, short),
        Err(CodecMismatch::OpenedLength { chunk: 5 })
    ));
    let poison = vec![f32::NAN; CHUNK];
    let poisoned = OpenedChunk { error_in: &poison, ..opened(&trained, 5) };
    assert!(matches!(
        check(&forged, Profile::Standard, 5, poisoned),
        Err(CodecMismatch::NotFinite { chunk: 5, .. })
    ));
}

#[test]
fn a_late_update_goes_back_into_the_buffer() {
    let layout = layout();
    let trained = trained(&layout, 6);
    let (payload, mut next) = encoded(&layout, Profile::Standard, &trained);
    let update = Update::parse(payload.as_bytes(), &layout, Profile::Standard).expect("honest");
    add_sent(&layout, &mut next, &update);
    for (at, &next) in next.iter().enumerate() {
        let error = 0.95 * trained.error[at] + (trained.start[at] - trained.end[at]);
        // (e − v̂) + v̂ rounds twice.
        assert!((next - error).abs() <= 2.0 * f32::EPSILON * error.abs());
    }
}

#[test]
fn refusals_say_what_was_expected() {
    let layout = layout();
    let parse = |bytes: &[u8]| Update::parse(bytes, &layout, Profile::Standard);
    let bytes = payload_of(&layout, Profile::Standard, 1);
    let with = |at: usize, byte: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = byte;
        parse(&bytes)
    };
    assert!(matches!(parse(&[]), Err(ParseUpdateError::Length { expected: 6, got: 0 })));
    assert!(matches!(with(0, 9), Err(ParseUpdateError::Version { got: 9 })));
    assert!(matches!(with(0, 1), Err(ParseUpdateError::Version { got: 1 })));
    assert!(matches!(with(1, 2), Err(ParseUpdateError::Profile { got: 2, .. })));
    assert!(matches!(with(5, 1), Err(ParseUpdateError::ChunkCount { .. })));
    assert!(matches!(with(6, bytes[6] ^ 1), Err(ParseUpdateError::Length { .. })));
    let huge = vec![1; payload_bytes_max(&layout, Profile::Standard) + 1];
    assert!(matches!(parse(&huge), Err(ParseUpdateError::TooLong { .. })));
    assert_eq!(
        parse(&bytes[..bytes.len() - 1]).expect_err("it is cut").to_string(),
        format!("expected {} bytes, got {}", bytes.len(), bytes.len() - 1)
    );
}

#[test]
fn a_decompression_bomb_is_refused_by_the_length_the_layout_gives() {
    let layout = matrix(2);
    for profile in [Profile::DenseFp16, Profile::DenseInt8] {
        let mut bytes = payload_of(&layout, profile, 1);
        bytes.truncate(6);
        bytes.extend(zstd::bulk::compress(&vec![0; 100 << 20], 3).expect("it compresses"));
        assert!(matches!(
            Update::parse(&bytes, &layout, profile),
            Err(ParseUpdateError::Compression { .. })
        ));
    }
}

#[test]
fn a_tail_keeps_its_share_and_ties_go_to_the_lower_index() {
    // 65 values keep ⌈64 · 65 / 4096⌉ = 2.
    let layout = Layout::from_tensors(vec![("tail".to_owned(), vec![65])]).expect("a layout");
    let mut start: Vec<f32> = (0..65).map(|at| if at % 9 == 4 { 0.5 } else { 0.1 }).collect();
    start.resize(CHUNK, 0.0);
    let (zero, mut error) = (vec![0.0; CHUNK], vec![0.0; CHUNK]);
    let ends = Endpoints { start: &start, end: &zero };
    let payload = codec(Profile::Standard).encode(&layout, &mut error, ends).expect("finite");
    let update = Update::parse(payload.as_bytes(), &layout, Profile::Standard).expect("honest");
    let mut sent = Vec::new();
    let mut scratch = ChunkScratch::default();
    let symbols = update.chunk(&layout, ChunkIndex(0), &mut scratch).expect("it is there");
    symbols.for_each(|index, value| sent.push((index, value)));
    assert_eq!(sent, [(4, 0.5), (13, 0.5)]);
    assert_eq!((error[4], error[22]), (0.0, 0.5));
}

#[test]
fn the_published_wire_has_its_published_size_and_is_read_back() {
    let layout = matrix(64);
    let (payload, error) = encoded(&layout, Profile::Flat12, &trained(&layout, 3));
    // 64 values of 14 bits for each block of 4,096, and five numbers for the tensor.
    assert_eq!(payload.as_bytes().len(), 6 + 20 + 64 * 64 * 14 / 8);
    let update = Update::parse(payload.as_bytes(), &layout, Profile::Flat12).expect("honest");
    assert_eq!(update.sent_count(&layout), 64 * 64);
    let mut sent = vec![0.0; layout.vector_len()];
    update.subtract_from(&layout, &mut sent);
    let trained = trained(&layout, 3);
    let (mut kept, mut whole) = (0.0, 0.0);
    for (at, (&error, &sent)) in error.iter().zip(&sent).enumerate() {
        let before = 0.95 * trained.error[at] + (trained.start[at] - trained.end[at]);
        assert_eq!(error.to_bits(), (before + sent).to_bits(), "{at}");
        kept += f64::from(error).powi(2);
        whole += f64::from(before).powi(2);
    }
    assert!(kept < 0.92 * whole, "the largest of each block are gone: {kept} of {whole}");
    assert!(matches!(
        codec(Profile::Flat12).check_chunk(&layout, &update, ChunkIndex(0), opened(&trained, 0)),
        Err(CodecMismatch::WholeTensors)
    ));
}

fn opened(trained: &Trained, chunk: usize) -> OpenedChunk<'_> {
    let range = chunk * CHUNK..(chunk + 1) * CHUNK;
    OpenedChunk {
        error_in: &trained.error[range.clone()],
        ends: Endpoints { start: &trained.start[range.clone()], end: &trained.end[range] },
    }
}

/// A few tensors with tails, in groups that are not full.
fn ragged() -> Layout {
    let shapes = [("a", vec![70, 100]), ("b", vec![5]), ("c", vec![3, CHUNK]), ("d", vec![4100])];
    let named = shapes.into_iter().map(|(name, shape)| (name.to_owned(), shape)).collect();
    Layout::from_tensors(named).expect("a valid layout")
}

/// Payloads of four honest workers for each profile.
static HONEST: LazyLock<[[Vec<u8>; 4]; 5]> = LazyLock::new(|| {
    let layout = ragged();
    PROFILES.map(|profile| [0, 1, 2, 3].map(|seed| payload_of(&layout, profile, seed)))
});

fn payload_of(layout: &Layout, profile: Profile, seed: u64) -> Vec<u8> {
    encoded(layout, profile, &trained(layout, seed)).0.into_bytes()
}

/// What a worker would send that sends just these values.
fn encoded_again(layout: &Layout, update: &Update) -> Payload {
    let zero = vec![0.0; layout.vector_len()];
    let (mut error, mut negated) = (zero.clone(), zero.clone());
    update.subtract_from(layout, &mut negated);
    let codec = UpdateCodec::new(update.profile(), 0.0).expect("a valid decay");
    let ends = Endpoints { start: &zero, end: &negated };
    codec.encode(layout, &mut error, ends).expect("sent values are finite")
}

/// Profiles whose values are the same after another coding. Of `dense_int8` the step may round.
const EXACT: [Profile; 4] =
    [Profile::Standard, Profile::Quality, Profile::Wide, Profile::DenseFp16];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any byte string is refused, or is the one coding of what it says.
    #[test]
    fn mutated_payloads_are_refused_or_canonical(
        profile in 0_usize..5,
        seed in 0_usize..4,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0_u32..8), 1..4),
        header_kept in any::<bool>(),
    ) {
        let layout = ragged();
        let mut bytes = HONEST[profile][seed].clone();
        let profile = PROFILES[profile];
        for (at, bit) in flips {
            let kept = if header_kept { 8 } else { 0 };
            let at = kept + at.index(bytes.len() - kept);
            bytes[at] ^= 1 << bit;
        }
        if let Ok(update) = Update::parse(&bytes, &layout, profile)
            && EXACT.contains(&profile)
        {
            prop_assert_eq!(encoded_again(&layout, &update).into_bytes(), bytes);
        }
    }

    #[test]
    fn noise_behind_a_good_header_never_panics(
        mut body in prop::collection::vec(any::<u8>(), 0..300),
        profile in 0_usize..3,
    ) {
        let layout = ragged();
        let mut bytes = HONEST[profile][0][..6].to_vec();
        let profile = PROFILES[profile];
        bytes.extend((body.len() as u16).to_le_bytes());
        bytes.append(&mut body);
        if let Ok(update) = Update::parse(&bytes, &layout, profile) {
            prop_assert_eq!(encoded_again(&layout, &update).into_bytes(), bytes);
        }
    }
}
