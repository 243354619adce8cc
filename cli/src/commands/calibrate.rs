//! `calibrate`: how far honest replays of a run's own rounds end apart on this machine, and how far cheats do.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use manyhands_model::Device;
use manyhands_model::calibration::{
    CalibrationError, Cheat, Laboratory, Numerics, Replayer, Trial, serve,
};
use manyhands_model::device::{DeviceChoice, cpu_kernels, numeric_class};
use manyhands_proto::message::Distances;
use manyhands_proto::run_file::{Precision, RunFile, Verification};
use serde::Serialize;

use super::work::all_cores;
use crate::failure::Failure;
use crate::output::{Output, table};
use crate::progress::Progress;
use crate::run_file;

/// A threshold lies so many times above the farthest honest replay, and a cheat as many above it.
const MARGIN: f64 = 3.0;
/// Where honest replays come to the same bits, a threshold still leaves room for machines that were not tried: three times
/// what was measured between others (8.6e-6 among CPUs, 8e-4 of moments between a CPU and a GPU).
const DELTA_FLOOR: f64 = 3e-5;
const MOMENT_FLOOR: f64 = 3e-3;
/// Those of the table in the design that come nearest.
const CHEATS: [Cheat; 4] =
    [Cheat::BatchReplaced, Cheat::LearningRate(1.1), Cheat::Steps(90), Cheat::LowerPrecision];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run's file.
    file: PathBuf,
    /// A data set in the place of the file's.
    #[arg(long, value_name = "DIR")]
    dataset: Option<PathBuf>,
    /// auto (the first of CUDA, MPS, CPU that is there), cpu, cuda, cuda:N or mps.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// CPU threads of one operation [default: all cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Rounds that are repeated, each from a warm start and from a new worker's.
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u64).range(1..=1_000))]
    rounds: u64,
    /// Steps of a round: fewer than the run's to be done sooner [default: the run's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2..=100_000))]
    steps: Option<u64>,
    /// Sequences of a step [default: the run's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    sequences: Option<u32>,
}

/// What was compared with the same round as it was assigned.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// Or a cheat.
    honest: bool,
    /// On a device of another kind.
    other_kind: bool,
    /// Of honest replays the farthest, of cheats the nearest, by each of the three.
    distances: Distances,
}

#[derive(Debug, Serialize)]
struct Calibration {
    /// Of this machine.
    class: String,
    rounds: u64,
    steps: u64,
    /// Shorter rounds than the run's drift less: what they ask for is no less than the file's.
    is_shortened: bool,
    rows: Vec<Row>,
    thresholds: Thresholds,
    /// What the rows ask for; none where no threshold lies between the honest and the cheats.
    suggested: Option<Thresholds>,
    /// The farthest honest replay over its threshold of the file.
    honest_over_threshold: f64,
    /// The nearest cheat over the threshold of the file.
    cheat_over_threshold: f64,
}

/// As the run's file has them.
#[derive(Debug, Clone, Copy, Serialize)]
struct Thresholds {
    delta_distance_max: f64,
    same_kind_delta_distance_max: f64,
    first_moment_distance_max: f64,
    second_moment_distance_max: f64,
}

/// Another machine's numerics, as far as this one has them.
struct Variant {
    name: String,
    kernels: String,
    numerics: Numerics,
    other_kind: bool,
}

pub(crate) fn run(args: &Args, output: Output) -> Result<(), Failure> {
    let file = run_file::read(&args.file, args.dataset.as_deref())?;
    let failed = |error: CalibrationError| {
        Failure::new("calibration", error, "check the data set, or choose another --device")
    };
    let laboratory = Laboratory::open(trial(args, &file)).map_err(failed)?;
    let calibration = measure(args, &file, &laboratory).map_err(failed)?;
    output.document(&calibration, || text(&file, &calibration));
    Ok(())
}

/// What `calibrate` starts: trains the rounds that come on standard input.
pub(crate) fn replay() -> Result<(), Failure> {
    serve(std::io::stdin().lock(), std::io::stdout().lock())
        .map_err(|error| Failure::new("calibration", error, "`manyhands calibrate` starts this"))
}

fn trial(args: &Args, file: &RunFile) -> Trial {
    let steps = args.steps.unwrap_or(file.training.steps_per_round.into());
    Trial {
        dataset: file.data.dataset.clone(),
        model: file.model.clone(),
        training: file.training.clone(),
        total_steps: u64::from(file.run.rounds) * u64::from(file.training.steps_per_round),
        warm_steps: steps,
        steps,
        sequences: args.sequences.unwrap_or(file.training.batch_sequences),
    }
}

