//! The coordinator's service with real peers on loopback: whole runs, a kill in the middle, cheats and
//! nonsense.

mod page;
mod peer;
mod refusals;
mod restart;
mod runs;
mod world;
