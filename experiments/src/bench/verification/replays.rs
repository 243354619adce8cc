//! Replays of a small transformer's rounds: of cheats, and of honest rounds by machines that add in another order.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{Layout, initial_theta, replay};
use manyhands_model::data::{SequenceId, SequenceSource, ShardSet};
use manyhands_model::device::{DeviceChoice, cpu_kernels};
use manyhands_model::{Control, LocalTrainer, TrainTask, Trainer};
use manyhands_proto::message::Distances;
use manyhands_proto::run_file::{Architecture, Precision, Training, Verification};
use manyhands_rules::sampling::sequence_at;

use super::super::Report;
use super::class::Class;
use super::page::Replayed;
use crate::cluster::Text;
use crate::plan;

/// Steps that a round has behind it: moments are warm, and the learning rate is at its height.
const WARM_STEPS: usize = 60;
const STEPS: usize = 30;
const SEQUENCES: usize = 4;
/// A run of so many steps, for its schedule.
const RUN_STEPS: u64 = 3_000;
/// Of a run in bf16, as the recipes have it.
const BF16_DELTA_MAX: f64 = 0.02;

/// What decides the bits of a round, beside the process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Numerics {
    pub(super) threads: u32,
    pub(super) micro_batch_sequences: u32,
    pub(super) precision: Precision,
    pub(super) without_onednn: bool,
    pub(super) device: DeviceChoice,
}

/// What the assignment says.
pub(super) const ASSIGNED: Numerics = Numerics {
    threads: 1,
    micro_batch_sequences: SEQUENCES as u32,
    precision: Precision::F32,
    without_onednn: false,
    device: DeviceChoice::Cpu,
};

/// Where a worker's round begins; its batches follow from the seed.
#[derive(Debug, Clone)]
pub(super) struct Start {
    pub(super) seed: u64,
    pub(super) theta: Vec<f32>,
    pub(super) moments: Moments8,
}

/// Where it ends.
#[derive(Debug, Clone)]
pub(super) struct End {
    pub(super) theta: Vec<f32>,
    pub(super) moments: Moments8,
}

/// The model, its training and the text.
pub(super) struct Bench {
    pub(super) layout: Layout,
    model: Architecture,
    training: Training,
    text: Arc<ShardSet>,
}

impl Bench {
    pub(super) fn new(text: &Text) -> anyhow::Result<Self> {
        let (model, training) = plan::of_replays();
        let text = text.train(model.context_length);
        Ok(Self { layout: Layout::of(&model)?, model, training, text })
    }

    fn batches(&self, seed: u64, steps: std::ops::Range<usize>) -> Vec<Vec<SequenceId>> {
        let sequence =
            |at: usize| SequenceId(sequence_at(seed, at as u64, self.text.sequence_count()));
        steps
            .map(|step| (step * SEQUENCES..(step + 1) * SEQUENCES).map(sequence).collect())
            .collect()
    }

    fn assigned(&self, seed: u64) -> Vec<Vec<SequenceId>> {
        self.batches(seed, WARM_STEPS..WARM_STEPS + STEPS)
    }

    /// A run of this seed, some steps after its beginning.
    pub(super) fn begin(&self, seed: u64, precision: Precision) -> anyhow::Result<Start> {
        let theta = initial_theta(&self.layout, &self.model, seed);
        let batches = self.batches(seed, 0..WARM_STEPS);
        let task = TrainTask {
            theta: &theta,
            moments: None,
            adam_step: 0,
            first_step: 0,
            batches: &batches,
            micro_batch_sequences: SEQUENCES as u32,
            precision,
            threads: 1,
        };
        let End { theta, moments } = self.run(&self.training, &task, DeviceChoice::Cpu)?;
        Ok(Start { seed, theta, moments })
    }

    pub(super) fn train(&self, start: &Start, numerics: Numerics) -> anyhow::Result<End> {
        let batches = self.assigned(start.seed);
        let task = task(start, &batches, numerics);
        self.run(&self.training, &task, numerics.device)
    }

