//! How much an update puts into each chunk, as integers: where a forger would gain most.

use rayon::prelude::*;

use crate::codec::{ChunkSymbols, Update};

/// 2²⁴, the units in a magnitude of 1.
const UNITS: f32 = 16_777_216.0;

/// For each chunk the sum of the magnitudes that are sent, in units of 2⁻²⁴, rounded down one by one.
/// The energies of all chunks together fit 64 bits.
pub fn chunk_energies(update: &Update) -> Vec<u64> {
    let chunks = update.chunk_count();
    // A chunk has at most 2⁴⁰; only a vector of more than 2²⁴ full chunks comes near the limit.
    let energy_max = u64::MAX / (chunks as u64).max(1);
    (0..chunks)
        .into_par_iter()
        .map(|chunk| {
            let mut energy = 0_u64;
            let symbols = ChunkSymbols(update.symbols(chunk));
            // The product with a power of two is exact.
            symbols.for_each(|_, value| energy += (value.abs() * UNITS) as u64);
            energy.min(energy_max)
        })
        .collect()
}
