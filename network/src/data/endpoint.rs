//! The socket, its handshakes, and dialling.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use libp2p::identity::Keypair;
use manyhands_proto::NodeId;
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime,
    TransportConfig, VarInt,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::congestion::RateControl;
use super::peers::{Attempts, CLOSE_REFUSED, CLOSE_SHUTDOWN, ConnectError, Opener, Peers};
use super::quota::Ledgers;
use super::tls::{self, TlsError, TlsIdentity};
use super::{BlobStore, DataConfig, DataLimits, Timeouts, serve};
use crate::identity;

/// The kernel's default (208 KiB) overflows at home-line speeds while the process is off the CPU.
const UDP_BUFFER_BYTES: usize = 4 << 20;
/// One chunk per stream; twice that so that a window update is never waited for.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// 200 Mbit/s at 250 ms is 6 MB; also the memory that one connection may cost us each way.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Streams a peer may have open towards us: two windows of 16 chunks, and room for small requests.
const STREAMS_MAX: u32 = 48;
/// Addresses of one peer that are tried, and how long each gets before the next joins in.
const ADDRESSES_MAX: usize = 16;
const ADDRESS_STAGGER: Duration = Duration::from_millis(250);
/// A dial that meets a closed NAT is lost; a new one goes out this often.
const PUNCH_INTERVAL: Duration = Duration::from_millis(500);

/// Why the data plane could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartDataError {
    #[error("cannot listen on {address} (UDP): {source}; choose another port or stop what uses it")]
    Bind { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
}

pub(super) struct Shared {
    pub(super) local_addr: SocketAddr,
    pub(super) endpoint: Endpoint,
    pub(super) peers: Peers,
    pub(super) ledgers: Ledgers,
    pub(super) store: Arc<dyn BlobStore>,
    pub(super) limits: DataLimits,
    pub(super) timeouts: Timeouts,
    own: NodeId,
    tls: TlsIdentity,
    transport: Arc<TransportConfig>,
    handshakes: AtomicUsize,
}

impl Shared {
    pub(super) fn start(config: DataConfig) -> Result<Arc<Self>, StartDataError> {
        let keypair: Keypair = identity::keypair(&config.key);
        let tls = TlsIdentity::new(&keypair)?;
        let transport = Arc::new(transport(&config.timeouts));
        let mut server = ServerConfig::with_crypto(Arc::new(tls.server()?));
        server.transport_config(transport.clone());
        server
            .max_incoming(config.limits.handshakes)
            // A handshake flight is a few packets; nobody sends data before it.
            .incoming_buffer_size(64 << 10)
            .incoming_buffer_size_total(4 << 20);
        let bind_error = |source| StartDataError::Bind { address: config.listen, source };
        let socket = socket(config.listen).map_err(bind_error)?;
        let endpoint =
            Endpoint::new(EndpointConfig::default(), Some(server), socket, Arc::new(TokioRuntime))
                .map_err(bind_error)?;
        let local_addr = endpoint.local_addr().map_err(bind_error)?;
        let shared = Arc::new(Self {
            local_addr,
            endpoint,
            peers: Peers::new(config.limits.clone()),
            ledgers: Ledgers::new(config.quotas),
            store: config.store,
            limits: config.limits,
            timeouts: config.timeouts,
            own: config.key.node_id(),
            tls,
            transport,
            handshakes: AtomicUsize::new(0),
        });
        tokio::spawn(accept(shared.clone()));
        Ok(shared)
    }

    pub(super) fn close(&self) {
        self.endpoint.close(CLOSE_SHUTDOWN.into(), b"shutting down");
    }

    /// A connection to `peer`: one that is up, or a new one.
    pub(super) async fn connect(
        self: &Arc<Self>,
        peer: NodeId,
        addresses: &[SocketAddr],
    ) -> Result<Connection, ConnectError> {
        if let Some(connection) = self.peers.connection(peer) {
            return Ok(connection);
        }
        if addresses.is_empty() || peer == self.own {
            return Err(ConnectError::NoAddress { peer });
        }
        let ledger = self.ledgers.of(peer);
        let _one_at_a_time = ledger.dialing.lock().await;
        if let Some(connection) = self.peers.connection(peer) {
            return Ok(connection);
        }
        self.peers.check_welcome(peer)?;
        self.peers.room()?;
        self.dial_any(peer, addresses).await
    }

    /// Dials the addresses a quarter of a second apart and takes the first that answers.
    async fn dial_any(
        self: &Arc<Self>,
        peer: NodeId,
        addresses: &[SocketAddr],
    ) -> Result<Connection, ConnectError> {
        let dial = |(index, address): (usize, &SocketAddr)| {
            let address = *address;
            async move {
                tokio::time::sleep(ADDRESS_STAGGER * index as u32).await;
                (address, self.dial(peer, address).await)
            }
        };
        let mut dials: FuturesUnordered<_> =
            addresses.iter().take(ADDRESSES_MAX).enumerate().map(dial).collect();
        let mut attempts = Vec::new();
        while let Some((address, result)) = dials.next().await {
            match result {
                Ok(connection) => {
                    self.adopt(peer, &connection, Opener::We)?;
                    return Ok(connection);
                }
                Err(reason) => attempts.push((address, reason)),
            }
        }
        Err(ConnectError::Failed { peer, attempts: Attempts(attempts) })
    }