fn measure(
    args: &Args,
    file: &RunFile,
    laboratory: &Laboratory,
) -> Result<Calibration, CalibrationError> {
    let precision = file.training.precision;
    let own = Numerics {
        device: args.device,
        precision,
        threads: args.threads.unwrap_or_else(all_cores),
        micro_batch_sequences: file
            .training
            .micro_batch_sequences
            .min(laboratory.trial().sequences),
        without_onednn: false,
    };
    let class = numeric_class(args.device.resolve()?, precision, own.threads)?.to_string();
    let mut compared = Vec::new();
    for variant in variants(own)? {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("replay");
        let replayer =
            Replayer::start(command, &variant.kernels, laboratory.trial(), variant.numerics)?;
        compared.push((variant, replayer, Distances::NONE));
    }
    let lower = |cheat: &&Cheat| **cheat != Cheat::LowerPrecision || precision == Precision::F32;
    let mut cheats: Vec<(Cheat, Distances)> =
        CHEATS.iter().filter(lower).map(|cheat| (*cheat, Distances::FARTHEST)).collect();
    let (mut progress, mut done) = (Progress::default(), 0);
    // A warm start, the round and its replays, from there and from a cold start, and the cheats.
    let total = args.rounds * (3 + 2 * compared.len() as u64 + cheats.len() as u64);
    let mut tell = |trained: u64| {
        done += trained;
        progress.set("rounds trained", done, total);
    };
    for seed in 0..args.rounds {
        let warm = laboratory.begin_warm(seed, own)?;
        tell(1);
        for start in [&laboratory.begin_cold(seed), &warm] {
            let honest = laboratory.train(start, own)?;
            tell(1);
            for (_, replayer, farthest) in &mut compared {
                replayer.ask(start)?;
                let replayed = replayer.answer(laboratory.layout())?;
                *farthest = each(f64::max, *farthest, start.distances(&honest, &replayed));
                tell(1);
            }
            if start.moments.is_some() {
                for (cheat, nearest) in &mut cheats {
                    let claimed = laboratory.claim(*cheat, (start, &honest), own)?;
                    *nearest = each(f64::min, *nearest, start.distances(&claimed, &honest));
                    tell(1);
                }
            }
        }
    }
    progress.clear();
    let honest = compared.into_iter().map(|(variant, _, distances)| {
        let Variant { name, other_kind, .. } = variant;
        Row { name, honest: true, other_kind, distances }
    });
    let cheats = cheats.into_iter().map(|(cheat, distances)| {
        let name = name_of(cheat);
        Row { name, honest: false, other_kind: false, distances }
    });
    let rows = honest.chain(cheats).collect();
    Ok(Calibration { class, ..judge(file, laboratory.trial(), args.rounds, rows) })
}

fn name_of(cheat: Cheat) -> String {
    cheat.name().replace('_', " ")
}

fn each(of: fn(f64, f64) -> f64, one: Distances, other: Distances) -> Distances {
    Distances {
        delta: of(one.delta, other.delta),
        first_moment: of(one.first_moment, other.first_moment),
        second_moment: of(one.second_moment, other.second_moment),
    }
}

fn variants(own: Numerics) -> Result<Vec<Variant>, CalibrationError> {
    let kernels = cpu_kernels();
    let threads = if own.threads > 1 { 1 } else { 2 };
    let half = own.micro_batch_sequences.div_ceil(2);
    let mut variants = Vec::new();
    let mut add = |name: String, kernels: &str, numerics: Numerics, other_kind: bool| {
        variants.push(Variant { name, kernels: kernels.to_owned(), numerics, other_kind });
    };
    let halved = Numerics { micro_batch_sequences: half, ..own };
    if half < own.micro_batch_sequences {
        add(format!("micro-batches of {half}"), &kernels, halved, false);
    }
    let on_cpu = own.device.resolve()? == Device::Cpu;
    if !on_cpu {
        add("on the CPU".to_owned(), &kernels, Numerics { device: DeviceChoice::Cpu, ..own }, true);
        return Ok(variants);
    }
    add(format!("threads {threads}"), &kernels, Numerics { threads, ..own }, false);
    add("without oneDNN".to_owned(), &kernels, Numerics { without_onednn: true, ..own }, false);
    for set in ["avx2", "default"] {
        if kernels == "avx512" || (kernels == "avx2" && set == "default") {
            add(format!("kernels {set}"), set, own, false);
        }
    }
    let all = Numerics { threads, without_onednn: true, ..halved };
    add("all of these".to_owned(), "default", all, false);
    Ok(variants)
}

