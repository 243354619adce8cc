//! The arithmetic this crate relies on: IEEE 754, round to nearest, subnormals kept.

use std::hint::black_box;

/// Panics unless this thread rounds to nearest and keeps subnormal numbers.
///
/// Libraries switch on flush-to-zero for a thread, and threads it starts inherit it; results would
/// then differ between machines in bits that digests see. Call it where a thread starts; the
/// parallel parts of this crate call it per piece of work (a few nanoseconds per megabyte).
pub fn assert_ieee() {
    let smallest_normal = black_box(f32::MIN_POSITIVE);
    assert!(
        (smallest_normal * black_box(0.5)).to_bits() == 0x0040_0000,
        "flush-to-zero is on in this thread: subnormal results become 0"
    );
    assert!(
        (black_box(f32::from_bits(1)) * black_box(16_777_216.0)).to_bits() == 0x0100_0000,
        "denormals-are-zero is on in this thread: subnormal operands become 0"
    );
    let half_ulp = black_box(f32::EPSILON * 0.5);
    assert!(
        black_box(1.0_f32) + half_ulp == 1.0
            && black_box(1.0_f32) + half_ulp * 1.5 > 1.0
            && black_box(-1.0_f32) - half_ulp == -1.0,
        "this thread does not round to nearest"
    );
}