    async fn dial(&self, peer: NodeId, address: SocketAddr) -> Result<Connection, String> {
        let crypto =
            self.tls.client(identity::peer_id(&peer)).map_err(|error| error.to_string())?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(self.transport.clone());
        let address = self.reachable(address);
        let connecting = self
            .endpoint
            .connect_with(config, address, tls::SERVER_NAME)
            .map_err(|error| error.to_string())?;
        match tokio::time::timeout(self.timeouts.handshake, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer in {:?}", self.timeouts.handshake)),
        }
    }

    /// A dual-stack socket sends to IPv4 addresses in their IPv6 form.
    fn reachable(&self, address: SocketAddr) -> SocketAddr {
        match address {
            SocketAddr::V4(v4) if self.local_addr.is_ipv6() => {
                SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port())
            }
            SocketAddr::V4(_) | SocketAddr::V6(_) => address,
        }
    }

    pub(super) async fn punch(
        self: &Arc<Self>,
        peer: NodeId,
        address: SocketAddr,
    ) -> Result<(), ConnectError> {
        self.peers.check_welcome(peer)?;
        let deadline = tokio::time::Instant::now() + self.timeouts.punch;
        let mut reason = format!("nothing came through in {:?}", self.timeouts.punch);
        while tokio::time::Instant::now() < deadline {
            let mut arrived = std::pin::pin!(self.peers.arrived.notified());
            // Registered before the look, so that no arrival falls between the two.
            arrived.as_mut().enable();
            if self.peers.connection(peer).is_some() {
                return Ok(());
            }
            let pause = tokio::time::sleep(PUNCH_INTERVAL);
            tokio::select! {
                () = arrived => {}
                result = self.dial(peer, address) => match result {
                    Ok(connection) => return self.adopt(peer, &connection, Opener::We),
                    Err(error) => {
                        reason = error;
                        pause.await;
                    }
                },
            }
        }
        Err(ConnectError::Failed { peer, attempts: Attempts(vec![(address, reason)]) })
    }

    /// Registers a connection whose peer is proven and serves it until it closes.
    fn adopt(
        self: &Arc<Self>,
        peer: NodeId,
        connection: &Connection,
        opener: Opener,
    ) -> Result<(), ConnectError> {
        self.peers.register(peer, connection, opener)?;
        let (shared, connection) = (self.clone(), connection.clone());
        tokio::spawn(async move {
            serve::serve(&shared, peer, &connection).await;
            let reason = connection.closed().await;
            tracing::debug!(%peer, %reason, "a data connection ended");
            shared.peers.unregister(peer, &connection);
        });
        Ok(())
    }
}

async fn accept(shared: Arc<Shared>) {
    while let Some(incoming) = shared.endpoint.accept().await {
        let handshakes = shared.handshakes.load(Ordering::Relaxed);
        let address = incoming.remote_address().ip();
        let crowded = handshakes >= shared.limits.handshakes || shared.peers.is_crowded(address);
        if crowded {
            incoming.refuse();
        } else if handshakes >= shared.limits.handshakes / 2 && incoming.may_retry() {
            // A forged address cannot answer the retry, so it cannot hold a handshake slot.
            if let Err(error) = incoming.retry() {
                tracing::debug!(%error, "could not ask a newcomer to retry");
            }
        } else {
            shared.handshakes.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(handshake(shared.clone(), incoming));
        }
    }
}

async fn handshake(shared: Arc<Shared>, incoming: Incoming) {
    let address = incoming.remote_address();
    let result = tokio::time::timeout(shared.timeouts.handshake, incoming).await;
    shared.handshakes.fetch_sub(1, Ordering::Relaxed);
    let connection = match result {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(%address, %error, "a handshake failed"),
        Err(_) => return tracing::debug!(%address, "a handshake took too long"),
    };
    let Some(peer) = tls::remote_node(&connection) else {
        return connection
            .close(CLOSE_REFUSED.into(), b"expected the certificate of an ed25519 node");
    };
    if let Err(reason) = shared.adopt(peer, &connection, Opener::Peer) {
        tracing::debug!(%peer, %reason, "refused a data connection");
    }
}

fn socket(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    // The kernel grants what its own limit allows: less is slower, not wrong.
    for result in [
        socket.set_recv_buffer_size(UDP_BUFFER_BYTES),
        socket.set_send_buffer_size(UDP_BUFFER_BYTES),
    ] {
        if let Err(error) = result {
            tracing::warn!(%error, "cannot enlarge the UDP buffers; transfers will be slower");
        }
    }
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn transport(timeouts: &Timeouts) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let idle_ms = u32::try_from(timeouts.idle.as_millis()).unwrap_or(u32::MAX);
    transport
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .send_window(CONNECTION_WINDOW_BYTES.into())
        .max_concurrent_bidi_streams(STREAMS_MAX.into())
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(VarInt::from_u32(idle_ms).into()))
        .keep_alive_interval(Some(timeouts.keep_alive))
        .congestion_controller_factory(Arc::new(RateControl));
    transport
}
