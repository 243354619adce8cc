//! The asking side of one stream.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use manyhands_proto::Digest;
use manyhands_proto::tree::{
    CHUNK_BYTES, ChunkList, GROUP_BYTES, Opening, TreeError, chunk_value_count,
};
use quinn::{ReadExactError, RecvStream};

use super::endpoint::Shared;
use super::fetch::Source;
use super::peers::ConnectError;
use super::quota::Ledger;
use super::wire::{GROUPS_PER_REQUEST_MAX, OBSERVED_BYTES_MAX, Refusal, Request, STATUS_OK};

/// What a source provably did wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Blame {
    #[error("its chunk list is not the blob's: {0}")]
    ChunkList(TreeError),
    #[error("chunk {index} is not the blob's: {error}")]
    Chunk { index: u64, error: TreeError },
    #[error("chunk {index} is longer than the {expected} bytes of its own chunk list")]
    TooLong { index: u64, expected: u64 },
    #[error("group {group} does not open against the digest: {error}")]
    Opening { group: u64, error: TreeError },
    #[error("expected {expected}, got {got}")]
    Answer { expected: &'static str, got: String },
}

/// Why a source did not give what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the source refused: {0}")]
    Refused(#[from] Refusal),
    #[error("the source lied: {0}")]
    Blame(#[from] Blame),
    #[error("nothing arrived for {waited:?}")]
    Stalled { waited: Duration },
    #[error("the chunk took longer than {limit:?}")]
    TooSlow { limit: Duration },
    #[error("the connection broke: {0}")]
    Lost(String),
    #[error("the blob has {length} bytes, at most {limit} were expected")]
    TooLarge { length: u64, limit: u64 },
    #[error("1 to {GROUPS_PER_REQUEST_MAX} groups can be opened at a time, got {got}")]
    GroupCount { got: usize },
}

impl SourceError {
    /// For metrics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Connect(_) => "connect",
            Self::Refused(_) => "refused",
            Self::Blame(_) => "blame",
            Self::Stalled { .. } => "stalled",
            Self::TooSlow { .. } => "too_slow",
            Self::Lost(_) => "lost",
            Self::TooLarge { .. } => "too_large",
            Self::GroupCount { .. } => "group_count",
        }
    }
}

/// One opened group: 16 KiB of the blob (less at its end), proven against the digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedGroup {
    pub opening: Opening,
    pub bytes: Vec<u8>,
}

/// Opened groups, and the length of the blob that the source stated. The bytes are proven; the
/// length is only proven to lead to the same paths, so compare it to the one you expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Openings {
    pub length: u64,
    pub groups: Vec<OpenedGroup>,
}

/// The blob's length and chunk list, which merges to the digest.
pub(super) async fn head(
    shared: &Arc<Shared>,
    source: &Source,
    digest: Digest,
    length_max: u64,
) -> Result<ChunkList, SourceError> {
    let mut answer = ask(shared, source, &Request::Head { digest }).await?;
    let length = answer.u64().await?;
    if length > length_max {
        return Err(SourceError::TooLarge { length, limit: length_max });
    }
    let count = chunk_value_count(length);
    // Grows with what arrives, not with what was announced.
    let mut values = Vec::new();
    for _ in 0..count {
        values.push(answer.array::<32>().await?);
    }
    answer.end("the end of the chunk list").await?;
    let list = ChunkList::parse(digest, length, values).map_err(Blame::ChunkList)?;
    Ok(list)
}

/// One chunk, checked against `list`, which must be this source's own.
pub(super) async fn chunk(
    shared: &Arc<Shared>,
    source: &Source,
    list: &ChunkList,
    index: u64,
) -> Result<Vec<u8>, SourceError> {
    let limit = shared.timeouts.chunk;
    let read = async {
        let request = Request::Chunk { digest: list.digest(), index };
        let mut answer = ask(shared, source, &request).await?;
        let expected = list.chunk_length(index);
        let mut bytes = Vec::with_capacity(expected.min(CHUNK_BYTES) as usize);
        while let Some(piece) = answer.piece().await? {
            if bytes.len() as u64 + piece.len() as u64 > expected {
                return Err(Blame::TooLong { index, expected }.into());
            }
            bytes.extend_from_slice(&piece);
        }
        Ok::<_, SourceError>(bytes)
    };
    let bytes =
        tokio::time::timeout(limit, read).await.map_err(|_| SourceError::TooSlow { limit })??;
    list.verify(index, &bytes).map_err(|error| Blame::Chunk { index, error })?;
    metrics::counter!(crate::metrics::DATA_CHUNKS_VERIFIED).increment(1);
    Ok(bytes)
}

