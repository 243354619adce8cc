//! The one message that outlives its exchange: a worker's signed commitment, which anybody can
//! check later against the round's commit set.

use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::{Assignment, CommitSet, Commitment, wire};
use crate::keys::{self, NodeKey};
use crate::{Digest, NodeId, RunId};

const SIGNED_CONTEXT: &str = "manyhands 2026 signed commitment";
const COMMIT_SET_CONTEXT: &str = "manyhands 2026 commit set";

/// A [`Commitment`] under its worker's signature.
///
/// One that was opened from a request has been verified; one from elsewhere (a file, the journal)
/// holds only after [`Self::verify`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SignedCommitment {
    pub commitment: Commitment,
    pub run: RunId,
    pub worker: NodeId,
    /// ed25519, by `worker`.
    #[serde(with = "hex::serde")]
    pub signature: [u8; 64],
}

impl SignedCommitment {
    pub fn sign(key: &NodeKey, run: RunId, commitment: Commitment) -> Self {
        let worker = key.node_id();
        let signature = key.sign(&preimage(run, worker, &commitment));
        Self { commitment, run, worker, signature }
    }

    /// Whether the signature is the worker's over this commitment in this run.
    pub fn verify(&self) -> bool {
        let preimage = preimage(self.run, self.worker, &self.commitment);
        keys::verify(&self.worker, &preimage, &self.signature)
    }

    /// [`Commitment::digest_of`] its worker.
    pub fn digest(&self) -> Digest {
        self.commitment.digest_of(self.run, self.worker)
    }
}

impl Commitment {
    /// What a commit set and a later assignment refer to: binds run, round, worker and every field, but not the
    /// signature, which a worker could make in more than one way.
    pub fn digest_of(&self, run: RunId, worker: NodeId) -> Digest {
        Digest::derive(SIGNED_CONTEXT, &preimage(run, worker, self))
    }
}

impl Assignment {
    /// Binds all that the round's work follows from: not the time that is left for it.
    pub fn digest(&self) -> Digest {
        let untimed = wire::Assignment { commit_deadline_ms: 0, ..self.into() };
        Digest::derive("manyhands 2026 assignment", &untimed.encode_to_vec())
    }
}

impl CommitSet {
    pub fn digest(&self) -> Digest {
        Digest::derive(COMMIT_SET_CONTEXT, &wire::CommitSet::from(self).encode_to_vec())
    }
}

/// Context, a zero byte, run, round (4 bytes, little-endian), worker, the commitment's wire bytes:
/// all but the last have one length. The protocol's version is left out, so that a later one can
/// still check it.
fn preimage(run: RunId, worker: NodeId, commitment: &Commitment) -> Vec<u8> {
    let mut preimage = SIGNED_CONTEXT.as_bytes().to_vec();
    preimage.push(0);
    preimage.extend_from_slice(run.as_bytes());
    preimage.extend_from_slice(&commitment.round.0.to_le_bytes());
    preimage.extend_from_slice(worker.as_bytes());
    preimage.extend_from_slice(&wire::Commitment::from(commitment).encode_to_vec());
    preimage
}
