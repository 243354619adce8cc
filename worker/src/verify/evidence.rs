//! What a worker has to show for a replay: the moments that its round began with.
//!
//! The worker may be restarting, may not have heard yet who its verifiers are, or may hope that a
//! verifier which waits long enough finds nothing. So everything but a provable lie is asked for again,
//! until the time that the worker has is used up.

use std::path::{Path, PathBuf};
use std::time::Duration;

use manyhands_network::data::{DataHandle, FetchError, FetchRequest, ProgressFn, Source};
use manyhands_proto::Digest;
use tokio::time::Instant;

const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Often enough for a round whose checks have a minute.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Why evidence could not be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum EvidenceError {
    #[error("it opened something else: {0}")]
    Wrong(String),
    #[error("not opened in time: {0}")]
    TooLate(String),
    /// Our own disk.
    #[error(transparent)]
    Disk(FetchError),
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
}

impl EvidenceError {
    /// Whether the worker is to blame.
    pub(super) fn is_withheld(&self) -> bool {
        match self {
            Self::Wrong(_) | Self::TooLate(_) => true,
            Self::Disk(_) | Self::Read { .. } => false,
        }
    }
}

/// A worker, and how long it has.
pub(super) struct Evidence<'a> {
    pub(super) data: &'a DataHandle,
    pub(super) worker: Source,
    /// Where downloads are until they are whole: what was interrupted goes on.
    pub(super) incoming: PathBuf,
    pub(super) progress: ProgressFn,
    /// The longest pause between two attempts.
    pub(super) pause_max: Duration,
    pub(super) patience: Duration,
}

impl Evidence<'_> {
    /// A whole blob of at most `bytes_max` bytes.
    pub(super) async fn blob(
        &self,
        digest: Digest,
        bytes_max: u64,
    ) -> Result<Vec<u8>, EvidenceError> {
        let path = self.incoming.join(digest.to_string());
        self.insist_on_blob(digest, bytes_max, &path).await?;
        let read = tokio::fs::read(&path).await;
        // It is wanted once. What stays is removed before the next replay.
        let _ = tokio::fs::remove_file(&path).await;
        read.map_err(|source| EvidenceError::Read { path, source })
    }

    async fn insist_on_blob(
        &self,
        digest: Digest,
        bytes_max: u64,
        path: &Path,
    ) -> Result<(), EvidenceError> {
        let deadline = Instant::now() + self.patience;
        let mut waiting =
            Waiting { deadline, pause: PAUSE_MIN.min(self.pause_max), pause_max: self.pause_max };
        loop {
            let mut request = FetchRequest::new(digest, vec![self.worker.clone()], bytes_max);
            request.progress = Some(self.progress.clone());
            request.deadline = Some(waiting.deadline);
            let error = match self.data.fetch_to_file(request, path).await {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            match &error {
                FetchError::NoSource { failures, .. } => {
                    if failures.iter().any(|failure| failure.error.is_lie()) {
                        return Err(EvidenceError::Wrong(error.to_string()));
                    }
                    waiting.pause(error.to_string()).await?;
                }
                FetchError::TooLate { .. } => {
                    return Err(EvidenceError::TooLate(error.to_string()));
                }
                FetchError::Io { .. } | FetchError::UnderWay { .. } => {
                    return Err(EvidenceError::Disk(error));
                }
            }
        }
    }
}

/// One piece of evidence that is waited for.
struct Waiting {
    deadline: Instant,
    pause: Duration,
    pause_max: Duration,
}

impl Waiting {
    /// Waits before the next attempt, twice as long each time; the reason of the last one if there is
    /// no time for another.
    async fn pause(&mut self, reason: String) -> Result<(), EvidenceError> {
        let next = Instant::now() + self.pause;
        if next >= self.deadline {
            return Err(EvidenceError::TooLate(reason));
        }
        self.pause = (2 * self.pause).min(self.pause_max);
        tokio::time::sleep_until(next).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    use manyhands_network::data::{Access, BlobInfo, BlobStore, FileStore, NoStore, Refusal};
    use manyhands_proto::NodeId;
    use tempfile::TempDir;

    use super::*;
    use crate::sync::testing::{data, store};

    const HOUR: Duration = Duration::from_secs(3600);

    /// Refuses a while, then serves.
    struct Reluctant {
        refusals: Mutex<VecDeque<Refusal>>,
        blobs: Arc<FileStore>,
    }

    impl BlobStore for Reluctant {
        fn stat(&self, digest: Digest, peer: NodeId) -> Result<BlobInfo, Refusal> {
            match self.refusals.lock().expect("no panic").pop_front() {
                Some(refusal) => Err(refusal),
                None => self.blobs.stat(digest, peer),
            }
        }

        fn read(&self, digest: Digest, offset: u64, length: u64) -> Result<Vec<u8>, Refusal> {
            self.blobs.read(digest, offset, length)
        }
    }

    /// A verifier and a worker.
    struct Pair {
        verifier: DataHandle,
        worker: Arc<Reluctant>,
        source: Source,
        folder: TempDir,
        _worker: DataHandle,
    }

    impl Pair {
        fn new(seed: u8) -> Self {
            let folder = tempfile::tempdir().expect("folder");
            let (verifier, _) = data(seed, Arc::new(NoStore));
            let blobs = store(folder.path().join("worker"));
            let worker = Arc::new(Reluctant { refusals: Mutex::default(), blobs });
            let (_worker, source) = data(seed + 100, Arc::clone(&worker) as _);
            Self { verifier, worker, source, folder, _worker }
        }

        /// Whatever a worker says that is not there yet; more often than anybody would count.
        fn refuse_for_now(&self) {
            let busy = Refusal::Busy { retry_after: Duration::ZERO };
            let mut refusals = self.worker.refusals.lock().expect("no panic");
            for _ in 0..5 {
                refusals.extend([Refusal::Unknown, Refusal::NotYet, Refusal::Forbidden, busy]);
            }
        }

        fn evidence(&self, patience: Duration) -> Evidence<'_> {
            Evidence {
                data: &self.verifier,
                worker: self.source.clone(),
                incoming: self.folder.path().join("incoming"),
                progress: Arc::new(|_| {}),
                pause_max: Duration::from_millis(5),
                patience,
            }
        }
    }

    fn blob() -> Vec<u8> {
        (0..100_000_u32).map(|i| (i / 5) as u8).collect()
    }

    #[tokio::test]
    async fn what_is_refused_for_now_is_asked_for_again() {
        let pair = Pair::new(40);
        let digest = pair.worker.blobs.insert(&blob(), Access::Everyone).expect("insert");
        let evidence = pair.evidence(HOUR);
        pair.refuse_for_now();
        assert!(evidence.blob(digest, 1 << 20).await.expect("served in the end") == blob());
    }

    #[tokio::test]
    async fn patience_ends() {
        let pair = Pair::new(42);
        let evidence = pair.evidence(Duration::from_millis(200));
        let refused = evidence.blob(Digest::of(b"nothing"), 100_000).await;
        let error = refused.expect_err("nobody has it");
        assert!(error.is_withheld() && matches!(error, EvidenceError::TooLate(_)), "{error}");
    }

    #[tokio::test]
    async fn a_blob_that_is_too_long_is_a_lie_at_once() {
        let pair = Pair::new(43);
        let digest = pair.worker.blobs.insert(&blob(), Access::Everyone).expect("insert");
        let error = pair.evidence(HOUR).blob(digest, 99_999).await.expect_err("too long");
        assert!(error.is_withheld() && matches!(error, EvidenceError::Wrong(_)), "{error}");
    }
}