    fn run(
        &self,
        training: &Training,
        task: &TrainTask<'_>,
        device: DeviceChoice,
    ) -> anyhow::Result<End> {
        let text = Arc::clone(&self.text) as Arc<dyn SequenceSource>;
        let device = device.resolve()?;
        let mut trainer = LocalTrainer::new(&self.model, training, RUN_STEPS, text, device)?;
        let outcome = trainer.train(task, &mut |_| Control::Continue)?;
        Ok(End { theta: outcome.theta, moments: outcome.moments })
    }
}

impl Start {
    /// How far `claimed` is from `replayed`, over all chunks.
    fn distances(&self, claimed: &End, replayed: &End) -> Distances {
        let [claimed_moments, replayed_moments] =
            [claimed, replayed].map(|end| end.moments.dequantise());
        let claimed = replay::End::new(&claimed.theta, &claimed_moments);
        replay::distances(
            &self.theta,
            claimed,
            replay::End::new(&replayed.theta, &replayed_moments),
        )
    }
}

fn task<'a>(
    start: &'a Start,
    batches: &'a [Vec<SequenceId>],
    Numerics { threads, micro_batch_sequences, precision, .. }: Numerics,
) -> TrainTask<'a> {
    TrainTask {
        theta: &start.theta,
        moments: Some(&start.moments),
        adam_step: WARM_STEPS as u64,
        first_step: WARM_STEPS as u64,
        batches,
        micro_batch_sequences,
        precision,
        threads,
    }
}

/// The largest of the three distances, each over what a run lets pass.
fn over_threshold(distances: Distances, replayed: Numerics) -> f64 {
    let terms = Verification::default();
    let delta_max = match (replayed.precision, replayed.device) {
        (Precision::Bf16, _) => BF16_DELTA_MAX,
        (Precision::F32, DeviceChoice::Cpu) => terms.same_kind_delta_distance_max,
        (Precision::F32, _) => terms.delta_distance_max,
    };
    (distances.delta / delta_max)
        .max(distances.first_moment / terms.first_moment_distance_max)
        .max(distances.second_moment / terms.second_moment_distance_max)
}

/// What a worker may have done instead.
#[derive(Debug, Clone, Copy)]
enum Cheat {
    BatchReplaced,
    OtherData,
    Steps(usize),
    LearningRate(f64),
    ZeroedMoments,
    ZeroUpdate,
    RandomUpdate,
    CopiedUpdate,
    ScaledUpdate(f32),
    LowerPrecision,
}

const CHEATS: [(&str, Cheat); 11] = [
    ("batch_replaced", Cheat::BatchReplaced),
    ("other_data", Cheat::OtherData),
    ("steps_90_percent", Cheat::Steps(STEPS * 9 / 10)),
    ("steps_50_percent", Cheat::Steps(STEPS / 2)),
    ("learning_rate_1.1", Cheat::LearningRate(1.1)),
    ("zeroed_moments", Cheat::ZeroedMoments),
    ("zero_update", Cheat::ZeroUpdate),
    ("random_update", Cheat::RandomUpdate),
    ("copied_update", Cheat::CopiedUpdate),
    ("scaled_update_1.1", Cheat::ScaledUpdate(1.1)),
    ("bf16_for_f32", Cheat::LowerPrecision),
];

/// What the measurements share.
pub(super) struct Laboratory {
    pub(super) bench: Bench,
    text: PathBuf,
}

impl Laboratory {
    pub(super) fn new(text: &Text) -> anyhow::Result<Self> {
        Ok(Self { bench: Bench::new(text)?, text: text.folder.clone() })
    }

