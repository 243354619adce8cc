//! One key, three names: the node id (ed25519 public key), the libp2p peer id that encodes it, and
//! the key pair that both planes prove.

use libp2p::PeerId;
use libp2p::identity::Keypair;
use manyhands_proto::NodeId;
use manyhands_proto::keys::NodeKey;

/// How every peer id of an ed25519 key begins: identity multihash (`00`) of 36 bytes (`24`) that
/// are a protobuf public key of type 1, ed25519 (`08 01`), with 32 bytes of data (`12 20`).
/// Source: the libp2p specification of peer ids.
const ED25519_PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

/// A peer id that is not a manyhands node's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected the peer id of an ed25519 key, got {got}")]
pub struct NotANode {
    got: PeerId,
}

/// The libp2p name of a node.
pub fn peer_id(node: &NodeId) -> PeerId {
    let mut bytes = [0; 38];
    bytes[..6].copy_from_slice(&ED25519_PREFIX);
    bytes[6..].copy_from_slice(node.as_bytes());
    PeerId::from_bytes(&bytes).expect("an identity multihash of 36 bytes is a valid peer id")
}

/// The node behind a libp2p name.
///
/// # Errors
/// [`NotANode`] for keys of another kind (RSA, secp256k1, ECDSA).
pub fn node_id(peer: &PeerId) -> Result<NodeId, NotANode> {
    peer.to_bytes()
        .strip_prefix(&ED25519_PREFIX)
        .and_then(|key| NodeId::try_from(key).ok())
        .ok_or(NotANode { got: *peer })
}

pub(crate) fn keypair(key: &NodeKey) -> Keypair {
    Keypair::ed25519_from_bytes(key.seed()).expect("any 32 bytes are an ed25519 seed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_keeps_its_identity_under_libp2p() {
        let key = NodeKey::from_seed([3; 32]);
        let peer = keypair(&key).public().to_peer_id();
        assert_eq!(peer_id(&key.node_id()), peer);
        assert_eq!(node_id(&peer), Ok(key.node_id()));
    }

    #[test]
    fn a_peer_with_another_kind_of_key_is_no_node() {
        // A SHA-256 multihash: what keys of more than 42 bytes (RSA, ECDSA) are named by.
        let mut bytes = [7; 34];
        bytes[..2].copy_from_slice(&[0x12, 0x20]);
        let peer = PeerId::from_bytes(&bytes).expect("a sha-256 peer id");
        assert_eq!(node_id(&peer), Err(NotANode { got: peer }));
    }
}
