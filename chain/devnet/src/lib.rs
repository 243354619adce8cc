//! A chain in one process: the runtime executed natively behind Substrate's JSON-RPC.
//!
//! No consensus, no peers: whoever runs it makes the blocks, one when a transaction comes and one
//! per block time regardless, and each is final at once. Everything else is as on a real node: the
//! same runtime, the same encodings, the same state trie and proofs, so that Substrate's clients
//! work unchanged. State is kept on disk, every block's for good.

mod chain;
mod execution;
mod metrics;
mod pool;
mod rpc;
mod sealing;
mod store;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;

use jsonrpsee::server::ServerHandle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use chain::{Chain, OpenChainError};
pub use store::StoreError;

/// The database file in the data folder.
const DATABASE_FILE: &str = "chain.redb";

/// Where and how a devnet runs.
#[derive(Debug, Clone)]
pub struct DevnetConfig {
    /// Folder of the database; made if it is not there.
    pub data_dir: PathBuf,
    /// Where JSON-RPC is served, over HTTP and WebSocket; port 0 takes a free one. There is no
    /// access control: on any but a loopback address everybody may submit transactions.
    pub listen: SocketAddr,
    /// A block is made this often even if nothing waits, so that windows counted in blocks
    /// elapse.
    pub block_time_ms: NonZeroU64,
}

/// Why a devnet did not start. Nothing that was on disk has changed.
#[derive(Debug, thiserror::Error)]
pub enum StartDevnetError {
    #[error("{listen} is in use by another program; choose another port, or stop that one")]
    PortInUse { listen: SocketAddr },
    #[error("cannot listen on {listen}: {source}")]
    Listen { listen: SocketAddr, source: io::Error },
    #[error("cannot make the folder {}: {source}", path.display())]
    DataDir { path: PathBuf, source: io::Error },
    #[error("another devnet uses {}; stop it, or choose another folder", path.display())]
    DataDirInUse { path: PathBuf },
    #[error(
        "{} holds a chain with the genesis {found}, expected {expected}: it was made by another \
         version; choose another folder, or remove it and start anew",
        path.display()
    )]
    OtherGenesis { path: PathBuf, expected: String, found: String },
    #[error("no space is left on the disk of {}", path.display())]
    DiskFull { path: PathBuf },
    #[error("cannot open the chain in {}: {source}", path.display())]
    Store { path: PathBuf, source: StoreError },
    #[error("the runtime has no genesis: {reason}")]
    Genesis { reason: String },
}

/// Why a running devnet stopped by itself. The chain on disk is whole up to its last block.
#[derive(Debug, thiserror::Error)]
pub enum RunDevnetError {
    #[error("no space is left on the disk; the chain is whole up to its last block")]
    DiskFull,
    #[error("a block cannot be written: {0}")]
    Store(#[source] StoreError),
    #[error("making a block panicked; this is a bug")]
    Panicked,
}

/// Starts chains.
pub struct Devnet;

impl Devnet {
    /// Opens or makes the chain in `config.data_dir`, and serves it. Call it within a tokio
    /// runtime; what it started goes on until [`DevnetHandle::shutdown`], or until the handle is
    /// dropped.
    pub async fn start(config: DevnetConfig) -> Result<DevnetHandle, StartDevnetError> {
        let DevnetConfig { data_dir, listen, block_time_ms } = config;
        // The port first: a second start must not touch the first one's folder.
        let listener = bind(listen)?;
        let address =
            listener.local_addr().map_err(|source| StartDevnetError::Listen { listen, source })?;
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "everybody who reaches this address may use the chain");
        }
        let chain = tokio::task::spawn_blocking(move || open(data_dir))
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let chain = Arc::new(chain);
        let server = rpc::serve(listener, chain.clone())
            .map_err(|source| StartDevnetError::Listen { listen, source })?;
        let (stop, stopped) = watch::channel(false);
        let sealer = tokio::spawn(sealing::run(chain.clone(), block_time_ms, stopped));
        let head = chain.head();
        tracing::info!(%address, genesis = ?chain.genesis_hash(), head = head.number, "devnet serves");
        Ok(DevnetHandle { url: rpc::url(address), chain, server, stop, sealer })
    }
}

fn bind(listen: SocketAddr) -> Result<TcpListener, StartDevnetError> {
    let listener = TcpListener::bind(listen).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map_err(|source| {
        if source.kind() == io::ErrorKind::AddrInUse {
            StartDevnetError::PortInUse { listen }
        } else {
            StartDevnetError::Listen { listen, source }
        }
    })
}

fn open(path: PathBuf) -> Result<Chain, StartDevnetError> {
    if let Err(source) = std::fs::create_dir_all(&path) {
        return Err(if store::is_disk_full(&source) {
            StartDevnetError::DiskFull { path }
        } else {
            StartDevnetError::DataDir { path, source }
        });
    }
    Chain::open(&path.join(DATABASE_FILE)).map_err(|failure| match failure {
        OpenChainError::Store(StoreError::DiskFull) => StartDevnetError::DiskFull { path },
        OpenChainError::Store(StoreError::InUse) => StartDevnetError::DataDirInUse { path },
        OpenChainError::Store(source) => StartDevnetError::Store { path, source },
        OpenChainError::OtherGenesis { expected, found } => StartDevnetError::OtherGenesis {
            path,
            expected: hex::encode(expected),
            found: hex::encode(found),
        },
        OpenChainError::Genesis(reason) => StartDevnetError::Genesis { reason },
    })
}

/// A running devnet.
pub struct DevnetHandle {
    url: String,
    chain: Arc<Chain>,
    server: ServerHandle,
    stop: watch::Sender<bool>,
    sealer: JoinHandle<Result<(), StoreError>>,
}

impl DevnetHandle {
    /// Where clients connect: `ws://address:port`. Plain HTTP works on the same port.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The hash of block 0, which names the chain.
    pub fn genesis_hash(&self) -> [u8; 32] {
        self.chain.genesis_hash().0
    }

    /// Waits until the chain stops by itself, which it does only when the disk fails. May be
    /// cancelled and called again.
    pub async fn failed(&mut self) -> RunDevnetError {
        match (&mut self.sealer).await {
            Ok(Err(StoreError::DiskFull)) => RunDevnetError::DiskFull,
            Ok(Err(error)) => RunDevnetError::Store(error),
            Ok(Ok(())) | Err(_) => RunDevnetError::Panicked,
        }
    }

    /// Finishes the block in work, closes all connections and releases the port and the folder.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        if !self.sealer.is_finished()
            && let Err(panic) = (&mut self.sealer).await
        {
            tracing::error!(%panic, "making a block panicked");
        }
        // An error means that the server is stopped already.
        if self.server.stop().is_ok() {
            self.server.clone().stopped().await;
        }
        self.chain.close();
    }
}
