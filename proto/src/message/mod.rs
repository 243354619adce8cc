//! The message door: what peers send each other, sealed and signed.
//!
//! The domain types say what a message means; `convert` parses the generated wire types into them
//! once and refuses whatever is outside [`limits`]; `envelope` signs and opens.

mod class;
mod commitment;
mod convert;
mod envelope;
mod evidence;
pub mod limits;
mod replayed;
#[cfg(test)]
mod tests;
mod types;

pub use class::{DeviceKind, NumericClass};
pub use commitment::SignedCommitment;
pub use convert::MessageError;
pub use envelope::{
    Announcement, Heading, OpenError, SealError, Signed, open_announcement, open_reply,
    open_request, request_digest, seal_announcement, seal_reply, seal_request,
};
pub use evidence::{
    OpenedEnd, OpenedEnds, OpenedStates, ParseEvidenceError, ReplayEvidence, UpdateEvidence, Work,
    WorkError,
};
pub use replayed::{EndState, ReplayEnd, Replayed, SignedReplay};
pub use types::*;

/// Generated from `wire.proto`. Only this module's conversions see it.
#[expect(unreachable_pub, reason = "the generator makes everything public")]
mod wire {
    include!(concat!(env!("OUT_DIR"), "/manyhands.v1.rs"));
}
