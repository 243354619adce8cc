//! What travels on a stream of the data plane. One request, one answer, one stream.
//!
//! Request: a kind byte, then the fields below, then the end of the stream. Integers are
//! little-endian.
//!
//! | kind | fields | answer after the status byte |
//! |---|---|---|
//! | 1 head | digest (32) | length (8), chaining values (32 each, as many as the length implies) |
//! | 2 chunk | digest (32), chunk index (8) | the chunk's bytes |
//! | 3 groups | digest (32), 1 to 256 ascending group indices (8 each) | length (8), then per group: sibling count (1), siblings (32 each), byte count (2), bytes |
//! | 4 observed | none | the asker's address as text, at most 64 bytes |
//!
//! Status 0 is success; every other status is a [`Refusal`] and ends the answer, `Busy` (4) after
//! the milliseconds (4) to wait.

use std::time::Duration;

use manyhands_proto::Digest;

/// Groups in one request. A spot check opens a few dozen.
pub const GROUPS_PER_REQUEST_MAX: usize = 256;
pub(super) const REQUEST_BYTES_MAX: usize = 1 + 32 + 8 * GROUPS_PER_REQUEST_MAX;
/// "[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255%4294967295]:65535" has 64 characters.
pub(super) const OBSERVED_BYTES_MAX: usize = 64;

pub(super) const STATUS_OK: u8 = 0;

/// Why a peer did not serve a request. The owner of the store decides the first three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the blob is not known")]
    Unknown,
    #[error("this peer may not read the blob")]
    Forbidden,
    #[error("nobody may read the blob yet")]
    NotYet,
    #[error("over this peer's quota: try again in {} ms", retry_after.as_millis())]
    Busy { retry_after: Duration },
    #[error("the blob has no such chunk or group")]
    OutOfRange,
    #[error("the blob cannot be read from disk")]
    Storage,
}

