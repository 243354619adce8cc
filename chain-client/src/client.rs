//! The connection to a node, and what it knows about the chain behind it.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use manyhands_proto::{Digest, NodeId};
use parking_lot::Mutex;
use subxt::OnlineClient;
use subxt::config::RpcConfigFor;
use subxt::config::substrate::{H256, SubstrateConfig, SubstrateHeader};
use subxt::rpcs::LegacyRpcMethods;
use subxt::rpcs::client::RpcClient;
use subxt::rpcs::client::reconnecting_rpc_client::{
    ExponentialBackoff, RpcClient as ReconnectingClient,
};

use crate::chain;
use crate::metrics;

/// How long the first connection is tried: a node started together with its client needs a
/// moment.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one question may take, a reconnection included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of an answer: a block of the largest size in hexadecimal, and a little more.
const ANSWER_BYTES_MAX: u32 = 32 << 20;

pub(crate) type Rpc = LegacyRpcMethods<RpcConfigFor<SubstrateConfig>>;
pub(crate) type AtBlock = subxt::client::OnlineClientAtBlock<SubstrateConfig>;
pub(crate) type Header = SubstrateHeader<H256>;

/// Why no connection was made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("expected a chain address that begins with ws:// or wss://, got {url:?}")]
    Address { url: String },
    #[error(
        "no chain answers at {url}: start one with `manyhands devnet`, or check the address \
         ({reason})"
    )]
    Unreachable { url: String, reason: String },
    #[error(
        "the chain at {url} (spec version {spec_version}) has another training pallet than this \
         client was built for; update whichever is older"
    )]
    OtherRuntime { url: String, spec_version: u32 },
    #[error("the node at {url} gave a wrong answer: {reason}")]
    Node { url: String, reason: String },
}

/// Why a question got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("the chain did not answer within {} s", waited.as_secs())]
    TimedOut { waited: Duration },
    #[error("the connection to the chain was lost: {0}")]
    Disconnected(String),
    #[error("the chain has no block {0}")]
    NoSuchBlock(String),
    #[error("the node refused: {0}")]
    Refused(String),
    #[error("the node gave {what} that does not decode: {reason}")]
    Undecodable { what: &'static str, reason: String },
}

/// A block, by both its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRef {
    pub number: u32,
    /// BLAKE2b-256 of the header.
    pub hash: Digest,
}

impl fmt::Display for BlockRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.number, self.hash.short())
    }
}

/// A connection to one node, shared by its clones. It reconnects by itself; what is asked
/// meanwhile waits, up to a time limit.
#[derive(Clone)]
pub struct ChainClient {
    inner: Arc<Inner>,
}

struct Inner {
    url: String,
    api: OnlineClient<SubstrateConfig>,
    rpc: Rpc,
    development: bool,
    /// The highest finalised block this client has seen: a node below it is behind.
    highest_seen: AtomicU32,
    /// One submission at a time for each account, so that nonces are given out in order.
    turns: Mutex<BTreeMap<NodeId, Arc<tokio::sync::Mutex<()>>>>,
}

impl fmt::Debug for ChainClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChainClient({})", self.inner.url)
    }
}

