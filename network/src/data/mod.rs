//! The data plane: a QUIC endpoint of our own that fetches and serves blobs named by their BLAKE3
//! digest.
//!
//! A connection is symmetric: whoever dialled, both sides may ask over it, so a worker behind a NAT
//! that dials the coordinator can be asked for its payload. A blob moves as one stream per MiB, about
//! 16 in flight, each checked when it is whole; a chunk that does not match is its sender's fault.
//! What goes over a stream is described in `wire.rs`.

mod congestion;
mod endpoint;
mod fetch;
mod openings;
mod peers;
mod quota;
mod request;
mod serve;
mod sink;
mod store;
mod tls;
mod wire;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::tree::Openings;
use manyhands_proto::{Digest, NodeId};

pub use endpoint::StartDataError;
pub use fetch::{
    FetchError, FetchReport, FetchRequest, Progress, ProgressFn, Source, SourceFailure,
};
pub use peers::ConnectError;
pub use quota::Quotas;
pub use request::{Blame, SourceError};
pub use store::{Access, BlobInfo, BlobStore, FileStore, NoStore, StoreError};
pub use tls::TlsError;
pub use wire::{GROUPS_PER_REQUEST_MAX, Refusal};

use endpoint::Shared;

/// How to run the data plane.
#[derive(Clone)]
pub struct DataConfig {
    pub key: NodeKey,
    /// Where to listen; port 0 picks a free one.
    pub listen: SocketAddr,
    pub store: Arc<dyn BlobStore>,
    pub quotas: Quotas,
    pub limits: DataLimits,
    pub timeouts: Timeouts,
}

impl DataConfig {
    /// Default quotas, limits and timeouts.
    pub fn new(key: NodeKey, listen: SocketAddr, store: Arc<dyn BlobStore>) -> Self {
        Self {
            key,
            listen,
            store,
            quotas: Quotas::default(),
            limits: DataLimits::default(),
            timeouts: Timeouts::default(),
        }
    }
}

/// Bounds on connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataLimits {
    /// Established connections, both directions together. When all are taken, a dial of our own closes
    /// the one that was idle longest of those that peers opened and that we have no use for.
    pub connections: usize,
    pub connections_per_peer: usize,
    /// From one IPv4 address, or one IPv6 network of 64 bits.
    pub connections_per_ip: usize,
    /// Handshakes under way; from half of it, newcomers must first prove their address (a QUIC
    /// retry), above it they are refused.
    pub handshakes: usize,
    /// How long a peer that sent nonsense is refused.
    pub penalty: Duration,
    /// Chunks of one fetch in flight.
    pub chunks_in_flight: usize,
    /// Sources of one fetch that are used at the same time.
    pub sources_in_use: usize,
}

impl Default for DataLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            // Two from a simultaneous open, two while an old one times out.
            connections_per_peer: 4,
            connections_per_ip: 64,
            handshakes: 128,
            penalty: Duration::from_secs(300),
            chunks_in_flight: 16,
            sources_in_use: 4,
        }
    }
}

/// How long to wait for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    pub handshake: Duration,
    /// A stream on which nothing moves for this long has stalled.
    pub stall: Duration,
    /// A request is answered whole within this time, however steadily the answer trickles.
    pub request: Duration,
    /// A source that keeps answering "busy" for this long is given up.
    pub busy: Duration,
    /// A connection with no traffic is closed after this.
    pub idle: Duration,
    /// Keeps connections, and the NAT mappings under them, alive; must be less than half of `idle`.
    pub keep_alive: Duration,
    pub punch: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            stall: Duration::from_secs(10),
            request: Duration::from_secs(120),
            busy: Duration::from_secs(60),
            idle: Duration::from_secs(30),
            // NATs forget a UDP mapping after 30 s at the earliest in practice.
            keep_alive: Duration::from_secs(8),
            punch: Duration::from_secs(5),
        }
    }
}

/// The data plane's service.
#[derive(Debug)]
pub struct Data;

