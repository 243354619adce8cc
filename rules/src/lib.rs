//! What all parties must agree on, and the two machines that act on it.
//!
//! The functions of [`sampling`], [`assignment`], [`draw`], [`credibility`] and [`reward`] are what
//! an auditor recomputes. The machines ([`coordinator::Coordinator`], [`worker::Worker`]) are values:
//! an input changes them, what they want done is read off them, time is an argument. There is no
//! clock, file, network, thread or randomness in this crate.

pub mod assignment;
pub mod coordinator;
pub mod credibility;
pub mod draw;
pub mod economics;
pub mod evidence;
pub mod panel;
pub mod quarantine;
pub mod record;
pub mod requirements;
pub mod reward;
pub mod run_id;
pub mod sampling;
pub mod update_evidence;
pub mod worker;
