//! Sequences as tensors.

use tch::{Device, Tensor};

use crate::data::{SequenceError, SequenceId, SequenceSource};
use crate::transformer::tokens_tensor;

/// Inputs and targets, i64, `bt`: target t is input t + 1.
pub(crate) struct Batch {
    pub(crate) inputs_bt: Tensor,
    pub(crate) targets_bt: Tensor,
}

impl Batch {
    pub(crate) fn load(
        source: &dyn SequenceSource,
        sequences: &[SequenceId],
        device: Device,
    ) -> Result<Self, SequenceError> {
        let tokens =
            sequences.iter().map(|&id| source.sequence(id)).collect::<Result<Vec<_>, _>>()?;
        let tokens_bt = tokens_tensor(&tokens, device);
        let targets = tokens_bt.size()[1] - 1;
        Ok(Self {
            inputs_bt: tokens_bt.narrow(1, 0, targets),
            targets_bt: tokens_bt.narrow(1, 1, targets),
        })
    }
}
