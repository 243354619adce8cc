//! Held-out loss.

use manyhands_proto::TokenCount;

use crate::batch::{Batch, tokens_of};
use crate::data::{SequenceError, SequenceId, SequenceSource};
use crate::metrics;
use crate::torch::{TorchError, guarded, set_threads};
use crate::trainer::Control;
use crate::transformer::Transformer;

/// Loss over a list of sequences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean over all targets, nats per token.
    pub loss: f64,
    pub tokens: TokenCount,
}

/// Why a loss could not be had.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    #[error("expected at least one sequence and one sequence per batch, got none")]
    Empty,
    #[error("expected sequences of {expected} targets, the data has {got}")]
    ContextLength { expected: u32, got: u32 },
    #[error("stopped")]
    Stopped,
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    #[error(transparent)]
    Torch(#[from] TorchError),
}

/// What to evaluate on, and how.
#[derive(Debug, Clone, Copy)]
pub struct EvaluateTask<'a> {
    pub sequences: &'a [SequenceId],
    pub batch_sequences: u32,
    pub threads: u32,
}

/// Mean loss of `model` over the task's sequences; `progress` gets the targets seen so far after each batch.
///
/// # Errors
/// When there is nothing to evaluate, data is missing, it was stopped, or the machine fails.
pub fn evaluate(
    model: &Transformer,
    source: &dyn SequenceSource,
    task: EvaluateTask<'_>,
    progress: &mut dyn FnMut(TokenCount) -> Control,
) -> Result<Evaluation, EvaluateError> {
    if task.sequences.is_empty() || task.batch_sequences == 0 {
        return Err(EvaluateError::Empty);
    }
    let (expected, got) = (model.architecture().context_length, source.context_length());
    if expected != got {
        return Err(EvaluateError::ContextLength { expected, got });
    }
    guarded(|| {
        set_threads(task.threads);
        let (mut loss_sum, mut tokens) = (0.0, 0);
        for sequences in task.sequences.chunks(task.batch_sequences as usize) {
            let batch = Batch::new(&tokens_of(source, sequences)?, model.device());
            let loss = tch::no_grad(|| model.loss_sum(&batch.inputs_bt, &batch.targets_bt));
            loss_sum += loss.double_value(&[]);
            let targets = sequences.len() as u64 * u64::from(expected);
            tokens += targets;
            metrics::evaluated_tokens(targets);
            match progress(TokenCount(tokens)) {
                Control::Continue => {}
                Control::Pause(duration) => std::thread::sleep(duration),
                Control::Stop => return Err(EvaluateError::Stopped),
            }
        }
        Ok(Evaluation { loss: loss_sum / tokens as f64, tokens: TokenCount(tokens) })
    })?
}
