//! The blobs of a run: what the coordinator made or fetched, and the data set's files where they lie.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use manyhands_network::data::{Access, BlobInfo, BlobStore, FileStore, Refusal, StoreError};
use manyhands_proto::tree::{CHUNK_BYTES, ChunkList, TreeError, chunk_value, chunk_value_count};
use manyhands_proto::{Digest, NodeId, Round};
use serde::{Deserialize, Serialize};

use crate::journal::{BlobKind, BlobNote};

/// θ of at most so many bytes is kept as long as the evidence of its round.
const SMALL_THETA_BYTES: u64 = 64 << 20;
/// Rounds for which a larger θ is kept: members that are behind by less can still be replayed.
const LARGE_THETA_ROUNDS: u32 = 4;

/// A file outside the store that is served under its digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServedFile {
    pub digest: Digest,
    pub path: PathBuf,
}

/// Why a blob could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadBlobError {
    #[error("blob {0:?} is not in the store; restore the run's folder from a backup")]
    Missing(Digest),
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} does not hash to {expected:?} any more", path.display())]
    Changed { path: PathBuf, expected: Digest },
}

/// Blobs by digest. What is public is served to everybody: parameters, merges, records and data. A
/// payload is served to verifiers only, until its round is merged.
#[derive(Debug)]
pub struct RunStore {
    files: FileStore,
    /// The data set's files, which stay where they are.
    served: BTreeMap<Digest, Served>,
    /// θ that was read last: every member's proof is checked against the same.
    theta: Mutex<Option<(Digest, Bytes)>>,
}

#[derive(Debug)]
struct Served {
    path: PathBuf,
    chunks: OnceLock<Arc<ChunkList>>,
}

impl RunStore {
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn open(folder: &Path, bytes_max: u64, served: &[ServedFile]) -> Result<Self, StoreError> {
        let files = FileStore::open(folder, bytes_max)?;
        let served = served
            .iter()
            .map(|ServedFile { digest, path }| {
                (*digest, Served { path: path.clone(), chunks: OnceLock::new() })
            })
            .collect();
        Ok(Self { files, served, theta: Mutex::default() })
    }

    /// # Errors
    /// When the disk or the store is full.
    pub fn insert(&self, bytes: &[u8], access: Access) -> Result<Digest, StoreError> {
        self.files.insert(bytes, access)
    }

    pub fn contains(&self, digest: Digest) -> bool {
        self.files.contains(digest)
    }

    /// A whole blob, checked against its name.
    ///
    /// # Errors
    /// [`ReadBlobError`].
    pub fn get(&self, digest: Digest) -> Result<Bytes, ReadBlobError> {
        let path = self.files.path(digest).ok_or(ReadBlobError::Missing(digest))?;
        let bytes = std::fs::read(&path)
            .map_err(|source| ReadBlobError::Io { path: path.clone(), source })?;
        if Digest::of(&bytes) != digest {
            return Err(ReadBlobError::Changed { path, expected: digest });
        }
        Ok(bytes.into())
    }

    /// θ, from memory if it was the last one asked for.
    ///
    /// # Errors
    /// [`ReadBlobError`].
    pub fn theta(&self, digest: Digest) -> Result<Bytes, ReadBlobError> {
        let mut kept = self.theta.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = kept.as_ref().filter(|(of, _)| *of == digest) {
            return Ok(bytes.clone());
        }
        let bytes = self.get(digest)?;
        *kept = Some((digest, bytes.clone()));
        Ok(bytes)
    }

    /// Says who may read which blob: asked once per change, as the store forgets it on restart.
    pub(crate) fn set_access(&self, notes: &[BlobNote], readers: &Readers) {
        let verifiers: BTreeSet<NodeId> = readers.verifiers.iter().copied().collect();
        for note in notes {
            let access = match note.kind {
                BlobKind::Payload if note.round >= readers.open => Access::Only(verifiers.clone()),
                // Or a verifier that has still to judge could say what another found.
                BlobKind::Evidence if !readers.decided.contains(&note.digest) => Access::Nobody,
                BlobKind::Payload
                | BlobKind::Theta
                | BlobKind::Residual
                | BlobKind::Aggregate
                | BlobKind::Evidence
                | BlobKind::Record => Access::Everyone,
            };
            // Unknown only if it is just being removed.
            let _ = self.files.set_access(note.digest, access);
        }
    }

    /// Removes blobs; one that cannot be removed now is when the store is next opened.
    pub(crate) fn remove(&self, digests: &[Digest]) {
        for digest in digests {
            if let Err(error) = self.files.remove(*digest) {
                tracing::warn!(%error, "a blob was not removed");
            }
        }
    }

    /// Removes what no note speaks of: it was stored by an effect whose result was not journalled.
    pub(crate) fn remove_unnoted(&self, notes: &[BlobNote]) {
        let noted: BTreeSet<Digest> = notes.iter().map(|note| note.digest).collect();
        let strays: Vec<Digest> = self
            .files
            .blobs()
            .into_iter()
            .map(|(digest, _)| digest)
            .filter(|digest| !noted.contains(digest))
            .collect();
        self.remove(&strays);
    }
}

/// What decides who may read a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Readers {
    /// The open round.
    pub(crate) open: Round,
    pub(crate) verifiers: Vec<NodeId>,
    /// Evidence behind what has been decided.
    pub(crate) decided: BTreeSet<Digest>,
}

/// What blobs are still needed for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs<'a> {
    /// Evidence of rounds before this one expires.
    pub(crate) evidence_from: Round,
    pub(crate) open: Round,
    /// θ and residual of the open round, the evidence behind verdicts, and updates that somebody is accused of.
    pub(crate) used: &'a BTreeSet<Digest>,
}

