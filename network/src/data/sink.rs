//! Where the chunks of a fetch go: memory, or a file that a later fetch continues.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use manyhands_proto::Digest;
use manyhands_proto::tree::{CHUNK_BYTES, ChunkList};

use super::fetch::FetchError;
use super::quota::lock;

#[derive(Debug, Clone)]
pub(super) enum Sink {
    Memory(Arc<Mutex<BTreeMap<u64, Vec<u8>>>>),
    File(Arc<PartialFile>),
}

/// Chunks at their final offsets; holes where chunks are missing. No index is kept beside it: what is
/// there is found out by hashing, so a crash at any point cannot lie.
#[derive(Debug)]
pub(super) struct PartialFile {
    file: Mutex<File>,
    path: PathBuf,
    target: PathBuf,
}

impl Sink {
    pub(super) fn memory() -> Self {
        Self::Memory(Arc::default())
    }

    /// Opens or continues `<target>.<digest>.partial`, which nobody else may be filling.
    pub(super) fn file(target: &Path, digest: Digest) -> Result<Self, FetchError> {
        let mut path = target.as_os_str().to_owned();
        path.push(format!(".{}.partial", digest.short()));
        let path = PathBuf::from(path);
        let io_error = |source| FetchError::Io { path: path.clone(), source };
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(io_error)?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io_error)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FetchError::UnderWay { path }),
            Err(TryLockError::Error(source)) => return Err(FetchError::Io { path, source }),
        }
        let target = target.to_owned();
        Ok(Self::File(Arc::new(PartialFile { file: Mutex::new(file), path, target })))
    }

    /// Keeps the chunks that match `list` and returns the indices of the others.
    pub(super) async fn missing(&self, list: Arc<ChunkList>) -> Result<Vec<u64>, FetchError> {
        match self {
            Self::Memory(chunks) => {
                let mut chunks = lock(chunks);
                chunks.retain(|index, bytes| list.verify(*index, bytes).is_ok());
                Ok((0..list.chunk_count()).filter(|index| !chunks.contains_key(index)).collect())
            }
            Self::File(partial) => {
                let partial = partial.clone();
                partial.clone().blocking(move || partial.missing(&list)).await
            }
        }
    }

    /// Takes a verified chunk.
    pub(super) async fn store(&self, index: u64, bytes: Vec<u8>) -> Result<(), FetchError> {
        match self {
            Self::Memory(chunks) => {
                lock(chunks).insert(index, bytes);
                Ok(())
            }
            Self::File(partial) => {
                let partial = partial.clone();
                partial.clone().blocking(move || partial.store(index, &bytes)).await
            }
        }
    }

    /// The whole blob of a memory sink.
    pub(super) fn into_bytes(self) -> Bytes {
        match self {
            Self::Memory(chunks) => {
                let mut chunks = std::mem::take(&mut *lock(&chunks));
                if chunks.len() == 1
                    && let Some((_, only)) = chunks.pop_first()
                {
                    return only.into();
                }
                let mut whole = Vec::with_capacity(chunks.values().map(Vec::len).sum());
                for chunk in chunks.into_values() {
                    whole.extend_from_slice(&chunk);
                }
                whole.into()
            }
            Self::File(_) => unreachable!("a file sink is finished, not read"),
        }
    }

    /// Moves a whole file to its final name, durably.
    pub(super) async fn finish_file(self, length: u64) -> Result<(), FetchError> {
        match self {
            Self::Memory(_) => unreachable!("a memory sink has no file"),
            Self::File(partial) => partial.clone().blocking(move || partial.finish(length)).await,
        }
    }
}

impl PartialFile {
    async fn blocking<T: Send + 'static>(
        self: Arc<Self>,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, FetchError> {
        let result = tokio::task::spawn_blocking(work).await.map_err(io::Error::other);
        result.flatten().map_err(|source| FetchError::Io { path: self.path.clone(), source })
    }

    fn missing(&self, list: &ChunkList) -> io::Result<Vec<u64>> {
        let mut file = lock(&self.file);
        let present = file.metadata()?.len();
        let mut chunk = Vec::with_capacity(CHUNK_BYTES as usize);
        let mut missing = Vec::new();
        for index in 0..list.chunk_count() {
            let offset = index * CHUNK_BYTES;
            if offset < present {
                chunk.clear();
                file.seek(SeekFrom::Start(offset))?;
                Read::by_ref(&mut *file).take(list.chunk_length(index)).read_to_end(&mut chunk)?;
                if list.verify(index, &chunk).is_ok() {
                    continue;
                }
            }
            missing.push(index);
        }
        Ok(missing)
    }

    fn store(&self, index: u64, bytes: &[u8]) -> io::Result<()> {
        let mut file = lock(&self.file);
        file.seek(SeekFrom::Start(index * CHUNK_BYTES))?;
        file.write_all(bytes)
    }

    fn finish(&self, length: u64) -> io::Result<()> {
        let file = lock(&self.file);
        // An earlier attempt may have left more.
        file.set_len(length)?;
        file.sync_all()?;
        fs::rename(&self.path, &self.target)?;
        match self.target.parent() {
            Some(folder) if cfg!(unix) && folder != Path::new("") => File::open(folder)?.sync_all(),
            Some(_) | None => Ok(()),
        }
    }
}