    /// Every cheat in as many rounds.
    pub(super) fn cheats(&self, seeds: u64, report: &mut Report) -> anyhow::Result<Vec<Replayed>> {
        let mut rows: Vec<Replayed> =
            CHEATS.iter().map(|(name, _)| Replayed::new(name, false)).collect();
        for seed in 0..seeds {
            if seed.is_multiple_of(20) {
                eprintln!("cheats: {seed} of {seeds} rounds");
            }
            let start = self.bench.begin(seed, Precision::F32)?;
            let honest = self.bench.train(&start, ASSIGNED)?;
            for (row, (_, cheat)) in rows.iter_mut().zip(CHEATS) {
                let claimed = self.claim(cheat, &start, &honest)?;
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

    fn claim(&self, cheat: Cheat, start: &Start, honest: &End) -> anyhow::Result<End> {
        let bench = &self.bench;
        let assigned = bench.assigned(start.seed);
        let moved = |change: &dyn Fn(usize, f32) -> f32| {
            let values = start.theta.iter().zip(&honest.theta).enumerate();
            let theta = values.map(|(at, (from, to))| from - change(at, from - to)).collect();
            End { theta, moments: honest.moments.clone() }
        };
        let trained = |batches: &[Vec<SequenceId>]| {
            bench.run(&bench.training, &task(start, batches, ASSIGNED), ASSIGNED.device)
        };
        Ok(match cheat {
            Cheat::BatchReplaced => {
                let mut batches = assigned;
                batches[STEPS / 2] = bench.batches(start.seed + 1, 0..1).remove(0);
                trained(&batches)?
            }
            Cheat::OtherData => trained(&bench.assigned(start.seed + 1_000_000))?,
            Cheat::Steps(steps) => trained(&assigned[..steps])?,
            Cheat::LearningRate(factor) => {
                let learning_rate = bench.training.learning_rate * factor;
                let training = Training { learning_rate, ..bench.training.clone() };
                bench.run(&training, &task(start, &assigned, ASSIGNED), ASSIGNED.device)?
            }
            Cheat::ZeroedMoments => {
                let task = task(start, &assigned, ASSIGNED);
                let task = TrainTask { moments: None, adam_step: 0, ..task };
                bench.run(&bench.training, &task, ASSIGNED.device)?
            }
            Cheat::ZeroUpdate => End { theta: start.theta.clone(), moments: start.moments.clone() },
            Cheat::RandomUpdate => {
                let last = start.theta.len() - 1;
                // As long as an honest one, and in no relation to it.
                moved(&|at, _| start.theta[last - at] - honest.theta[last - at])
            }
            Cheat::CopiedUpdate => {
                // Of a worker with moments and batches of its own.
                let other = bench.begin(start.seed + 2_000_000, Precision::F32)?;
                bench.train(&Start { theta: start.theta.clone(), ..other }, ASSIGNED)?
            }
            Cheat::ScaledUpdate(factor) => moved(&|_, delta| factor * delta),
            Cheat::LowerPrecision => {
                bench.train(start, Numerics { precision: Precision::Bf16, ..ASSIGNED })?
            }
        })
    }
}

impl Laboratory {
    /// Honest rounds, replayed by processes of other classes.
    pub(super) fn honest(&self, seeds: u64, report: &mut Report) -> anyhow::Result<Vec<Replayed>> {
        let classes = classes();
        let share = seeds.div_ceil(classes.len() as u64);
        let mut rows = Vec::with_capacity(classes.len());
        for (number, (name, kernels, numerics)) in (0..).zip(&classes) {
            eprintln!("honest rounds replayed by {name}");
            let mut class = Class::start(&self.text, kernels, *numerics)?;
            let mut row = Replayed::new(name, true);
            let reference = Numerics { precision: numerics.precision, ..ASSIGNED };
            for seed in number * share..(number + 1) * share {
                // No seed of those that were cheated with.
                let start = self.bench.begin(10_000_000 + seed, numerics.precision)?;
                class.ask(&start)?;
                let claimed = self.bench.train(&start, reference)?;
                let replayed = class
                    .answer(&self.bench.layout)
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
}

fn note(row: &mut Replayed, distances: Distances, replayed: Numerics) {
    row.over_threshold.push(over_threshold(distances, replayed));
    row.distances.push(distances);
}

/// Classes that this machine's processor offers beside that of this process: name, kernels, numerics.
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
