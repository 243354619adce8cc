//! Tokens per second of a worker, beside the same model, batch and optimiser in PyTorch.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use manyhands_gradient::{Layout, initial_theta};
use manyhands_model::data::{SequenceError, SequenceId, SequenceSource};
use manyhands_model::{Control, Device, LocalTrainer, TrainTask, Trainer};
use manyhands_proto::run_file::RunFile;

use super::Report;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Recipes whose model and batch are measured.
    #[arg(long, num_args = 1.., default_values = ["configs/demo.toml", "configs/10m.toml"])]
    run_files: Vec<PathBuf>,
    /// Where the figures are kept.
    #[arg(long, default_value = "runs/bench/report.json")]
    report: PathBuf,
    /// Steps that are timed.
    #[arg(long, default_value = "12")]
    steps: usize,
    /// Tokens of a step, in whole sequences: a CPU's share of a larger batch.
    #[arg(long, default_value = "1024")]
    tokens: u32,
    /// Runs a Python that has PyTorch.
    #[arg(long)]
    torch_python: Option<PathBuf>,
}

/// Tokens that follow from the sequence's number: what they are does not matter to the speed.
struct Invented {
    context_length: u32,
    vocabulary_size: u32,
}

impl SequenceSource for Invented {
    fn sequence(&self, id: SequenceId) -> Result<Vec<u32>, SequenceError> {
        let mut state = id.0;
        Ok((0..=self.context_length)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as u32 % self.vocabulary_size
            })
            .collect())
    }

    fn sequence_count(&self) -> u64 {
        1 << 32
    }

    fn context_length(&self) -> u32 {
        self.context_length
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut report = Report::default();
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u32;
    for path in &options.run_files {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let file = RunFile::parse(&text)?;
        let sequences = (options.tokens / file.model.context_length).max(1);
        let ours = tokens_per_second(&file, sequences, threads, options.steps)?;
        let mut config = serde_json::to_value(&file.model)?;
        config["batch_sequences"] = sequences.into();
        let name = &file.run.name;
        let unit = "tokens/s";
        match &options.torch_python {
            None => report.add(&format!("train.{name}.speed"), ours, unit, None),
            Some(python) => {
                let output = Command::new(python)
                    .arg("experiments/torch/train.py")
                    .args([threads.to_string(), options.steps.to_string(), config.to_string()])
                    .output()
                    .with_context(|| format!("cannot start {}", python.display()))?;
                let complaint = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.success(), "PyTorch said: {complaint}");
                let theirs: serde_json::Value = serde_json::from_slice(&output.stdout)?;
                let of = |kind: &str| theirs[kind].as_f64().context("a speed of PyTorch");
                let (eager, compiled) = (of("eager")?, of("compiled")?);
                report.add(&format!("train.{name}.speed"), ours, unit, Some(eager));
                let against = |theirs: f64| (ours / theirs, "times", Some(1.0));
                let (value, unit, baseline) = against(eager);
                report.add(&format!("train.{name}.over_eager"), value, unit, baseline);
                let (value, unit, baseline) = against(compiled);
                report.add(&format!("train.{name}.over_compiled"), value, unit, baseline);
            }
        }
    }
    report.save(&options.report)
}

/// The median over steps, as a worker trains them.
fn tokens_per_second(
    file: &RunFile,
    sequences: u32,
    threads: u32,
    steps: usize,
) -> anyhow::Result<f64> {
    let (model, training) = (&file.model, &file.training);
    let layout = Layout::of(model)?;
    let theta = initial_theta(&layout, model, file.run.seed);
    let source = Arc::new(Invented {
        context_length: model.context_length,
        vocabulary_size: model.vocabulary_size,
    });
    let warm_up = 3;
    let batches: Vec<Vec<SequenceId>> = (0..(steps + warm_up) as u64)
        .map(|step| (0..u64::from(sequences)).map(|at| SequenceId(step << 16 | at)).collect())
        .collect();
    let mut trainer = LocalTrainer::new(model, training, 1_000, source, Device::Cpu)?;
    let task = TrainTask {
        theta: &theta,
        moments: None,
        adam_step: 0,
        first_step: 0,
        batches: &batches,
        micro_batch_sequences: sequences,
        precision: training.precision,
        threads,
    };
    let mut seconds = Vec::new();
    let mut began = Instant::now();
    trainer.train(&task, &mut |progress| {
        if progress.loss.is_some() {
            seconds.push(began.elapsed().as_secs_f64());
            began = Instant::now();
        }
        Control::Continue
    })?;
    let mut timed = seconds.split_off(warm_up);
    timed.sort_by(f64::total_cmp);
    Ok(f64::from(sequences * model.context_length) / timed[timed.len() / 2])
}
