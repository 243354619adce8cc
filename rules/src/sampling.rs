//! Which training sequence stands at which position of the run's order, and which held-out ones updates are
//! weighed with.
//!
//! Every epoch is a permutation of all training sequences that follows from the run's seed, so
//! whoever knows an assignment knows its samples, and no sequence is seen twice in an epoch.

use manyhands_proto::Digest;
use manyhands_proto::message::Weigh;

/// The sequence at `position` of the run's endless order over `sequences` (> 0) training sequences.
pub fn sequence_at(seed: u64, position: u64, sequences: u64) -> u64 {
    assert!(sequences > 0, "a run has at least one training sequence");
    let (epoch, within) = (position / sequences, position % sequences);
    Permutation { seed, epoch, sequences }.apply(within)
}

/// Held-out sequences that a round's updates are weighed with. What is compared is the same text before and
/// after an update, so few are enough.
pub const WEIGHED_SEQUENCES: u64 = 16;

/// So many different ones of `there`, or all. They follow from all the commitments, so nobody knows them while it
/// can still choose what it sends.
pub fn weighed_sequences(task: &Weigh, there: u64) -> Vec<u64> {
    let mut material = task.round.0.to_le_bytes().to_vec();
    material.extend_from_slice(task.theta.as_bytes());
    for (worker, payload) in &task.updates {
        material.extend_from_slice(worker.as_bytes());
        material.extend_from_slice(payload.as_bytes());
    }
    let seed = first_u64(&Digest::derive("manyhands 2026 weighed sequences", &material));
    (0..WEIGHED_SEQUENCES.min(there)).map(|at| sequence_at(seed, at, there)).collect()
}

/// A pseudo-random permutation of `0..sequences`: a balanced Feistel network over the next even
/// power of two, walked until the value falls in range (Black and Rogaway, "Ciphers with Arbitrary
/// Finite Domains", 2002). Fewer than four steps are expected.
struct Permutation {
    seed: u64,
    epoch: u64,
    sequences: u64,
}

impl Permutation {
    fn apply(&self, value: u64) -> u64 {
        let half_bits = (64 - (self.sequences - 1).leading_zeros()).div_ceil(2).max(1);
        let mut value = self.encipher(value, half_bits);
        while value >= self.sequences {
            value = self.encipher(value, half_bits);
        }
        value
    }

    fn encipher(&self, value: u64, half_bits: u32) -> u64 {
        // Four rounds make a strong pseudo-random permutation (Luby and Rackoff, 1988).
        const ROUNDS: u8 = 4;
        let mask = (1 << half_bits) - 1;
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (self.mix(round, right) & mask));
        }
        left << half_bits | right
    }

    fn mix(&self, round: u8, half: u64) -> u64 {
        let mut material = [0; 25];
        material[..8].copy_from_slice(&self.seed.to_le_bytes());
        material[8..16].copy_from_slice(&self.epoch.to_le_bytes());
        material[16..24].copy_from_slice(&half.to_le_bytes());
        material[24] = round;
        first_u64(&Digest::derive("manyhands 2026 sequence order", &material))
    }
}

/// The first eight bytes of a digest as a number.
pub(crate) fn first_u64(digest: &Digest) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use manyhands_proto::{NodeId, Round};

    use super::*;

    #[test]
    fn an_epoch_visits_every_sequence_once_in_an_order_of_its_own() {
        for sequences in [1, 2, 3, 5, 64, 1000] {
            let epoch = |from: u64| -> Vec<u64> {
                (from..from + sequences).map(|at| sequence_at(7, at, sequences)).collect()
            };
            let (first, second) = (epoch(0), epoch(sequences));
            let all: BTreeSet<_> = (0..sequences).collect();
            assert_eq!(first.iter().copied().collect::<BTreeSet<_>>(), all);
            assert_eq!(second.iter().copied().collect::<BTreeSet<_>>(), all);
            assert!(sequences < 64 || first != second);
        }
    }

    #[test]
    fn the_order_follows_from_the_seed() {
        let order = |seed| (0..50).map(|at| sequence_at(seed, at, 1000)).collect::<Vec<_>>();
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
    }

    #[test]
    fn what_updates_are_weighed_with_follows_from_all_of_them() {
        let task = |payload: &[u8]| Weigh {
            round: Round(3),
            theta: Digest::of(b"theta"),
            updates: vec![(NodeId::new([1; 32]), Digest::of(payload))],
        };
        let drawn = weighed_sequences(&task(b"payload"), 1000);
        assert_eq!(drawn, weighed_sequences(&task(b"payload"), 1000));
        assert_ne!(drawn, weighed_sequences(&task(b"another"), 1000));
        let different: BTreeSet<_> = drawn.into_iter().filter(|&at| at < 1000).collect();
        assert_eq!(different.len() as u64, WEIGHED_SEQUENCES);
        let all: BTreeSet<_> = weighed_sequences(&task(b"payload"), 5).into_iter().collect();
        assert_eq!(all, (0..5).collect());
    }
}
