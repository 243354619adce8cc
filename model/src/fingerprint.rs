//! What a machine's numerics are recognised by: the bits that a fixed short training comes to.

use std::sync::Arc;

use manyhands_gradient::{Layout, initial_theta, vector};
use manyhands_proto::Digest;
use manyhands_proto::run_file::{Architecture, Precision, Training};
use tch::Device;

use crate::data::{SequenceError, SequenceId, SequenceSource};
use crate::trainer::{Control, LocalTrainer, TrainError, TrainTask};

const SEED: u64 = 7;

/// The digest of θ and the moments after a fixed training of a very small model on `device`; none if it does not come to
/// the same bits twice, as a GPU's does not unless numerics are deterministic. Takes well under a second.
///
/// Two machines with one fingerprint agree on the kernels that it went through, at its sizes; it says nothing of others.
///
/// # Errors
/// When the device fails.
pub(crate) fn fingerprint(
    device: Device,
    precision: Precision,
    threads: u32,
) -> Result<Option<Digest>, TrainError> {
    twice(&architecture(), &training(precision), 4, (device, threads))
}

/// The same of a run's own model and terms, two steps of it: two machines that agree on it take the same kernels at the
/// run's sizes. Takes as long as a few steps of the run, and as much memory.
///
/// # Errors
/// When the device fails.
pub fn run_fingerprint(
    architecture: &Architecture,
    training: &Training,
    device: Device,
    threads: u32,
) -> Result<Option<Digest>, TrainError> {
    twice(architecture, training, 2, (device, threads))
}

fn twice(
    architecture: &Architecture,
    training: &Training,
    steps: u64,
    on: (Device, u32),
) -> Result<Option<Digest>, TrainError> {
    let once = train(architecture, training, steps, on)?;
    Ok((train(architecture, training, steps, on)? == once).then_some(once))
}

/// Each step has two full micro-batches and one that is smaller than the others, where they have more than a sequence.
fn train(
    architecture: &Architecture,
    training: &Training,
    steps: u64,
    (device, threads): (Device, u32),
) -> Result<Digest, TrainError> {
    let layout = Layout::of(architecture).expect("a run's layout was checked");
    let theta = initial_theta(&layout, architecture, SEED);
    let sequences = 2 * u64::from(training.micro_batch_sequences) + 1;
    let batches: Vec<Vec<SequenceId>> = (0..steps)
        .map(|step| (step * sequences..(step + 1) * sequences).map(SequenceId).collect())
        .collect();
    let source = Arc::new(Counted {
        vocabulary_size: architecture.vocabulary_size,
        context_length: architecture.context_length,
        sequences: steps * sequences,
    });
    let mut trainer = LocalTrainer::new(architecture, training, steps, source, device)
        .expect("its layout was just made");
    let task = TrainTask {
        theta: &theta,
        moments: None,
        adam_step: 0,
        first_step: 0,
        batches: &batches,
        micro_batch_sequences: training.micro_batch_sequences,
        precision: training.precision,
        threads,
    };
    let outcome = trainer.train_unrounded(&task, None, &mut |_| Control::Continue)?;
    let parts = [&outcome.theta, &outcome.moments.first, &outcome.moments.second];
    Ok(Digest::of(&parts.map(|part| vector::to_bytes(part)).concat()))
}

/// No size is a multiple of a vector register's, so that what is left over at the end of a row counts too.
fn architecture() -> Architecture {
    Architecture {
        vocabulary_size: 523,
        hidden_size: 90,
        layers: 2,
        heads: 3,
        key_value_heads: 1,
        feed_forward_size: 251,
        context_length: 61,
        rope_theta: 10_000.0,
        norm_epsilon: 1e-5,
        tie_embeddings: true,
    }
}

fn training(precision: Precision) -> Training {
    Training {
        steps_per_round: 4,
        batch_sequences: 5,
        micro_batch_sequences: 2,
        learning_rate: 1e-3,
        warmup_steps: 1,
        decay_steps: 0,
        learning_rate_final_share: 0.0,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        gradient_clip: 1.0,
        precision,
    }
}

/// Tokens that follow from where they stand.
struct Counted {
    vocabulary_size: u32,
    context_length: u32,
    sequences: u64,
}

impl SequenceSource for Counted {
    fn sequence(&self, id: SequenceId) -> Result<Vec<u32>, SequenceError> {
        let Self { vocabulary_size, context_length, .. } = *self;
        let token = |at: u32| {
            let at = id.0 * u64::from(context_length) + u64::from(at);
            (at.wrapping_mul(at).wrapping_add(3 * at) % u64::from(vocabulary_size)) as u32
        };
        Ok((0..=context_length).map(token).collect())
    }

    fn sequence_count(&self) -> u64 {
        self.sequences
    }

    fn context_length(&self) -> u32 {
        self.context_length
    }
}
