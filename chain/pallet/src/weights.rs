//! What each call may cost.
//!
//! Not measured yet: upper bounds from counting. Each function adds a fixed time for decoding and
//! logic, the storage reads and writes of its worst path (each hold, release or transfer touches
//! an account and its holds), and the size of the largest record it reads as proof. Hashing a
//! proof's sibling is a BLAKE2b block and the decoding of 32 bytes, rounded up generously.

use core::marker::PhantomData;

use codec::MaxEncodedLen;
use frame_support::{traits::Get, weights::Weight};

use crate::{Config, Run};

pub trait WeightInfo {
    fn register_worker() -> Weight;
    fn update_worker() -> Weight;
    fn increase_stake() -> Weight;
    fn join_run() -> Weight;
    fn leave_run() -> Weight;
    fn announce_exit() -> Weight;
    fn withdraw_stake() -> Weight;
    fn register_verifier() -> Weight;
    fn retire_verifier() -> Weight;
    fn withdraw_verifier_bond() -> Weight;
    fn create_run() -> Weight;
    fn fund_run() -> Weight;
    fn pause_run() -> Weight;
    fn resume_run() -> Weight;
    fn cancel_run() -> Weight;
    fn complete_run() -> Weight;
    fn timeout_run() -> Weight;
    fn refund_funder() -> Weight;
    fn settle_run() -> Weight;
    fn anchor_commitments() -> Weight;
    fn commit_round() -> Weight;
    fn attest_round() -> Weight;
    fn resolve_challenge() -> Weight;
    fn expire_challenge() -> Weight;
    fn finalize_round() -> Weight;
    fn report_fault() -> Weight;
    fn contest_fault() -> Weight;
    fn execute_fault() -> Weight;
    fn report_verifier() -> Weight;
    fn contest_verifier_fault() -> Weight;
    fn execute_verifier_fault() -> Weight;
    fn vote_on_fault() -> Weight;
    fn vote_on_verifier() -> Weight;
    /// `limit`: records removed.
    fn prune_run(limit: u32) -> Weight;
    /// `siblings`: hashes of the leaf's proof.
    fn challenge_round(siblings: u32) -> Weight;
    /// `siblings`: hashes of the leaf's proof.
    fn claim_reward(siblings: u32) -> Weight;
}

/// Decoding, checks, event: 30 µs in picoseconds.
const LOGIC: u64 = 30_000_000;
/// One BLAKE2b compression in WASM with its decoding: 2 µs in picoseconds.
const SIBLING: u64 = 2_000_000;
/// Trie nodes on the way to one value: the proof of a key in a state of some million entries.
const TRIE_PATH_BYTES: u64 = 2_048;

/// The counted weights, priced by the runtime's database weights.
pub struct CountedWeight<T>(PhantomData<T>);

impl<T: Config> CountedWeight<T> {
    fn storage(reads: u64, writes: u64) -> Weight {
        let proof =
            reads.saturating_mul(TRIE_PATH_BYTES).saturating_add(Run::max_encoded_len() as u64);
        Weight::from_parts(LOGIC, proof)
            .saturating_add(T::DbWeight::get().reads_writes(reads, writes))
    }
}

impl<T: Config> WeightInfo for CountedWeight<T> {
    fn register_worker() -> Weight {
        Self::storage(5, 5)
    }

    fn update_worker() -> Weight {
        Self::storage(1, 1)
    }

    fn increase_stake() -> Weight {
        Self::storage(3, 3)
    }

    fn join_run() -> Weight {
        // Every membership's run is looked up to drop those that are over, and for its stake.
        Self::storage(34, 1)
    }

    fn leave_run() -> Weight {
        Self::storage(2, 1)
    }

    fn announce_exit() -> Weight {
        // Every membership's run is looked up for its unbonding period.
        Self::storage(17, 1)
    }

    fn withdraw_stake() -> Weight {
        Self::storage(5, 5)
    }

    fn register_verifier() -> Weight {
        Self::storage(4, 4)
    }

    fn retire_verifier() -> Weight {
        Self::storage(2, 1)
    }

    fn withdraw_verifier_bond() -> Weight {
        Self::storage(4, 4)
    }

    fn create_run() -> Weight {
        Self::storage(12, 12)
    }

    fn fund_run() -> Weight {
        Self::storage(6, 6)
    }

    fn pause_run() -> Weight {
        Self::storage(1, 1)
    }

    fn resume_run() -> Weight {
        Self::storage(3, 3)
    }

    fn cancel_run() -> Weight {
        Self::storage(1, 1)
    }

    fn complete_run() -> Weight {
        Self::storage(1, 1)
    }

    fn timeout_run() -> Weight {
        Self::storage(5, 5)
    }

    fn refund_funder() -> Weight {
        Self::storage(5, 5)
    }

    fn settle_run() -> Weight {
        Self::storage(6, 6)
    }

    fn anchor_commitments() -> Weight {
        Self::storage(4, 4)
    }

    fn commit_round() -> Weight {
        Self::storage(4, 4)
    }

    fn attest_round() -> Weight {
        Self::storage(3, 1)
    }

    fn resolve_challenge() -> Weight {
        // The deciding vote may reject all pending commits and return their challenges.
        Self::storage(73, 73)
    }

    fn expire_challenge() -> Weight {
        Self::storage(5, 5)
    }

    fn finalize_round() -> Weight {
        // A commit nobody attested is rejected with all that wait behind it.
        Self::storage(66, 66)
    }

    fn report_fault() -> Weight {
        Self::storage(7, 7)
    }

    fn contest_fault() -> Weight {
        Self::storage(4, 3)
    }

    fn execute_fault() -> Weight {
        // Pays up to 32 voters.
        Self::storage(75, 76)
    }

    fn report_verifier() -> Weight {
        Self::storage(6, 6)
    }

    fn contest_verifier_fault() -> Weight {
        Self::storage(4, 3)
    }

    fn execute_verifier_fault() -> Weight {
        // Pays up to 31 voters: all verifiers but the accused.
        Self::storage(70, 70)
    }

    fn vote_on_fault() -> Weight {
        // The deciding vote pays up to 32 voters.
        Self::storage(78, 76)
    }

    fn vote_on_verifier() -> Weight {
        // The deciding vote pays up to 31 voters: all verifiers but the accused.
        Self::storage(74, 71)
    }

    fn prune_run(limit: u32) -> Weight {
        // A fault is the dearest record: the iterator's read, the record, its deposit's hold.
        Self::storage(9, 9).saturating_add(Self::storage(4, 3).saturating_mul(limit.into()))
    }

    fn challenge_round(siblings: u32) -> Weight {
        Self::storage(4, 5)
            .saturating_add(Weight::from_parts(SIBLING, 0).saturating_mul(siblings.into()))
    }

    fn claim_reward(siblings: u32) -> Weight {
        Self::storage(10, 6)
            .saturating_add(Weight::from_parts(SIBLING, 0).saturating_mul(siblings.into()))
    }
}