impl Data {
    /// Binds the socket and serves until [`DataHandle::shutdown`] or until the last handle is
    /// dropped. Call within a tokio runtime.
    ///
    /// # Errors
    /// [`StartDataError`] if the address is taken or the key is unusable.
    pub fn start(config: DataConfig) -> Result<DataHandle, StartDataError> {
        let shared = Shared::start(config)?;
        Ok(DataHandle { shared: Arc::new(CloseOnDrop(shared)) })
    }
}

/// Talks to the service. Cheap to clone.
#[derive(Clone)]
pub struct DataHandle {
    shared: Arc<CloseOnDrop>,
}

impl std::fmt::Debug for DataHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DataHandle({:?})", self.local_addr())
    }
}

struct CloseOnDrop(Arc<Shared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl DataHandle {
    /// The address that the socket is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.0.local_addr
    }

    /// Connects to `peer` at the first of these addresses that answers as that peer, unless a
    /// connection (in either direction) is already up.
    ///
    /// # Errors
    /// [`ConnectError`], with what every address said.
    pub async fn connect(
        &self,
        peer: NodeId,
        addresses: &[SocketAddr],
    ) -> Result<(), ConnectError> {
        self.shared.0.connect(peer, addresses).await.map(drop)
    }

    /// Opens a connection while the peer does the same, so that both NATs let the other in. Returns
    /// when either direction is up.
    ///
    /// # Errors
    /// [`ConnectError`] after [`Timeouts::punch`].
    pub async fn punch(&self, peer: NodeId, address: SocketAddr) -> Result<(), ConnectError> {
        self.shared.0.punch(peer, address).await
    }

    /// This node's address as a connected `peer` sees it: what others behind NATs should dial.
    ///
    /// # Errors
    /// [`SourceError`] if the peer is not connected or does not say.
    pub async fn observed_addr(&self, peer: NodeId) -> Result<SocketAddr, SourceError> {
        let source = Source { peer, addresses: Vec::new() };
        request::observed(&self.shared.0, &source).await
    }

    /// Fetches a blob from several sources into memory.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn fetch_to_memory(
        &self,
        request: FetchRequest,
    ) -> Result<(Bytes, FetchReport), FetchError> {
        let (sink, report) = fetch::fetch(&self.shared.0, request, sink::Sink::memory()).await?;
        Ok((sink.into_bytes(), report))
    }

    /// Fetches a blob to `path`. Chunks are kept in a file beside it until the blob is whole, then
    /// that is renamed; a fetch of the same blob to the same path continues from the chunks there
    /// that match. Dropping the future stops it; the file may then be busy until a write under way is
    /// done.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn fetch_to_file(
        &self,
        request: FetchRequest,
        path: &Path,
    ) -> Result<FetchReport, FetchError> {
        let sink = sink::Sink::file(path, request.digest)?;
        let (sink, report) = fetch::fetch(&self.shared.0, request, sink).await?;
        sink.finish_file(report.length).await?;
        Ok(report)
    }

    /// Opens single 16 KiB groups of a blob, each checked against the digest. At most
    /// [`GROUPS_PER_REQUEST_MAX`] at a time. The groups come back in the order asked. Dropping the
    /// future withdraws the request.
    ///
    /// # Errors
    /// [`SourceError`]; a wrong proof is a [`Blame`].
    pub async fn open_groups(
        &self,
        source: &Source,
        digest: Digest,
        groups: &[u64],
    ) -> Result<Openings, SourceError> {
        request::groups(&self.shared.0, source, digest, groups).await
    }

    /// Closes every connection and waits until the peers know, at most three seconds.
    pub async fn shutdown(&self) {
        self.shared.0.close();
        let idle = self.shared.0.endpoint.wait_idle();
        if tokio::time::timeout(Duration::from_secs(3), idle).await.is_err() {
            tracing::warn!("peers did not acknowledge the end of their connections in 3 s");
        }
    }
}
