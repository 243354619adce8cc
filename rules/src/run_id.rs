//! How a run is named.

use manyhands_proto::{Digest, NodeId, RunId};

/// The id of the run that `owner` makes of a specification on the chain with that genesis hash (all
/// zeros for no chain). Whoever has the id can check the specification that it is given.
pub fn run_id(chain_genesis: [u8; 32], owner: NodeId, spec: Digest) -> RunId {
    let mut material = chain_genesis.to_vec();
    material.extend_from_slice(owner.as_bytes());
    material.extend_from_slice(spec.as_bytes());
    RunId::new(*Digest::derive("manyhands 2026 run id", &material).as_bytes())
}
