//! The crate's promises, from outside: bits that never change, orders that never matter, and bytes
//! from strangers.

mod aggregate;
mod codec;
mod golden;
mod layout;
mod moments;
mod support;
