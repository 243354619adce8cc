//! The decoder of moments: whatever bytes come, it refuses them or reads moments that are coded just so.
#![no_main]

use std::alloc::System;
use std::sync::LazyLock;

use cap::Cap;
use libfuzzer_sys::fuzz_target;
use manyhands_gradient::Layout;
use manyhands_gradient::moments8::Moments8;

/// An allocation past this aborts: some tens of times the moments of the layout.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 4 << 20);

/// Tensors with tails.
static LAYOUT: LazyLock<Layout> = LazyLock::new(|| {
    let shapes = vec![("a".to_owned(), vec![60, 5]), ("b".to_owned(), vec![5])];
    Layout::from_tensors(shapes).expect("a layout")
});

fuzz_target!(|made_up: &[u8]| {
    // Zero moments, of which the fuzzer writes the begin of every block: scale, some codes.
    let mut bytes = Moments8::zero(&LAYOUT).into_bytes();
    for (block, start) in made_up.chunks(32).zip((1..bytes.len()).step_by(260)) {
        bytes[start..][..block.len()].copy_from_slice(block);
    }
    let Ok(moments) = Moments8::parse(bytes.clone(), &LAYOUT) else { return };
    assert_eq!(moments.as_bytes(), bytes);
    let values = moments.dequantise();
    assert!(values.first.iter().chain(&values.second).all(|value| value.is_finite()));
    assert!(values.second.iter().all(|value| *value >= 0.0));
    let again = Moments8::quantise(&LAYOUT, &values, 1).expect("they are finite");
    assert_eq!(again.as_bytes(), bytes, "quantising what was quantised changes nothing");
});