impl Thresholds {
    fn of(terms: &Verification) -> Self {
        Self {
            delta_distance_max: terms.delta_distance_max,
            same_kind_delta_distance_max: terms.same_kind_delta_distance_max,
            first_moment_distance_max: terms.first_moment_distance_max,
            second_moment_distance_max: terms.second_moment_distance_max,
        }
    }

    fn or_more(self, than: &Self) -> Self {
        Self {
            delta_distance_max: self.delta_distance_max.max(than.delta_distance_max),
            same_kind_delta_distance_max: self
                .same_kind_delta_distance_max
                .max(than.same_kind_delta_distance_max),
            first_moment_distance_max: self
                .first_moment_distance_max
                .max(than.first_moment_distance_max),
            second_moment_distance_max: self
                .second_moment_distance_max
                .max(than.second_moment_distance_max),
        }
    }

    fn delta_max(&self, other_kind: bool) -> f64 {
        if other_kind { self.delta_distance_max } else { self.same_kind_delta_distance_max }
    }

    /// The largest of a row's distances over its threshold.
    fn over(&self, row: &Row) -> f64 {
        let Distances { delta, first_moment, second_moment } = row.distances;
        (delta / self.delta_max(row.other_kind))
            .max(first_moment / self.first_moment_distance_max)
            .max(second_moment / self.second_moment_distance_max)
    }
}

fn judge(file: &RunFile, trial: &Trial, rounds: u64, rows: Vec<Row>) -> Calibration {
    let thresholds = Thresholds::of(&file.verification);
    let farthest =
        |of: &dyn Fn(&Row) -> f64| rows.iter().filter(|row| row.honest).map(of).fold(0.0, f64::max);
    let nearest = |of: &dyn Fn(&Row) -> f64| {
        rows.iter().filter(|row| !row.honest).map(of).fold(f64::INFINITY, f64::min)
    };
    let delta_of = |other_kind: bool| {
        farthest(&|row| if row.other_kind == other_kind { row.distances.delta } else { 0.0 })
    };
    let is_tried =
        |other_kind: bool| rows.iter().any(|row| row.honest && row.other_kind == other_kind);
    let asked = |farthest: f64, floor: f64| (MARGIN * farthest).max(floor);
    let delta = |other_kind: bool| {
        let asked = asked(delta_of(other_kind), DELTA_FLOOR);
        if is_tried(other_kind) { asked } else { thresholds.delta_max(other_kind) }
    };
    let suggested = Thresholds {
        delta_distance_max: delta(true),
        same_kind_delta_distance_max: delta(false),
        first_moment_distance_max: asked(farthest(&|row| row.distances.first_moment), MOMENT_FLOOR),
        second_moment_distance_max: asked(
            farthest(&|row| row.distances.second_moment),
            MOMENT_FLOOR,
        ),
    };
    let is_shortened = trial.steps < u64::from(file.training.steps_per_round)
        || trial.sequences < file.training.batch_sequences;
    let suggested = if is_shortened { suggested.or_more(&thresholds) } else { suggested };
    // That bf16 passes for f32 on a device of another kind is known (ADR 22).
    let lower_precision = name_of(Cheat::LowerPrecision);
    let nearest_to = |other_kind: bool| {
        nearest(&|row| {
            let left_out = other_kind && row.name == lower_precision;
            if left_out { f64::INFINITY } else { row.distances.delta }
        })
    };
    let mut tried = [false, true].into_iter().filter(|kind| is_tried(*kind));
    let separates = suggested.first_moment_distance_max < 1.0
        && suggested.second_moment_distance_max < 1.0
        && tried.all(|kind| nearest_to(kind) >= MARGIN * suggested.delta_max(kind));
    Calibration {
        is_shortened,
        class: String::new(),
        rounds,
        steps: trial.steps,
        honest_over_threshold: farthest(&|row| thresholds.over(row)),
        cheat_over_threshold: nearest(&|row| thresholds.over(row)),
        suggested: separates.then_some(suggested),
        thresholds,
        rows,
    }
}

