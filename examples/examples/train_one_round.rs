//! One round of a run in one process, without network or chain: train, encode the update, merge it, step.
//!
//! ```text
//! cargo run -p manyhands-examples --example train_one_round
//! ```

use std::sync::Arc;

use anyhow::ensure;
use manyhands_gradient::aggregate::Member;
use manyhands_gradient::codec::{Endpoints, Update, UpdateCodec};
use manyhands_gradient::{Admitted, Layout, OuterState, initial_theta, merge, vector};
use manyhands_model::data::{SequenceError, SequenceId, SequenceSource};
use manyhands_model::{Control, Device, LocalTrainer, TrainTask, Trainer};
use manyhands_proto::NodeId;
use manyhands_proto::run_file::RunFile;

/// Counting from a different number in each sequence: a model learns it in a few steps.
struct Counting {
    vocabulary: u32,
    context: u32,
}

impl SequenceSource for Counting {
    fn sequence(&self, id: SequenceId) -> Result<Vec<u32>, SequenceError> {
        let first = (id.0 % 97) as u32;
        Ok((0..=self.context).map(|at| (first + at) % self.vocabulary).collect())
    }

    fn sequence_count(&self) -> u64 {
        97
    }

    fn context_length(&self) -> u32 {
        self.context
    }
}

fn main() -> anyhow::Result<()> {
    let file = RunFile::parse(
        r#"
        [run]
        name = "example"
        rounds = 1
        [model]
        vocabulary_size = 512
        hidden_size = 32
        layers = 2
        heads = 2
        key_value_heads = 2
        feed_forward_size = 64
        context_length = 32
        [training]
        steps_per_round = 40
        batch_sequences = 8
        micro_batch_sequences = 8
        learning_rate = 1e-2
        [data]
        dataset = "made up"
        "#,
    )?;
    let layout = Layout::of(&file.model)?;
    let theta = initial_theta(&layout, &file.model, file.run.seed);
    let source = Counting { vocabulary: 512, context: 32 };
    let steps = u64::from(file.training.steps_per_round);
    let mut trainer =
        LocalTrainer::new(&file.model, &file.training, steps, Arc::new(source), Device::Cpu)?;
    let batches: Vec<Vec<SequenceId>> =
        (0..steps).map(|step| (0..8).map(|at| SequenceId(step * 8 + at)).collect()).collect();
    let task = TrainTask {
        theta: &theta,
        moments: None,
        adam_step: 0,
        first_step: 0,
        batches: &batches,
        micro_batch_sequences: 8,
        precision: file.training.precision,
        threads: 1,
    };
    let outcome = trainer.train(&task, &mut |_| Control::Continue)?;
    let (first, last) = (outcome.losses[0], outcome.losses[outcome.losses.len() - 1]);
    println!("{} parameters, loss {first:.3} to {last:.3}", layout.parameter_count());
    ensure!(last < first, "expected the loss to fall");

    // What is not sent stays in the error buffer, for the next round.
    let mut error = vec![0.0; layout.vector_len()];
    let codec = UpdateCodec::new(file.codec.profile, file.codec.error_decay)?;
    let ends = Endpoints { start: &theta, end: &outcome.theta };
    let payload = codec.encode(&layout, &mut error, ends)?;
    println!("an update of {:.3} bits per parameter", payload.bits_per_parameter(&layout));

    // Anybody who has the payloads comes to the same bits.
    let update = Update::parse(&payload.into_bytes(), &layout, file.codec.profile)?;
    let worker = NodeId::new([1; 32]);
    let members = [Member { worker, tokens: outcome.tokens, update: &update, loss_effect: None }];
    let admitted = Admitted { members: &members, alpha: 1.0 };
    let (mut next, mut residual) = (theta.clone(), vec![0.0; layout.vector_len()]);
    let state = OuterState { theta: &mut next, residual: &mut residual };
    let broadcast = merge(&layout, &file.aggregation, admitted, &[], state)?.broadcast;
    println!("a broadcast of {:.3} bits per parameter", broadcast.bits_per_parameter(&layout));
    println!("θ of round 0 {}\nθ of round 1 {}", vector::digest(&theta), vector::digest(&next));
    Ok(())
}
