//! What a worker starts the next round with. It follows from its last commitment; it is no choice.

use rayon::prelude::*;

use crate::codec::Update;
use crate::layout::{CHUNK, Layout};

/// What became of a worker's round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoundEnding {
    /// The update was merged, at any weight.
    Admitted,
    /// Rejected by norm, geometry or held-out loss.
    Rejected,
    /// Committed in time, uploaded late.
    Late,
    /// Not merged through a fault of the data, the network or the coordinator.
    FaultOfOthers,
    /// The worker is in no CommitSet: it crashed, or was not there.
    NotCommitted,
    /// The worker is new.
    Joined,
    /// The worker returns after a fault of its own.
    ReturnedAfterFault,
}

/// Where the next round's error buffer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextError {
    /// The committed e_next.
    Next,
    /// The committed e_next with the sent values put back: nobody used them.
    NextPlusSent,
    /// What the last commitment before this round left.
    Head,
    Zero,
}

/// Where the next round's optimiser moments come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextMoments {
    /// The committed m and v, and the step count.
    Carried,
    /// What the last commitment before this round left.
    Head,
    /// m = v = 0 and Adam's step 0; the assignment says `fresh`.
    Fresh,
}

/// A worker's state at the start of its next round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextState {
    pub error: NextError,
    pub moments: NextMoments,
}

impl RoundEnding {
    pub const fn next_state(self) -> NextState {
        let (error, moments) = match self {
            Self::Admitted | Self::Rejected => (NextError::Next, NextMoments::Carried),
            Self::Late | Self::FaultOfOthers => (NextError::NextPlusSent, NextMoments::Carried),
            Self::NotCommitted => (NextError::Head, NextMoments::Head),
            Self::Joined | Self::ReturnedAfterFault => (NextError::Zero, NextMoments::Fresh),
        };
        NextState { error, moments }
    }
}

/// Puts sent values back into an error buffer: e_i + v̂_i on the sent indices.
///
/// # Panics
/// When the buffer or the update belongs to another layout.
pub fn add_sent(layout: &Layout, error: &mut [f32], update: &Update) {
    layout.assert_covers(error, "the error buffer");
    assert_eq!(update.chunk_count(), layout.chunk_count(), "an update belongs to one layout");
    error
        .par_chunks_mut(CHUNK)
        .enumerate()
        .for_each(|(chunk, error)| add_sent_to_chunk(error, update, chunk));
}

/// The same for one chunk, as whoever checks opened chunks needs it.
///
/// # Panics
/// When there is no such chunk, or `error` is shorter than one.
pub fn add_sent_to_chunk(error: &mut [f32], update: &Update, chunk: usize) {
    crate::ieee::assert_ieee();
    update.symbols(chunk).for_each(|index, value| error[index] += value);
}
