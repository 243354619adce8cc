//! The one line that `launch` prints and a worker joins with.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use libp2p::Multiaddr;
use manyhands_proto::{NodeId, RunId};

/// What the text begins with: the name, and the version of the layout.
const PREFIX: &str = "manyhands1";
/// Characters of the whole line. An honest one has a few hundred.
const TEXT_MAX: usize = 4096;
const ADDRESSES_MAX: usize = 16;
const ADDRESS_BYTES_MAX: usize = 256;
const URL_BYTES_MAX: usize = 256;
/// Four bytes of BLAKE3: a mistyped line passes once in 4 · 10⁹.
const CHECKSUM_BYTES: usize = 4;

/// Where a run is, and which run and chain it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invitation {
    pub run: RunId,
    pub coordinator: NodeId,
    /// Where the coordinator's control plane listens, at most 16.
    pub control: Vec<Multiaddr>,
    /// Where its data plane listens, at most 16.
    pub data: Vec<SocketAddr>,
    /// Hash of the chain's first block: a worker on another chain notices before it stakes.
    pub chain_genesis: [u8; 32],
    /// Where to reach the chain, if the worker has no node of its own.
    pub chain_url: Option<String>,
}

/// Why a line is not an invitation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseInvitationError {
    #[error("expected a line that begins with {PREFIX:?}, got {got:?}")]
    Prefix { got: String },
    #[error("expected at most {TEXT_MAX} characters, got {got}")]
    Length { got: usize },
    #[error("character {position} is not one of an invitation's: was the line copied whole?")]
    Character { position: usize },
    #[error("the checksum does not match: a character is missing or wrong; copy the line again")]
    Checksum,
    #[error("the invitation ends inside its {field}")]
    Truncated { field: &'static str },
    #[error("{count} bytes follow the end of the invitation")]
    TrailingBytes { count: usize },
    #[error("expected at most {limit} {field}, got {got}")]
    Limit { field: &'static str, limit: usize, got: usize },
    #[error("the {field} cannot be read: {reason}")]
    Field { field: &'static str, reason: String },
}

impl fmt::Display for Invitation {
    /// # Panics
    /// If a list or the URL is longer than the limits in the type's description.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = self.encode();
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(&checksum.as_bytes()[..CHECKSUM_BYTES]);
        write!(f, "{PREFIX}{}", bs58::encode(bytes).into_string())
    }
}

impl FromStr for Invitation {
    type Err = ParseInvitationError;

    fn from_str(text: &str) -> Result<Self, ParseInvitationError> {
        let text = text.trim();
        // bs58 takes quadratic time: bound the length before it looks.
        if text.len() > TEXT_MAX {
            return Err(ParseInvitationError::Length { got: text.len() });
        }
        let body = text
            .strip_prefix(PREFIX)
            .ok_or_else(|| ParseInvitationError::Prefix { got: text.chars().take(20).collect() })?;
        let bytes = bs58::decode(body).into_vec().map_err(|error| character_error(&error, body))?;
        let (content, checksum) = bytes
            .split_last_chunk::<CHECKSUM_BYTES>()
            .ok_or(ParseInvitationError::Truncated { field: "checksum" })?;
        if blake3::hash(content).as_bytes()[..CHECKSUM_BYTES] != checksum[..] {
            return Err(ParseInvitationError::Checksum);
        }
        Self::decode(content)
    }
}

fn character_error(error: &bs58::decode::Error, body: &str) -> ParseInvitationError {
    let index = if let bs58::decode::Error::InvalidCharacter { index, .. }
    | bs58::decode::Error::NonAsciiCharacter { index } = error
    {
        *index
    } else {
        body.len()
    };
    ParseInvitationError::Character { position: PREFIX.len() + index + 1 }
}

impl Invitation {
    fn encode(&self) -> Vec<u8> {
        assert!(self.control.len() <= ADDRESSES_MAX, "at most {ADDRESSES_MAX} control addresses");
        assert!(self.data.len() <= ADDRESSES_MAX, "at most {ADDRESSES_MAX} data addresses");
        let mut bytes = Vec::with_capacity(512);
        bytes.extend_from_slice(self.run.as_bytes());
        bytes.extend_from_slice(self.coordinator.as_bytes());
        bytes.extend_from_slice(&self.chain_genesis);
        bytes.push(self.control.len() as u8);
        for address in &self.control {
            push_short(&mut bytes, address.as_ref(), ADDRESS_BYTES_MAX);
        }
        bytes.push(self.data.len() as u8);
        for address in &self.data {
            push_socket_address(&mut bytes, *address);
        }
        let url = self.chain_url.as_deref().unwrap_or_default();
        push_short(&mut bytes, url.as_bytes(), URL_BYTES_MAX);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, ParseInvitationError> {
        let mut reader = Reader { rest: bytes };
        let run = RunId::new(reader.array("run id")?);
        let coordinator = NodeId::new(reader.array("coordinator's id")?);
        let chain_genesis = reader.array("chain's genesis hash")?;
        let control = (0..reader.count("control addresses")?)
            .map(|_| {
                let field = "control address";
                let bytes = reader.short(field, ADDRESS_BYTES_MAX)?;
                Multiaddr::try_from(bytes.to_vec()).map_err(|error| ParseInvitationError::Field {
                    field,
                    reason: error.to_string(),
                })
            })
            .collect::<Result<_, _>>()?;
        let data = (0..reader.count("data addresses")?)
            .map(|_| reader.socket_address())
            .collect::<Result<_, _>>()?;
        let url = reader.short("chain URL", URL_BYTES_MAX)?;
        let url = std::str::from_utf8(url).map_err(|error| ParseInvitationError::Field {
            field: "chain URL",
            reason: error.to_string(),
        })?;
        let chain_url = (!url.is_empty()).then(|| url.to_owned());
        if !reader.rest.is_empty() {
            return Err(ParseInvitationError::TrailingBytes { count: reader.rest.len() });
        }
        Ok(Self { run, coordinator, control, data, chain_genesis, chain_url })
    }
}

fn push_short(bytes: &mut Vec<u8>, field: &[u8], limit: usize) {
    assert!(field.len() <= limit, "a field of {} bytes, at most {limit}", field.len());
    bytes.extend_from_slice(&(field.len() as u16).to_le_bytes());
    bytes.extend_from_slice(field);
}

/// Family (4 or 6), address, port in network order.
fn push_socket_address(bytes: &mut Vec<u8>, address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes.push(4);
            bytes.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes.push(6);
            bytes.extend_from_slice(&ip.octets());
        }
    }
    bytes.extend_from_slice(&address.port().to_be_bytes());
}

