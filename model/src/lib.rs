//! The only crate that links libtorch: the transformer, its inner optimiser, data loading, evaluation,
//! generation, and folders of Hugging Face `transformers`.
//!
//! θ enters and leaves as the canonical vector of [`manyhands_gradient::Layout`], the same bits on both
//! sides. Nothing here knows about peers, rounds or the chain; the worker and the verifier know this
//! crate by [`Trainer`], [`evaluate()`] and [`data`].

pub mod calibration;
pub mod data;
pub mod determinism;
pub mod device;
pub mod hugging_face;

mod batch;
mod evaluate;
mod fingerprint;
mod generate;
mod metrics;
mod optimizer;
mod parameters;
mod schedule;
mod torch;
mod trainer;
mod transformer;

pub use evaluate::{EvaluateError, EvaluateTask, Evaluation, evaluate};
pub use fingerprint::run_fingerprint;
pub use generate::{GenerateError, GenerateOptions, generate};
pub use schedule::learning_rate;
pub use torch::TorchError;
pub use trainer::{
    Control, LocalTrainer, Progress, TrainError, TrainOutcome, TrainTask, Trainer, UnroundedOutcome,
};
pub use transformer::Transformer;

/// A device that libtorch computes on.
pub use tch::Device;
