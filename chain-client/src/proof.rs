//! Storage proofs: what the chain's state held, checked without trusting the node.
//!
//! The path is value → state root (a Merkle-Patricia proof) → header → block hash (BLAKE2b-256 of
//! the header's SCALE bytes). That the block is final is for the verifier to know: from a node of
//! its own, or from a hash it was given by somebody it trusts.

use codec::{Decode, Encode};
use manyhands_proto::Digest;
use sp_core::H256;
use sp_runtime::generic;
use sp_runtime::traits::BlakeTwo256;
use sp_state_machine::read_proof_check;
use sp_trie::StorageProof;

use crate::client::{ChainClient, ReadError, answer};

/// Nodes in one proof. A proof of a hundred keys needs fewer than a thousand.
const PROOF_NODES_MAX: usize = 65_536;

/// The full key of a storage entry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct StorageKey(pub Vec<u8>);

/// A header, and the nodes that lead from its state root to some values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadProof {
    /// SCALE of the header: the block's hash is the hash of these bytes.
    pub header: Vec<u8>,
    /// Trie nodes, in any order.
    pub nodes: Vec<Vec<u8>>,
}

/// The parts of a block's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeaderParts {
    pub number: u32,
    /// BLAKE2b-256 of the header's bytes.
    pub hash: Digest,
    pub parent: Digest,
    pub state_root: Digest,
    pub extrinsics_root: Digest,
}

/// Why a proof does not prove.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyProofError {
    #[error("the header's bytes are no block header")]
    Header,
    #[error("the header hashes to {got}, expected block {expected}")]
    OtherBlock { expected: Digest, got: Digest },
    #[error("expected at most {PROOF_NODES_MAX} proof nodes, got {got}")]
    TooManyNodes { got: usize },
    #[error("the nodes do not lead from the state root {state_root} to the value: {reason}")]
    Broken { state_root: Digest, reason: String },
}

/// Reads a header and hashes it.
fn read_header(bytes: &[u8]) -> Result<HeaderParts, VerifyProofError> {
    let mut rest = bytes;
    let header = generic::Header::<u32, BlakeTwo256>::decode(&mut rest)
        .map_err(|_| VerifyProofError::Header)?;
    // One header has one form: bytes that decode to it but are not it would have another hash.
    if header.encode() != bytes {
        return Err(VerifyProofError::Header);
    }
    Ok(HeaderParts {
        number: header.number,
        hash: Digest::new(sp_crypto_hashing::blake2_256(bytes)),
        parent: Digest::new(header.parent_hash.0),
        state_root: Digest::new(header.state_root.0),
        extrinsics_root: Digest::new(header.extrinsics_root.0),
    })
}

/// A value that a proof shows, or its proven absence.
pub type ProvenValue = Option<Vec<u8>>;

/// The values of `keys` under a state root, in the order of the keys; `None` where the proof shows
/// that there is no value.
fn verify_read_proof(
    state_root: &Digest,
    nodes: &[Vec<u8>],
    keys: &[StorageKey],
) -> Result<Vec<ProvenValue>, VerifyProofError> {
    if nodes.len() > PROOF_NODES_MAX {
        return Err(VerifyProofError::TooManyNodes { got: nodes.len() });
    }
    let broken = |failure: Box<dyn sp_state_machine::Error>| VerifyProofError::Broken {
        state_root: *state_root,
        reason: failure.to_string(),
    };
    let root = H256(*state_root.as_bytes());
    let proof = StorageProof::new(nodes.iter().cloned());
    let keys = keys.iter().map(|key| key.0.as_slice());
    let values = read_proof_check::<BlakeTwo256, _>(root, proof, keys.clone()).map_err(broken)?;
    Ok(keys.map(|key| values.get(key).cloned().flatten()).collect())
}

impl ReadProof {
    /// The values of `keys` after the block with this hash, in the order of the keys; `None` where
    /// the proof shows that there is no value. Asks nobody.
    pub fn verify(
        &self,
        block: &Digest,
        keys: &[StorageKey],
    ) -> Result<(HeaderParts, Vec<ProvenValue>), VerifyProofError> {
        let header = read_header(&self.header)?;
        if header.hash != *block {
            return Err(VerifyProofError::OtherBlock { expected: *block, got: header.hash });
        }
        let values = verify_read_proof(&header.state_root, &self.nodes, keys)?;
        Ok((header, values))
    }
}

