//! What the crate promises, told as stories on models small enough for two slow cores.

mod data;
mod exchange;
mod replay;
mod support;
mod training;
