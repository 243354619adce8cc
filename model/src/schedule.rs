//! The learning rate as a function of the run's inner step.

use manyhands_proto::run_file::Training;

/// Learning rate of the inner step `step` (from 0, counted over the whole run, not per worker): linear
/// warm-up, then a cosine down to `learning_rate_final_share`, then constant.
///
/// `total_steps` is the length of the run; the decay ends there when `decay_steps` is 0. A step counts
/// the same for all workers of a round, so a worker that joins late follows the same schedule.
pub fn learning_rate(training: &Training, total_steps: u64, step: u64) -> f64 {
    let warmup = u64::from(training.warmup_steps);
    let end = if training.decay_steps == 0 { total_steps } else { u64::from(training.decay_steps) };
    if step < warmup {
        return training.learning_rate * (step + 1) as f64 / warmup as f64;
    }
    let least = training.learning_rate * training.learning_rate_final_share;
    if step >= end {
        return least;
    }
    let progress = (step - warmup) as f64 / (end - warmup) as f64;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    least + (training.learning_rate - least) * cosine
}

#[cfg(test)]
mod tests {
    use super::*;

    fn training() -> Training {
        serde_json::from_str(
            r#"{"steps_per_round":10,"batch_sequences":4,"micro_batch_sequences":2,
                "learning_rate":0.01,"warmup_steps":10,"decay_steps":110,"learning_rate_final_share":0.1}"#,
        )
        .expect("a training section")
    }

    #[test]
    fn it_warms_up_decays_and_stays() {
        let at = |step| learning_rate(&training(), 1_000, step);
        assert_eq!(at(0), 0.001);
        assert_eq!(at(9), 0.01);
        assert!((at(10) - 0.01).abs() < 1e-15);
        assert!((at(60) - 0.0055).abs() < 1e-12, "halfway between .01 and .001");
        assert!((at(110) - 0.001).abs() < 1e-15);
        assert_eq!(at(5_000), at(110));
    }

    #[test]
    fn without_decay_steps_it_decays_over_the_whole_run() {
        let training = Training { decay_steps: 0, ..training() };
        assert!((learning_rate(&training, 210, 110) - 0.0055).abs() < 1e-12);
        assert!((learning_rate(&training, 210, 210) - 0.001).abs() < 1e-15);
    }

    #[test]
    fn a_run_shorter_than_its_warm_up_only_warms_up() {
        let training = Training { decay_steps: 0, ..training() };
        assert!((learning_rate(&training, 5, 4) - 0.005).abs() < 1e-12);
        assert!((learning_rate(&training, 5, 20) - 0.001).abs() < 1e-12);
    }
}
