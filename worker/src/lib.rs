//! The service of a worker or a verifier: drives the worker's machine against network, disk, chain
//! and device.
//!
//! What to do is decided in `rules`; this crate knows how. It trains through the
//! [`manyhands_model::Trainer`] it is given, so whoever wants another trainer brings one.

mod chain;
mod context;
mod data;
mod disk;
mod disputes;
mod introduce;
mod metrics;
mod service;
mod sync;
mod train;
mod verify;

pub use chain::{EnrolError, Enrolment, enrol};
pub use context::{Trainers, WorkerConfig, WorkerEvent};
pub use disk::{DiskError, WorkerDisk};
pub use service::{RunWorkerError, run};
