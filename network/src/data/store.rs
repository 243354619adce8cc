//! Where served blobs come from. The trait asks the owner for every request who may read what; the
//! file store keeps blobs as files named by their digest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use manyhands_proto::tree::{CHUNK_BYTES, ChunkList, chunk_value, chunk_value_count};
use manyhands_proto::{Digest, NodeId};

use super::quota::lock;
use super::wire::Refusal;

/// A blob that may be served.
#[derive(Debug, Clone)]
pub struct BlobInfo {
    pub chunks: Arc<ChunkList>,
}

/// What the data plane serves. Called from blocking threads, once per request: `stat` decides
/// whether `peer` may read the blob *now*, so a policy may change at any time.
pub trait BlobStore: Send + Sync + 'static {
    /// # Errors
    /// The [`Refusal`] that the peer is told.
    fn stat(&self, digest: Digest, peer: NodeId) -> Result<BlobInfo, Refusal>;

    /// Bytes `offset..offset + length`, which lie within the blob, after a `stat` that allowed it.
    ///
    /// # Errors
    /// The [`Refusal`] that the peer is told: `Storage` if the disk fails, `Unknown` if the blob has
    /// gone.
    fn read(&self, digest: Digest, offset: u64, length: u64) -> Result<Vec<u8>, Refusal>;
}

/// Serves nothing: for a node that only fetches.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoStore;

impl BlobStore for NoStore {
    fn stat(&self, _digest: Digest, _peer: NodeId) -> Result<BlobInfo, Refusal> {
        Err(Refusal::Unknown)
    }

    fn read(&self, _digest: Digest, _offset: u64, _length: u64) -> Result<Vec<u8>, Refusal> {
        Err(Refusal::Unknown)
    }
}

/// Who may read a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    Everyone,
    Only(BTreeSet<NodeId>),
    /// Not yet: a payload before its commitments are fixed. Peers are told to come back.
    Nobody,
}

impl Access {
    fn check(&self, peer: NodeId) -> Result<(), Refusal> {
        match self {
            Self::Everyone => Ok(()),
            Self::Only(peers) if peers.contains(&peer) => Ok(()),
            Self::Only(_) => Err(Refusal::Forbidden),
            Self::Nobody => Err(Refusal::NotYet),
        }
    }
}

/// Why the store could not take or give a blob.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot use {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{needed} bytes do not fit: {used} of {limit} bytes are used; raise the limit or remove blobs"
    )]
    Full { needed: u64, used: u64, limit: u64 },
    #[error("expected {path} to hold {expected:?}, it hashes to {got:?}")]
    Digest { path: PathBuf, expected: Digest, got: Digest },
    #[error("no blob {0:?} in the store")]
    Unknown(Digest),
}

/// Blobs as files in one directory, named by their digest in hexadecimal. A file appears whole or
/// not at all. Access is not kept on disk: after a restart nobody may read anything until the owner
/// says so again. Its methods read and write files: call them where blocking is allowed.
#[derive(Debug)]
pub struct FileStore {
    folder: PathBuf,
    bytes_max: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<Digest, Entry>,
    /// Bytes of the entries and of the inserts under way.
    used_bytes: u64,
    inserts: u64,
}

#[derive(Debug, Clone)]
struct Entry {
    length: u64,
    access: Access,
    /// Computed when first needed, which also checks the file against its name.
    chunks: Option<Arc<ChunkList>>,
}

