//! Building the swarm: transports, behaviour, listening.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use futures::StreamExt;
use libp2p::core::transport::ListenerId;
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, Swarm, SwarmBuilder, noise, tcp, yamux};

use super::behaviour::Behaviour;
use super::{ControlConfig, StartControlError};

/// Between rounds nothing may be said for minutes.
const IDLE_CONNECTION: Duration = Duration::from_secs(600);
/// Streams of one connection that have not said yet what they are.
const NEGOTIATING_STREAMS_MAX: usize = 64;
const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn build(
    keypair: Keypair,
    config: &ControlConfig,
) -> Result<Swarm<Behaviour>, StartControlError> {
    let other = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
    let mut failed = None;
    let swarm = SwarmBuilder::with_existing_identity(keypair)
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)
        .map_err(|error| other(&error))?
        .with_quic()
        .with_dns()?
        .with_relay_client(noise::Config::new, yamux::Config::default)
        .map_err(|error| other(&error))?
        .with_behaviour(|keypair, relay_client| {
            Behaviour::new(keypair, relay_client, config).map_err(|error| {
                let text = error.to_string();
                failed = Some(error);
                text.into()
            })
        })
        .map_err(|error| failed.take().unwrap_or_else(|| other(&error).into()))?
        .with_swarm_config(|swarm| {
            swarm
                .with_idle_connection_timeout(IDLE_CONNECTION)
                .with_max_negotiating_inbound_streams(NEGOTIATING_STREAMS_MAX)
                // Several addresses of a peer: QUIC first, TCP if that does not answer.
                .with_smart_dial()
        })
        .build();
    Ok(swarm)
}

/// Returns once every address is really listened on, so that `addresses` is complete and a busy port
/// is an error of `start`.
pub(super) async fn listen(
    swarm: &mut Swarm<Behaviour>,
    addresses: &[Multiaddr],
) -> Result<(), StartControlError> {
    let mut waiting: HashMap<ListenerId, Multiaddr> = HashMap::new();
    for address in addresses {
        let listener = swarm.listen_on(address.clone()).map_err(|error| {
            StartControlError::Listen { address: address.clone(), reason: error.to_string() }
        })?;
        waiting.insert(listener, address.clone());
    }
    let all = async {
        while !waiting.is_empty() {
            let event = swarm.select_next_some().await;
            if let SwarmEvent::NewListenAddr { listener_id, .. } = event {
                waiting.remove(&listener_id);
            } else if let SwarmEvent::ListenerClosed { listener_id, reason, .. } = event
                && let Some(address) = waiting.remove(&listener_id)
            {
                let reason = reason.err().map_or("closed".to_owned(), |error| error.to_string());
                return Err(StartControlError::Listen { address, reason });
            }
        }
        Ok(())
    };
    match tokio::time::timeout(LISTEN_TIMEOUT, all).await {
        Ok(result) => result,
        Err(_) => {
            let address = addresses.first().cloned().unwrap_or_else(Multiaddr::empty);
            let reason = format!("no answer from the system in {LISTEN_TIMEOUT:?}");
            Err(StartControlError::Listen { address, reason })
        }
    }
}

/// Takes a public node's word that it is reachable where it listens: a relay without a known address
/// grants no reservations. Loopback counts only if there is nothing else.
pub(super) fn state_external(swarm: &mut Swarm<Behaviour>) {
    let (local, public): (Vec<_>, Vec<_>) = swarm.listeners().cloned().partition(is_loopback);
    for address in if public.is_empty() { local } else { public } {
        swarm.add_external_address(address);
    }
}

fn is_loopback(address: &Multiaddr) -> bool {
    address.iter().any(|part| {
        if let Protocol::Ip4(ip) = part {
            ip.is_loopback()
        } else if let Protocol::Ip6(ip) = part {
            ip.is_loopback()
        } else {
            false
        }
    })
}
