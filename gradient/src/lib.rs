//! Parameter layout, initial θ, update codec, error feedback, robust aggregation, outer step: pure and
//! bit-exact.
//!
//! Everything here gives the same bits on every machine, for any number of threads and any order of
//! arrival: f32 and f64 + − × ÷ √ in a stated order, no fused multiply-add, no transcendentals, and
//! reductions in integers. There is no clock, file, network, torch or ambient randomness.

pub mod aggregate;
mod bits;
pub mod codec;
mod energy;
pub mod error_feedback;
mod ieee;
mod initial;
pub mod layout;
pub mod moments8;
mod outer;
pub mod replay;
pub mod vector;

pub use energy::chunk_energies;
pub use ieee::assert_ieee;
pub use initial::initial_theta;
pub use layout::{CHUNK, Layout};
pub use outer::{
    Admitted, AggregateError, BroadcastSlice, Merged, OuterState, OuterStep, Revoked, merge,
    outer_learning_rate,
};
