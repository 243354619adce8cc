//! The most of everything that a message may hold. What exceeds them is refused at the door.
//!
//! An envelope's size is checked before anything is decoded, and a body is decoded only after its
//! signature held, so a stranger can spend at most [`REQUEST_BYTES_MAX`], and with a key of its
//! own some tens of times that, of a coordinator's memory at a time; a reply is decoded only when
//! it is from the one coordinator that was asked.

/// A whole sealed request. The largest that means anything has 48 KiB.
pub const REQUEST_BYTES_MAX: usize = 1 << 16;
/// A whole sealed reply: room for a commit set of 65,536 entries of 70 bytes.
pub const REPLY_BYTES_MAX: usize = 5 << 20;
pub const ANNOUNCEMENT_BYTES_MAX: usize = 1 << 10;

pub const SPEC_BYTES_MAX: usize = 1 << 20;
pub const STATUS_BYTES_MAX: usize = 4 << 20;

pub const ADDRESSES_MAX: usize = 16;
/// An IPv6 address in brackets with scope and port takes at most 58.
pub const ADDRESS_BYTES_MAX: usize = 64;
/// Of each name in a numeric class.
pub const NAME_BYTES_MAX: usize = 128;
/// Longer explanations are cut when they are sealed.
pub const REASON_BYTES_MAX: usize = 1_024;

/// Rounds whose state a joining node still has: as many as it keeps.
pub const HEAD_ROUNDS_MAX: usize = 20;

pub const COMMIT_SET_ENTRIES_MAX: usize = 65_536;
pub const SOURCES_MAX: usize = 64;
pub const TASKS_MAX: usize = 1_024;
/// Updates whose effect on held-out loss a verifier measures in a round: an answer of at most 47 bytes each
/// fits a request.
pub const WEIGHED_MAX: usize = 1_024;
pub const VERIFIERS_MAX: usize = 64;
/// Training sequences that an assignment may leave out.
pub const QUARANTINED_MAX: usize = 256;

/// α: far above what training wants, and small enough that no merge overflows.
pub const OUTER_LEARNING_RATE_MAX: f32 = 10.0;

/// Far from where a round's successor would overflow.
pub const ROUND_MAX: u32 = 1 << 30;
pub const STEPS_MAX: u32 = 100_000;
/// Of one worker's round.
pub const SEQUENCES_MAX: u32 = 1 << 30;
/// A payload, θ or aggregate: 1 TiB.
pub const BLOB_BYTES_MAX: u64 = 1 << 40;
/// Tokens, sequences, optimiser steps, milliseconds, bytes of memory: sums and products of a few
/// of them by small factors stay inside 64 bits.
pub const COUNT_MAX: u64 = 1 << 50;
