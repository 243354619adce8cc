//! What a machine's numerics are recognised by: the bits that a fixed short training comes to.

use std::sync::Arc;

use manyhands_gradient::{Layout, initial_theta, vector};
use manyhands_proto::Digest;
use manyhands_proto::run_file::{Architecture, Precision, Training};
use tch::Device;

use crate::data::{SequenceError, SequenceId, SequenceSource};
use crate::trainer::{Control, LocalTrainer, TrainError, TrainTask};

const STEPS: u64 = 4;
const SEQUENCES: u64 = 5;
const SEED: u64 = 7;

/// The digest of θ and the moments after a fixed training on `device`; none if it does not come to the same bits
/// twice, as a GPU's does not unless numerics are deterministic. Takes well under a second.
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
    let once = train(device, precision, threads)?;
    Ok((train(device, precision, threads)? == once).then_some(once))
}

fn train(device: Device, precision: Precision, threads: u32) -> Result<Digest, TrainError> {
    let architecture = architecture();
    let training = training(precision);
    let layout = Layout::of(&architecture).expect("a few thousand weights");
    let theta = initial_theta(&layout, &architecture, SEED);
    let batches: Vec<Vec<SequenceId>> = (0..STEPS)
        .map(|step| (step * SEQUENCES..(step + 1) * SEQUENCES).map(SequenceId).collect())
        .collect();
    let source = Arc::new(Counted);
    let mut trainer = LocalTrainer::new(&architecture, &training, STEPS, source, device)
        .expect("its layout was just made");
    let task = TrainTask {
        theta: &theta,
        moments: None,
        adam_step: 0,
        first_step: 0,
        batches: &batches,
        // The last micro-batch of a step is smaller than the others.
        micro_batch_sequences: 2,
        precision,
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
        steps_per_round: STEPS as u32,
        batch_sequences: SEQUENCES as u32,
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
struct Counted;

impl SequenceSource for Counted {
    fn sequence(&self, id: SequenceId) -> Result<Vec<u32>, SequenceError> {
        let Architecture { vocabulary_size, context_length, .. } = architecture();
        let token = |at: u32| {
            let at = id.0 * u64::from(context_length) + u64::from(at);
            (at.wrapping_mul(at).wrapping_add(3 * at) % u64::from(vocabulary_size)) as u32
        };
        Ok((0..=context_length).map(token).collect())
    }

    fn sequence_count(&self) -> u64 {
        STEPS * SEQUENCES
    }

    fn context_length(&self) -> u32 {
        architecture().context_length
    }
}
