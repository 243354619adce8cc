//! All that the journal reproduces: the machine, and where its members can be reached.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use manyhands_proto::message::{Reply, Request};
use manyhands_proto::{NodeId, Tick};
use manyhands_rules::coordinator::{Coordinator, Input};
use serde::{Deserialize, Serialize};

/// Changes only by [`State::handle`], so that journalled inputs give the same value again.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) machine: Coordinator,
    /// Data-plane addresses, as members gave them when they joined.
    addresses: BTreeMap<NodeId, Vec<SocketAddr>>,
}

impl State {
    pub(crate) fn new(machine: Coordinator) -> Self {
        Self { machine, addresses: BTreeMap::new() }
    }

    pub(crate) fn handle(&mut self, now: Tick, input: Input) -> Option<Reply> {
        let joining = joining(&input);
        let reply = self.machine.handle(now, input);
        if let (Some((node, addresses)), Some(Reply::Situation(_))) = (joining, &reply) {
            self.addresses.insert(node, addresses);
        }
        reply
    }

    pub(crate) fn addresses(&self, node: NodeId) -> Vec<SocketAddr> {
        self.addresses.get(&node).cloned().unwrap_or_default()
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data with string keys serialises")
    }
}

/// A message that may add a member, with everything that is known of where it is.
fn joining(input: &Input) -> Option<(NodeId, Vec<SocketAddr>)> {
    let Input::Message { from, request: Request::Join(join), facts, .. } = input else {
        return None;
    };
    let mut addresses = join.addresses.clone();
    addresses.extend(facts.observed.iter().filter(|observed| !join.addresses.contains(observed)));
    Some((*from, addresses))
}
