//! Training sequences that nobody trains on any more: a round on which every replay ended somewhere else blames nobody, and
//! what two workers' such rounds have in common is left out from then on.

use std::collections::{BTreeSet, VecDeque};

use manyhands_proto::NodeId;
use manyhands_proto::message::limits::QUARANTINED_MAX;
use manyhands_proto::message::{Assignment, Commitment};
use manyhands_proto::run_file::RunSpec;
use serde::{Deserialize, Serialize};

use crate::record::{Check, Finding, RoundRecord};
use crate::sampling::sequence_at;

/// Irreproducible rounds that another is compared with.
const SUSPECTS_MAX: usize = 8;

/// Longer rounds tell nothing.
const SUSPECT_SEQUENCES_MAX: u64 = 1 << 14;

/// After so many in a run nothing more is left out: it is not the data.
const SUSPECTS_OF_A_RUN_MAX: u32 = 256;

/// Of a run's training sequences, at most one in so many is left out: what machines do to numbers must not choose what a
/// model learns.
const LEFT_OUT_OF: u64 = 100;

/// A worker's round that could not be repeated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Suspect {
    worker: NodeId,
    first_sequence: u64,
    sequences: u64,
}

impl Suspect {
    fn numbers(&self, spec: &RunSpec) -> BTreeSet<u64> {
        let (seed, of) = (spec.run.seed, spec.data.train_sequences);
        let end = self.first_sequence.saturating_add(self.sequences);
        (self.first_sequence..end).map(|at| sequence_at(seed, at, of)).collect()
    }
}

/// What the records of a run say so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    suspects: VecDeque<Suspect>,
    seen: u32,
    left_out: BTreeSet<u64>,
}

impl Quarantine {
    /// The sequences that are left out, ascending.
    pub fn left_out(&self) -> Vec<u64> {
        self.left_out.iter().copied().collect()
    }

    /// Goes on by what is in the next record. `commitment` gives that of a round and worker.
    pub fn follow<'a>(
        &mut self,
        spec: &RunSpec,
        record: &RoundRecord,
        commitment: impl Fn(&Check) -> Option<&'a Commitment>,
    ) {
        let found = record.checks.iter().filter(|check| check.finding == Finding::Irreproducible);
        for check in found {
            let Some(commitment) = commitment(check) else { continue };
            self.add(
                spec,
                Suspect {
                    worker: check.worker,
                    first_sequence: commitment.first_sequence,
                    sequences: commitment.tokens.0 / u64::from(spec.model.context_length),
                },
            );
        }
    }

    fn add(&mut self, spec: &RunSpec, suspect: Suspect) {
        if suspect.sequences > SUSPECT_SEQUENCES_MAX || self.seen >= SUSPECTS_OF_A_RUN_MAX {
            return;
        }
        self.seen += 1;
        let numbers = suspect.numbers(spec);
        let room = (spec.data.train_sequences / LEFT_OUT_OF).min(QUARANTINED_MAX as u64) as usize;
        for other in self.suspects.iter().filter(|other| other.worker != suspect.worker) {
            let mut left_out = self.left_out.clone();
            left_out.extend(other.numbers(spec).intersection(&numbers));
            // Where too much is in both, they do not tell which it is.
            if left_out.len() <= room {
                self.left_out = left_out;
            }
        }
        self.suspects.push_back(suspect);
        if self.suspects.len() > SUSPECTS_MAX {
            self.suspects.pop_front();
        }
    }
}

/// What is left out of each round of a run whose records are all there, from round 0 without a gap.
pub fn left_out_by_round(spec: &RunSpec, records: &[RoundRecord]) -> Vec<Vec<u64>> {
    let mut quarantine = Quarantine::default();
    let commitment = |check: &Check| {
        let of = records.get(check.round.0 as usize)?;
        let signed = of.commitments.iter().find(|signed| signed.worker == check.worker)?;
        Some(&signed.commitment)
    };
    let next = |record| {
        let left_out = quarantine.left_out();
        quarantine.follow(spec, record, commitment);
        left_out
    };
    records.iter().map(next).collect()
}

/// The training sequences of one inner step of an assignment. In the place of one that is left out comes the next that
/// is not.
pub fn step_sequences(spec: &RunSpec, assignment: &Assignment, step: u32) -> Vec<u64> {
    let (seed, of) = (spec.run.seed, spec.data.train_sequences);
    let left_out = |number: &u64| assignment.left_out.binary_search(number).is_ok();
    let instead = |number: u64| {
        // Only few are left out; if all were, the first would have to do.
        let mut next = (0..=assignment.left_out.len() as u64).map(|on| (number + on) % of);
        next.find(|number| !left_out(number)).unwrap_or(number)
    };
    assignment.step(step).map(|at| instead(sequence_at(seed, at, of))).collect()
}

#[cfg(test)]
mod tests {
    use manyhands_proto::Digest;
    use manyhands_proto::message::Start;

    use super::*;
    use crate::record::tests_support::{assignment, spec};

    fn suspect(worker: u8, first_sequence: u64, sequences: u64) -> Suspect {
        Suspect { worker: NodeId::new([worker; 32]), first_sequence, sequences }
    }

    fn after(suspects: &[Suspect]) -> Vec<u64> {
        let mut quarantine = Quarantine::default();
        suspects.iter().for_each(|it| quarantine.add(&spec(), it.clone()));
        quarantine.left_out()
    }

    #[test]
    fn what_two_workers_could_not_do_is_left_out() {
        let (spec, epoch) = (spec(), spec().data.train_sequences);
        let at = |position| sequence_at(spec.run.seed, position, epoch);
        let second_epoch: Vec<u64> = (epoch..2 * epoch).collect();
        let bad = at(500);
        let again = second_epoch.iter().copied().find(|&it| at(it) == bad).expect("in every epoch");
        // One worker's own machine may be the reason.
        assert_eq!(after(&[suspect(1, 480, 40)]), [0; 0]);
        assert_eq!(after(&[suspect(1, 480, 40), suspect(1, again, 40)]), [0; 0]);
        let out = after(&[suspect(1, 480, 40), suspect(2, again, 40)]);
        assert!(out.contains(&bad) && out.len() <= 5, "{out:?}");
        // A hundredth of ten thousand at most.
        assert_eq!(after(&[suspect(1, 0, 4_000), suspect(2, 0, 101)]), [0; 0]);
        assert_eq!(after(&[suspect(1, 0, 4_000), suspect(2, 0, 100)]).len(), 100);
        let more = [suspect(1, 0, 4_000), suspect(2, 0, 100), suspect(3, 200, 1)];
        assert_eq!(after(&more).len(), 100, "nothing more is left out");
    }

    #[test]
    fn in_the_place_of_what_is_left_out_comes_the_next() {
        let spec = spec();
        let all = |left_out| -> Vec<u64> {
            let (worker, theta) = (NodeId::new([1; 32]), Digest::of(b"theta"));
            let assignment = Assignment { left_out, ..assignment(worker, theta, Start::Fresh) };
            (0..4).flat_map(|step| step_sequences(&spec, &assignment, step)).collect()
        };
        let before = all(Vec::new());
        let at = |position| sequence_at(spec.run.seed, position, spec.data.train_sequences);
        assert_eq!(before, (40..48).map(at).collect::<Vec<_>>());
        let bad = before[5];
        let mut left_out = vec![bad, (bad + 1) % spec.data.train_sequences];
        left_out.sort_unstable();
        let mut expected = before;
        expected[5] = (bad + 2) % spec.data.train_sequences;
        assert_eq!(all(left_out), expected);
    }
}
