//! The leaf that says what one account earned, and the tree over a round's leaves.
//!
//! The pallet, the coordinator and the auditor share this one implementation. It needs no `std`
//! and knows no Substrate crate: ids are plain 32-byte arrays here.
//!
//! All hashes are BLAKE2b-256 over a first byte that separates the domains:
//!
//! ```text
//! leaf  = H(0x00 ‖ LEAF_DOMAIN ‖ SCALE(RewardLeaf))
//! node  = H(0x01 ‖ left ‖ right)              an unpaired last node moves up unchanged
//! root  = H(0x02 ‖ number_of_leaves as u32, little-endian ‖ top node)
//! ```
//!
//! The tags keep an inner node from passing as a leaf; the number of leaves in the root keeps a
//! proof of one tree's shape from being read as another's.

extern crate alloc;

use alloc::vec::Vec;

use codec::{Decode, DecodeWithMemTracking, Encode, MaxEncodedLen};
use scale_info::TypeInfo;

/// A BLAKE2b-256 value: a leaf's hash, a node or a root.
pub type LeafHash = [u8; 32];

/// Names the format; a new layout gets a new string.
pub const LEAF_DOMAIN: &[u8] = b"manyhands/reward-leaf/1";

/// Siblings of the longest possible proof: `number_of_leaves` is a `u32`.
pub const PROOF_LENGTH_MAX: u32 = 32;

const LEAF_TAG: u8 = 0x00;
const NODE_TAG: u8 = 0x01;
const ROOT_TAG: u8 = 0x02;

/// What one account has earned in a run up to the end of one committed round.
///
/// The reward is cumulative, so a claim pays what was earned less what was already claimed:
/// claiming twice, skipping rounds or claiming them out of order pays every reward exactly once.
#[derive(
    Clone, Debug, PartialEq, Eq, Encode, Decode, DecodeWithMemTracking, MaxEncodedLen, TypeInfo,
)]
pub struct RewardLeaf {
    /// The chain the leaf is for: the same run id on a fork or a test chain is another run.
    pub genesis_hash: [u8; 32],
    pub run: [u8; 32],
    /// The last round of the commit that carries this leaf.
    pub round: u32,
    /// The account to be paid: a worker's or a verifier's.
    pub worker: [u8; 32],
    /// Verified work units of the rounds this commit covers (not cumulative).
    pub work_units: u64,
    /// Planck earned in the run from its first round to `round`, faulted rounds excluded.
    pub cumulative_reward: u128,
    /// Digest of the evidence the reward rests on.
    pub evidence_digest: [u8; 32],
}

impl RewardLeaf {
    /// The bytes that are hashed into the leaf's node.
    pub fn pre_image(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(256);
        bytes.push(LEAF_TAG);
        bytes.extend_from_slice(LEAF_DOMAIN);
        self.encode_to(&mut bytes);
        bytes
    }

    pub fn hash(&self) -> LeafHash {
        blake2_256(&[&self.pre_image()])
    }
}

/// The root of a tree over `leaves` in the given order; of no leaves, the root of 32 zero bytes.
///
/// # Panics
/// With 2^32 leaves or more: no round has them, and the format cannot express them.
pub fn merkle_root(leaves: &[LeafHash]) -> LeafHash {
    let mut level = leaves.to_vec();
    while level.len() > 1 {
        level = parents(&level);
    }
    let top = level.first().copied().unwrap_or_default();
    bind_root(number_of(leaves), &top)
}

/// The siblings from the leaf at `leaf_index` to the top, lowest first; none if there is no such
/// leaf.
pub fn merkle_proof(leaves: &[LeafHash], leaf_index: u32) -> Option<Vec<LeafHash>> {
    let mut position = usize::try_from(leaf_index).ok()?;
    leaves.get(position)?;
    let mut siblings = Vec::new();
    let mut level = leaves.to_vec();
    while level.len() > 1 {
        if let Some(sibling) = level.get(position ^ 1) {
            siblings.push(*sibling);
        }
        level = parents(&level);
        position /= 2;
    }
    Some(siblings)
}

/// Whether `leaf` is at `leaf_index` in the tree of `number_of_leaves` leaves that has `root`.
///
/// Any input is safe: wrong lengths and indices beyond the tree are `false`.
pub fn verify_proof(
    root: &LeafHash,
    number_of_leaves: u32,
    leaf_index: u32,
    leaf: &LeafHash,
    siblings: &[LeafHash],
) -> bool {
    if leaf_index >= number_of_leaves {
        return false;
    }
    let mut siblings = siblings.iter();
    let mut node = *leaf;
    let mut position = leaf_index;
    let mut width = number_of_leaves;
    while width > 1 {
        let is_right = position & 1 == 1;
        let has_right_sibling = (position | 1) < width;
        if is_right || has_right_sibling {
            let Some(sibling) = siblings.next() else {
                return false;
            };
            node = if is_right { parent(sibling, &node) } else { parent(&node, sibling) };
        }
        position /= 2;
        width = width.div_ceil(2);
    }
    siblings.next().is_none() && bind_root(number_of_leaves, &node) == *root
}

