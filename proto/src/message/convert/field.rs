//! One field at a time: from what the wire can hold to what is meant.

use std::fmt;
use std::net::SocketAddr;

use super::MessageError;
use crate::message::limits::{
    ADDRESS_BYTES_MAX, ADDRESSES_MAX, NAME_BYTES_MAX, REASON_BYTES_MAX, ROUND_MAX,
};
use crate::{Digest, NodeId, Round, RunId};

type Field = &'static str;

pub(in crate::message) fn digest(field: Field, bytes: &[u8]) -> Result<Digest, MessageError> {
    array(field, bytes).map(Digest::new)
}

pub(in crate::message) fn node(field: Field, bytes: &[u8]) -> Result<NodeId, MessageError> {
    array(field, bytes).map(NodeId::new)
}

pub(in crate::message) fn run(field: Field, bytes: &[u8]) -> Result<RunId, MessageError> {
    array(field, bytes).map(RunId::new)
}

pub(in crate::message) fn signature(field: Field, bytes: &[u8]) -> Result<[u8; 64], MessageError> {
    array(field, bytes)
}

pub(in crate::message) fn round(field: Field, round: u32) -> Result<Round, MessageError> {
    at_most(field, round.into(), ROUND_MAX.into())?;
    Ok(Round(round))
}

fn array<const N: usize>(field: Field, bytes: &[u8]) -> Result<[u8; N], MessageError> {
    bytes.try_into().map_err(|_| MessageError::Length { field, expected: N, got: bytes.len() })
}

pub(super) fn required<T>(field: Field, value: Option<T>) -> Result<T, MessageError> {
    value.ok_or(MessageError::Missing { field })
}

pub(super) fn at_most(field: Field, value: u64, max: u64) -> Result<u64, MessageError> {
    if value > max { Err(MessageError::TooMany { field, max, got: value }) } else { Ok(value) }
}

/// From 1 to `max`.
pub(super) fn some_at_most(field: Field, value: u32, max: u32) -> Result<u32, MessageError> {
    at_most(field, value.into(), max.into())?;
    check(field, "more than 0", value, value > 0)
}

/// Refuses a list or byte string of more than `max` entries.
pub(super) fn count(field: Field, len: usize, max: usize) -> Result<(), MessageError> {
    at_most(field, len as u64, max as u64).map(|_| ())
}

/// `value`, if it holds what was `expected`.
pub(super) fn check<T: fmt::Debug>(
    field: Field,
    expected: &'static str,
    value: T,
    holds: bool,
) -> Result<T, MessageError> {
    if holds { Ok(value) } else { Err(unexpected(field, expected, &value)) }
}

pub(super) fn unexpected(
    field: Field,
    expected: &'static str,
    got: impl fmt::Debug,
) -> MessageError {
    let got = format!("{got:?}").chars().take(80).collect();
    MessageError::Value { field, expected, got }
}

pub(super) fn ascending<T: PartialOrd>(
    field: Field,
    entries: impl Iterator<Item = T> + Clone,
) -> Result<(), MessageError> {
    let mut pairs = entries.clone().zip(entries.skip(1));
    match pairs.position(|(before, after)| before >= after) {
        Some(before) => Err(MessageError::Order { field, index: before + 1 }),
        None => Ok(()),
    }
}

pub(super) fn name(field: Field, text: String) -> Result<String, MessageError> {
    printable(field, text, NAME_BYTES_MAX)
}

pub(super) fn reason(field: Field, text: String) -> Result<String, MessageError> {
    printable(field, text, REASON_BYTES_MAX)
}

/// Without control characters: these texts reach terminals and logs.
fn printable(field: Field, text: String, bytes_max: usize) -> Result<String, MessageError> {
    count(field, text.len(), bytes_max)?;
    let printable = !text.contains(char::is_control);
    check(field, "text without control characters", text, printable)
}

/// An explanation as [`reason`] takes it. Explanations quote errors of other libraries: what is
/// too long is cut and what would break a line becomes a space, rather than lose the message.
pub(super) fn explain(text: &str) -> String {
    let mut cut = String::with_capacity(text.len().min(REASON_BYTES_MAX));
    for character in text.chars() {
        let character = if character.is_control() { ' ' } else { character };
        if cut.len() + character.len_utf8() > REASON_BYTES_MAX {
            break;
        }
        cut.push(character);
    }
    cut
}

pub(super) fn addresses(
    field: Field,
    addresses: Vec<String>,
) -> Result<Vec<SocketAddr>, MessageError> {
    count(field, addresses.len(), ADDRESSES_MAX)?;
    addresses
        .into_iter()
        .map(|address| {
            count(field, address.len(), ADDRESS_BYTES_MAX)?;
            address.parse().map_err(|_| unexpected(field, "an IP address and port", &address))
        })
        .collect()
}

pub(super) fn address_texts(addresses: &[SocketAddr]) -> Vec<String> {
    addresses.iter().map(SocketAddr::to_string).collect()
}

/// Parses every entry of a list that holds at most `max`.
pub(super) fn list<W, T>(
    field: Field,
    entries: Vec<W>,
    max: usize,
    parse: impl Fn(W) -> Result<T, MessageError>,
) -> Result<Vec<T>, MessageError> {
    count(field, entries.len(), max)?;
    entries.into_iter().map(parse).collect()
}