impl FileStore {
    /// Opens or makes the directory. Files left by an interrupted insert are removed; files whose
    /// name is not a digest are left alone.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(folder: impl Into<PathBuf>, bytes_max: u64) -> Result<Self, StoreError> {
        let folder = folder.into();
        let io_error = |source| StoreError::Io { path: folder.clone(), source };
        fs::create_dir_all(&folder).map_err(io_error)?;
        let mut state = State::default();
        for entry in fs::read_dir(&folder).map_err(io_error)? {
            let entry = entry.map_err(io_error)?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with(INCOMING) {
                fs::remove_file(entry.path()).map_err(io_error)?;
            } else if let Ok(digest) = name.parse::<Digest>() {
                let length = entry.metadata().map_err(io_error)?.len();
                state.used_bytes += length;
                let entry = Entry { length, access: Access::Nobody, chunks: None };
                state.entries.insert(digest, entry);
            }
        }
        Ok(Self { folder, bytes_max, state: Mutex::new(state) })
    }

    /// Stores `bytes`; a blob that is already there only gets the new access.
    ///
    /// # Errors
    /// [`StoreError::Full`] or [`StoreError::Io`]; nothing is kept then.
    pub fn insert(&self, bytes: &[u8], access: Access) -> Result<Digest, StoreError> {
        let chunks = ChunkList::of(bytes);
        let digest = chunks.digest();
        if self.set_access(digest, access.clone()).is_ok() {
            return Ok(digest);
        }
        let incoming = self.reserve(bytes.len() as u64)?;
        let write = || {
            let mut file = File::create(&incoming.path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|source| StoreError::Io { path: incoming.path.clone(), source })?;
        self.publish(incoming, chunks, access)?;
        Ok(digest)
    }

    /// Moves a file into the store, hashing it on the way; on another file system it is copied.
    ///
    /// # Errors
    /// [`StoreError`]; the file is left where it was unless the very last rename fails.
    pub fn insert_file(&self, path: &Path, access: Access) -> Result<Digest, StoreError> {
        let io_error = |source| StoreError::Io { path: path.to_owned(), source };
        let chunks = File::open(path).and_then(|mut file| hash(&mut file)).map_err(io_error)?;
        let digest = chunks.digest();
        if self.set_access(digest, access.clone()).is_ok() {
            fs::remove_file(path).map_err(io_error)?;
            return Ok(digest);
        }
        let incoming = self.reserve(chunks.length())?;
        if fs::rename(path, &incoming.path).is_err() {
            fs::copy(path, &incoming.path).map_err(io_error)?;
            fs::remove_file(path).map_err(io_error)?;
        }
        self.publish(incoming, chunks, access)?;
        Ok(digest)
    }

    /// Changes who may read a blob, from the next request on.
    ///
    /// # Errors
    /// [`StoreError::Unknown`].
    pub fn set_access(&self, digest: Digest, access: Access) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        let entry = state.entries.get_mut(&digest).ok_or(StoreError::Unknown(digest))?;
        entry.access = access;
        Ok(())
    }

    /// Removes a blob; requests under way fail.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn remove(&self, digest: Digest) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        let entry = state.entries.remove(&digest).ok_or(StoreError::Unknown(digest))?;
        state.used_bytes -= entry.length;
        let path = self.file(digest);
        fs::remove_file(&path).map_err(|source| StoreError::Io { path, source })
    }

    pub fn contains(&self, digest: Digest) -> bool {
        lock(&self.state).entries.contains_key(&digest)
    }

    /// Every blob, with its length in bytes.
    pub fn blobs(&self) -> Vec<(Digest, u64)> {
        lock(&self.state).entries.iter().map(|(digest, entry)| (*digest, entry.length)).collect()
    }

    /// The blob's file, for reading.
    pub fn path(&self, digest: Digest) -> Option<PathBuf> {
        self.contains(digest).then(|| self.file(digest))
    }

    /// Length and chunk list, whoever asks. The first call after a start reads the file.
    ///
    /// # Errors
    /// [`StoreError::Digest`] if the file is not what its name says.
    pub fn chunks(&self, digest: Digest) -> Result<Arc<ChunkList>, StoreError> {
        let entry = lock(&self.state).entries.get(&digest).cloned();
        let entry = entry.ok_or(StoreError::Unknown(digest))?;
        if let Some(chunks) = entry.chunks {
            return Ok(chunks);
        }
        let path = self.file(digest);
        let chunks = match File::open(&path).and_then(|mut file| hash(&mut file)) {
            Ok(chunks) => Arc::new(chunks),
            Err(source) => return Err(StoreError::Io { path, source }),
        };
        if chunks.digest() != digest {
            return Err(StoreError::Digest { path, expected: digest, got: chunks.digest() });
        }
        if let Some(entry) = lock(&self.state).entries.get_mut(&digest) {
            entry.chunks = Some(chunks.clone());
        }
        Ok(chunks)
    }

    fn file(&self, digest: Digest) -> PathBuf {
        self.folder.join(digest.to_string())
    }

    fn reserve(&self, length: u64) -> Result<Incoming<'_>, StoreError> {
        let mut state = lock(&self.state);
        let used = state.used_bytes;
        if used.saturating_add(length) > self.bytes_max {
            return Err(StoreError::Full { needed: length, used, limit: self.bytes_max });
        }
        state.used_bytes += length;
        state.inserts += 1;
        let path = self.folder.join(format!("{INCOMING}{}", state.inserts));
        Ok(Incoming { store: self, path, length, published: false })
    }

    fn publish(
        &self,
        mut incoming: Incoming<'_>,
        chunks: ChunkList,
        access: Access,
    ) -> Result<(), StoreError> {
        let digest = chunks.digest();
        let mut state = lock(&self.state);
        let path = self.file(digest);
        fs::rename(&incoming.path, &path).map_err(|source| StoreError::Io { path, source })?;
        let length = chunks.length();
        let entry = Entry { length, access, chunks: Some(Arc::new(chunks)) };
        if state.entries.insert(digest, entry).is_some() {
            // Two inserts of the same blob at the same time: it takes its room once.
            state.used_bytes -= length;
        }
        incoming.published = true;
        Ok(())
    }
}