impl ChainClient {
    /// Asks the node for a proof of `keys` after the block with the hash `at`. The answer proves
    /// nothing before [`ReadProof::verify`] accepts it.
    pub async fn read_proof(
        &self,
        keys: &[StorageKey],
        at: &Digest,
    ) -> Result<ReadProof, ReadError> {
        let block = subxt::config::substrate::H256(*at.as_bytes());
        let header = self.header(block).await?;
        let keys = keys.iter().map(|key| key.0.as_slice());
        let proof = answer(self.rpc().state_get_read_proof(keys, Some(block))).await?;
        let nodes = proof.proof.into_iter().map(|node| node.0).collect();
        Ok(ReadProof { header: header.encode(), nodes })
    }
}

#[cfg(test)]
mod tests {
    use manyhands_proto::{NodeId, Round, RunId};
    use sp_core::storage::{StateVersion, Storage};
    use sp_state_machine::{InMemoryBackend, prove_read};

    use super::*;

    const RUN: RunId = RunId::new([1; 32]);

    /// A block over a state of a few entries, and a proof of some of them.
    fn block() -> (Digest, Vec<StorageKey>, ReadProof) {
        let here = [StorageKey::run(&RUN), StorageKey::round(&RUN, Round(3))];
        let absent = StorageKey::claimed(&RUN, &NodeId::new([2; 32]));
        let mut storage = Storage::default();
        for (place, key) in here.iter().enumerate() {
            // Longer than 32 bytes: such values are nodes of their own.
            storage.top.insert(key.0.clone(), vec![place as u8; 300]);
        }
        for filler in 0..50 {
            storage.top.insert(vec![filler; 40], vec![filler; 20]);
        }
        let state = InMemoryBackend::<BlakeTwo256>::from((storage, StateVersion::V1));
        let header = generic::Header::<u32, BlakeTwo256> {
            parent_hash: H256::repeat_byte(7),
            number: 300,
            state_root: *state.root(),
            extrinsics_root: H256::repeat_byte(8),
            digest: sp_runtime::Digest::default(),
        };
        let keys = [here.to_vec(), vec![absent]].concat();
        let proof = prove_read(state, keys.iter().map(|key| &key.0)).expect("a whole state");
        let proof =
            ReadProof { header: header.encode(), nodes: proof.iter_nodes().cloned().collect() };
        (Digest::new(sp_runtime::traits::Header::hash(&header).0), keys, proof)
    }

    #[test]
    fn a_proof_gives_values_and_absences() {
        let (hash, keys, proof) = block();
        let (header, values) = proof.verify(&hash, &keys).expect("the proof holds");
        assert_eq!((header.number, header.parent), (300, Digest::new([7; 32])));
        assert_eq!(values, [Some(vec![0; 300]), Some(vec![1; 300]), None]);
        let twice = [keys[0].clone(), keys[0].clone()];
        let (_, values) = proof.verify(&hash, &twice).expect("asking twice is no harm");
        assert_eq!(values, [Some(vec![0; 300]), Some(vec![0; 300])]);
    }

    #[test]
    fn whatever_is_changed_the_proof_breaks() {
        let (hash, keys, proof) = block();
        for place in 0..proof.header.len() {
            let mut forged = proof.clone();
            forged.header[place] ^= 1;
            assert!(forged.verify(&hash, &keys).is_err(), "byte {place} of the header");
        }
        for node in 0..proof.nodes.len() {
            let mut left_out = proof.clone();
            left_out.nodes.remove(node);
            assert!(left_out.verify(&hash, &keys).is_err(), "without node {node}");
            for place in 0..proof.nodes[node].len() {
                let mut forged = proof.clone();
                forged.nodes[node][place] ^= 0x10;
                assert!(forged.verify(&hash, &keys).is_err(), "byte {place} of node {node}");
            }
        }
        let mut longer = proof.clone();
        longer.header.push(0);
        assert_eq!(longer.verify(&hash, &keys), Err(VerifyProofError::Header));
    }

    #[test]
    fn rubbish_never_panics() {
        let empty = ReadProof { header: Vec::new(), nodes: Vec::new() };
        assert_eq!(empty.verify(&Digest::new([0; 32]), &[]), Err(VerifyProofError::Header));
        let root = Digest::new([5; 32]);
        let key = StorageKey(vec![1, 2, 3]);
        for nodes in [vec![], vec![vec![]], vec![vec![0xff; 1_000]], vec![vec![0]; 100]] {
            assert!(verify_read_proof(&root, &nodes, std::slice::from_ref(&key)).is_err());
        }
        let many = vec![Vec::new(); PROOF_NODES_MAX + 1];
        let refusal = verify_read_proof(&root, &many, &[key]);
        assert_eq!(refusal, Err(VerifyProofError::TooManyNodes { got: many.len() }));
    }
}
