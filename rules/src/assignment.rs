//! Who trains on what in a round: everybody the same steps where that can be, and a share of the
//! sequences by measured speed, so that all finish together.

use manyhands_proto::message::{Assignment, NumericClass, Start};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, Round};
use serde::{Deserialize, Serialize};

/// What is known of a worker when a round opens; recorded, so that the plan can be recomputed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    pub worker: NodeId,
    pub tokens_per_second: u64,
    pub class: NumericClass,
    pub start: Start,
}

/// The state of the run when a round opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening<'a> {
    pub round: Round,
    pub theta: Digest,
    /// Positions of the run's sequence order that earlier rounds used up.
    pub first_sequence: u64,
    /// [`crate::quarantine::Quarantine::left_out`], by the records of earlier rounds.
    pub left_out: &'a [u64],
    /// What a verifier repeats in time; none without one.
    pub sequences_max: Option<u32>,
}

/// The assignments of a round, in worker order. Their positions are consecutive from
/// `opening.first_sequence`.
///
/// A round has `candidates × batch_sequences × steps_per_round` sequences. Shares are proportional
/// to speed (largest remainder, ties to the lower id), at least one sequence each, and at most what
/// the worker does in half of the commitment deadline, and what a verifier repeats in time. A share
/// smaller than `steps_per_round` means fewer steps.
pub fn plan(spec: &RunSpec, opening: Opening<'_>, candidates: &[Candidate]) -> Vec<Assignment> {
    let mut candidates: Vec<_> = candidates.iter().collect();
    candidates.sort_by_key(|candidate| candidate.worker);
    let shares = shares(spec, opening.sequences_max, &candidates);
    let mut first_sequence = opening.first_sequence;
    candidates
        .into_iter()
        .zip(shares)
        .map(|(candidate, sequences)| {
            let assignment = Assignment {
                round: opening.round,
                worker: candidate.worker,
                theta: opening.theta,
                class: candidate.class.clone(),
                first_sequence,
                sequences,
                steps: spec.training.steps_per_round.min(sequences),
                first_step: u64::from(opening.round.0) * u64::from(spec.training.steps_per_round),
                start: candidate.start,
                left_out: opening.left_out.to_vec(),
                commit_deadline_ms: spec.round.commit_ms,
            };
            first_sequence += u64::from(sequences);
            assignment
        })
        .collect()
}

fn shares(spec: &RunSpec, most: Option<u32>, candidates: &[&Candidate]) -> Vec<u32> {
    let round_sequences = candidates.len() as u128
        * u128::from(spec.training.batch_sequences)
        * u128::from(spec.training.steps_per_round);
    let speed = |candidate: &&Candidate| u128::from(candidate.tokens_per_second.max(1));
    let speed_sum: u128 = candidates.iter().map(speed).sum::<u128>().max(1);
    let mut shares: Vec<u128> =
        candidates.iter().map(|c| round_sequences * speed(c) / speed_sum).collect();
    let mut by_remainder: Vec<usize> = (0..candidates.len()).collect();
    by_remainder
        .sort_by_key(|&i| std::cmp::Reverse(round_sequences * speed(&candidates[i]) % speed_sum));
    let missing = round_sequences - shares.iter().sum::<u128>();
    for &i in by_remainder.iter().take(missing as usize) {
        shares[i] += 1;
    }
    shares
        .into_iter()
        .zip(candidates)
        .map(|(share, candidate)| {
            let own = sequences_max(spec, candidate);
            share.clamp(1, most.map_or(own, |most| own.min(most.max(1).into()))) as u32
        })
        .collect()
}

/// What the (upper) median of verifiers with these speeds repeats in half of the time for checks, a sequence a step at
/// least, as [`crate::requirements::admit`] asks of each; none without a verifier.
pub fn repeated_in_time(spec: &RunSpec, mut tokens_per_second: Vec<u64>) -> Option<u32> {
    tokens_per_second.sort_unstable();
    let median = tokens_per_second.get(tokens_per_second.len() / 2)?;
    let tokens = u128::from(*median) * u128::from(spec.round.check_ms) / 2_000;
    let sequences = tokens / u128::from(spec.model.context_length);
    Some(sequences.clamp(spec.training.steps_per_round.into(), u32::MAX.into()) as u32)
}

