//! How much an update puts into each chunk, as integers: where a forger would gain most.

use crate::codec::Update;
use crate::layout::Layout;

/// 2²⁴, the units in a magnitude of 1.
const UNITS: f32 = 16_777_216.0;

/// For each chunk the sum of the magnitudes that are sent, in units of 2⁻²⁴, rounded down one by one.
/// The energies of all chunks together fit 64 bits.
///
/// # Panics
/// When the update belongs to another layout.
pub fn chunk_energies(layout: &Layout, update: &Update) -> Vec<u64> {
    // A chunk has at most 2⁴⁰; only a vector of more than 2²⁴ full chunks comes near the limit.
    let energy_max = u64::MAX / (update.chunk_count() as u64).max(1);
    update.map_chunks(layout, |symbols| {
        let mut energy = 0_u64;
        // The product with a power of two is exact.
        symbols.for_each(|_, value| energy += (value.abs() * UNITS) as u64);
        energy.min(energy_max)
    })
}
