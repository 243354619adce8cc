//! A small model and pseudo-random training, the same bits everywhere.

use manyhands_gradient::codec::{Endpoints, Payload, Update, UpdateCodec};
use manyhands_gradient::{CHUNK, Layout, initial_theta};
use manyhands_proto::NodeId;
use manyhands_proto::run_file::{Architecture, Profile};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Those whose chunks can be checked one by one.
pub(crate) const PROFILES: [Profile; 5] =
    [Profile::Standard, Profile::Quality, Profile::Wide, Profile::DenseFp16, Profile::DenseInt8];

pub(crate) fn architecture() -> Architecture {
    Architecture {
        vocabulary_size: 700,
        hidden_size: 48,
        layers: 11,
        heads: 4,
        key_value_heads: 2,
        feed_forward_size: 130,
        context_length: 64,
        rope_theta: 10_000.0,
        norm_epsilon: 1e-5,
        tie_embeddings: true,
    }
}

pub(crate) fn layout() -> Layout {
    Layout::of(&architecture()).expect("a valid architecture")
}

/// One matrix of so many chunks.
pub(crate) fn matrix(chunks: usize) -> Layout {
    Layout::from_tensors(vec![("m".to_owned(), vec![chunks, CHUNK])]).expect("a valid layout")
}

pub(crate) fn worker(number: u8) -> NodeId {
    NodeId::new([number; 32])
}

/// Near-normal values of this deviation where the layout has real values: sums of twelve uniforms.
pub(crate) fn noise(layout: &Layout, seed: u64, deviation: f32) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut vector = vec![0.0; layout.vector_len()];
    for tensor in layout.tensors() {
        for value in &mut vector[tensor.range()] {
            let sum: i32 = (0..6)
                .map(|_| random.next_u32())
                .map(|word| (word & 0xffff) as i32 + (word >> 16) as i32)
                .sum();
            *value = (sum - 6 * 65_535) as f32 * (deviation / 65_536.0);
        }
    }
    vector
}

/// A worker's round: θ_t, θ_H, and the error buffer that it began with.
pub(crate) struct Trained {
    pub(crate) start: Vec<f32>,
    pub(crate) end: Vec<f32>,
    pub(crate) error: Vec<f32>,
}

impl Trained {
    pub(crate) fn ends(&self) -> Endpoints<'_> {
        Endpoints { start: &self.start, end: &self.end }
    }
}

pub(crate) fn trained(layout: &Layout, seed: u64) -> Trained {
    let start = if *layout == self::layout() {
        initial_theta(layout, &architecture(), 1)
    } else {
        noise(layout, 1, 0.02)
    };
    let steps = noise(layout, 100 + seed, 0.003);
    let end = start.iter().zip(&steps).map(|(start, step)| start - step).collect();
    Trained { start, end, error: noise(layout, 200 + seed, 0.001) }
}

pub(crate) fn codec(profile: Profile) -> UpdateCodec {
    UpdateCodec::new(profile, 0.95).expect("a valid decay")
}

/// A worker's payload, and its e_next.
pub(crate) fn encoded(layout: &Layout, profile: Profile, trained: &Trained) -> (Payload, Vec<f32>) {
    let mut error = trained.error.clone();
    let payload =
        codec(profile).encode(layout, &mut error, trained.ends()).expect("finite values encode");
    (payload, error)
}

pub(crate) fn update_of(layout: &Layout, profile: Profile, seed: u64) -> Update {
    let (payload, _) = encoded(layout, profile, &trained(layout, seed));
    Update::parse(payload.as_bytes(), layout, profile).expect("an honest payload parses")
}
