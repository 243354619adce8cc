//! What is looked at: which chunks, and whose rounds. Everything follows from entropy that did not
//! exist when the work was committed, so nobody can prepare for it and anybody can recompute it.

use std::collections::BTreeSet;

use manyhands_proto::{ChunkIndex, Digest, NodeId, Round};
use serde::{Deserialize, Serialize};

use crate::credibility::Credibility;
use crate::sampling::first_u64;

/// The source of all draws over one closed set of commitments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beacon(Digest);

impl Beacon {
    /// `set` is the digest of what was closed before `entropy` (the hash of a block at least two
    /// after it was anchored) could be known.
    pub fn new(set: Digest, entropy: Digest) -> Self {
        let mut material = set.as_bytes().to_vec();
        material.extend_from_slice(entropy.as_bytes());
        Self(Digest::derive("manyhands 2026 beacon", &material))
    }

    /// Whether `worker`'s round is replayed, at thousandths `audit_rate_per_mille` for a worker
    /// without credibility.
    pub fn audits(
        &self,
        worker: NodeId,
        credibility: Credibility,
        audit_rate_per_mille: u32,
    ) -> bool {
        let draw = u128::from(self.number("audit", worker.as_bytes(), 0));
        let (numerator, denominator) = credibility.audit_rate(audit_rate_per_mille);
        // draw / 2⁶⁴ < numerator / denominator, without rounding.
        draw * u128::from(denominator) < u128::from(numerator) << 64
    }

    /// Chunks whose encoding the coordinator recomputes: half of them uniform over all chunks, half
    /// weighted by `chunk_energy` (any measure of what the update puts into each chunk), since a
    /// forger gains most where the update is large. Ascending, without repetition.
    pub fn codec_chunks(
        &self,
        worker: NodeId,
        count: u32,
        chunk_energy: &[u64],
    ) -> Vec<ChunkIndex> {
        let chunks = chunk_energy.len() as u64;
        let total: u128 = chunk_energy.iter().map(|&energy| u128::from(energy)).sum();
        let mut drawn = BTreeSet::new();
        for i in 0..u64::from(count) {
            let number = self.number("codec", worker.as_bytes(), i);
            let index = if i % 2 == 0 || total == 0 {
                scale(number, u128::from(chunks)) as u32
            } else {
                weighted(scale(number, total), chunk_energy)
            };
            drawn.insert(ChunkIndex(index));
        }
        drawn.into_iter().collect()
    }

    /// Chunks that a replay compares: all if there are not more than `count`. Ascending.
    pub fn replay_chunks(&self, worker: NodeId, count: u32, chunks: u32) -> Vec<ChunkIndex> {
        if chunks <= count {
            return (0..chunks).map(ChunkIndex).collect();
        }
        let mut drawn = BTreeSet::new();
        let mut i = 0;
        while drawn.len() < count as usize {
            let number = self.number("replay", worker.as_bytes(), i);
            drawn.insert(ChunkIndex(scale(number, u128::from(chunks)) as u32));
            i += 1;
        }
        drawn.into_iter().collect()
    }

    /// `count` of the verifiers, or all if there are fewer.
    pub fn verifiers(&self, count: usize, verifiers: &[NodeId]) -> Vec<NodeId> {
        let mut drawn = verifiers.to_vec();
        drawn.sort_by_key(|&verifier| (self.number("verifier", verifier.as_bytes(), 0), verifier));
        drawn.truncate(count);
        drawn
    }

    /// All of `verifiers`, in the order in which they are asked about `worker`'s round.
    pub fn panel(&self, worker: NodeId, verifiers: &[NodeId]) -> Vec<NodeId> {
        let mut drawn = verifiers.to_vec();
        drawn.sort_by_cached_key(|verifier| {
            let pair = [worker.as_bytes().as_slice(), verifier.as_bytes()].concat();
            (self.number("panel", &pair, 0), *verifier)
        });
        drawn
    }

