//! The answering side of a connection.

use std::sync::Arc;

use manyhands_proto::tree::{CHUNK_BYTES, ChunkList, GROUP_BYTES};
use manyhands_proto::{Digest, NodeId};
use quinn::{Connection, RecvStream, SendStream};

use super::endpoint::Shared;
use super::openings::{ChunkOpener, GROUPS_PER_CHUNK};
use super::quota::Ledger;
use super::store::BlobInfo;
use super::wire::{REQUEST_BYTES_MAX, Refusal, Request, RequestParseError, STATUS_OK};
use crate::metrics::{DATA_BYTES_SENT, DATA_REQUESTS};

/// Stream reset code: the asker did not read, or the answer took too long.
const RESET_STALLED: u32 = 1;

/// Why a request was not answered to its end.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("malformed request: {0}")]
    Malformed(RequestParseError),
    #[error("malformed request: more than {REQUEST_BYTES_MAX} bytes")]
    TooLong,
    #[error("the asker gave up: {0}")]
    Withdrawn(RequestParseError),
    /// After the status said that all is well, nothing but the blob may follow.
    #[error("the answer could not be finished: {0}")]
    Interrupted(Refusal),
    #[error("the asker stalled")]
    Stalled,
    #[error("the stream broke: {0}")]
    Lost(String),
}

impl ServeError {
    /// As it is once the answer has begun.
    fn interrupted(self) -> Self {
        match self {
            Self::Refused(refusal) => Self::Interrupted(refusal),
            Self::Malformed(_)
            | Self::TooLong
            | Self::Withdrawn(_)
            | Self::Interrupted(_)
            | Self::Stalled
            | Self::Lost(_) => self,
        }
    }
}

impl From<RequestParseError> for ServeError {
    fn from(error: RequestParseError) -> Self {
        match error {
            RequestParseError::Empty | RequestParseError::CutShort { .. } => Self::Withdrawn(error),
            RequestParseError::Kind(_)
            | RequestParseError::TooLong { .. }
            | RequestParseError::Order { .. } => Self::Malformed(error),
        }
    }
}

/// Answers the peer's requests until the connection closes.
pub(super) async fn serve(shared: &Arc<Shared>, peer: NodeId, connection: &Connection) {
    let ledger = shared.ledgers.of(peer);
    // quinn's stream limit bounds how many of these tasks a connection can have.
    while let Ok((send, receive)) = connection.accept_bi().await {
        shared.peers.heard(peer, connection);
        let asker = Asker {
            shared: shared.clone(),
            peer,
            ledger: ledger.clone(),
            connection: connection.clone(),
        };
        tokio::spawn(asker.answer(send, receive));
    }
}

struct Asker {
    shared: Arc<Shared>,
    peer: NodeId,
    ledger: Arc<Ledger>,
    connection: Connection,
}

impl Asker {
    async fn answer(self, mut send: SendStream, receive: RecvStream) {
        let result = match tokio::time::timeout(
            self.shared.timeouts.request,
            self.try_answer(&mut send, receive),
        )
        .await
        {
            Ok(result) => result,
            Err(_) => Err(ServeError::Stalled),
        };
        let label = match result {
            Ok(()) => "served",
            Err(ServeError::Refused(refusal)) => {
                // If even that cannot be sent the asker has gone.
                let _ = self.write(&mut send, &refusal.encode()).await;
                let _ = send.finish();
                refusal.name()
            }
            Err(error @ (ServeError::Malformed(_) | ServeError::TooLong)) => {
                self.shared.peers.drop_peer(self.peer, error.to_string());
                "malformed"
            }
            Err(
                error @ (ServeError::Stalled
                | ServeError::Lost(_)
                | ServeError::Withdrawn(_)
                | ServeError::Interrupted(_)),
            ) => {
                tracing::debug!(peer = %self.peer, %error, "a request was not answered to its end");
                // Already closed if the peer has gone.
                let _ = send.reset(RESET_STALLED.into());
                "lost"
            }
        };
        metrics::counter!(DATA_REQUESTS, "result" => label).increment(1);
    }

    async fn try_answer(
        &self,
        send: &mut SendStream,
        receive: RecvStream,
    ) -> Result<(), ServeError> {
        let request = self.read_request(receive).await?;
        let _permit = self.shared.ledgers.admit(&self.ledger)?;
        match request {
            Request::Head { digest } => self.head(send, digest).await?,
            Request::Chunk { digest, index } => self.chunk(send, digest, index).await?,
            Request::Groups { digest, groups } => self.groups(send, digest, &groups).await?,
            Request::Observed => {
                let address = self.connection.remote_address();
                let address =
                    std::net::SocketAddr::new(address.ip().to_canonical(), address.port());
                self.write(send, &[STATUS_OK]).await?;
                self.write(send, address.to_string().as_bytes()).await?;
            }
        }
        send.finish().map_err(|error| ServeError::Lost(error.to_string()))
    }

    async fn read_request(&self, mut receive: RecvStream) -> Result<Request, ServeError> {
        let read = receive.read_to_end(REQUEST_BYTES_MAX);
        let bytes = tokio::time::timeout(self.shared.timeouts.stall, read)
            .await
            .map_err(|_| ServeError::Stalled)?
            .map_err(|error| match error {
                quinn::ReadToEndError::TooLong => ServeError::TooLong,
                quinn::ReadToEndError::Read(error) => ServeError::Lost(error.to_string()),
            })?;
        Ok(Request::parse(&bytes)?)
    }

