//! The decoder of updates: whatever bytes come, it refuses them or reads what the codec would have written.
//!
//! The first byte chooses the profile, and the header is put right, so that the fuzzer works on what is behind it.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use manyhands_gradient::codec::{Endpoints, Update, UpdateCodec, payload_bytes_max};
use manyhands_gradient::{CHUNK, Layout};
use manyhands_proto::run_file::Profile;

const PROFILES: [Profile; 6] = [
    Profile::Standard,
    Profile::Quality,
    Profile::Wide,
    Profile::DenseFp16,
    Profile::DenseInt8,
    Profile::Flat12,
];

/// Tensors with tails.
static LAYOUT: LazyLock<Layout> = LazyLock::new(|| {
    let shapes = [("a", vec![70, 60]), ("b", vec![5]), ("c", vec![CHUNK])];
    let named = shapes.into_iter().map(|(name, shape)| (name.to_owned(), shape)).collect();
    Layout::from_tensors(named).expect("a layout")
});

/// Version, profile and number of chunks, as the codec writes them.
static HEADERS: LazyLock<[[u8; 6]; 6]> = LazyLock::new(|| {
    PROFILES.map(|profile| {
        let zero = vec![0.0; LAYOUT.vector_len()];
        let codec = UpdateCodec::new(profile, 1.0).expect("a decay");
        let ends = Endpoints { start: &zero, end: &zero };
        let payload = codec.encode(&LAYOUT, &mut zero.clone(), ends).expect("finite");
        payload.as_bytes()[..6].try_into().expect("a header")
    })
});

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, body)) = bytes.split_first() else { return };
    let choice = usize::from(choice) % PROFILES.len();
    let profile = PROFILES[choice];
    let mut bytes = HEADERS[choice].to_vec();
    if !matches!(profile, Profile::DenseFp16 | Profile::DenseInt8 | Profile::Flat12) {
        // One group: its length is what is left.
        bytes.extend((body.len() as u16).to_le_bytes());
    }
    bytes.extend(body);
    let Ok(update) = Update::parse(&bytes, &LAYOUT, profile) else { return };
    assert!(bytes.len() <= payload_bytes_max(&LAYOUT, profile));
    assert!(update.sent_count(&LAYOUT) <= LAYOUT.vector_len());
    let mut sent = vec![0.0; LAYOUT.vector_len()];
    update.subtract_from(&LAYOUT, &mut sent);
    assert!(sent.iter().all(|value| value.is_finite()));
    if matches!(profile, Profile::Standard | Profile::Quality | Profile::Wide) {
        let codec = UpdateCodec::new(profile, 0.0).expect("a decay");
        let zero = vec![0.0; LAYOUT.vector_len()];
        let ends = Endpoints { start: &zero, end: &sent };
        let again = codec.encode(&LAYOUT, &mut zero.clone(), ends).expect("finite");
        assert_eq!(again.as_bytes(), bytes, "an update has one byte string");
    }
});
