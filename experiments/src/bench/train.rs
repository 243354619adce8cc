//! Tokens per second of a worker, beside the same model, batch and optimiser in PyTorch.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use manyhands_gradient::{Layout, initial_theta};
use manyhands_model::data::{SequenceError, SequenceId, SequenceSource};
use manyhands_model::device::DeviceChoice;
use manyhands_model::{Control, Device, LocalTrainer, TrainTask, Trainer, determinism};
use manyhands_proto::run_file::RunFile;
use serde::Deserialize;

use super::{Report, median};

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Recipes whose model and batch are measured.
    #[arg(long, num_args = 1.., default_values = ["configs/demo.toml", "configs/10m.toml"])]
    run_files: Vec<PathBuf>,
    /// Where the figures are kept.
    #[arg(long, default_value = "runs/bench/report.json")]
    report: PathBuf,
    /// Steps that are timed in one pass of five.
    #[arg(long, default_value = "12")]
    steps: usize,
    /// Tokens of a step, in whole sequences: a CPU's share of a larger batch.
    #[arg(long, default_value = "1024")]
    tokens: u32,
    /// Where the worker trains: cpu, cuda, cuda:N or mps.
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// Runs a Python that has PyTorch, which is measured on the CPU.
    #[arg(long)]
    torch_python: Option<PathBuf>,
}

/// One measurement, in a process of its own.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DeterministicOptions {
    #[arg(long)]
    run_file: PathBuf,
    #[arg(long)]
    sequences: u32,
    #[arg(long)]
    steps: usize,
    #[arg(long)]
    device: DeviceChoice,
}

/// Prints tokens per second with deterministic numerics, which this process was started for.
pub(crate) fn deterministic(options: &DeterministicOptions) -> anyhow::Result<()> {
    determinism::switch_on()?;
    let DeterministicOptions { run_file, sequences, steps, device } = options;
    let work = Work { sequences: *sequences, steps: *steps, device: device.resolve()? };
    println!("{}", tokens_per_second(&read(run_file)?, work)?);
    Ok(())
}

fn in_deterministic_process(path: &Path, work: Work, device: &str) -> anyhow::Result<f64> {
    let program = std::env::current_exe().context("this program's own path")?;
    let output = Command::new(program)
        .arg("train-deterministically")
        .args(["--run-file".as_ref(), path.as_os_str()])
        .args(["--sequences", &work.sequences.to_string()])
        .args(["--steps", &work.steps.to_string(), "--device", device])
        .envs(determinism::ENVIRONMENT)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start a process of deterministic numerics")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().with_context(|| format!("it said {text:?}"))
}

fn read(path: &Path) -> anyhow::Result<RunFile> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(RunFile::parse(&text)?)
}

/// What is timed.
#[derive(Debug, Clone, Copy)]
struct Work {
    /// Of a step.
    sequences: u32,
    steps: usize,
    device: Device,
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
    let device = options.device.resolve()?;
    for path in &options.run_files {
        let file = read(path)?;
        let sequences = (options.tokens / file.model.context_length).max(1);
        let work = Work { sequences, steps: options.steps, device };
        let mut config = serde_json::to_value(&file.model)?;
        config["batch_sequences"] = sequences.into();
        let mut torch = match &options.torch_python {
            Some(python) => Some(Torch::start(python, threads(), &config)?),
            None => None,
        };
        let mut passes = Vec::new();
        for _ in 0..PASSES {
            let ours = tokens_per_second(&file, work)?;
            let deterministic = in_deterministic_process(path, work, &options.device.to_string())?;
            let theirs = torch.as_mut().map(|torch| torch.measure(options.steps)).transpose()?;
            passes.push(Pass { ours, deterministic, theirs });
        }
        let name = &file.run.name;
        let of = |value: fn(f64, TorchSpeeds) -> f64| {
            median(passes.iter().filter_map(|pass| Some(value(pass.ours, pass.theirs?))))
        };
        let over_passes = |value: fn(&Pass) -> f64| {
            median(passes.iter().map(value)).expect("there are several passes")
        };
        let speed = over_passes(|pass| pass.ours);
        let share = over_passes(|pass| pass.deterministic / pass.ours);
        report.add(&format!("train.{name}.deterministic_speed"), share, "times", Some(1.0));
        report.add(&format!("train.{name}.speed"), speed, "tokens/s", of(|_, it| it.eager));
        for (against, ratio) in [
            ("eager", of(|ours, it| ours / it.eager)),
            ("compiled", of(|ours, it| ours / it.compiled)),
        ] {
            if let Some(ratio) = ratio {
                report.add(&format!("train.{name}.over_{against}"), ratio, "times", Some(1.0));
            }
        }
    }
    report.save(&options.report)
}

/// Of ours and PyTorch in turn: a machine that others use as well is not the same from one minute to the next.
const PASSES: usize = 5;

/// Tokens per second.
struct Pass {
    ours: f64,
    /// With deterministic numerics.
    deterministic: f64,
    theirs: Option<TorchSpeeds>,
}

/// Tokens per second.
#[derive(Debug, Clone, Copy, Deserialize)]
struct TorchSpeeds {
    eager: f64,
    compiled: f64,
}

/// The same model in a process of PyTorch, measured when it is asked.
struct Torch {
    process: Child,
    asks: ChildStdin,
    says: BufReader<ChildStdout>,
}

impl Torch {
    fn start(python: &Path, threads: u32, config: &serde_json::Value) -> anyhow::Result<Self> {
        let mut process = Command::new(python)
            .arg("experiments/torch/train.py")
            .args([threads.to_string(), config.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", python.display()))?;
        let asks = process.stdin.take().context("it was given one")?;
        let says = BufReader::new(process.stdout.take().context("it was given one")?);
        Ok(Self { process, asks, says })
    }

    fn measure(&mut self, steps: usize) -> anyhow::Result<TorchSpeeds> {
        writeln!(self.asks, "{steps}")?;
        let mut line = String::new();
        self.says.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("PyTorch said {line:?}"))
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        // It waits for the next question.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn threads() -> u32 {
    std::thread::available_parallelism().map_or(1, usize::from) as u32
}

/// The median over steps, as a worker trains them.
fn tokens_per_second(file: &RunFile, work: Work) -> anyhow::Result<f64> {
    let Work { sequences, steps, device } = work;
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
    let mut trainer = LocalTrainer::new(model, training, 1_000, source, device)?;
    let task = TrainTask {
        theta: &theta,
        moments: None,
        adam_step: 0,
        first_step: 0,
        batches: &batches,
        micro_batch_sequences: sequences,
        precision: training.precision,
        threads: threads(),
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
    let step = median(seconds.split_off(warm_up).into_iter()).context("at least one step")?;
    Ok(f64::from(sequences * model.context_length) / step)
}
