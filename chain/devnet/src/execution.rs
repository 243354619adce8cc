//! The runtime as a native function over a state: nothing here knows of blocks or clients.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use codec::{Decode, Encode};
use manyhands_chain_runtime::api;
use sp_core::H256;
use sp_core::storage::StateVersion;
use sp_runtime::generic;
use sp_runtime::traits::BlakeTwo256;
use sp_state_machine::{Ext, OverlayedChanges, Storage, TrieBackend, TrieBackendBuilder};

pub(crate) type Hashing = BlakeTwo256;
pub(crate) type Header = generic::Header<u32, Hashing>;
/// The storage under one state root.
pub(crate) type State = TrieBackend<Arc<dyn Storage<Hashing>>, Hashing>;

/// Values over 32 bytes are nodes of their own.
pub(crate) const STATE_VERSION: StateVersion = StateVersion::V1;

/// A node of a state trie.
pub(crate) struct TrieNode {
    pub(crate) hash: H256,
    pub(crate) bytes: Vec<u8>,
}

/// Why a call into the runtime gave no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("the runtime has no entry point {method:?}")]
    UnknownMethod { method: String },
    #[error("the runtime panicked in {method}: {message}")]
    Panicked { method: String, message: String },
    #[error("the result of {method} does not decode")]
    Undecodable { method: String },
}

pub(crate) fn state_at(nodes: Arc<dyn Storage<Hashing>>, root: H256) -> State {
    TrieBackendBuilder::new(nodes, root).build()
}

/// What was done to a state, and not yet written anywhere.
pub(crate) struct StateChange {
    pub(crate) root: H256,
    pub(crate) nodes: Vec<TrieNode>,
}

/// A sequence of runtime calls over one state, each seeing what the ones before it wrote.
pub(crate) struct Execution<'a> {
    state: &'a State,
    overlay: OverlayedChanges<Hashing>,
}

impl<'a> Execution<'a> {
    pub(crate) fn new(state: &'a State) -> Self {
        Self { state, overlay: OverlayedChanges::default() }
    }

    /// Calls the runtime's entry point `method` with SCALE arguments; gives the SCALE result.
    /// A panic in the runtime is an error like another, but what the call wrote before it stays:
    /// use [`Self::attempt`] where that matters.
    pub(crate) fn call(&mut self, method: &str, arguments: &[u8]) -> Result<Vec<u8>, CallError> {
        self.overlay.enter_runtime().expect("calls do not nest: `self` is borrowed");
        let result = {
            let mut externalities = Ext::new(&mut self.overlay, self.state, None);
            catch_unwind(AssertUnwindSafe(|| {
                sp_externalities::set_and_run_with_externalities(&mut externalities, || {
                    api::dispatch(method, arguments)
                })
            }))
        };
        // A panic leaves storage transactions open; this rolls them back.
        self.overlay.exit_runtime().expect("entered above");
        match result {
            Ok(Some(output)) => Ok(output),
            Ok(None) => Err(CallError::UnknownMethod { method: method.chars().take(80).collect() }),
            Err(panic) => Err(CallError::Panicked {
                method: method.to_owned(),
                message: panic_message(panic.as_ref()),
            }),
        }
    }

    /// [`Self::call`] with the arguments encoded and the result decoded.
    pub(crate) fn typed<T: Decode>(
        &mut self,
        method: &str,
        arguments: &impl Encode,
    ) -> Result<T, CallError> {
        decode_result(method, &self.call(method, &arguments.encode())?)
    }

    /// Calls, and keeps what the call wrote only if `keep` says so of its result.
    pub(crate) fn attempt<T: Decode>(
        &mut self,
        method: &str,
        arguments: &[u8],
        keep: impl FnOnce(&T) -> bool,
    ) -> Result<T, CallError> {
        self.overlay.start_transaction();
        let result = self.call(method, arguments).and_then(|bytes| decode_result(method, &bytes));
        let closed = match &result {
            Ok(value) if keep(value) => self.overlay.commit_transaction(),
            Ok(_) | Err(_) => self.overlay.rollback_transaction(),
        };
        closed.expect("opened above, and `exit_runtime` closes only the runtime's own");
        result
    }

    /// The state root with everything written so far, and the nodes that it adds.
    pub(crate) fn finish(mut self) -> StateChange {
        let mut changes = self
            .overlay
            .drain_storage_changes(self.state, STATE_VERSION)
            .expect("draining an overlay cannot fail: its error type has no cause");
        let nodes = changes
            .transaction
            .drain()
            .into_iter()
            // Negative counts are removals; an old root needs its nodes, so none is removed.
            .filter(|(_, (_, references))| *references > 0)
            // The key is the node's place in the trie followed by its hash.
            .map(|(key, (bytes, _))| TrieNode {
                hash: H256::from_slice(&key[key.len() - 32..]),
                bytes,
            })
            .collect();
        StateChange { root: changes.transaction_storage_root, nodes }
    }
}

fn decode_result<T: Decode>(method: &str, mut bytes: &[u8]) -> Result<T, CallError> {
    T::decode(&mut bytes).map_err(|_| CallError::Undecodable { method: method.to_owned() })
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "no message".to_owned()
    }
}