fn parents(level: &[LeafHash]) -> Vec<LeafHash> {
    level
        .chunks(2)
        .map(|pair| match pair {
            [left, right] => parent(left, right),
            [unpaired] => *unpaired,
            _ => LeafHash::default(),
        })
        .collect()
}

fn parent(left: &LeafHash, right: &LeafHash) -> LeafHash {
    blake2_256(&[&[NODE_TAG], left, right])
}

fn bind_root(number_of_leaves: u32, top: &LeafHash) -> LeafHash {
    blake2_256(&[&[ROOT_TAG], &number_of_leaves.to_le_bytes(), top])
}

fn number_of(leaves: &[LeafHash]) -> u32 {
    let Ok(count) = u32::try_from(leaves.len()) else {
        panic!("expected fewer than 2^32 leaves, got {}", leaves.len());
    };
    count
}

fn blake2_256(parts: &[&[u8]]) -> LeafHash {
    let mut hasher = blake2b_simd::Params::new().hash_length(32).to_state();
    for part in parts {
        hasher.update(part);
    }
    let mut hash = LeafHash::default();
    hash.copy_from_slice(hasher.finalize().as_bytes());
    hash
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaf(index: u32) -> RewardLeaf {
        RewardLeaf {
            genesis_hash: [1; 32],
            run: [2; 32],
            round: 3,
            worker: [index as u8; 32],
            work_units: u64::from(index),
            cumulative_reward: u128::from(index) * 10,
            evidence_digest: [4; 32],
        }
    }

    fn hashes(count: u32) -> Vec<LeafHash> {
        (0..count).map(|index| leaf(index).hash()).collect()
    }

    #[test]
    fn the_encoding_is_pinned() {
        // tag 1, domain 23, then 32 + 32 + 4 + 32 + 8 + 16 + 32 bytes without any length prefix.
        let bytes = leaf(7).pre_image();
        assert_eq!(bytes.len(), 1 + 23 + 156);
        assert_eq!(bytes[0], 0);
        assert_eq!(&bytes[1..24], LEAF_DOMAIN);
        assert_eq!(&bytes[24 + 64..24 + 68], &[3, 0, 0, 0]);
    }

    #[test]
    fn every_leaf_of_every_small_tree_proves_itself_and_no_other() {
        for count in 1..=17 {
            let leaves = hashes(count);
            let root = merkle_root(&leaves);
            for index in 0..count {
                let proof = merkle_proof(&leaves, index).expect("the leaf exists");
                assert!(proof.len() <= PROOF_LENGTH_MAX as usize);
                for other in 0..count + 1 {
                    let claimed = leaf(other).hash();
                    let holds = verify_proof(&root, count, index, &claimed, &proof);
                    assert_eq!(holds, other == index, "{count} leaves, {index} as {other}");
                }
                assert!(!verify_proof(&root, count + 1, index, &leaves[index as usize], &proof));
            }
            assert!(merkle_proof(&leaves, count).is_none());
        }
    }

    #[test]
    fn an_inner_node_is_not_a_leaf() {
        let leaves = hashes(4);
        let root = merkle_root(&leaves);
        let left = parent(&leaves[0], &leaves[1]);
        let right = parent(&leaves[2], &leaves[3]);
        // The tree of the two inner nodes has the same top, yet another root.
        assert_ne!(merkle_root(&[left, right]), root);
        assert!(!verify_proof(&root, 2, 0, &left, &[right]));
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_refused(
            count in 1_u32..40, pick in any::<u32>(), byte in 0_usize..32, flip in 1_u8..=255,
            which in any::<prop::sample::Index>(),
        ) {
            let leaves = hashes(count);
            let root = merkle_root(&leaves);
            let index = pick % count;
            let mut proof = merkle_proof(&leaves, index).expect("the leaf exists");
            let mut claimed = leaves[index as usize];
            prop_assert!(verify_proof(&root, count, index, &claimed, &proof));
            let place = which.index(proof.len() + 1);
            match proof.get_mut(place) {
                Some(sibling) => sibling[byte] ^= flip,
                None => claimed[byte] ^= flip,
            }
            prop_assert!(!verify_proof(&root, count, index, &claimed, &proof));
        }

        #[test]
        fn arbitrary_proofs_never_panic(
            count in any::<u32>(), index in any::<u32>(),
            proof in prop::collection::vec(any::<[u8; 32]>(), 0..40),
        ) {
            prop_assert!(!verify_proof(&[0; 32], count, index, &[9; 32], &proof));
        }
    }
}