    /// Whether another verifier looks over a replay of `worker`'s round `round` that one let pass. This beacon is of a
    /// later round than the verdict: nobody could know when it was given.
    pub fn looks_again(&self, round: Round, worker: NodeId, recheck_per_mille: u32) -> bool {
        let number = self.number("recheck", worker.as_bytes(), u64::from(round.0));
        u128::from(number) * 1_000 < u128::from(recheck_per_mille) << 64
    }

    fn number(&self, purpose: &str, about: &[u8], index: u64) -> u64 {
        let mut material = self.0.as_bytes().to_vec();
        material.extend_from_slice(about);
        material.extend_from_slice(&index.to_le_bytes());
        material.extend_from_slice(purpose.as_bytes());
        first_u64(&Digest::derive("manyhands 2026 draw", &material))
    }
}

/// `number / 2⁶⁴ · range`, below `range` (< 2⁶⁴).
fn scale(number: u64, range: u128) -> u128 {
    (u128::from(number) * range) >> 64
}

fn weighted(mut at: u128, weights: &[u64]) -> u32 {
    for (&weight, index) in weights.iter().zip(0..) {
        if at < u128::from(weight) {
            return index;
        }
        at -= u128::from(weight);
    }
    unreachable!("`at` is below the sum of the weights")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beacon(i: u64) -> Beacon {
        Beacon::new(Digest::of(b"set"), Digest::of(&i.to_le_bytes()))
    }

    const WORKER: NodeId = NodeId::new([9; 32]);

    #[test]
    fn the_share_of_audited_rounds_is_the_rate_and_credibility_halves_it() {
        let audited = |credibility: Credibility| {
            (0..20_000).filter(|&i| beacon(i).audits(WORKER, credibility, 100)).count()
        };
        let fresh = audited(Credibility::default());
        assert!((1_850..2_150).contains(&fresh), "{fresh}");
        let mut trusted = Credibility::default();
        (0..64).for_each(|_| trusted.passed());
        let trusted = audited(trusted);
        assert!((890..1_110).contains(&trusted), "{trusted}");
        assert!((0..100).all(|i| beacon(i).audits(WORKER, Credibility::default(), 1_000)));
        assert!((0..100).all(|i| !beacon(i).audits(WORKER, Credibility::default(), 0)));
    }

    #[test]
    fn half_of_the_codec_chunks_go_where_the_energy_is() {
        let mut energy = vec![1; 1_000];
        energy[77] = 1_000_000;
        let hits = (0..50)
            .filter(|&i| beacon(i).codec_chunks(WORKER, 16, &energy).contains(&ChunkIndex(77)));
        assert_eq!(hits.count(), 50);
        assert!(beacon(0).codec_chunks(WORKER, 16, &[0, 0]).len() <= 2);
    }

    #[test]
    fn every_verifier_is_drawn_at_times_and_none_twice() {
        let verifiers: Vec<NodeId> = (0..5).map(|number| NodeId::new([number; 32])).collect();
        assert_eq!(beacon(1).verifiers(3, &verifiers[..2]).len(), 2);
        let drawn = |i| BTreeSet::from_iter(beacon(i).verifiers(3, &verifiers));
        assert!((0..100).all(|i| drawn(i).len() == 3));
        assert_eq!((0..100).flat_map(drawn).collect::<BTreeSet<_>>().len(), 5);
    }

    #[test]
    fn replay_chunks_are_distinct_and_all_of_a_small_model() {
        assert_eq!(beacon(1).replay_chunks(WORKER, 256, 3).len(), 3);
        let drawn = beacon(1).replay_chunks(WORKER, 256, 100_000);
        assert_eq!(drawn.len(), 256);
        assert!(drawn.is_sorted() && drawn.iter().all(|chunk| chunk.0 < 100_000));
        assert_ne!(drawn, beacon(2).replay_chunks(WORKER, 256, 100_000));
    }
}
