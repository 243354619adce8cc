//! θ₀ from a seed, the same bits on every machine.
//!
//! Norm weights are 1. Everything else is near normal with standard deviation 0.02, the projections
//! that write into the residual stream (`o_proj`, `down_proj`) divided by √(2 · layers), as GPT-2 does it:
//! <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>.

use manyhands_proto::run_file::Architecture;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use crate::ieee::assert_ieee;
use crate::layout::{CHUNK, Layout};

const STANDARD_DEVIATION: f64 = 0.02;

/// Uniform 16-bit numbers summed for one value (Irwin–Hall): no logarithm, sine or rejection.
/// Eight have the variance wanted and an excess kurtosis of −0.15.
const SUMMANDS: usize = 8;

/// The mean of that sum, exactly.
const SUM_MEAN: i32 = SUMMANDS as i32 / 2 * 65_535;

/// θ₀ of the run with this seed: the canonical vector, padding 0.
///
/// # Panics
/// When `layout` is not `architecture`'s, or this thread flushes subnormals to zero.
pub fn initial_theta(layout: &Layout, architecture: &Architecture, seed: u64) -> Vec<f32> {
    assert_ieee();
    assert_eq!(
        Layout::of(architecture).as_ref(),
        Ok(layout),
        "the layout must be the architecture's"
    );
    let key = blake3::derive_key("manyhands 2026 initial theta", &seed.to_le_bytes());
    let sum_deviation = (SUMMANDS as f64 * (65_536.0 * 65_536.0 - 1.0) / 12.0).sqrt();
    let unit = STANDARD_DEVIATION / sum_deviation;
    let residual_unit = unit / f64::from(2 * architecture.layers).sqrt();

    let mut theta = vec![0.0; layout.vector_len()];
    theta.par_chunks_mut(CHUNK).zip(layout.places()).enumerate().for_each(
        |(chunk, (values, place))| {
            let tensor = &layout.tensors()[place.tensor];
            let values = &mut values[..place.real];
            if tensor.shape().len() == 1 {
                values.fill(1.0);
                return;
            }
            let is_residual = [".o_proj.weight", ".down_proj.weight"]
                .iter()
                .any(|end| tensor.name().ends_with(end));
            let unit = if is_residual { residual_unit } else { unit } as f32;
            // A stream per chunk: chunks can be made in any order.
            let mut random = ChaCha8Rng::from_seed(key);
            random.set_stream(chunk as u64);
            for value in values {
                let mut bytes = [0; 2 * SUMMANDS];
                random.fill_bytes(&mut bytes);
                let sum: i32 = bytes
                    .chunks_exact(2)
                    .map(|pair| i32::from(u16::from_le_bytes([pair[0], pair[1]])))
                    .sum();
                // At most 19 bits: exact as f32, so there is one rounding.
                *value = (sum - SUM_MEAN) as f32 * unit;
            }
        },
    );
    theta
}