    async fn head(&self, send: &mut SendStream, digest: Digest) -> Result<(), ServeError> {
        let info = self.stat(digest).await?;
        let values = info.chunks.values().as_flattened();
        self.shared.ledgers.spend(&self.ledger, values.len() as u64 + 9).await?;
        let mut bytes = Vec::with_capacity(9 + values.len());
        bytes.push(STATUS_OK);
        bytes.extend_from_slice(&info.chunks.length().to_le_bytes());
        bytes.extend_from_slice(values);
        self.write(send, &bytes).await
    }

    async fn chunk(
        &self,
        send: &mut SendStream,
        digest: Digest,
        index: u64,
    ) -> Result<(), ServeError> {
        let info = self.stat(digest).await?;
        if index >= info.chunks.chunk_count() {
            return Err(Refusal::OutOfRange.into());
        }
        let length = info.chunks.chunk_length(index);
        self.shared.ledgers.spend(&self.ledger, length).await?;
        let _memory = self.shared.ledgers.chunk_memory()?;
        let bytes = self.read(digest, index * CHUNK_BYTES, length).await?;
        self.write(send, &[STATUS_OK]).await?;
        self.write(send, &bytes).await
    }

    async fn groups(
        &self,
        send: &mut SendStream,
        digest: Digest,
        groups: &[u64],
    ) -> Result<(), ServeError> {
        let chunks = self.stat(digest).await?.chunks;
        let length = chunks.length();
        let count = length.div_ceil(GROUP_BYTES).max(1);
        if groups.iter().any(|group| *group >= count) {
            return Err(Refusal::OutOfRange.into());
        }
        // The groups ascend, so every chunk is read once.
        let chunk_of = |group: &u64| group / GROUPS_PER_CHUNK;
        let parts = groups.chunk_by(|left, right| chunk_of(left) == chunk_of(right));
        for (position, part) in parts.enumerate() {
            let chunk = chunk_of(&part[0]);
            // What it costs us is reading and hashing the chunk, not the few groups of it.
            let cost = chunks.chunk_length(chunk);
            if position == 0 {
                self.shared.ledgers.spend(&self.ledger, cost).await?;
                let _memory = self.shared.ledgers.chunk_memory()?;
                let opened = self.open(digest, &chunks, part).await?;
                self.write(send, &[STATUS_OK]).await?;
                self.write(send, &length.to_le_bytes()).await?;
                self.write(send, &opened).await?;
            } else {
                self.shared.ledgers.wait_and_spend(&self.ledger, cost).await;
                let memory = self.shared.ledgers.wait_for_chunk_memory().await;
                let _memory = memory.map_err(ServeError::Interrupted)?;
                let opened = self.open(digest, &chunks, part).await;
                self.write(send, &opened.map_err(ServeError::interrupted)?).await?;
            }
        }
        Ok(())
    }

    /// The answer's part for these groups, which lie in one chunk.
    async fn open(
        &self,
        digest: Digest,
        chunks: &Arc<ChunkList>,
        groups: &[u64],
    ) -> Result<Vec<u8>, ServeError> {
        let (store, chunks, groups) = (self.shared.store.clone(), chunks.clone(), groups.to_vec());
        blocking(move || {
            let chunk = groups[0] / GROUPS_PER_CHUNK;
            let bytes = store.read(digest, chunk * CHUNK_BYTES, chunks.chunk_length(chunk))?;
            let opener = ChunkOpener::new(&chunks, chunk, &bytes);
            let encode = |group: &u64| encode_group(&opener, *group, &bytes);
            Ok(groups.iter().map(encode).collect::<Vec<_>>().concat())
        })
        .await
    }

    async fn stat(&self, digest: Digest) -> Result<BlobInfo, ServeError> {
        let (store, peer) = (self.shared.store.clone(), self.peer);
        blocking(move || store.stat(digest, peer)).await
    }

    async fn read(&self, digest: Digest, offset: u64, length: u64) -> Result<Vec<u8>, ServeError> {
        let store = self.shared.store.clone();
        blocking(move || store.read(digest, offset, length)).await
    }

    /// Writes all, with the stall timeout on every bit of progress.
    async fn write(&self, send: &mut SendStream, mut bytes: &[u8]) -> Result<(), ServeError> {
        while !bytes.is_empty() {
            let written = tokio::time::timeout(self.shared.timeouts.stall, send.write(bytes))
                .await
                .map_err(|_| ServeError::Stalled)?
                .map_err(|error| ServeError::Lost(error.to_string()))?;
            metrics::counter!(DATA_BYTES_SENT).increment(written as u64);
            bytes = &bytes[written..];
        }
        Ok(())
    }
}

fn encode_group(opener: &ChunkOpener, group: u64, chunk: &[u8]) -> Vec<u8> {
    let opening = opener.open(group);
    let start = (group % GROUPS_PER_CHUNK * GROUP_BYTES) as usize;
    let end = chunk.len().min(start + GROUP_BYTES as usize);
    let bytes = &chunk[start..end];
    let siblings = opening.siblings.as_flattened();
    let mut encoded = Vec::with_capacity(3 + siblings.len() + bytes.len());
    // A path in a tree of 2^64 bytes has fewer than 64 siblings.
    encoded.push(opening.siblings.len() as u8);
    encoded.extend_from_slice(siblings);
    encoded.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
    encoded.extend_from_slice(bytes);
    encoded
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, ServeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => {
            tracing::error!(%error, "the blob store panicked");
            Err(Refusal::Storage.into())
        }
    }
}
