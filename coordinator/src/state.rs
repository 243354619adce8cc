//! All that the journal reproduces.

use manyhands_proto::Tick;
use manyhands_proto::message::Reply;
use manyhands_rules::coordinator::{Coordinator, Input};
use serde::{Deserialize, Serialize};

/// Changes only by [`State::handle`], so that journalled inputs give the same value again.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) machine: Coordinator,
}

impl State {
    pub(crate) fn new(machine: Coordinator) -> Self {
        Self { machine }
    }

    pub(crate) fn handle(&mut self, now: Tick, input: Input) -> Option<Reply> {
        self.machine.handle(now, input)
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data with string keys serialises")
    }
}
