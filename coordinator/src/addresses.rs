//! Under which addresses others are told to reach this node.

use std::net::{IpAddr, SocketAddr};

use manyhands_network::Multiaddr;

/// As many of each kind as an invitation takes.
const ADDRESSES_MAX: usize = 16;

/// QUIC first and TCP as fallback, on the same port.
pub fn control_listen(address: SocketAddr) -> Vec<Multiaddr> {
    let (ip, port) = (ip_text(address.ip()), address.port());
    [format!("{ip}/udp/{port}/quic-v1"), format!("{ip}/tcp/{port}")]
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect()
}

/// The IP address that a multiaddress begins with.
pub(crate) fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    let text = address.to_string();
    let mut parts = text.split('/').skip(1);
    match parts.next() {
        Some("ip4" | "ip6") => parts.next()?.parse().ok(),
        Some(_) | None => None,
    }
}

/// The control plane's own addresses, those under which it is also reachable first, and QUIC before TCP:
/// whichever listener was up first, a run started again has the invitation that it had.
pub(crate) fn control(mut own: Vec<Multiaddr>, reachable_at: &[IpAddr]) -> Vec<Multiaddr> {
    own.sort_by_cached_key(|address| {
        let text = address.to_string();
        (!text.contains("/quic-v1"), text)
    });
    let mut addresses: Vec<Multiaddr> = Vec::new();
    for ip in reachable_at {
        for address in &own {
            let Some(was) = ip_of(address) else { continue };
            let text = address.to_string();
            let moved = text.strip_prefix(&ip_text(was)).map(|rest| ip_text(*ip) + rest);
            addresses.extend(moved.and_then(|text| text.parse::<Multiaddr>().ok()));
        }
    }
    addresses.extend(own);
    unique(addresses)
}

/// The data plane's addresses: where it listens, or its port on every interface that the control plane
/// found, if it listens on all.
pub(crate) fn data(
    listen: SocketAddr,
    control: &[Multiaddr],
    reachable_at: &[IpAddr],
) -> Vec<SocketAddr> {
    let mut ips = reachable_at.to_vec();
    if listen.ip().is_unspecified() {
        ips.extend(control.iter().filter_map(ip_of));
    } else {
        ips.push(listen.ip());
    }
    unique(ips.into_iter().map(|ip| SocketAddr::new(ip, listen.port())).collect())
}

fn ip_text(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => format!("/ip4/{ip}"),
        IpAddr::V6(ip) => format!("/ip6/{ip}"),
    }
}

/// In the same order, each once, no more than an invitation takes.
fn unique<T: PartialEq>(all: Vec<T>) -> Vec<T> {
    let mut unique = Vec::new();
    for one in all {
        if unique.len() < ADDRESSES_MAX && !unique.contains(&one) {
            unique.push(one);
        }
    }
    unique
}

#[cfg(test)]
mod tests {
    use super::*;

    fn multiaddr(text: &str) -> Multiaddr {
        text.parse().expect("a multiaddress")
    }

    #[test]
    fn the_ip_address_of_a_connection_is_read_from_its_multiaddress() {
        let ip = |text: &str| ip_of(&multiaddr(text));
        assert_eq!(ip("/ip4/192.0.2.7/udp/4001/quic-v1"), Some(IpAddr::from([192, 0, 2, 7])));
        assert_eq!(ip("/ip6/2001:db8::7/tcp/4001"), "2001:db8::7".parse().ok());
        assert_eq!(ip("/dns4/run.example/tcp/4001"), None);
    }

    #[test]
    fn a_node_behind_a_forwarded_port_is_named_by_its_public_address_first() {
        let own = vec![multiaddr("/ip4/10.0.0.2/udp/4001/quic-v1")];
        let public = [IpAddr::from([192, 0, 2, 7])];
        let listen = "0.0.0.0:4002".parse().expect("an address");
        let named: Vec<_> = data(listen, &own, &public).iter().map(ToString::to_string).collect();
        assert_eq!(named, ["192.0.2.7:4002", "10.0.0.2:4002"]);
        let named: Vec<_> = control(own, &public).iter().map(ToString::to_string).collect();
        assert_eq!(named, ["/ip4/192.0.2.7/udp/4001/quic-v1", "/ip4/10.0.0.2/udp/4001/quic-v1"]);
        let alone = "127.0.0.1:9".parse().expect("an address");
        assert_eq!(data(alone, &[], &[]), [alone]);
    }
}
