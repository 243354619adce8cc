//! The only place where bytes become meaning: ids, units, digests, the run file,
//! signed messages, and the leaf encoding that the pallet and the auditor share.
//!
//! Everything but [`leaf`] needs `std`; the pallet uses this crate without it.

#![cfg_attr(not(feature = "std"), no_std)]

pub mod leaf;

#[cfg(feature = "std")]
pub mod ids;
#[cfg(feature = "std")]
pub mod keys;
#[cfg(feature = "std")]
pub mod message;
#[cfg(feature = "std")]
pub mod run_file;
#[cfg(feature = "std")]
pub mod tree;
#[cfg(feature = "std")]
pub mod units;

#[cfg(feature = "std")]
pub use ids::{Digest, NodeId, RunId};
#[cfg(feature = "std")]
pub use message::PROTOCOL_VERSION;
#[cfg(feature = "std")]
pub use units::{Balance, ChunkIndex, ParameterCount, Round, Tick, TokenCount, WorkUnits};
