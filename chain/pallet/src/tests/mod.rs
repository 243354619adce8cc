//! Stories about one chain; every one ends with all invariants checked.

mod claims;
mod faults;
mod properties;
mod rounds;
mod runs;
mod workers;
