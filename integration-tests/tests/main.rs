//! The parts together, on loopback.

mod chain;
mod processes;
