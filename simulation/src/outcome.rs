//! What a simulated run came to.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_proto::{Balance, Digest, NodeId, Round, Tick};
use manyhands_rules::coordinator::Status;
use manyhands_rules::record::{Outcome as RoundOutcome, RoundRecord};
use manyhands_rules::worker::Exit;

/// The records of a run, and what its world saw.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub records: Vec<RoundRecord>,
    pub status: Status,
    pub honest: Vec<NodeId>,
    pub adversaries: Vec<NodeId>,
    /// The lying ones last.
    pub verifiers: Vec<NodeId>,
    /// How each node ended.
    pub exits: BTreeMap<NodeId, Exit>,
    /// Every θ that a node proved, by round.
    pub thetas: BTreeMap<Round, BTreeSet<Digest>>,
    /// Faults that reached the chain.
    pub reported: Vec<(Round, NodeId)>,
    /// Verifiers that the chain was told of.
    pub unmasked: BTreeSet<NodeId>,
    pub ended_at: Tick,
    /// Everything that the coordinator was told, in order.
    pub journal: Vec<u8>,
}

impl Outcome {
    /// Rounds in which something was merged.
    pub fn rounds_merged(&self) -> usize {
        self.records.iter().filter(|record| record.merge.is_some()).count()
    }

    pub fn slashed(&self) -> BTreeSet<NodeId> {
        self.reported.iter().map(|(_, worker)| *worker).collect()
    }

    /// Rounds of `worker` that were merged.
    pub fn admitted(&self, worker: NodeId) -> usize {
        self.outcomes(worker).filter(|outcome| **outcome == RoundOutcome::Admitted).count()
    }

    pub fn outcomes(&self, worker: NodeId) -> impl Iterator<Item = &RoundOutcome> {
        self.records
            .iter()
            .flat_map(|record| &record.results)
            .filter(move |result| result.worker == worker)
            .map(|result| &result.outcome)
    }

    pub fn earned(&self, account: NodeId) -> Balance {
        let last = self.records.last().map(|record| record.earnings.as_slice()).unwrap_or_default();
        last.iter().find(|e| e.account == account).map_or(Balance(0), |earning| earning.cumulative)
    }

    /// What holds of every run, whatever happened in it.
    ///
    /// # Panics
    /// With the name of what does not hold.
    pub fn assert_invariants(&self) {
        for (round, thetas) in &self.thetas {
            assert_eq!(thetas.len(), 1, "everybody holds the same θ of round {round}");
        }
        let mut first_sequence = 0;
        for pair in self.records.windows(2) {
            assert_eq!(pair[1].previous, pair[0].digest(), "records form a chain");
            assert_eq!(pair[1].theta, pair[0].theta_next, "θ follows from round to round");
            assert!(pair[1].first_sequence >= pair[0].first_sequence, "no sequence is given twice");
        }
        for record in &self.records {
            assert!(record.first_sequence >= first_sequence);
            first_sequence = record.first_sequence;
            for signed in &record.commitments {
                assert!(signed.verify(), "every commitment is signed by its worker");
            }
        }
        for end in self.records.iter().flat_map(|record| &record.false_ends) {
            assert!(self.unmasked.contains(&end.verifier), "what is on record is before the chain");
        }
        for worker in &self.honest {
            assert!(!self.slashed().contains(worker), "no honest worker is slashed");
        }
    }
}
