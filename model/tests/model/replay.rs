//! Honest replays against cheats, on the same round.

use std::sync::LazyLock;

use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::replay::{End, distances};
use manyhands_model::data::SequenceId;
use manyhands_model::{TrainOutcome, TrainTask};
use manyhands_proto::message::Distances;
use manyhands_proto::run_file::{Precision, Training};

use crate::support::*;

/// The thresholds that a run starts with.
const DELTA_MAX: f64 = 1e-3;
const MOMENT_MAX: f64 = 2e-2;

/// A round of a run that is under way: θ, moments and the batches of ten steps.
struct Round {
    theta: Vec<f32>,
    moments: Moments8,
    batches: Vec<Vec<SequenceId>>,
}

static ROUND: LazyLock<Round> = LazyLock::new(|| {
    let start = theta(&architecture(), 11);
    let before = batches(0, 30, 4);
    let warm = train(&mut trainer(), &task(&start, None, 0, &before));
    Round { theta: warm.theta, moments: warm.moments, batches: batches(1_000, 10, 4) }
});

fn assigned() -> TrainTask<'static> {
    task(&ROUND.theta, Some(&ROUND.moments), 30, &ROUND.batches)
}

/// Distances of what `claimed` says from an honest replay of the assigned task.
fn judged(claimed: &TrainOutcome) -> Distances {
    let replayed = train(&mut trainer(), &assigned());
    let [claimed_moments, replayed_moments] =
        [claimed, &replayed].map(|outcome| outcome.moments.dequantise());
    let claimed = End::new(&claimed.theta, &claimed_moments);
    distances(&ROUND.theta, claimed, End::new(&replayed.theta, &replayed_moments))
}

#[test]
fn a_replay_of_itself_is_the_same_to_the_bit() {
    let honest = train(&mut trainer(), &assigned());
    assert_eq!(judged(&honest), Distances::NONE);
}

#[test]
fn other_numerics_stay_well_below_the_thresholds() {
    for (threads, micro_batch_sequences) in [(2, 4), (1, 1), (2, 3)] {
        let honest =
            train(&mut trainer(), &TrainTask { threads, micro_batch_sequences, ..assigned() });
        let distances = judged(&honest);
        println!("{threads} threads, micro-batches of {micro_batch_sequences}: {distances:?}");
        assert!(distances.delta < DELTA_MAX / 3.0, "{distances:?}");
        assert!(distances.first_moment < MOMENT_MAX / 3.0, "{distances:?}");
        assert!(distances.second_moment < MOMENT_MAX / 3.0, "{distances:?}");
    }
}

#[test]
fn every_cheat_is_far_above_the_threshold() {
    let cheat = |name: &str, claimed: TrainOutcome| {
        let distances = judged(&claimed);
        println!("{name}: {distances:?}");
        assert!(distances.delta > 20.0 * DELTA_MAX, "{name}: {distances:?}");
    };
    let lazy = assigned();
    cheat(
        "90 % of the steps",
        train(&mut trainer(), &TrainTask { batches: &lazy.batches[..9], ..lazy }),
    );

    let hasty = Training { learning_rate: training().learning_rate * 1.1, ..training() };
    cheat("learning rate × 1.1", train(&mut trainer_of(&architecture(), &hasty), &assigned()));

    let mut other = ROUND.batches.clone();
    other[4] = batches(9_000, 1, 4).remove(0);
    cheat(
        "one batch replaced",
        train(&mut trainer(), &TrainTask { batches: &other, ..assigned() }),
    );

    let zeroed = TrainTask { moments: None, adam_step: 0, ..assigned() };
    cheat("zeroed moments", train(&mut trainer(), &zeroed));

    let still = TrainOutcome { theta: ROUND.theta.clone(), ..train(&mut trainer(), &assigned()) };
    cheat("no training", still);
}

#[test]
fn a_lower_precision_than_assigned_fails() {
    let rounded = train(&mut trainer(), &TrainTask { precision: Precision::Bf16, ..assigned() });
    let distances = judged(&rounded);
    println!("bf16 for f32: {distances:?}");
    assert!(distances.delta > DELTA_MAX, "{distances:?}");
}

#[test]
fn forged_moments_are_seen_beside_an_honest_delta() {
    let honest = train(&mut trainer(), &assigned());
    let forged = TrainOutcome { moments: ROUND.moments.clone(), ..honest };
    let distances = judged(&forged);
    assert!(
        distances.delta == 0.0
            && distances.first_moment > MOMENT_MAX
            && distances.second_moment > MOMENT_MAX
    );
}
