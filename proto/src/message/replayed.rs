//! What a verifier stands for with its signature, and anybody can check later: where its repetition of a
//! worker's round ended.

use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::wire;
use crate::keys::{self, NodeKey};
use crate::{Digest, NodeId, Round, RunId};

const SIGNED_CONTEXT: &str = "manyhands 2026 signed replay";

/// A worker's round, and where it ended when it was repeated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replayed {
    pub round: Round,
    pub worker: NodeId,
    /// [`super::Assignment::digest`]: what was repeated.
    pub assignment: Digest,
    pub end: ReplayEnd,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "detail")]
pub enum ReplayEnd {
    At(EndState),
    /// Training that began with the worker's own moments led to what is no number.
    Nowhere,
    /// The worker did not open the moments that it began with, or opened something else.
    Withheld(String),
}

/// Digests of an end state, as a [`super::Commitment`] has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndState {
    /// θ_H, f32 canonical vector.
    pub theta: Digest,
    /// m_H and v_H, rounded to 8 bits, as one blob.
    pub moments: Digest,
}

/// [`Replayed`] under its verifier's signature.
///
/// One that was opened from a request has been verified; one from elsewhere (a file, the journal)
/// holds only after [`Self::verify`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedReplay {
    pub replayed: Replayed,
    pub run: RunId,
    pub verifier: NodeId,
    /// ed25519, by `verifier`.
    #[serde(with = "hex::serde")]
    pub signature: [u8; 64],
}

impl SignedReplay {
    pub fn sign(key: &NodeKey, run: RunId, replayed: Replayed) -> Self {
        let verifier = key.node_id();
        let signature = key.sign(&preimage(run, verifier, &replayed));
        Self { replayed, run, verifier, signature }
    }

    /// Whether the signature is the verifier's over this end in this run.
    pub fn verify(&self) -> bool {
        keys::verify(
            &self.verifier,
            &preimage(self.run, self.verifier, &self.replayed),
            &self.signature,
        )
    }
}

/// Context, a zero byte, run, verifier, the wire bytes: all but the last have one length. The protocol's
/// version is left out, so that a later one can still check it.
fn preimage(run: RunId, verifier: NodeId, replayed: &Replayed) -> Vec<u8> {
    let mut preimage = SIGNED_CONTEXT.as_bytes().to_vec();
    preimage.push(0);
    preimage.extend_from_slice(run.as_bytes());
    preimage.extend_from_slice(verifier.as_bytes());
    preimage.extend_from_slice(&wire::Replayed::from(replayed).encode_to_vec());
    preimage
}
