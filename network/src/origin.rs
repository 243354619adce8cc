//! Where a connection comes from, as far as that says who pays for it.

use std::net::{IpAddr, Ipv6Addr};

use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;

/// An IPv4 address, or the first 64 bits of an IPv6 address: every home and every rented machine gets
/// at least a /64, so whoever has one of its addresses has 2⁶⁴.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Origin(IpAddr);

impl Origin {
    pub(crate) fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => {
                let network = u128::from(address) >> 64 << 64;
                Ipv6Addr::from(network).into()
            }
        })
    }

    /// None for a circuit through a relay, whose address is the relay's and not the peer's.
    pub(crate) fn of_multiaddr(address: &Multiaddr) -> Option<Self> {
        if address.iter().any(|part| part == Protocol::P2pCircuit) {
            return None;
        }
        address.iter().find_map(|part| {
            if let Protocol::Ip4(address) = part {
                Some(Self::of(address.into()))
            } else if let Protocol::Ip6(address) = part {
                Some(Self::of(address.into()))
            } else {
                None
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(text: &str) -> Origin {
        Origin::of(text.parse().expect("an address"))
    }

    #[test]
    fn the_addresses_of_one_ipv6_network_are_one_origin() {
        assert_eq!(origin("2001:db8:1:2::1"), origin("2001:db8:1:2:ffff:ffff:ffff:ffff"));
        assert_ne!(origin("2001:db8:1:2::1"), origin("2001:db8:1:3::1"));
        assert_eq!(origin("::ffff:192.0.2.1"), origin("192.0.2.1"));
        assert_ne!(origin("192.0.2.1"), origin("192.0.2.2"));
    }

    #[test]
    fn a_multiaddr_has_the_origin_of_its_ip_unless_a_relay_speaks_for_it() {
        let of = |text: &str| Origin::of_multiaddr(&text.parse().expect("a multiaddr"));
        assert_eq!(of("/ip6/2001:db8::7/udp/1/quic-v1"), Some(origin("2001:db8::")));
        assert_eq!(of("/ip4/192.0.2.1/tcp/1"), Some(origin("192.0.2.1")));
        assert_eq!(of("/ip4/192.0.2.1/tcp/1/p2p-circuit"), None);
        assert_eq!(of("/memory/1"), None);
    }
}