/// Blobs that are no longer kept.
pub(crate) fn expired(
    notes: &[BlobNote],
    theta_bytes: u64,
    Needs { evidence_from, open, used }: Needs<'_>,
) -> Vec<Digest> {
    let theta_from = if theta_bytes <= SMALL_THETA_BYTES {
        evidence_from
    } else {
        evidence_from.max(Round(open.0.saturating_sub(LARGE_THETA_ROUNDS)))
    };
    notes
        .iter()
        .filter(|note| match note.kind {
            BlobKind::Theta | BlobKind::Residual => {
                note.round < theta_from && !used.contains(&note.digest)
            }
            BlobKind::Payload | BlobKind::Aggregate => {
                note.round < evidence_from && !used.contains(&note.digest)
            }
            BlobKind::Evidence => !used.contains(&note.digest),
            // Small, and without them nobody could follow the chain of records back.
            BlobKind::Record => false,
        })
        .map(|note| note.digest)
        .collect()
}

impl BlobStore for RunStore {
    fn stat(&self, digest: Digest, peer: NodeId) -> Result<BlobInfo, Refusal> {
        match self.served.get(&digest) {
            None => self.files.stat(digest, peer),
            Some(served) => served.chunks(digest).map(|chunks| BlobInfo { chunks }),
        }
    }

    fn read(&self, digest: Digest, offset: u64, length: u64) -> Result<Vec<u8>, Refusal> {
        match self.served.get(&digest) {
            None => self.files.read(digest, offset, length),
            Some(served) => served.read(offset, length).map_err(|error| served.unreadable(&error)),
        }
    }
}

impl Served {
    fn chunks(&self, digest: Digest) -> Result<Arc<ChunkList>, Refusal> {
        if let Some(chunks) = self.chunks.get() {
            return Ok(chunks.clone());
        }
        let chunks = File::open(&self.path)
            .and_then(|file| chunk_list(file, digest))
            .map_err(|error| self.unreadable(&error))?;
        Ok(self.chunks.get_or_init(|| Arc::new(chunks)).clone())
    }

    fn read(&self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn unreadable(&self, error: &io::Error) -> Refusal {
        tracing::error!(path = %self.path.display(), %error, "a file of the data set cannot be served");
        Refusal::Storage
    }
}

/// The chunk list of a file that must have this digest; one chunk in memory at a time.
fn chunk_list(mut file: File, digest: Digest) -> io::Result<ChunkList> {
    let changed = |error: TreeError| io::Error::new(io::ErrorKind::InvalidData, error);
    let length = file.metadata()?.len();
    let mut values = Vec::new();
    let mut chunk = Vec::new();
    for index in 0..length.div_ceil(CHUNK_BYTES) {
        chunk.clear();
        file.by_ref().take(CHUNK_BYTES).read_to_end(&mut chunk)?;
        values.push(chunk_value(index, &chunk));
    }
    if chunk_value_count(length) == 0 {
        let list = ChunkList::of(&chunk);
        let expected = digest;
        let got = list.digest();
        return if got == expected {
            Ok(list)
        } else {
            Err(changed(TreeError::Root { expected, got }))
        };
    }
    ChunkList::parse(digest, length, values).map_err(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(kind: BlobKind, round: u32) -> BlobNote {
        let digest = Digest::of(&[kind as u8, round as u8]);
        BlobNote { digest, kind, round: Round(round) }
    }

    #[test]
    fn evidence_and_small_parameters_expire_together_large_ones_earlier_and_records_never() {
        let kinds = [BlobKind::Theta, BlobKind::Payload, BlobKind::Record, BlobKind::Evidence];
        let notes: Vec<_> = kinds
            .into_iter()
            .flat_map(|kind| (0..20).map(move |round| note(kind, round)))
            .collect();
        let mut used = BTreeSet::from([note(BlobKind::Theta, 3).digest]);
        used.extend((0..20).map(|round| note(BlobKind::Evidence, round).digest));
        used.remove(&note(BlobKind::Evidence, 7).digest);
        let needs = Needs { evidence_from: Round(5), open: Round(19), used: &used };
        let small = expired(&notes, 1 << 20, needs);
        let expected: Vec<_> = [0, 1, 2, 4]
            .map(|round| note(BlobKind::Theta, round).digest)
            .into_iter()
            .chain((0..5).map(|round| note(BlobKind::Payload, round).digest))
            .chain([note(BlobKind::Evidence, 7).digest])
            .collect();
        assert_eq!(small, expected);
        let large = expired(&notes, 1 << 30, needs);
        assert!(large.contains(&note(BlobKind::Theta, 14).digest));
        assert!(!large.contains(&note(BlobKind::Theta, 15).digest));
    }

    #[test]
    fn a_file_outside_is_served_under_its_digest_and_not_when_it_changed() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("shard");
        for length in [5_usize, (1 << 20) + 7] {
            let bytes: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
            std::fs::write(&path, &bytes).expect("write");
            let digest = Digest::of(&bytes);
            let peer = NodeId::new([1; 32]);
            let open = |digest| {
                let served = [ServedFile { digest, path: path.clone() }];
                RunStore::open(&folder.path().join("blobs"), 1 << 20, &served).expect("open")
            };
            let store = open(digest);
            assert_eq!(*store.stat(digest, peer).expect("served").chunks, ChunkList::of(&bytes));
            assert_eq!(store.read(digest, 2, 3).expect("read"), &bytes[2..5]);
            let other = Digest::of(b"another");
            assert_eq!(open(other).stat(other, peer).err(), Some(Refusal::Storage));
        }
    }
}
