//! The coordinator's service: drives the machine of `manyhands-rules` against network, journal, chain and
//! clock, and shows what it does on a live page.
//!
//! [`launch::launch`] makes a run, [`service::start`] coordinates it. The machine decides; the shell
//! around it chooses how, never whether. It knows no model: what needs one is a task of a verifier.

pub mod addresses;
mod chain_watch;
mod clock;
mod context;
mod door;
mod driver;
mod effects;
mod files;
pub mod journal;
pub mod launch;
pub mod metrics;
mod page;
mod retry;
mod runner;
pub mod service;
mod state;
pub mod store;
#[cfg(test)]
mod test_run;

pub use context::SeenBlock;
pub use driver::RunError;
pub use effects::EffectError;
pub use effects::settle::{
    RecordFileError, read_record, record_path, reward_leaves, round_commitment,
};
pub use launch::{LaunchError, LaunchOrder, Launched, RunManifest, launch};
pub use page::{ChainStatus, LiveStatus, PageError};
pub use service::{Completed, CoordinatorConfig, Handle, StartError, WaitError, start};
