//! What one process makes of the same work: the same steps, all workers' batches together, no codec, no merge.

use std::path::Path;
use std::sync::Arc;

use manyhands_gradient::initial_theta;
use manyhands_model::data::{Dataset, SequenceId, Split};
use manyhands_model::{
    Control, Device, EvaluateTask, LocalTrainer, TrainTask, Trainer, Transformer, evaluate,
};
use manyhands_proto::run_file::RunSpec;
use manyhands_rules::assignment::{Opening, plan};
use manyhands_rules::quarantine::{left_out_by_round, step_sequences};
use manyhands_rules::record::RoundRecord;
use manyhands_rules::reward::layout;

use crate::failure::{Explain, Failure};

const REMEDY: &str = "look whether the data set in the demo's folder was changed";

/// Held-out loss of one process after the steps of `records`, nats per token. `progress` is told steps done
/// and steps in all.
pub(super) fn held_out_loss(
    spec: &RunSpec,
    records: &[RoundRecord],
    dataset: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<f64, Failure> {
    let dataset =
        Dataset::open_expecting(dataset, spec.data.manifest).explain("demo_baseline", REMEDY)?;
    let set = |split| Arc::new(dataset.sequences(split, spec.model.context_length));
    let layout = layout(&spec.model);
    let theta = initial_theta(&layout, &spec.model, spec.run.seed);
    let train = set(Split::Train);
    let mut trainer =
        LocalTrainer::new(&spec.model, &spec.training, spec.total_steps(), train, Device::Cpu)
            .explain("demo_baseline", REMEDY)?;
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(8) as u32);
    let task = TrainTask {
        theta: &theta,
        moments: None,
        adam_step: 0,
        first_step: 0,
        batches: &batches(spec, records),
        micro_batch_sequences: spec.training.micro_batch_sequences,
        precision: spec.training.precision,
        threads,
    };
    let outcome = trainer
        .train(&task, &mut |at| {
            progress(at.steps_done, at.steps);
            Control::Continue
        })
        .explain("demo_baseline", REMEDY)?;
    let model = Transformer::new(&spec.model, spec.training.precision, &outcome.theta, Device::Cpu)
        .explain("demo_baseline", REMEDY)?;
    let sequences: Vec<_> = (0..u64::from(spec.data.held_out_sequences)).map(SequenceId).collect();
    let batch_sequences = spec.training.micro_batch_sequences;
    let task = EvaluateTask { sequences: &sequences, batch_sequences, threads };
    let held_out = set(Split::HeldOut);
    let evaluation = evaluate(&model, held_out.as_ref(), task, &mut |_| Control::Continue)
        .explain("demo_baseline", REMEDY)?;
    Ok(evaluation.loss)
}

/// The sequences of every inner step of the run: those of all workers whose update was merged.
fn batches(spec: &RunSpec, records: &[RoundRecord]) -> Vec<Vec<SequenceId>> {
    let mut batches = Vec::new();
    let left_out = left_out_by_round(spec, records);
    for (record, left_out) in records.iter().zip(&left_out) {
        let opening = Opening {
            round: record.round,
            theta: record.theta,
            first_sequence: record.first_sequence,
            left_out,
            sequences_max: record.sequences_max,
        };
        let admitted: Vec<_> = record.admitted().map(|result| result.worker).collect();
        let assignments = plan(spec, opening, &record.candidates);
        let merged: Vec<_> =
            assignments.iter().filter(|assignment| admitted.contains(&assignment.worker)).collect();
        for step in 0..spec.training.steps_per_round {
            let batch: Vec<_> = merged
                .iter()
                .filter(|assignment| step < assignment.steps)
                .flat_map(|assignment| step_sequences(spec, assignment, step))
                .map(SequenceId)
                .collect();
            if !batch.is_empty() {
                batches.push(batch);
            }
        }
    }
    batches
}