impl ChainClient {
    /// Connects to the node at `url` (`ws://` or `wss://`) and checks that its runtime is one
    /// that this client understands.
    pub async fn connect(url: &str) -> Result<Self, ConnectError> {
        if !url.starts_with("ws://") && !url.starts_with("wss://") {
            return Err(ConnectError::Address { url: url.to_owned() });
        }
        let unreachable =
            |reason: String| ConnectError::Unreachable { url: url.to_owned(), reason };
        let connecting = ReconnectingClient::builder()
            .retry_policy(ExponentialBackoff::from_millis(50).max_delay(Duration::from_secs(2)))
            .max_response_size(ANSWER_BYTES_MAX)
            .request_timeout(REQUEST_TIMEOUT)
            .build(url);
        let connection = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| unreachable(format!("tried for {} s", CONNECT_TIMEOUT.as_secs())))?
            .map_err(|failure| unreachable(failure.to_string()))?;
        let connection = RpcClient::new(connection);
        tokio::time::timeout(REQUEST_TIMEOUT, Self::introduce(url, connection)).await.map_err(
            |_| {
                unreachable(format!(
                    "it took the connection and was silent for {} s",
                    REQUEST_TIMEOUT.as_secs()
                ))
            },
        )?
    }

    async fn introduce(url: &str, connection: RpcClient) -> Result<Self, ConnectError> {
        let wrong = |reason: String| ConnectError::Node { url: url.to_owned(), reason };
        let api = OnlineClient::<SubstrateConfig>::from_rpc_client(connection.clone())
            .await
            .map_err(|failure| wrong(failure.to_string()))?;
        let rpc = Rpc::new(connection);
        let at = api.at_current_block().await.map_err(|failure| wrong(failure.to_string()))?;
        if !chain::is_codegen_valid_for(at.metadata_ref()) {
            return Err(ConnectError::OtherRuntime {
                url: url.to_owned(),
                spec_version: at.spec_version(),
            });
        }
        let kind = rpc.system_chain_type().await.map_err(|failure| wrong(failure.to_string()))?;
        let number = u32::try_from(at.block_number())
            .map_err(|_| wrong(format!("block number {} is over 32 bits", at.block_number())))?;
        Ok(Self {
            inner: Arc::new(Inner {
                url: url.to_owned(),
                api,
                rpc,
                development: kind == "Development",
                highest_seen: AtomicU32::new(number),
                turns: Mutex::default(),
            }),
        })
    }

    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// The hash of block 0, which names the chain.
    pub fn genesis_hash(&self) -> Digest {
        Digest::new(self.inner.api.genesis_hash().0)
    }

    /// Whether the node says that this chain is for development: its money is worthless, and
    /// there is a faucet.
    pub fn is_development(&self) -> bool {
        self.inner.development
    }

    /// The newest finalised block.
    pub async fn finalized_head(&self) -> Result<BlockRef, ReadError> {
        let hash = answer(self.rpc().chain_get_finalized_head()).await?;
        let header = self.header(hash).await?;
        Ok(BlockRef { number: self.saw(header.number)?, hash: Digest::new(hash.0) })
    }

    /// The hash of the finalised block `number`; nothing if there is none yet.
    pub async fn block_hash(&self, number: u32) -> Result<Option<Digest>, ReadError> {
        if number > self.finalized_head().await?.number {
            return Ok(None);
        }
        let hash = answer(self.rpc().chain_get_block_hash(Some(number.into()))).await?;
        Ok(hash.map(|hash| Digest::new(hash.0)))
    }

    pub(crate) fn rpc(&self) -> &Rpc {
        &self.inner.rpc
    }

    /// The highest finalised block seen from any answer.
    pub(crate) fn highest_seen(&self) -> u32 {
        self.inner.highest_seen.load(Ordering::Relaxed)
    }

    /// Notes a finalised block's number.
    pub(crate) fn saw(&self, number: u64) -> Result<u32, ReadError> {
        let number = u32::try_from(number).map_err(|_| ReadError::Undecodable {
            what: "a block number",
            reason: format!("{number} is over 32 bits"),
        })?;
        self.inner.highest_seen.fetch_max(number, Ordering::Relaxed);
        metrics::finalized_head(self.highest_seen());
        Ok(number)
    }

    /// The lock of an account's submissions.
    pub(crate) fn turn(&self, account: NodeId) -> Arc<tokio::sync::Mutex<()>> {
        self.inner.turns.lock().entry(account).or_default().clone()
    }

    pub(crate) async fn header(&self, hash: H256) -> Result<Header, ReadError> {
        answer(self.rpc().chain_get_header(Some(hash)))
            .await?
            .ok_or_else(|| ReadError::NoSuchBlock(format!("{hash:#x}")))
    }

    /// The chain as it was after the newest finalised block.
    pub(crate) async fn at_head(&self) -> Result<AtBlock, ReadError> {
        let at = answer(self.inner.api.at_current_block()).await?;
        self.saw(at.block_number())?;
        Ok(at)
    }

    /// The chain as it was after `block`; at the newest finalised block if none is given.
    pub(crate) async fn at(&self, block: Option<Digest>) -> Result<AtBlock, ReadError> {
        match block {
            None => self.at_head().await,
            Some(hash) => answer(self.inner.api.at_block(H256(*hash.as_bytes()))).await,
        }
    }
}

/// Waits for an answer, but not for ever.
pub(crate) async fn answer<T, E>(
    question: impl Future<Output = Result<T, E>>,
) -> Result<T, ReadError>
where
    subxt::Error: From<E>,
{
    match tokio::time::timeout(REQUEST_TIMEOUT, question).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(failure)) => Err(subxt::Error::from(failure).into()),
        Err(_) => {
            metrics::request_timed_out();
            Err(ReadError::TimedOut { waited: REQUEST_TIMEOUT })
        }
    }
}

impl From<subxt::Error> for ReadError {
    fn from(failure: subxt::Error) -> Self {
        if failure.is_disconnected_will_reconnect() {
            return Self::Disconnected(failure.to_string());
        }
        if let subxt::Error::OtherRpcClientError(failure) = failure {
            return failure.into();
        }
        // The rest of subxt's errors differ in where something was refused, not in what the
        // caller can do about it; their text says both.
        Self::Refused(failure.to_string())
    }
}

impl From<subxt::rpcs::Error> for ReadError {
    fn from(failure: subxt::rpcs::Error) -> Self {
        use subxt::rpcs::Error;
        let reason = failure.to_string();
        if matches!(failure, Error::DisconnectedWillReconnect(_) | Error::Client(_)) {
            Self::Disconnected(reason)
        } else if matches!(failure, Error::Deserialization(_) | Error::Decode(_)) {
            Self::Undecodable { what: "an answer", reason }
        } else {
            Self::Refused(reason)
        }
    }
}
