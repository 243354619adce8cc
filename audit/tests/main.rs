//! Small runs whose every link is real but for the training, audited whole and with something changed.

mod chain;
mod stories;
mod tampering;
mod world;
