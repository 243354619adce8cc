//! Where blobs come from.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};

use manyhands_proto::Digest;

/// Why a blob could not be had, other than that it is gone.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    #[error("expected a blob with the digest {expected}, got bytes with {got}")]
    Changed { expected: Digest, got: Digest },
    #[error("expected blob {digest} of at most {bytes_max} bytes, it has {got}")]
    TooLarge { digest: Digest, bytes_max: u64, got: u64 },
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("no source of blob {digest} answers: {reason}")]
    Unreachable { digest: Digest, reason: String },
}

/// Blobs by digest: records, payloads, merges, parameters.
pub trait Evidence: Sync {
    /// The blob, whose hash the implementation has checked; none if it is not there any more.
    ///
    /// # Errors
    /// [`EvidenceError`]: [`EvidenceError::Changed`] and [`EvidenceError::TooLarge`] are findings
    /// of the audit, the others end it.
    fn blob(
        &self,
        digest: Digest,
        bytes_max: u64,
    ) -> impl Future<Output = Result<Option<Vec<u8>>, EvidenceError>> + Send;
}

/// A folder of files that are named by their digests in hexadecimal, as coordinators keep them.
#[derive(Debug, Clone)]
pub struct FolderEvidence {
    folder: PathBuf,
}

impl FolderEvidence {
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }
}

impl Evidence for FolderEvidence {
    async fn blob(&self, digest: Digest, bytes_max: u64) -> Result<Option<Vec<u8>>, EvidenceError> {
        let path = self.folder.join(digest.to_string());
        let failed = |path: &Path, source| EvidenceError::Io { path: path.to_owned(), source };
        let reading = path.clone();
        let read = tokio::task::spawn_blocking(move || read_at_most(&reading, digest, bytes_max));
        read.await.map_err(|error| failed(&path, io::Error::other(error)))?
    }
}

fn read_at_most(
    path: &Path,
    digest: Digest,
    bytes_max: u64,
) -> Result<Option<Vec<u8>>, EvidenceError> {
    use std::io::Read;

    let failed = |source| EvidenceError::Io { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let got = file.metadata().map_err(failed)?.len();
    if got > bytes_max {
        return Err(EvidenceError::TooLarge { digest, bytes_max, got });
    }
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes).map_err(failed)?;
    let got = Digest::of(&bytes);
    if got != digest {
        return Err(EvidenceError::Changed { expected: digest, got });
    }
    Ok(Some(bytes))
}

/// Digest of the newest of the records that lie as `0.json`, `1.json` and so on in a folder; none if
/// there is none. Where no chain names the newest record, this does.
///
/// # Errors
/// When a file cannot be read. Whether it is a record, the audit finds out.
pub fn newest_record(records: &Path) -> Result<Option<Digest>, EvidenceError> {
    let failed = |path: &Path, source| EvidenceError::Io { path: path.to_owned(), source };
    let mut newest: Option<(u32, PathBuf)> = None;
    for entry in std::fs::read_dir(records).map_err(|error| failed(records, error))? {
        let path = entry.map_err(|error| failed(records, error))?.path();
        let is_record = path.extension().is_some_and(|extension| extension == "json");
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|s| s.parse().ok());
        let Some(number) = number.filter(|_| is_record) else { continue };
        if newest.as_ref().is_none_or(|(highest, _)| number > *highest) {
            newest = Some((number, path));
        }
    }
    let Some((_, path)) = newest else { return Ok(None) };
    let bytes = std::fs::read(&path).map_err(|error| failed(&path, error))?;
    Ok(Some(Digest::of(&bytes)))
}
