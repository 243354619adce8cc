//! Between wire and domain. Every list is counted, every number bounded and every name checked
//! here, so that nobody behind the door does it again.

mod field;
mod reply;
mod request;
mod shared;
mod task;

pub(super) use field::{digest, node, round, run, signature};

/// Why a decoded message was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("{field}: expected one, got none")]
    Missing { field: &'static str },
    #[error("{field}: expected {expected} bytes, got {got}")]
    Length { field: &'static str, expected: usize, got: usize },
    #[error("{field}: expected at most {max}, got {got}")]
    TooMany { field: &'static str, max: u64, got: u64 },
    #[error("{field}: expected {expected}, got {got}")]
    Value { field: &'static str, expected: &'static str, got: String },
    #[error("{field}: expected strictly ascending entries, got otherwise at entry {index}")]
    Order { field: &'static str, index: usize },
}
