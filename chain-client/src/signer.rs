//! A node's key as a Substrate account.

use manyhands_proto::NodeId;
use manyhands_proto::keys::NodeKey;
use subxt::config::substrate::{AccountId32, MultiSignature, SubstrateConfig};
use subxt::transactions::Signer;

pub(crate) struct NodeSigner<'a>(pub(crate) &'a NodeKey);

impl Signer<SubstrateConfig> for NodeSigner<'_> {
    fn account_id(&self) -> AccountId32 {
        account(&self.0.node_id())
    }

    fn sign(&self, payload: &[u8]) -> MultiSignature {
        MultiSignature::Ed25519(self.0.sign(payload))
    }
}

/// A node's account is its public key.
pub(crate) fn account(node: &NodeId) -> AccountId32 {
    AccountId32(*node.as_bytes())
}

pub(crate) fn node(account: &AccountId32) -> NodeId {
    NodeId::new(account.0)
}

#[cfg(test)]
mod tests {
    use manyhands_proto::keys::verify;

    use super::*;

    #[test]
    fn the_account_is_the_public_key_and_signs_as_the_node_does() {
        let key = NodeKey::from_seed([3; 32]);
        let signer = NodeSigner(&key);
        assert_eq!(node(&signer.account_id()), key.node_id());
        let MultiSignature::Ed25519(signature) = signer.sign(b"payload") else {
            panic!("expected an ed25519 signature");
        };
        assert!(verify(&key.node_id(), b"payload", &signature));
    }
}
