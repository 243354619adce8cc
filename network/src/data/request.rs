//! The asking side of one stream.
//!
//! Every request has one limit for all of it, from dialling to the last byte of its answer: a limit
//! on each read alone lets a source take as long as it likes, a byte at a time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use manyhands_proto::Digest;
use manyhands_proto::tree::{
    CHUNK_BYTES, ChunkList, GROUP_BYTES, OpenedGroup, Opening, Openings, TreeError,
    chunk_value_count,
};
use quinn::{ReadExactError, RecvStream, SendStream};

use super::endpoint::Shared;
use super::fetch::Source;
use super::peers::ConnectError;
use super::wire::{GROUPS_PER_REQUEST_MAX, OBSERVED_BYTES_MAX, Refusal, Request, STATUS_OK};
use crate::metrics::DATA_BYTES_RECEIVED;

/// Stream reset code: the request was given up while it was sent.
const RESET_WITHDRAWN: u32 = 2;

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
    #[error("the answer took longer than {limit:?}")]
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

impl SourceError {
    /// Whether the source itself has shown that it does not have what it committed to. Of all else a moment later may be
    /// another.
    pub fn is_lie(&self) -> bool {
        match self {
            Self::Blame(_)
            | Self::TooLarge { .. }
            | Self::Refused(Refusal::OutOfRange)
            | Self::GroupCount { .. } => true,
            Self::Refused(
                Refusal::Unknown
                | Refusal::Forbidden
                | Refusal::NotYet
                | Refusal::Busy { .. }
                | Refusal::Storage,
            )
            | Self::Connect(_)
            | Self::Stalled { .. }
            | Self::TooSlow { .. }
            | Self::Lost(_) => false,
        }
    }
}

/// The blob's length and chunk list, which merges to the digest.
pub(super) async fn head(
    shared: &Arc<Shared>,
    source: &Source,
    digest: Digest,
    length_max: u64,
) -> Result<ChunkList, SourceError> {
    limited(shared, async {
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
        Ok::<_, SourceError>(list)
    })
    .await
}

/// One chunk, checked against `list`, which must be this source's own.
pub(super) async fn chunk(
    shared: &Arc<Shared>,
    source: &Source,
    list: &ChunkList,
    index: u64,
) -> Result<Vec<u8>, SourceError> {
    let bytes = limited(shared, async {
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
    })
    .await?;
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
    let mut ascending = groups.to_vec();
    ascending.sort_unstable();
    ascending.dedup();
    let (length, opened) =
        limited(shared, opened_groups(shared, source, digest, ascending)).await?;
    let groups = groups.iter().filter_map(|group| opened.get(group).cloned()).collect();
    Ok(Openings { length, groups })
}

async fn opened_groups(
    shared: &Arc<Shared>,
    source: &Source,
    digest: Digest,
    groups: Vec<u64>,
) -> Result<(u64, BTreeMap<u64, OpenedGroup>), SourceError> {
    let request = Request::Groups { digest, groups: groups.clone() };
    let mut answer = ask(shared, source, &request).await?;
    let length = answer.u64().await?;
    let mut opened = BTreeMap::new();
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
        let opening = Opening { group, siblings };
        opening.verify(digest, length, &bytes).map_err(|error| Blame::Opening { group, error })?;
        opened.insert(group, OpenedGroup { opening, bytes });
    }
    answer.end("the end of the openings").await?;
    Ok((length, opened))
}

pub(super) async fn observed(
    shared: &Arc<Shared>,
    source: &Source,
) -> Result<SocketAddr, SourceError> {
    let text = limited(shared, async {
        let mut answer = ask(shared, source, &Request::Observed).await?;
        let mut text = Vec::new();
        while let Some(piece) = answer.piece().await? {
            if text.len() + piece.len() > OBSERVED_BYTES_MAX {
                let got = "more than 64 bytes".to_owned();
                return Err(Blame::Answer { expected: "a socket address", got }.into());
            }
            text.extend_from_slice(&piece);
        }
        Ok::<_, SourceError>(text)
    })
    .await?;
    let text = String::from_utf8_lossy(&text);
    text.parse().map_err(|_| {
        Blame::Answer { expected: "a socket address", got: text.escape_debug().to_string() }.into()
    })
}

/// The whole of a request and its answer, which trickles in vain.
async fn limited<T>(
    shared: &Shared,
    work: impl Future<Output = Result<T, SourceError>>,
) -> Result<T, SourceError> {
    let limit = shared.timeouts.request;
    tokio::time::timeout(limit, work).await.unwrap_or(Err(SourceError::TooSlow { limit }))
}

/// The sending half of a request until all of it is sent. quinn ends a stream that is dropped, so that
/// a request given up half-way would arrive as a malformed one: it is reset instead.
struct Unsent(Option<SendStream>);

impl Unsent {
    async fn send(mut self, request: &[u8]) -> Result<(), SourceError> {
        if let Some(stream) = &mut self.0 {
            stream.write_all(request).await.map_err(lost)?;
            stream.finish().map_err(lost)?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.0 {
            // Fails if the peer has stopped it, which is as good.
            let _ = stream.reset(RESET_WITHDRAWN.into());
        }
    }
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
        let (send, receive) = connection.open_bi().await.map_err(lost)?;
        Unsent(Some(send)).send(&request.encode()).await?;
        Ok::<_, SourceError>(receive)
    };
    // A peer that grants no streams stalls us here.
    let stream = tokio::time::timeout(stall, open)
        .await
        .map_err(|_| SourceError::Stalled { waited: stall })??;
    let mut answer = Answer { stream, stall };
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
                metrics::counter!(DATA_BYTES_RECEIVED).increment(bytes.len() as u64);
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
            metrics::counter!(DATA_BYTES_RECEIVED).increment(piece.bytes.len() as u64);
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
