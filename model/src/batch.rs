//! Sequences as tensors.

use tch::{Device, Tensor};

use crate::data::{SequenceError, SequenceId, SequenceSource};
use crate::transformer::tokens_tensor;

/// Inputs and targets, i64, `bt`: target t is input t + 1.
pub(crate) struct Batch {
    pub(crate) inputs_bt: Tensor,
    pub(crate) targets_bt: Tensor,
}

/// Tokens of sequences, each with the one after its end.
pub(crate) fn tokens_of(
    source: &dyn SequenceSource,
    sequences: &[SequenceId],
) -> Result<Vec<Vec<u32>>, SequenceError> {
    sequences.iter().map(|&id| source.sequence(id)).collect()
}

impl Batch {
    pub(crate) fn new(tokens: &[Vec<u32>], device: Device) -> Self {
        let tokens_bt = tokens_tensor(tokens, device);
        let targets = tokens_bt.size()[1] - 1;
        Self {
            inputs_bt: tokens_bt.narrow(1, 0, targets),
            targets_bt: tokens_bt.narrow(1, 1, targets),
        }
    }
}