/// Takes fields from the front; never reads past the end.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], ParseInvitationError> {
        let (head, rest) =
            self.rest.split_first_chunk().ok_or(ParseInvitationError::Truncated { field })?;
        self.rest = rest;
        Ok(*head)
    }

    fn count(&mut self, field: &'static str) -> Result<usize, ParseInvitationError> {
        let [count] = self.array(field)?;
        let got = usize::from(count);
        if got > ADDRESSES_MAX {
            return Err(ParseInvitationError::Limit { field, limit: ADDRESSES_MAX, got });
        }
        Ok(got)
    }

    fn short(
        &mut self,
        field: &'static str,
        limit: usize,
    ) -> Result<&'a [u8], ParseInvitationError> {
        let got = usize::from(u16::from_le_bytes(self.array(field)?));
        if got > limit {
            return Err(ParseInvitationError::Limit { field, limit, got });
        }
        let (head, rest) =
            self.rest.split_at_checked(got).ok_or(ParseInvitationError::Truncated { field })?;
        self.rest = rest;
        Ok(head)
    }

    fn socket_address(&mut self) -> Result<SocketAddr, ParseInvitationError> {
        let field = "data address";
        let ip = match self.array(field)? {
            [4] => IpAddr::V4(Ipv4Addr::from(self.array::<4>(field)?)),
            [6] => IpAddr::V6(Ipv6Addr::from(self.array::<16>(field)?)),
            [family] => {
                let reason = format!("expected family 4 or 6, got {family}");
                return Err(ParseInvitationError::Field { field, reason });
            }
        };
        Ok(SocketAddr::new(ip, u16::from_be_bytes(self.array(field)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation() -> Invitation {
        Invitation {
            run: RunId::new([1; 32]),
            coordinator: NodeId::new([2; 32]),
            control: vec![
                "/ip4/192.0.2.7/udp/4001/quic-v1".parse().expect("multiaddr"),
                "/dns4/run.example/tcp/4001".parse().expect("multiaddr"),
            ],
            data: vec![
                "192.0.2.7:4002".parse().expect("socket address"),
                "[2001:db8::7]:4002".parse().expect("socket address"),
            ],
            chain_genesis: [3; 32],
            chain_url: Some("ws://192.0.2.7:9944".to_owned()),
        }
    }

    #[test]
    fn an_invitation_survives_a_copy_and_paste() {
        let line = invitation().to_string();
        assert!(!line.contains(char::is_whitespace));
        assert_eq!(format!("  {line}\n").parse(), Ok(invitation()));
        let bare = Invitation { control: vec![], data: vec![], chain_url: None, ..invitation() };
        assert_eq!(bare.to_string().parse(), Ok(bare));
    }

    #[test]
    fn every_single_wrong_character_is_noticed() {
        let line = invitation().to_string();
        for position in PREFIX.len()..line.len() {
            let other = if &line[position..=position] == "2" { "3" } else { "2" };
            let mut wrong = line.clone();
            wrong.replace_range(position..=position, other);
            assert!(wrong.parse::<Invitation>().is_err(), "character {position}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        type E = ParseInvitationError;
        let line = invitation().to_string();
        assert!(matches!("hello".parse::<Invitation>(), Err(E::Prefix { .. })));
        assert_eq!("manyhands1".parse::<Invitation>(), Err(E::Truncated { field: "checksum" }));
        assert_eq!(line[..line.len() - 9].parse::<Invitation>(), Err(E::Checksum));
        // Base 58 has no zero.
        let zero = format!("{}0", &line[..line.len() - 1]);
        assert_eq!(zero.parse::<Invitation>(), Err(E::Character { position: line.len() }));
        let long = format!("{PREFIX}{}", "2".repeat(TEXT_MAX));
        assert!(matches!(long.parse::<Invitation>(), Err(E::Length { .. })));
    }

    #[test]
    fn counts_are_not_believed_beyond_the_limits() {
        let mut bytes = invitation().encode();
        bytes[96] = 200;
        let expected = ParseInvitationError::Limit {
            field: "control addresses",
            limit: ADDRESSES_MAX,
            got: 200,
        };
        assert_eq!(Invitation::decode(&bytes), Err(expected));
        let whole = invitation().encode();
        for length in 0..whole.len() {
            assert!(Invitation::decode(&whole[..length]).is_err(), "cut at {length}");
        }
        let mut longer = whole;
        longer.push(0);
        let expected = ParseInvitationError::TrailingBytes { count: 1 };
        assert_eq!(Invitation::decode(&longer), Err(expected));
    }
}