/// What a worker does in half of the commitment deadline: a machine that is busy for a while is
/// then late by a little, not lost.
fn sequences_max(spec: &RunSpec, candidate: &Candidate) -> u128 {
    let tokens = u128::from(candidate.tokens_per_second) * u128::from(spec.round.commit_ms) / 2_000;
    (tokens / u128::from(spec.model.context_length)).clamp(1, u128::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use manyhands_proto::message::DeviceKind;

    use super::*;
    use crate::record::tests_support::spec;

    fn candidate(id: u8, tokens_per_second: u64) -> Candidate {
        Candidate {
            worker: NodeId::new([id; 32]),
            tokens_per_second,
            class: NumericClass::unknown(DeviceKind::Cpu),
            start: Start::Fresh,
        }
    }

    fn opening() -> Opening<'static> {
        Opening {
            round: Round(3),
            theta: Digest::of(b"theta"),
            first_sequence: 1_000,
            left_out: &[7],
            sequences_max: None,
        }
    }

    #[test]
    fn shares_follow_speed_and_positions_are_consecutive_in_worker_order() {
        let mut spec = spec();
        (spec.training.batch_sequences, spec.training.steps_per_round) = (8, 10);
        let plan = plan(
            &spec,
            opening(),
            &[candidate(2, 1_000), candidate(1, 4_000), candidate(3, 4_000)],
        );
        let sequences: Vec<_> = plan.iter().map(|a| a.sequences).collect();
        assert_eq!(sequences, [107, 27, 106]);
        let firsts: Vec<_> = plan.iter().map(|a| a.first_sequence).collect();
        assert_eq!(firsts, [1_000, 1_107, 1_134]);
        let steps: u64 = (0..10).map(|j| plan[1].step(j).end - plan[1].step(j).start).sum();
        assert_eq!(steps, 27);
        assert_eq!(plan[1].step(9).end, 1_134);
        assert!(plan.iter().all(|assignment| assignment.left_out == [7]));
    }

    #[test]
    fn nobody_gets_more_than_verifiers_repeat_in_time() {
        let mut spec = spec();
        (spec.training.batch_sequences, spec.training.steps_per_round) = (8, 10);
        spec.round.check_ms = 20_000;
        let context = u64::from(spec.model.context_length);
        assert_eq!(repeated_in_time(&spec, Vec::new()), None);
        // The middle one of three, the faster of two: in ten seconds so many sequences each.
        let speeds = vec![9 * context, context / 2, 5 * context];
        assert_eq!(repeated_in_time(&spec, speeds), Some(50));
        assert_eq!(repeated_in_time(&spec, vec![context, 5 * context]), Some(50));
        assert_eq!(repeated_in_time(&spec, vec![0]), Some(10), "a sequence a step");
        let opening = Opening { sequences_max: Some(50), ..opening() };
        let plan = plan(&spec, opening, &[candidate(1, 10_000 * context), candidate(2, context)]);
        assert_eq!(plan[0].sequences, 50);
        assert!(plan[1].sequences < 50);
    }

    #[test]
    fn a_very_slow_worker_gets_fewer_steps_and_never_more_than_fits_the_deadline() {
        let mut spec = spec();
        (spec.training.batch_sequences, spec.training.steps_per_round) = (8, 10);
        spec.round.commit_ms = 20_000;
        let context = u64::from(spec.model.context_length);
        // One second for a sequence: ten fit half of the deadline.
        let plan = plan(&spec, opening(), &[candidate(1, context), candidate(2, 10_000 * context)]);
        assert_eq!((plan[0].sequences, plan[0].steps), (1, 1));
        let alone = super::plan(&spec, opening(), &[candidate(1, context)]);
        assert_eq!((alone[0].sequences, alone[0].steps), (10, 10));
    }
}