impl Refusal {
    /// For metrics.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Forbidden => "forbidden",
            Self::NotYet => "not_yet",
            Self::Busy { .. } => "busy",
            Self::OutOfRange => "out_of_range",
            Self::Storage => "storage",
        }
    }

    pub(super) fn encode(self) -> Vec<u8> {
        match self {
            Self::Unknown => vec![1],
            Self::Forbidden => vec![2],
            Self::NotYet => vec![3],
            Self::Busy { retry_after } => {
                let ms = u32::try_from(retry_after.as_millis()).unwrap_or(u32::MAX);
                let mut bytes = vec![4];
                bytes.extend_from_slice(&ms.to_le_bytes());
                bytes
            }
            Self::OutOfRange => vec![5],
            Self::Storage => vec![6],
        }
    }

    /// `retry_after_ms` is read from the stream for status 4 alone.
    pub(super) fn decode(status: u8, retry_after_ms: u32) -> Option<Self> {
        match status {
            1 => Some(Self::Unknown),
            2 => Some(Self::Forbidden),
            3 => Some(Self::NotYet),
            4 => Some(Self::Busy { retry_after: Duration::from_millis(retry_after_ms.into()) }),
            5 => Some(Self::OutOfRange),
            6 => Some(Self::Storage),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    Head { digest: Digest },
    Chunk { digest: Digest, index: u64 },
    Groups { digest: Digest, groups: Vec<u64> },
    Observed,
}

/// Why bytes are not a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum RequestParseError {
    #[error("expected a request, got an empty stream")]
    Empty,
    /// An honest asker's, given up while it was sent.
    #[error("expected {expected} bytes for a request of kind {kind}, it was cut short after {got}")]
    CutShort { kind: u8, expected: &'static str, got: usize },
    #[error("expected a request of kind 1 to 4, got kind {0}")]
    Kind(u8),
    #[error("expected {expected} bytes for a request of kind {kind}, got {got}")]
    TooLong { kind: u8, expected: &'static str, got: usize },
    #[error("expected ascending groups, got {next} after {first}")]
    Order { first: u64, next: u64 },
}

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Head { digest } => [&[1], &digest.as_bytes()[..]].concat(),
            Self::Chunk { digest, index } => {
                [&[2], &digest.as_bytes()[..], &index.to_le_bytes()].concat()
            }
            Self::Groups { digest, groups } => {
                let mut bytes = [&[3], &digest.as_bytes()[..]].concat();
                bytes.extend(groups.iter().flat_map(|group| group.to_le_bytes()));
                bytes
            }
            Self::Observed => vec![4],
        }
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, RequestParseError> {
        let (&kind, fields) = bytes.split_first().ok_or(RequestParseError::Empty)?;
        let got = bytes.len();
        let cut = |expected| RequestParseError::CutShort { kind, expected, got };
        let long = |expected| RequestParseError::TooLong { kind, expected, got };
        let digest = || fields.split_first_chunk::<32>().map(|(d, rest)| (Digest::new(*d), rest));
        match kind {
            1 => match digest().ok_or_else(|| cut("33"))? {
                (digest, []) => Ok(Self::Head { digest }),
                (_, [_, ..]) => Err(long("33")),
            },
            2 => {
                let (digest, rest) = digest().ok_or_else(|| cut("41"))?;
                let (index, more) = rest.split_first_chunk::<8>().ok_or_else(|| cut("41"))?;
                let index = u64::from_le_bytes(*index);
                if more.is_empty() { Ok(Self::Chunk { digest, index }) } else { Err(long("41")) }
            }
            3 => {
                let expected = "33 + 8 per group, 1 to 256 groups,";
                let (digest, rest) = digest().ok_or_else(|| cut(expected))?;
                let (groups, odd) = rest.as_chunks::<8>();
                if !odd.is_empty() || groups.is_empty() {
                    return Err(cut(expected));
                }
                if groups.len() > GROUPS_PER_REQUEST_MAX {
                    return Err(long(expected));
                }
                let groups: Vec<u64> = groups.iter().map(|g| u64::from_le_bytes(*g)).collect();
                // So that no chunk is read twice for one request.
                let wrong = groups.windows(2).find(|pair| pair[0] >= pair[1]);
                match wrong {
                    Some(pair) => Err(RequestParseError::Order { first: pair[0], next: pair[1] }),
                    None => Ok(Self::Groups { digest, groups }),
                }
            }
            4 if fields.is_empty() => Ok(Self::Observed),
            4 => Err(long("1")),
            kind => Err(RequestParseError::Kind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_wire_and_no_prefix_of_one_is_another_request_of_its_kind() {
        let digest = Digest::of(b"blob");
        let requests = [
            Request::Head { digest },
            Request::Chunk { digest, index: 7 },
            Request::Groups { digest, groups: vec![0, 3, u64::MAX] },
            Request::Observed,
        ];
        for request in requests {
            let bytes = request.encode();
            assert_eq!(Request::parse(&bytes), Ok(request.clone()));
            for length in 0..bytes.len() {
                assert_ne!(Request::parse(&bytes[..length]), Ok(request.clone()));
            }
        }
    }

    #[test]
    fn nonsense_is_refused_with_what_was_expected() {
        assert_eq!(Request::parse(b"GET / HTTP/1.1"), Err(RequestParseError::Kind(b'G')));
        assert!(matches!(Request::parse(&[1; 40]), Err(RequestParseError::TooLong { .. })));
        let groups = |groups| Request::Groups { digest: Digest::of(b""), groups }.encode();
        let many = groups((0..=GROUPS_PER_REQUEST_MAX as u64).collect());
        assert!(matches!(Request::parse(&many), Err(RequestParseError::TooLong { .. })));
        for (first, next) in [(1, 0), (64, 64)] {
            let refused = Request::parse(&groups(vec![first, next]));
            assert_eq!(refused, Err(RequestParseError::Order { first, next }));
        }
    }

    #[test]
    fn what_was_cut_short_is_told_from_nonsense() {
        assert_eq!(Request::parse(&[]), Err(RequestParseError::Empty));
        let digest = Digest::of(b"blob");
        for request in [
            Request::Head { digest },
            Request::Chunk { digest, index: 7 },
            Request::Groups { digest, groups: vec![9] },
        ] {
            let bytes = request.encode();
            for length in 1..bytes.len() {
                let cut = Request::parse(&bytes[..length]);
                assert!(matches!(cut, Err(RequestParseError::CutShort { .. })), "{cut:?}");
            }
        }
    }

    #[test]
    fn refusals_survive_the_wire() {
        let busy = Refusal::Busy { retry_after: Duration::from_millis(1500) };
        assert_eq!(busy.encode(), [4, 0xdc, 5, 0, 0]);
        assert_eq!(Refusal::decode(4, 1500), Some(busy));
        for refusal in [
            Refusal::Unknown,
            Refusal::Forbidden,
            Refusal::NotYet,
            Refusal::OutOfRange,
            Refusal::Storage,
        ] {
            assert_eq!(Refusal::decode(refusal.encode()[0], 0), Some(refusal));
        }
        assert_eq!(Refusal::decode(0, 0), None);
        assert_eq!(Refusal::decode(7, 0), None);
    }
}
