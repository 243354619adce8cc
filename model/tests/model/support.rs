//! A tiny model, made-up sequences with something to learn, and the usual task.

use std::sync::Arc;

use manyhands_gradient::Layout;
use manyhands_gradient::moments8::Moments8;
use manyhands_model::data::{SequenceError, SequenceId, SequenceSource};
use manyhands_model::{Control, Device, LocalTrainer, Progress, TrainOutcome, TrainTask, Trainer};
use manyhands_proto::run_file::{Architecture, Precision, Training};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

pub(crate) const CONTEXT: u32 = 32;

pub(crate) fn architecture() -> Architecture {
    Architecture {
        vocabulary_size: 300,
        hidden_size: 32,
        layers: 2,
        heads: 4,
        key_value_heads: 2,
        feed_forward_size: 64,
        context_length: CONTEXT,
        rope_theta: 10_000.0,
        norm_epsilon: 1e-5,
        tie_embeddings: true,
    }
}

pub(crate) fn training() -> Training {
    Training {
        steps_per_round: 10,
        batch_sequences: 4,
        micro_batch_sequences: 4,
        learning_rate: 3e-3,
        warmup_steps: 5,
        decay_steps: 0,
        learning_rate_final_share: 0.1,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        gradient_clip: 1.0,
        precision: Precision::F32,
    }
}

/// Norms of 1 and small uniform numbers elsewhere.
pub(crate) fn theta(architecture: &Architecture, seed: u64) -> Vec<f32> {
    let layout = Layout::of(architecture).expect("a layout");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut theta = vec![0.0; layout.vector_len()];
    for tensor in layout.tensors() {
        for value in &mut theta[tensor.range()] {
            let uniform = (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
            *value = if tensor.shape().len() == 1 { 1.0 } else { (uniform - 0.5) * 0.07 };
        }
    }
    theta
}

/// Sequences that follow from their number: mostly "the token before, plus three", sometimes anything.
#[derive(Clone)]
pub(crate) struct MadeUp;

impl SequenceSource for MadeUp {
    fn sequence(&self, id: SequenceId) -> Result<Vec<u32>, SequenceError> {
        let mut random = ChaCha8Rng::seed_from_u64(id.0);
        let mut token = random.next_u32() % 300;
        let mut next = || {
            token = if random.next_u32() % 8 == 0 {
                random.next_u32() % 300
            } else {
                (token + 3) % 300
            };
            token
        };
        Ok((0..=CONTEXT).map(|_| next()).collect())
    }

    fn sequence_count(&self) -> u64 {
        1 << 32
    }

    fn context_length(&self) -> u32 {
        CONTEXT
    }
}

pub(crate) fn batches(first: u64, steps: u64, sequences: u64) -> Vec<Vec<SequenceId>> {
    (0..steps)
        .map(|step| (0..sequences).map(|at| SequenceId(first + step * sequences + at)).collect())
        .collect()
}

pub(crate) fn trainer_of(architecture: &Architecture, training: &Training) -> LocalTrainer {
    LocalTrainer::new(architecture, training, 1_000, Arc::new(MadeUp), Device::Cpu)
        .expect("a layout")
}

pub(crate) fn trainer() -> LocalTrainer {
    trainer_of(&architecture(), &training())
}

pub(crate) fn task<'a>(
    theta: &'a [f32],
    moments: Option<&'a Moments8>,
    steps_before: u64,
    batches: &'a [Vec<SequenceId>],
) -> TrainTask<'a> {
    TrainTask {
        theta,
        moments,
        adam_step: steps_before,
        first_step: steps_before,
        batches,
        micro_batch_sequences: 4,
        precision: Precision::F32,
        threads: 1,
    }
}

pub(crate) fn go_on(_: Progress) -> Control {
    Control::Continue
}

pub(crate) fn train(trainer: &mut dyn Trainer, task: &TrainTask<'_>) -> TrainOutcome {
    trainer.train(task, &mut go_on).expect("an honest task can be trained")
}

/// |a − b| / |b|.
pub(crate) fn relative_distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| {
        values.map(|value| value * value).sum::<f64>().sqrt()
    };
    let difference = squares(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / squares(&mut b.iter().map(|b| f64::from(*b)))
}

pub(crate) fn delta(start: &[f32], end: &[f32]) -> Vec<f32> {
    start.iter().zip(end).map(|(start, end)| start - end).collect()
}
