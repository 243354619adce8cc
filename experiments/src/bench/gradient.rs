//! How small updates are, and how fast they are encoded and merged, against the speed of memory.
//!
//! The updates are those of a real training run, laid out again and again until the vectors are far larger
//! than any cache. Memory speed is a plain pass e ← β·e + Δ over vectors of the same size, with the same
//! threads.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use manyhands_gradient::aggregate::Member;
use manyhands_gradient::codec::{Endpoints, Payload, Update, UpdateCodec};
use manyhands_gradient::{Admitted, CHUNK, Layout, OuterState, OuterStep, vector};
use manyhands_model::Device;
use manyhands_proto::run_file::{Aggregation, Profile};
use manyhands_proto::{NodeId, TokenCount};
use peak_alloc::PeakAlloc;
use rayon::prelude::*;

use super::{Report, median_seconds};
use crate::cluster::{Cluster, Text};
use crate::experiment::{Experiment, Method};

/// What is measured, and with what.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// A data set that `manyhands prepare` wrote.
    #[arg(long, default_value = "runs/experiments/text")]
    text: PathBuf,
    /// Where the figures are kept.
    #[arg(long, default_value = "runs/bench/report.json")]
    report: PathBuf,
    /// MiB of each vector.
    #[arg(long, default_value = "1024")]
    mebibytes: usize,
    /// Rounds that are trained for the updates.
    #[arg(long, default_value = "8")]
    rounds: u32,
    /// Runs a Python that has PyTorch; without it nothing is compared with PyTorch.
    #[arg(long)]
    torch_python: Option<PathBuf>,
}

/// Updates that are merged at once.
const PAYLOADS: usize = 16;
const GROUP: usize = 1 << 18;

/// A worker's round of the real run.
struct Round {
    error: Vec<f32>,
    start: Vec<f32>,
    end: Vec<f32>,
}

pub(crate) fn run(
    options: &Options,
    experiment: &Experiment,
    peak: &PeakAlloc,
) -> anyhow::Result<()> {
    let mut report = Report::default();
    let rounds = sizes(options, experiment, &mut report)?;
    let chunks = (options.mebibytes << 20) / 4 / CHUNK;
    ensure!(chunks >= 64, "--mebibytes must be at least 1");
    let layout = Layout::from_tensors(vec![("matrix".to_owned(), vec![chunks, CHUNK])])?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut payloads = Vec::new();
    for threads in [1, cores] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        pool.install(|| encoding(&layout, &rounds[0], threads, peak, &mut report));
        if threads == cores {
            payloads = pool.install(|| rounds.iter().map(|it| encoded(&layout, it)).collect());
        }
    }
    for threads in [1, cores] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        pool.install(|| merging(&layout, &payloads, threads, peak, &mut report))?;
    }
    if let Some(python) = &options.torch_python {
        against_torch(python, &layout, &rounds[0], cores, &mut report)?;
    }
    report.save(&options.report)
}

/// Trains, and counts the bytes of what is sent and fetched.
fn sizes(
    options: &Options,
    experiment: &Experiment,
    report: &mut Report,
) -> anyhow::Result<Vec<Round>> {
    let Method::Sparse(method) = &experiment.method else {
        anyhow::bail!("sizes are those of a sparse method");
    };
    let mut cluster = Cluster::new(experiment, &Text::open(&options.text)?, Device::Cpu, None)?;
    let mut rounds = Vec::new();
    let (mut up, mut down, mut published) = (0.0, 0.0, 0.0);
    for round in 0..options.rounds {
        eprintln!("training round {} of {}", round + 1, options.rounds);
        let before = cluster.state().clone();
        let mut other = Cluster::new(experiment, &Text::open(&options.text)?, Device::Cpu, None)?;
        other.resume(before.clone());
        let ends = other.train_all()?;
        // The published wire of the same updates.
        let mut flat12 = method.clone();
        flat12.codec.profile = Profile::Flat12;
        let wire = other.encode(&flat12, &ends)?;
        published += wire.iter().map(|it| it.bits_per_parameter(cluster.layout())).sum::<f64>()
            / wire.len() as f64;
        let figures = cluster.step()?;
        (up, down) = (up + figures.bits_up, down + figures.bits_down);
        for (worker, end) in before.workers.into_iter().zip(ends) {
            rounds.push(Round { error: worker.error, start: before.theta.clone(), end: end.theta });
        }
    }
    let count = f64::from(options.rounds);
    let bits = "bits per parameter";
    report.add("codec.bits_per_parameter", up / count, bits, Some(published / count));
    report.add(
        "codec.compression",
        32.0 * count / up,
        "times smaller than f32",
        Some(32.0 * count / published),
    );
    report.add("download.bits_per_parameter", down / count, bits, Some(32.0));
    ensure!(rounds.len() >= PAYLOADS, "{PAYLOADS} updates need more --rounds");
    // The last ones: error buffers have filled.
    Ok(rounds.split_off(rounds.len() - PAYLOADS))
}

