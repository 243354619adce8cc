//! Replays of a small transformer's rounds: of cheats, and of honest rounds by machines that add in another order.

use std::process::Command;

use anyhow::Context;
use manyhands_model::calibration::{Cheat, Laboratory, Numerics, Replayer, Trial};
use manyhands_model::device::{DeviceChoice, cpu_kernels};
use manyhands_proto::message::Distances;
use manyhands_proto::run_file::{Precision, Verification};

use super::super::Report;
use super::page::Replayed;
use crate::cluster::Text;
use crate::plan;

/// Steps that a round has behind it: moments are warm, and the learning rate is at its height.
const WARM_STEPS: u64 = 60;
const STEPS: u64 = 30;
const SEQUENCES: u32 = 4;
/// A run of so many steps, for its schedule.
const RUN_STEPS: u64 = 3_000;
/// Of a run in bf16, as the recipes have it: of Δ, and of each moment.
const BF16_DELTA_MAX: f64 = 0.02;
const BF16_MOMENT_MAX: f64 = 0.05;

/// What the assignment says.
pub(super) const ASSIGNED: Numerics = Numerics {
    device: DeviceChoice::Cpu,
    precision: Precision::F32,
    threads: 1,
    micro_batch_sequences: SEQUENCES,
    without_onednn: false,
};

pub(super) fn laboratory(text: &Text) -> anyhow::Result<Laboratory> {
    let (model, training) = plan::of_replays();
    let trial = Trial {
        dataset: text.folder.clone(),
        model,
        training,
        total_steps: RUN_STEPS,
        warm_steps: WARM_STEPS,
        steps: STEPS,
        sequences: SEQUENCES,
    };
    Ok(Laboratory::open(trial)?)
}

/// The largest of the three distances, each over what a run lets pass.
fn over_threshold(distances: Distances, replayed: Numerics) -> f64 {
    let terms = Verification::default();
    let of_kind = match replayed.device {
        DeviceChoice::Cpu => terms.same_kind_delta_distance_max,
        DeviceChoice::Auto | DeviceChoice::Cuda(_) | DeviceChoice::Mps => terms.delta_distance_max,
    };
    let (delta_max, first_max, second_max) = match replayed.precision {
        Precision::F32 => {
            (of_kind, terms.first_moment_distance_max, terms.second_moment_distance_max)
        }
        Precision::Bf16 => (BF16_DELTA_MAX, BF16_MOMENT_MAX, BF16_MOMENT_MAX),
    };
    (distances.delta / delta_max)
        .max(distances.first_moment / first_max)
        .max(distances.second_moment / second_max)
}

/// Every cheat in as many rounds.
pub(super) fn cheats(
    laboratory: &Laboratory,
    seeds: u64,
    report: &mut Report,
) -> anyhow::Result<Vec<Replayed>> {
    let mut rows: Vec<Replayed> =
        Cheat::ALL.iter().map(|cheat| Replayed::new(&cheat.name(), false)).collect();
    for seed in 0..seeds {
        if seed.is_multiple_of(20) {
            eprintln!("cheats: {seed} of {seeds} rounds");
        }
        let start = laboratory.begin_warm(seed, ASSIGNED)?;
        let honest = laboratory.train(&start, ASSIGNED)?;
        for (row, cheat) in rows.iter_mut().zip(Cheat::ALL) {
            let claimed = laboratory.claim(cheat, (&start, &honest), ASSIGNED)?;
            note(row, start.distances(&claimed, &honest), ASSIGNED);
        }
    }
    for row in &rows {
        let (name, rejected) = (&row.name, row.rejected() as f64 / seeds as f64);
        report.add(&format!("replay.{name}.rejected"), rejected, "of rounds", None);
        let unit = "thresholds, the nearest";
        report.add(&format!("replay.{name}.distance"), row.nearest(), unit, None);
    }
    Ok(rows)
}

/// Honest rounds, replayed by processes of other classes.
pub(super) fn honest(
    laboratory: &Laboratory,
    seeds: u64,
    report: &mut Report,
) -> anyhow::Result<Vec<Replayed>> {
    let classes = classes();
    let share = seeds.div_ceil(classes.len() as u64);
    let mut rows = Vec::with_capacity(classes.len());
    for (number, (name, kernels, numerics)) in (0..).zip(&classes) {
        eprintln!("honest rounds replayed by {name}");
        let mut command = Command::new(std::env::current_exe().context("this program's path")?);
        command.arg("replay");
        let mut class = Replayer::start(command, kernels, laboratory.trial(), *numerics)?;
        let mut row = Replayed::new(name, true);
        let reference = Numerics { precision: numerics.precision, ..ASSIGNED };
        for seed in number * share..(number + 1) * share {
            // No seed of those that were cheated with.
            let start = laboratory.begin_warm(10_000_000 + seed, reference)?;
            class.ask(&start)?;
            let claimed = laboratory.train(&start, reference)?;
            let replayed = class
                .answer(laboratory.layout())
                .with_context(|| format!("the class {name} did not answer"))?;
            note(&mut row, start.distances(&claimed, &replayed), *numerics);
        }
        let unit = "thresholds, the farthest";
        report.add(&format!("replay.honest.{name}.distance"), row.farthest(), unit, None);
        rows.push(row);
    }
    let rounds: usize = rows.iter().map(|row| row.distances.len()).sum();
    let rejected: usize = rows.iter().map(Replayed::rejected).sum();
    let farthest = rows.iter().map(Replayed::farthest).fold(0.0, f64::max);
    report.add("replay.honest.rounds", rounds as f64, "rounds of distinct seeds", None);
    report.add("replay.honest.rejected", rejected as f64, "rounds", None);
    report.add("replay.honest.distance_over_threshold", farthest, "the farthest", None);
    Ok(rows)
}

fn note(row: &mut Replayed, distances: Distances, replayed: Numerics) {
    row.over_threshold.push(over_threshold(distances, replayed));
    row.distances.push(distances);
}

/// Classes that this machine offers beside that of this process: name, kernels, numerics.
fn classes() -> Vec<(&'static str, String, Numerics)> {
    let own = cpu_kernels;
    let bf16 = Numerics { precision: Precision::Bf16, ..ASSIGNED };
    let in_threads = |numerics| Numerics { threads: 2, ..numerics };
    let in_micro_batches = |of| Numerics { micro_batch_sequences: of, ..ASSIGNED };
    let mut classes = vec![
        ("threads_2", own(), in_threads(ASSIGNED)),
        ("micro_batches_of_1", own(), in_micro_batches(1)),
        ("micro_batches_of_3", own(), in_micro_batches(3)),
        ("without_onednn", own(), Numerics { without_onednn: true, ..ASSIGNED }),
        ("all_of_it", "default".to_owned(), in_threads(in_micro_batches(1))),
        ("bf16_threads_2", own(), in_threads(bf16)),
    ];
    for (kernels, name, bf16_name) in [
        ("default", "kernels_default", "bf16_kernels_default"),
        ("avx2", "kernels_avx2", "bf16_kernels_avx2"),
    ] {
        // Its own are no other class, and AVX2's are there where better ones are.
        if own() == "avx512" || (own() == "avx2" && kernels == "default") {
            classes.push((name, kernels.to_owned(), ASSIGNED));
            classes.push((bf16_name, kernels.to_owned(), bf16));
        }
    }
    let cuda = DeviceChoice::Cuda(0);
    if cuda.resolve().is_ok() {
        classes.push(("cuda", own(), Numerics { device: cuda, ..ASSIGNED }));
        classes.push(("bf16_cuda", own(), Numerics { device: cuda, ..bf16 }));
    }
    classes
}