fn text(file: &RunFile, calibration: &Calibration) -> String {
    let Calibration { class, rounds, steps, rows, thresholds, suggested, .. } = calibration;
    let mut text = format!(
        "{}: rounds of {steps} steps with {rounds} seeds, each from a warm start and a new worker's, on {class}.\n\
         Relative L2 distance from the same round as it was assigned, of\n\n",
        file.run.name
    );
    let number = |value: f64| format!("{value:.1e}");
    let mut lines = vec![["", "Δ", "m", "v"].map(str::to_owned).to_vec()];
    let cells = |of: &str, row: &Row| {
        let Distances { delta, first_moment, second_moment } = row.distances;
        let name = format!("{of}{}", row.name);
        vec![name, number(delta), number(first_moment), number(second_moment)]
    };
    lines.extend(rows.iter().filter(|row| row.honest).map(|row| cells("honest, ", row)));
    lines.extend(rows.iter().filter(|row| !row.honest).map(|row| cells("cheat, ", row)));
    text += &table(&lines);
    let _ = write!(
        text,
        "\n\nWith the file's thresholds the farthest honest replay is at {:.2} of one, the nearest cheat at {:.1} times one.\n",
        calibration.honest_over_threshold, calibration.cheat_over_threshold
    );
    if calibration.honest_over_threshold > 1.0 / MARGIN {
        text += "That is too near: an honest worker could be taken for a cheat.\n";
    }
    if calibration.cheat_over_threshold < MARGIN {
        text += "That is too near: a cheat could pass.\n";
    }
    let Some(suggested) = suggested else {
        text += "\nNo threshold lies between them with a factor of three to either side. A start that is unstable is the usual reason: \
                 raise training.warmup_steps, or lower the learning rate.";
        return text;
    };
    if calibration.is_shortened {
        text += "\nThese rounds are shorter than the run's, in which honest machines drift farther: nothing below the file's is suggested.\n";
    }
    let _ = write!(text, "\nThis machine's rounds ask for, under [verification]:\n\n");
    for (name, value, now) in [
        ("delta_distance_max", suggested.delta_distance_max, thresholds.delta_distance_max),
        (
            "same_kind_delta_distance_max",
            suggested.same_kind_delta_distance_max,
            thresholds.same_kind_delta_distance_max,
        ),
        (
            "first_moment_distance_max",
            suggested.first_moment_distance_max,
            thresholds.first_moment_distance_max,
        ),
        (
            "second_moment_distance_max",
            suggested.second_moment_distance_max,
            thresholds.second_moment_distance_max,
        ),
    ] {
        let _ = writeln!(text, "{name} = {value:.1e}    # {now:.1e} now");
    }
    text += "\nOther machines may be farther: take the largest of all kinds that are to take part.";
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, honest: bool, delta: f64) -> Row {
        let distances = Distances { delta, first_moment: delta, second_moment: delta };
        Row { name: name.to_owned(), honest, other_kind: false, distances }
    }

    fn judged(rows: Vec<Row>) -> Calibration {
        let text = include_str!("../../../configs/10m.toml");
        let file = RunFile::parse(text).expect("a recipe");
        let args = Args {
            file: PathBuf::new(),
            dataset: None,
            device: DeviceChoice::Cpu,
            threads: None,
            rounds: 1,
            steps: None,
            sequences: None,
        };
        judge(&file, &trial(&args, &file), 1, rows)
    }

    #[test]
    fn a_threshold_lies_three_times_above_the_honest_and_below_the_cheats() {
        let rows = vec![row("threads 1", true, 2e-5), row("batch replaced", false, 0.06)];
        let calibration = judged(rows);
        let suggested = calibration.suggested.expect("there is room");
        assert!((suggested.same_kind_delta_distance_max - 6e-5).abs() < 1e-12);
        assert!(!calibration.is_shortened);
        assert_eq!(suggested.first_moment_distance_max, MOMENT_FLOOR);
        // Nothing was tried on another kind of device.
        assert_eq!(suggested.delta_distance_max, calibration.thresholds.delta_distance_max);
        assert!((calibration.honest_over_threshold - 0.2).abs() < 1e-9);
    }

    #[test]
    fn where_honest_rounds_end_as_far_apart_as_cheats_no_threshold_is_suggested() {
        let calibration = judged(vec![row("kernels default", true, 0.05), row("x", false, 0.06)]);
        assert!(calibration.suggested.is_none());
        assert!(calibration.honest_over_threshold > 1.0);
    }
}