/// A vector of the layout, filled with `values` again and again.
fn tiled(layout: &Layout, values: &[f32]) -> Vec<f32> {
    let mut vector = Vec::with_capacity(layout.vector_len());
    while vector.len() < layout.vector_len() {
        let missing = layout.vector_len() - vector.len();
        vector.extend_from_slice(&values[..missing.min(values.len())]);
    }
    vector
}

fn encoded(layout: &Layout, round: &Round) -> Vec<u8> {
    let (start, end) = (tiled(layout, &round.start), tiled(layout, &round.end));
    let mut error = tiled(layout, &round.error);
    encode(layout, Profile::Standard, &mut error, (&start, &end)).into_bytes()
}

fn encode(layout: &Layout, profile: Profile, error: &mut [f32], ends: (&[f32], &[f32])) -> Payload {
    let codec = UpdateCodec::new(profile, 0.9).expect("a decay");
    codec
        .encode(layout, error, Endpoints { start: ends.0, end: ends.1 })
        .expect("a real update is finite")
}

/// Parameters per second of e ← β·e + Δ.
fn plain_pass(error: &mut [f32], delta: &[f32]) -> f64 {
    let parameters = error.len() as f64;
    let seconds = median_seconds(|| {
        error.par_chunks_mut(GROUP).zip(delta.par_chunks(GROUP)).for_each(|(error, delta)| {
            for (error, delta) in error.iter_mut().zip(delta) {
                *error = 0.9 * *error + delta;
            }
        });
    });
    parameters / seconds
}

fn encoding(layout: &Layout, round: &Round, threads: usize, peak: &PeakAlloc, report: &mut Report) {
    let (start, end) = (tiled(layout, &round.start), tiled(layout, &round.end));
    let mut error = tiled(layout, &round.error);
    let parameters = layout.vector_len() as f64;
    let giga = 1e9;
    for profile in [Profile::Standard, Profile::Quality, Profile::Wide] {
        let memory = plain_pass(&mut error, &start);
        error.copy_from_slice(&tiled(layout, &round.error));
        let (before, _) = (peak.current_usage(), peak.reset_peak_usage());
        let seconds = median_seconds(|| {
            std::hint::black_box(encode(layout, profile, &mut error, (&start, &end)));
        });
        let room = peak.peak_usage().saturating_sub(before) as f64;
        let speed = parameters / seconds;
        let name = match profile {
            Profile::Standard => "codec".to_owned(),
            Profile::Quality
            | Profile::Wide
            | Profile::DenseFp16
            | Profile::DenseInt8
            | Profile::Flat12 => format!("codec.{}", format!("{profile:?}").to_lowercase()),
        };
        let name = format!("{name}.encode");
        report.add(
            &format!("{name}_speed_{threads}_threads"),
            speed / giga,
            "Gparameter/s",
            Some(memory / giga),
        );
        if threads > 1 {
            report.add(
                &format!("{name}_share_of_memory_speed"),
                speed / memory,
                "of memory speed",
                Some(1.0),
            );
            // Beyond θ and the error buffer: the payload itself, and what threads work in.
            let share = room / (2.0 * 4.0 * parameters);
            report.add(&format!("{name}_memory_share"), share, "of θ and error buffer", None);
        }
    }
}