impl BlobStore for FileStore {
    fn stat(&self, digest: Digest, peer: NodeId) -> Result<BlobInfo, Refusal> {
        let access = lock(&self.state).entries.get(&digest).map(|entry| entry.access.check(peer));
        access.ok_or(Refusal::Unknown)??;
        let chunks = self.chunks(digest).map_err(|error| {
            tracing::error!(%error, "a blob cannot be served");
            Refusal::Storage
        })?;
        Ok(BlobInfo { chunks })
    }

    fn read(&self, digest: Digest, offset: u64, length: u64) -> Result<Vec<u8>, Refusal> {
        let path = self.path(digest).ok_or(Refusal::Unknown)?;
        let read = || {
            let mut file = File::open(&path)?;
            io::Seek::seek(&mut file, io::SeekFrom::Start(offset))?;
            let mut bytes = vec![0; length as usize];
            file.read_exact(&mut bytes)?;
            Ok::<_, io::Error>(bytes)
        };
        read().map_err(|error| {
            tracing::error!(path = %path.display(), %error, "a blob cannot be read");
            Refusal::Storage
        })
    }
}

const INCOMING: &str = "incoming-";

/// Room and a file name for an insert; both are given back unless it is published.
struct Incoming<'a> {
    store: &'a FileStore,
    path: PathBuf,
    length: u64,
    published: bool,
}

