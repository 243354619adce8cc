//! Measures how fast this machine trains a model, and how micro-batches change it.
//!
//! ```text
//! measure DEVICE VOCABULARY HIDDEN LAYERS HEADS KV_HEADS FEED_FORWARD CONTEXT THREADS MICRO_BATCH…
//! ```
//!
//! With the environment of [`manyhands_model::determinism`] numerics are deterministic; the class tells.

use std::time::Duration;

use anyhow::{Context, ensure};
use manyhands_gradient::Layout;
use manyhands_model::determinism;
use manyhands_model::device::{DeviceChoice, MemoryNeed, SpeedTask, measure_speed, numeric_class};
use manyhands_proto::run_file::{Architecture, Precision, Training};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let device: DeviceChoice = arguments.next().context("expected a device")?.parse()?;
    let device = device.resolve()?;
    let numbers = arguments
        .map(|argument| {
            argument.parse::<u32>().with_context(|| format!("expected a number, got {argument:?}"))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(
        numbers.len() >= 9,
        "expected DEVICE VOCABULARY HIDDEN LAYERS HEADS KV_HEADS FEED_FORWARD CONTEXT THREADS MICRO_BATCH…"
    );
    let (shape, micro_batches) = numbers.split_at(8);
    let threads = shape[7];
    let architecture: Architecture = serde_json::from_value(serde_json::json!({
        "vocabulary_size": shape[0], "hidden_size": shape[1], "layers": shape[2], "heads": shape[3],
        "key_value_heads": shape[4], "feed_forward_size": shape[5], "context_length": shape[6],
    }))?;
    let parameters = Layout::of(&architecture)?.parameter_count();
    if determinism::check_environment().is_ok() {
        determinism::switch_on()?;
    }
    println!("{parameters} parameters; {}", numeric_class(device, Precision::F32, threads)?);
    for &micro_batch_sequences in micro_batches {
        let training: Training = serde_json::from_value(serde_json::json!({
            "steps_per_round": 1, "batch_sequences": micro_batch_sequences,
            "micro_batch_sequences": micro_batch_sequences, "learning_rate": 1e-3,
        }))?;
        let need = MemoryNeed::of(&architecture, micro_batch_sequences, Precision::F32)?;
        let speed = measure_speed(&SpeedTask {
            architecture: &architecture,
            training: &training,
            device,
            threads,
            duration: Duration::from_secs(3),
        })?;
        println!(
            "micro-batch {micro_batch_sequences}, {threads} threads: {:.0} tokens/s, about {} MiB",
            speed.tokens_per_second,
            need.total_bytes() >> 20
        );
    }
    Ok(())
}
