//! Runs of many workers in virtual time, on one thread, from one seed.
//!
//! The machines are the real ones of `rules`; what surrounds them (links that delay and lose messages,
//! devices of different speed, disks that survive a crash, a chain, adversaries) is made here. The
//! same seed gives the same journal, byte for byte.
//!
//! ```
//! use manyhands_simulation::{Adversary, Simulation};
//!
//! let outcome = Simulation::new(7).workers(4).adversary(Adversary::SkipsSteps).rounds(3).run();
//! assert_eq!(outcome.rounds_merged(), 3);
//! assert_eq!(outcome.slashed().len(), 1);
//! ```

pub mod forgery;
mod node;
mod outcome;
mod scenario;
mod world;

pub use outcome::Outcome;
pub use scenario::{Adversary, Simulation};