impl Drop for Incoming<'_> {
    fn drop(&mut self) {
        if !self.published {
            lock(&self.store.state).used_bytes -= self.length;
            // What cannot be removed now is removed when the store is next opened.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The chunk list of what a reader gives, one MiB in memory at a time.
fn hash(reader: &mut impl Read) -> io::Result<ChunkList> {
    let mut whole = blake3::Hasher::new();
    let mut values = Vec::new();
    let mut length = 0;
    let mut chunk = Vec::with_capacity(CHUNK_BYTES as usize);
    loop {
        chunk.clear();
        reader.by_ref().take(CHUNK_BYTES).read_to_end(&mut chunk)?;
        if chunk.is_empty() {
            break;
        }
        whole.update(&chunk);
        values.push(chunk_value(length / CHUNK_BYTES, &chunk));
        length += chunk.len() as u64;
    }
    if chunk_value_count(length) == 0 {
        values.clear();
    }
    let digest = Digest::new(*whole.finalize().as_bytes());
    Ok(ChunkList::parse(digest, length, values).expect("values of the same bytes as the digest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 4 << 20;

    fn peer() -> NodeId {
        NodeId::new([9; 32])
    }

    fn blob(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i % 253) as u8).collect()
    }

    #[test]
    fn access_is_asked_for_every_request_and_forgotten_on_restart() {
        let folder = tempfile::tempdir().expect("folder");
        let store = FileStore::open(folder.path(), LIMIT).expect("open");
        let bytes = blob((1 << 20) + 9);
        let digest = store.insert(&bytes, Access::Nobody).expect("insert");
        let refused = |store: &FileStore| store.stat(digest, peer()).err();
        assert_eq!(refused(&store), Some(Refusal::NotYet));
        store.set_access(digest, Access::Only(BTreeSet::new())).expect("known");
        assert_eq!(refused(&store), Some(Refusal::Forbidden));
        store.set_access(digest, Access::Only(BTreeSet::from([peer()]))).expect("known");
        assert_eq!(*store.stat(digest, peer()).expect("allowed").chunks, ChunkList::of(&bytes));
        assert_eq!(store.read(digest, 1 << 20, 9).expect("read"), &bytes[1 << 20..]);
        assert_eq!(store.stat(Digest::of(b"other"), peer()).err(), Some(Refusal::Unknown));

        let reopened = FileStore::open(folder.path(), LIMIT).expect("open");
        assert_eq!(refused(&reopened), Some(Refusal::NotYet));
        assert_eq!(reopened.blobs(), [(digest, bytes.len() as u64)]);
        reopened.set_access(digest, Access::Everyone).expect("known");
        assert_eq!(*reopened.stat(digest, peer()).expect("allowed").chunks, ChunkList::of(&bytes));
    }

    #[test]
    fn a_full_store_refuses_and_keeps_what_it_has() {
        let folder = tempfile::tempdir().expect("folder");
        let store = FileStore::open(folder.path(), 1000).expect("open");
        let kept = store.insert(&blob(700), Access::Everyone).expect("fits");
        assert_eq!(store.insert(&blob(700), Access::Everyone).expect("is there"), kept);
        let full = store.insert(&blob(301), Access::Everyone);
        assert!(matches!(full, Err(StoreError::Full { needed: 301, used: 700, limit: 1000 })));
        store.remove(kept).expect("remove");
        assert_eq!(lock(&store.state).used_bytes, 0);
        store.insert(&blob(301), Access::Everyone).expect("fits now");
    }

    #[test]
    fn a_file_is_moved_in_and_a_damaged_one_is_not_served() {
        let folder = tempfile::tempdir().expect("folder");
        let source = folder.path().join("payload");
        fs::write(&source, blob(5000)).expect("write");
        let store = FileStore::open(folder.path().join("store"), LIMIT).expect("open");
        let digest = store.insert_file(&source, Access::Everyone).expect("insert");
        assert_eq!(digest, Digest::of(&blob(5000)));
        assert!(!source.exists());
        let path = store.path(digest).expect("known");
        drop(store);

        fs::write(path, blob(5001)).expect("damage");
        fs::write(folder.path().join("store/incoming-3"), b"half").expect("interrupted insert");
        let store = FileStore::open(folder.path().join("store"), LIMIT).expect("open");
        store.set_access(digest, Access::Everyone).expect("known");
        assert_eq!(store.stat(digest, peer()).err(), Some(Refusal::Storage));
        assert!(!folder.path().join("store/incoming-3").exists());
    }
}
