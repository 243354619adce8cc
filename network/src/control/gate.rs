//! Connections per place they come from. libp2p's own limits count all of them, and those per peer;
//! but a peer id costs nothing, an address does.

use std::collections::HashMap;
use std::convert::Infallible;
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

use crate::origin::Origin;

#[derive(Debug)]
pub(super) struct Gate {
    connections_per_ip: usize,
    /// Connections that others opened.
    accepted: HashMap<ConnectionId, Origin>,
}

#[derive(Debug, thiserror::Error)]
#[error("{limit} connections from this address are open already")]
struct Crowded {
    limit: usize,
}

impl Gate {
    pub(super) fn new(connections_per_ip: usize) -> Self {
        Self { connections_per_ip, accepted: HashMap::new() }
    }

    fn admit(&self, remote: &Multiaddr) -> Result<(), ConnectionDenied> {
        let limit = self.connections_per_ip;
        let crowded = Origin::of_multiaddr(remote).is_some_and(|origin| {
            self.accepted.values().filter(|other| **other == origin).count() >= limit
        });
        if crowded { Err(ConnectionDenied::new(Crowded { limit })) } else { Ok(()) }
    }
}

impl NetworkBehaviour for Gate {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    /// Before the handshake, which costs us more than the stranger.
    fn handle_pending_inbound_connection(
        &mut self,
        _: ConnectionId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.admit(remote)
    }

    /// Again, as many handshakes may have been under way at once.
    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.admit(remote).map(|()| dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::ConnectionEstablished(ConnectionEstablished {
            connection_id,
            endpoint,
            ..
        }) = event
        {
            if endpoint.is_listener()
                && let Some(origin) = Origin::of_multiaddr(endpoint.get_remote_address())
            {
                self.accepted.insert(connection_id, origin);
            }
        } else if let FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) = event {
            self.accepted.remove(&connection_id);
        }
    }

    fn on_connection_handler_event(
        &mut self,
        _: PeerId,
        _: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}