pub(super) async fn groups(
    shared: &Arc<Shared>,
    source: &Source,
    digest: Digest,
    groups: &[u64],
) -> Result<Openings, SourceError> {
    if groups.is_empty() || groups.len() > GROUPS_PER_REQUEST_MAX {
        return Err(SourceError::GroupCount { got: groups.len() });
    }
    let request = Request::Groups { digest, groups: groups.to_vec() };
    let mut answer = ask(shared, source, &request).await?;
    let length = answer.u64().await?;
    let mut opened = Vec::with_capacity(groups.len());
    for group in groups {
        let [sibling_count] = answer.array().await?;
        let mut siblings = Vec::with_capacity(sibling_count.into());
        for _ in 0..sibling_count {
            siblings.push(answer.array().await?);
        }
        let byte_count = u16::from_le_bytes(answer.array().await?);
        if u64::from(byte_count) > GROUP_BYTES {
            let got = format!("{byte_count} bytes");
            return Err(Blame::Answer { expected: "a group of at most 16384 bytes", got }.into());
        }
        let mut bytes = vec![0; byte_count.into()];
        answer.fill(&mut bytes).await?;
        let opening = Opening { group: *group, siblings };
        opening
            .verify(digest, length, &bytes)
            .map_err(|error| Blame::Opening { group: *group, error })?;
        opened.push(OpenedGroup { opening, bytes });
    }
    answer.end("the end of the openings").await?;
    Ok(Openings { length, groups: opened })
}

pub(super) async fn observed(
    shared: &Arc<Shared>,
    source: &Source,
) -> Result<SocketAddr, SourceError> {
    let mut answer = ask(shared, source, &Request::Observed).await?;
    let mut text = Vec::new();
    while let Some(piece) = answer.piece().await? {
        if text.len() + piece.len() > OBSERVED_BYTES_MAX {
            let got = "more than 64 bytes".to_owned();
            return Err(Blame::Answer { expected: "a socket address", got }.into());
        }
        text.extend_from_slice(&piece);
    }
    let text = String::from_utf8_lossy(&text);
    text.parse().map_err(|_| {
        Blame::Answer { expected: "a socket address", got: text.escape_debug().to_string() }.into()
    })
}

/// Sends a request and reads the status byte.
async fn ask(
    shared: &Arc<Shared>,
    source: &Source,
    request: &Request,
) -> Result<Answer, SourceError> {
    let connection = shared.connect(source.peer, &source.addresses).await?;
    let stall = shared.timeouts.stall;
    let open = async {
        let (mut send, receive) = connection.open_bi().await.map_err(lost)?;
        send.write_all(&request.encode()).await.map_err(lost)?;
        send.finish().map_err(lost)?;
        Ok::<_, SourceError>(receive)
    };
    // A peer that grants no streams stalls us here.
    let stream = tokio::time::timeout(stall, open)
        .await
        .map_err(|_| SourceError::Stalled { waited: stall })??;
    let mut answer = Answer { stream, stall, ledger: shared.ledgers.of(source.peer) };
    let [status] = answer.array().await?;
    if status == STATUS_OK {
        return Ok(answer);
    }
    let retry_after_ms = if status == 4 { u32::from_le_bytes(answer.array().await?) } else { 0 };
    let refusal = Refusal::decode(status, retry_after_ms)
        .ok_or_else(|| Blame::Answer { expected: "a status of 0 to 6", got: status.to_string() })?;
    Err(refusal.into())
}

/// The rest of a stream. Every read has the stall timeout.
struct Answer {
    stream: RecvStream,
    stall: Duration,
    ledger: Arc<Ledger>,
}

impl Answer {
    async fn array<const N: usize>(&mut self) -> Result<[u8; N], SourceError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes).await?;
        Ok(bytes)
    }

    async fn u64(&mut self) -> Result<u64, SourceError> {
        self.array().await.map(u64::from_le_bytes)
    }

    async fn fill(&mut self, bytes: &mut [u8]) -> Result<(), SourceError> {
        let read = tokio::time::timeout(self.stall, self.stream.read_exact(bytes)).await;
        match read.map_err(|_| SourceError::Stalled { waited: self.stall })? {
            Ok(()) => {
                self.ledger.count_received(bytes.len() as u64);
                Ok(())
            }
            Err(ReadExactError::FinishedEarly(got)) => {
                let got = format!("the end after {got} of {} bytes", bytes.len());
                Err(Blame::Answer { expected: "a whole answer", got }.into())
            }
            Err(ReadExactError::ReadError(error)) => Err(lost(error)),
        }
    }

    /// The next bytes, or `None` at the end.
    async fn piece(&mut self) -> Result<Option<bytes::Bytes>, SourceError> {
        let read = self.stream.read_chunk(CHUNK_BYTES as usize, true);
        let read = tokio::time::timeout(self.stall, read).await;
        let piece = read.map_err(|_| SourceError::Stalled { waited: self.stall })?.map_err(lost)?;
        Ok(piece.map(|piece| {
            self.ledger.count_received(piece.bytes.len() as u64);
            piece.bytes
        }))
    }

    async fn end(&mut self, expected: &'static str) -> Result<(), SourceError> {
        match self.piece().await? {
            None => Ok(()),
            Some(_) => Err(Blame::Answer { expected, got: "more bytes".to_owned() }.into()),
        }
    }
}

fn lost(error: impl std::fmt::Display) -> SourceError {
    SourceError::Lost(error.to_string())
}
