//! The compute check: repeat a round, then compare with what its worker claims.
//!
//! Running and comparing are apart: a verifier commits the digest of its own end state before it
//! sees the worker's chunks. Distances are relative L2, claimed against replayed; cosine alone
//! accepts every cheat worth naming.

use manyhands_gradient::CHUNK;
use manyhands_gradient::moments8::Moments;
use manyhands_proto::ChunkIndex;

use crate::trainer::{Control, Progress, TrainError, TrainOutcome, TrainTask, Trainer};

/// One chunk of a worker's claimed end state, as it was opened.
#[derive(Debug, Clone, PartialEq)]
pub struct ClaimedChunk {
    pub index: ChunkIndex,
    /// The chunk of θ_H: 4,096 values.
    pub theta: Vec<f32>,
    /// The chunk of m_H, read back from its 8-bit blocks.
    pub first_moment: Vec<f32>,
    /// The chunk of v_H, read back from its 8-bit blocks.
    pub second_moment: Vec<f32>,
}

/// Where a round ended, whole: θ_H, and the moments read back from their 8-bit blocks.
#[derive(Debug, Clone, Copy)]
pub struct EndState<'a> {
    pub theta: &'a [f32],
    pub moments: &'a Moments,
}

impl EndState<'_> {
    /// One chunk of it, as a worker would open it.
    ///
    /// # Panics
    /// When there is no such chunk.
    pub fn chunk(&self, index: ChunkIndex) -> ClaimedChunk {
        let range = index.0 as usize * CHUNK..(index.0 as usize + 1) * CHUNK;
        ClaimedChunk {
            index,
            theta: self.theta[range.clone()].to_vec(),
            first_moment: self.moments.first[range.clone()].to_vec(),
            second_moment: self.moments.second[range].to_vec(),
        }
    }
}

/// How far a claim is from its replay: |claimed − replayed| / |replayed| over the compared chunks.
///
/// 0 is the same bits. Infinite when a claimed value is not finite, or the replay did not move and
/// the claim did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distances {
    /// Of Δ = θ_t − θ_H.
    pub delta: f64,
    /// Of the first moments, both rounded to 8 bits.
    pub first_moment: f64,
    /// Of the second moments, both rounded to 8 bits.
    pub second_moment: f64,
}

/// Why a claim could not be compared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    #[error("expected at least one chunk to compare, got none")]
    Empty,
    #[error("expected a chunk below {chunks}, got {got}")]
    ChunkIndex { chunks: usize, got: u32 },
    #[error("chunk {index}: expected {CHUNK} values of each vector, got {got}")]
    ChunkLength { index: u32, got: usize },
}

/// A round that was repeated, and where it started.
#[derive(Debug, Clone)]
pub struct Replay<'a> {
    start: &'a [f32],
    outcome: TrainOutcome,
    moments: Moments,
}

impl<'a> Replay<'a> {
    /// Repeats `task`.
    ///
    /// # Errors
    /// As the trainer's.
    pub fn run(
        trainer: &mut dyn Trainer,
        task: &TrainTask<'a>,
        progress: &mut dyn FnMut(Progress) -> Control,
    ) -> Result<Self, TrainError> {
        let outcome = trainer.train(task, progress)?;
        let moments = outcome.moments.dequantise();
        Ok(Self { start: task.theta, outcome, moments })
    }

    /// The end state that the replay reached. In the worker's own class its digests equal the worker's.
    pub fn outcome(&self) -> &TrainOutcome {
        &self.outcome
    }

    /// Compares the chunks that a worker opened with the same chunks of the replay.
    ///
    /// # Errors
    /// When a chunk does not exist, or has not the form of one.
    pub fn compare(&self, claimed: &[ClaimedChunk]) -> Result<Distances, ClaimError> {
        let replayed = EndState { theta: &self.outcome.theta, moments: &self.moments };
        compare(self.start, replayed, claimed)
    }
}

/// The distances of `claimed` from `replayed`, both starting from `start` (θ_t). Pure.
///
/// # Errors
/// When a chunk does not exist, or has not the form of one.
pub fn compare(
    start: &[f32],
    replayed: EndState<'_>,
    claimed: &[ClaimedChunk],
) -> Result<Distances, ClaimError> {
    if claimed.is_empty() {
        return Err(ClaimError::Empty);
    }
    let chunks = start.len() / CHUNK;
    let (mut delta, mut first, mut second) = (Sums::default(), Sums::default(), Sums::default());
    for chunk in claimed {
        let index = chunk.index.0;
        if index as usize >= chunks {
            return Err(ClaimError::ChunkIndex { chunks, got: index });
        }
        let lengths = [&chunk.theta, &chunk.first_moment, &chunk.second_moment].map(Vec::len);
        if let Some(&got) = lengths.iter().find(|&&length| length != CHUNK) {
            return Err(ClaimError::ChunkLength { index, got });
        }
        let range = index as usize * CHUNK..(index as usize + 1) * CHUNK;
        let theta_ends = chunk.theta.iter().zip(&replayed.theta[range.clone()]);
        for (start, (claimed, replayed)) in start[range.clone()].iter().zip(theta_ends) {
            delta.add(start - claimed, start - replayed);
        }
        first.add_all(&chunk.first_moment, &replayed.moments.first[range.clone()]);
        second.add_all(&chunk.second_moment, &replayed.moments.second[range]);
    }
    Ok(Distances {
        delta: delta.distance(),
        first_moment: first.distance(),
        second_moment: second.distance(),
    })
}

/// Sums of squares, in f64: a chunk of f32 cannot overflow or lose them.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    difference: f64,
    replayed: f64,
}

impl Sums {
    fn add(&mut self, claimed: f32, replayed: f32) {
        self.difference += (f64::from(claimed) - f64::from(replayed)).powi(2);
        self.replayed += f64::from(replayed).powi(2);
    }

    fn add_all(&mut self, claimed: &[f32], replayed: &[f32]) {
        for (&claimed, &replayed) in claimed.iter().zip(replayed) {
            self.add(claimed, replayed);
        }
    }

    fn distance(self) -> f64 {
        if self.difference == 0.0 {
            return 0.0;
        }
        let distance = (self.difference / self.replayed).sqrt();
        // NaN comes from a claimed value that is not finite.
        if distance.is_nan() { f64::INFINITY } else { distance }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_infinitely_far() {
        let distance = |claimed: f32, replayed: f32| {
            let mut sums = Sums::default();
            sums.add(claimed, replayed);
            sums.distance()
        };
        assert_eq!(distance(0.0, 0.0), 0.0);
        assert_eq!(distance(1.1, 1.0), f64::from(1.1_f32) - 1.0);
        assert_eq!(distance(1.0, 0.0), f64::INFINITY);
        assert_eq!(distance(f32::NAN, 1.0), f64::INFINITY);
        assert_eq!(distance(f32::INFINITY, 1.0), f64::INFINITY);
    }
}
