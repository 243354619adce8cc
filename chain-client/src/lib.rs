//! A client of the chain: submit, watch, read and prove, in this project's own types.
//!
//! Works with the embedded devnet and with any Substrate node that runs the same runtime. A
//! submission takes effect exactly once, however often the connection breaks; every wait has a
//! limit.

mod blocks;
mod calls;
mod client;
mod disputes;
mod events;
mod faucet;
mod metrics;
mod proof;
mod signer;
mod state;
mod submit;
mod terms;
pub mod types;

pub use blocks::FinalizedBlocks;
pub use calls::{ProvenLeaf, WorkerCard};
pub use client::{BlockRef, ChainClient, ConnectError, ReadError};
pub use disputes::{Accusation, Dispute};
pub use events::TrainingEvent;
pub use faucet::FaucetError;
pub use proof::{HeaderParts, ProvenValue, ReadProof, StorageKey, VerifyProofError};
pub use state::{AccountBalance, ChainState};
pub use submit::{Submission, SubmitError};
pub use terms::{RunMismatch, TermDifference};

// The macro below reads it behind cargo's back: a new file is a new build.
const _: &[u8] = include_bytes!("../metadata.scale");

/// The runtime's interface as its metadata tells it; a node with another runtime is refused when
/// connecting. The runtime's example `dump_metadata` writes the file anew when it changes.
#[subxt::subxt(
    runtime_metadata_path = "metadata.scale",
    derive_for_type(
        path = "manyhands_chain_pallet::types::Run",
        derive = "subxt::ext::codec::Decode",
        recursive
    ),
    derive_for_type(
        path = "manyhands_chain_pallet::types::RoundRecord",
        derive = "subxt::ext::codec::Decode",
        recursive
    ),
    derive_for_type(
        path = "manyhands_chain_pallet::types::Anchor",
        derive = "subxt::ext::codec::Decode",
        recursive
    ),
    derive_for_type(
        path = "manyhands_chain_pallet::types::Fault",
        derive = "subxt::ext::codec::Decode",
        recursive
    ),
    derive_for_type(
        path = "manyhands_chain_pallet::types::VerifierFault",
        derive = "subxt::ext::codec::Decode",
        recursive
    ),
    derive_for_type(
        path = "manyhands_chain_pallet::types::Stage",
        derive = "subxt::ext::codec::Encode"
    )
)]
mod chain {}
