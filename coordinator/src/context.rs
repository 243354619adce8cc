//! What every effect works with, and what it tells the people who watch.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use manyhands_chain_client::{BlockRef, ChainClient};
use manyhands_gradient::Layout;
use manyhands_gradient::codec::payload_bytes_max;
use manyhands_network::data::{DataHandle, Source};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, RunId};
use serde::Serialize;

use crate::store::RunStore;

/// Chain blocks that the page lists.
const BLOCKS_MAX: usize = 12;

/// Shared by all effects of a service.
pub(crate) struct Context {
    pub(crate) key: NodeKey,
    pub(crate) run: RunId,
    pub(crate) spec: RunSpec,
    pub(crate) layout: Layout,
    pub(crate) store: std::sync::Arc<RunStore>,
    pub(crate) data: DataHandle,
    pub(crate) whereabouts: Whereabouts,
    /// None: the run settles on no chain.
    pub(crate) chain: Option<ChainClient>,
    /// Where records are written.
    pub(crate) records: PathBuf,
    pub(crate) notes: Notes,
}

impl Context {
    /// Bytes of θ and of every other canonical vector.
    pub(crate) fn vector_bytes(&self) -> u64 {
        self.layout.vector_len() as u64 * 4
    }

    pub(crate) fn payload_bytes_max(&self) -> u64 {
        payload_bytes_max(&self.layout, self.spec.codec.profile) as u64
    }
}

/// Where members were last: an effect that goes on while a member moves finds it again.
#[derive(Debug, Default)]
pub(crate) struct Whereabouts(Mutex<BTreeMap<NodeId, Vec<SocketAddr>>>);

impl Whereabouts {
    pub(crate) fn set(&self, node: NodeId, addresses: Vec<SocketAddr>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(node, addresses);
    }

    pub(crate) fn of(&self, node: NodeId) -> Source {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Source { peer: node, addresses: known.get(&node).cloned().unwrap_or_default() }
    }
}

/// A finalised block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SeenBlock {
    pub number: u32,
    pub hash: Digest,
}

/// What is going on outside the machine: the chain's newest blocks, and what does not work now.
#[derive(Debug, Default)]
pub(crate) struct Notes(Mutex<Noted>);

#[derive(Debug, Default)]
struct Noted {
    blocks: VecDeque<SeenBlock>,
    /// What is being tried again, and why it did not work.
    problems: BTreeMap<String, String>,
}

impl Notes {
    /// Says that `what` does not work and is tried again.
    pub(crate) fn report(&self, what: &str, problem: String) {
        self.lock().problems.insert(what.to_owned(), problem);
    }

    pub(crate) fn clear(&self, what: &str) {
        self.lock().problems.remove(what);
    }

    pub(crate) fn problems(&self) -> BTreeMap<String, String> {
        self.lock().problems.clone()
    }

    pub(crate) fn saw(&self, block: BlockRef) {
        let mut noted = self.lock();
        noted.blocks.push_back(SeenBlock { number: block.number, hash: block.hash });
        while noted.blocks.len() > BLOCKS_MAX {
            noted.blocks.pop_front();
        }
    }

    /// Oldest first.
    pub(crate) fn blocks(&self) -> Vec<SeenBlock> {
        self.lock().blocks.iter().copied().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
