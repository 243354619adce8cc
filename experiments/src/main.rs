//! What the codec and the merge do to learning, and how fast they are.
//!
//! ```text
//! manyhands-experiments run                 everything that has no result yet
//! manyhands-experiments run --only ablate   only names that begin so
//! manyhands-experiments list
//! manyhands-experiments report              one page with plots from the results that are there
//! ```

mod bench;
mod checkpoint;
mod cluster;
mod experiment;
mod job;
mod liars;
mod plan;
mod report;
mod result;
mod schedule;
mod statistics;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use manyhands_model::calibration;
use manyhands_model::device::DeviceChoice;
use peak_alloc::PeakAlloc;

use crate::experiment::Experiment;
use crate::job::Place;
use crate::result::Point;
use crate::schedule::Limits;

#[derive(Debug, Parser)]
#[command(about = "Trains many workers in one process and keeps what came of it")]
enum Command {
    /// Run what has no result yet; interrupted experiments go on where they stood.
    Run {
        #[command(flatten)]
        places: Places,
        /// Only experiments whose name begins so.
        #[arg(long, default_value = "")]
        only: String,
        /// A few rounds of a tiny model, every method.
        #[arg(long)]
        short: bool,
        /// Experiments at a time [default: one per core].
        #[arg(long)]
        processes: Option<usize>,
        /// Begin none after so many hours.
        #[arg(long, default_value = "6")]
        hours: f64,
    },
    /// Run one in this process: by its name, or one that a file describes as a result does.
    One {
        /// A name of the list, or a file that ends in `.json`.
        name: String,
        /// Keep its end for experiments that start there, and train it again where that is missing.
        #[arg(long)]
        keep_end: bool,
        #[command(flatten)]
        places: Places,
    },
    /// Names of all experiments.
    List,
    /// One page with plots from the results that are there.
    Report {
        #[arg(long, default_value = "docs/experiments/results")]
        results: PathBuf,
        #[arg(long, default_value = "docs/experiments")]
        out: PathBuf,
    },
    /// How small updates are, and how fast they are encoded and merged.
    BenchGradient(bench::gradient::Options),
    /// Tokens per second of a worker on this machine's cores.
    BenchTrain(bench::train::Options),
    /// Whether replays and draws find cheats and spare the honest, and what they cost.
    BenchVerification(bench::verification::Options),
    /// What `bench-train` starts: one measurement with deterministic numerics.
    #[command(hide = true)]
    TrainDeterministically(bench::train::DeterministicOptions),
    /// What `bench-verification` starts: replays what comes on standard input.
    #[command(hide = true)]
    Replay,
}

/// Counts what is allocated, for the benchmarks.
#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

#[derive(Debug, clap::Args)]
struct Places {
    /// A data set that `manyhands prepare` wrote.
    #[arg(long, default_value = "runs/experiments/text")]
    text: PathBuf,
    /// Where checkpoints are kept.
    #[arg(long, default_value = "runs/experiments/work")]
    work: PathBuf,
    /// Where results are kept.
    #[arg(long, default_value = "docs/experiments/results")]
    results: PathBuf,
    /// Where models are trained: cpu, cuda, cuda:N or mps.
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
}

impl Places {
    fn open(self) -> anyhow::Result<Place> {
        Place::open(&self.text, self.device.resolve()?, self.work, self.results)
    }
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::List => plan::all().iter().for_each(|experiment| println!("{}", experiment.name)),
        Command::Report { results, out } => report::write(&plan::all(), &results, &out)?,
        Command::BenchGradient(options) => {
            bench::gradient::run(&options, &plan::of_benchmarks(), &MEMORY)?;
        }
        Command::BenchTrain(options) => bench::train::run(&options)?,
        Command::TrainDeterministically(options) => bench::train::deterministic(&options)?,
        Command::BenchVerification(options) => bench::verification::run(&options)?,
        Command::Replay => {
            calibration::serve(std::io::stdin().lock(), std::io::stdout().lock())?;
        }
        Command::One { name, keep_end, places } => {
            let (experiment, place) = (named(&name)?, places.open()?);
            let rounds = experiment.rounds;
            let mut tell = |point: &Point| {
                eprintln!(
                    "{name}: round {} of {rounds}, held-out loss {:.4}",
                    point.rounds, point.held_out_loss
                );
            };
            if keep_end {
                job::final_state(&experiment, &place, &mut tell)?;
            }
            let result = job::run(&experiment, &place, &mut tell)?;
            println!(
                "{name}: held-out loss {:.4}, {:.4} bits up, {:.4} bits down, {:.0} s",
                result.held_out_loss, result.bits_up, result.bits_down, result.seconds
            );
        }
        Command::Run { places, only, short, processes, hours } => {
            let mut chosen = if short { plan::short() } else { plan::all() };
            chosen.retain(|experiment| experiment.name.starts_with(&only));
            if chosen.is_empty() {
                bail!(
                    "no experiment's name begins with {only:?}; `manyhands-experiments list` names them"
                );
            }
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let limits = Limits {
                processes: processes.unwrap_or(cores).max(1),
                time: Duration::from_secs_f64(hours * 3_600.0),
            };
            schedule::run(&chosen, &places.open()?, limits)?;
        }
    }
    Ok(())
}

fn named(name: &str) -> anyhow::Result<Experiment> {
    if name.ends_with(".json") {
        let text = std::fs::read_to_string(name).with_context(|| format!("cannot read {name}"))?;
        return serde_json::from_str(&text).with_context(|| format!("{name} is no experiment"));
    }
    let all = plan::all().into_iter().chain(plan::short());
    all.into_iter().find(|experiment| experiment.name == name).with_context(|| {
        format!("there is no experiment {name}; `manyhands-experiments list` names them")
    })
}
