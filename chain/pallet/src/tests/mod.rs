//! Stories about one chain; every one ends with all invariants checked.

mod claims;
mod faults;
mod migrations;
mod properties;
mod rounds;
mod runs;
mod verdicts;
mod workers;