fn merging(
    layout: &Layout,
    payloads: &[Vec<u8>],
    threads: usize,
    peak: &PeakAlloc,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut theta = vec![0.0_f32; layout.vector_len()];
    let mut residual = vec![0.0_f32; layout.vector_len()];
    let parameters = layout.vector_len() as f64;
    let memory = plain_pass(&mut residual, &theta);
    residual.fill(0.0);
    let parsed = median_seconds(|| {
        std::hint::black_box(Update::parse(&payloads[0], layout, Profile::Standard).is_ok());
    });
    let parse_all = || {
        let parse = |bytes: &Vec<u8>| Update::parse(bytes, layout, Profile::Standard);
        payloads.iter().map(parse).collect::<Result<Vec<_>, _>>()
    };
    let config = Aggregation::default();
    let whole = 0..layout.chunk_count();
    // From bytes that nobody has looked at to θ.
    let mut from_bytes = || -> anyhow::Result<()> {
        let updates = parse_all()?;
        let members = members(&updates);
        let admitted = Admitted { members: &members, alpha: 1.0 };
        OuterStep::new(layout, &config, admitted, &[])?.merge_into(whole.clone(), &mut theta);
        Ok(())
    };
    from_bytes()?;
    let from_bytes = parameters / median_seconds(|| from_bytes().expect("it went well before"));
    let updates = parse_all()?;
    let members = members(&updates);
    let admitted = Admitted { members: &members, alpha: 1.0 };
    let step = OuterStep::new(layout, &config, admitted, &[])?;
    let (before, _) = (peak.current_usage(), peak.reset_peak_usage());
    let seconds = median_seconds(|| {
        let state = OuterState { theta: &mut theta, residual: &mut residual };
        std::hint::black_box(step.apply(0..layout.chunk_count(), state));
    });
    let room = peak.peak_usage().saturating_sub(before) as f64;
    let merged = parameters / median_seconds(|| step.merge_into(whole.clone(), &mut theta));
    let ruled = parameters
        / median_seconds(|| {
            let step = OuterStep::new(layout, &config, admitted, &[]);
            std::hint::black_box(step.expect("it went well before"));
        });
    let giga = 1e9;
    let speed = parameters / seconds;
    let unit = "Gparameter/s";
    let speeds = [
        ("speed", merged),
        ("rules_speed", ruled),
        ("from_bytes_speed", from_bytes),
        ("broadcast_speed", speed),
    ];
    for (name, speed) in speeds {
        let name = format!("aggregate.{name}_{threads}_threads");
        report.add(&name, speed / giga, unit, Some(memory / giga));
    }
    report.add(
        &format!("codec.parse_speed_{threads}_threads"),
        parameters / parsed / giga,
        "Gparameter/s",
        Some(memory / giga),
    );
    if threads > 1 {
        // Decoded and merged, what was checked when it came; checked as well; and the whole step of what was checked,
        // compressed for everybody.
        for (name, speed) in
            [("share", merged), ("from_bytes_share", from_bytes), ("broadcast_share", speed)]
        {
            let name = format!("aggregate.{name}_of_memory_speed");
            report.add(&name, speed / memory, "of memory speed", Some(1.0));
        }
        let share = room / (2.0 * 4.0 * parameters);
        report.add("aggregate.memory_share", share, "of θ and residual", None);
    }
    Ok(())
}

/// Workers of equal weight.
fn members(updates: &[Update]) -> Vec<Member<'_>> {
    let member = |(number, update)| Member {
        worker: NodeId::new([number; 32]),
        tokens: TokenCount(1),
        update,
        loss_effect: None,
    };
    (0_u8..).zip(updates).map(member).collect()
}

/// The same in PyTorch on the same vectors, a quarter as long.
fn against_torch(
    python: &Path,
    layout: &Layout,
    round: &Round,
    threads: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let quarter = layout.chunk_count().div_ceil(4);
    let layout = Layout::from_tensors(vec![("matrix".to_owned(), vec![quarter, CHUNK])])?;
    let folder = std::env::temp_dir().join(format!("manyhands-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let (start, end) = (tiled(&layout, &round.start), tiled(&layout, &round.end));
    let mut error = tiled(&layout, &round.error);
    for (name, values) in [("error", &error), ("start", &start), ("end", &end)] {
        std::fs::write(folder.join(name), vector::to_bytes(values))?;
    }
    let output = Command::new(python)
        .arg("experiments/torch/encode.py")
        .arg(threads.to_string())
        .arg(&folder)
        .output()
        .with_context(|| format!("cannot start {}", python.display()))?;
    std::fs::remove_dir_all(&folder)?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "PyTorch said: {}", String::from_utf8_lossy(&output.stderr));
    let said: serde_json::Value = serde_json::from_str(text.trim())?;
    let theirs = said["parameters_per_second"].as_f64().context("a speed")?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let seconds = pool.install(|| {
        median_seconds(|| {
            std::hint::black_box(encode(&layout, Profile::Standard, &mut error, (&start, &end)));
        })
    });
    let ours = layout.vector_len() as f64 / seconds;
    report.add("codec.encode_speedup_over_torch", ours / theirs, "times", Some(1.0));
    Ok(())
}
