//! The run's data, fetched from peers as it is needed: manifest and tokenizer at once, a shard when a
//! sequence of it is assigned.

use std::path::PathBuf;
use std::sync::Arc;

use manyhands_model::data::{Dataset, Manifest, SequenceId, ShardSet, Split};
use manyhands_network::data::{FetchError, FetchRequest};
use manyhands_proto::Digest;
use manyhands_proto::message::Assignment;
use manyhands_rules::sampling::sequence_at;

use crate::context::{Context, WorkerEvent};

/// A manifest lists shards of megabytes each: this is enough for 10¹³ tokens.
const MANIFEST_BYTES_MAX: u64 = 1 << 30;

/// Why data could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DataError {
    #[error("cannot fetch the data set: {0}")]
    Fetch(#[from] FetchError),
    #[error("the data set's manifest is refused: {0}")]
    Manifest(String),
    #[error("cannot write {path}: {source}; free some space or choose another folder with --dir")]
    Io { path: PathBuf, source: std::io::Error },
}

/// The data set of a run on this node's disk.
pub(crate) struct RunData {
    manifest: Manifest,
    folder: PathBuf,
    context_length: u32,
    train: Arc<ShardSet>,
    held_out: Arc<ShardSet>,
}

impl RunData {
    /// Fetches what is missing of the manifest.
    pub(crate) async fn open(context: &Context) -> Result<Self, DataError> {
        let folder = context.folder.join("data");
        std::fs::create_dir_all(&folder)
            .map_err(|source| DataError::Io { path: folder.clone(), source })?;
        let path = Dataset::manifest_path(&folder);
        fetch(context, context.spec.data.manifest, MANIFEST_BYTES_MAX, path.clone(), "data set")
            .await?;
        let bytes =
            std::fs::read(&path).map_err(|source| DataError::Io { path: path.clone(), source })?;
        let manifest =
            Manifest::parse(&bytes).map_err(|error| DataError::Manifest(error.to_string()))?;
        let context_length = context.spec.model.context_length;
        let set = |split| {
            let folder = folder.clone();
            let locate = move |digest: &Digest| Dataset::shard_path_in(&folder, digest);
            Arc::new(ShardSet::new(manifest.clone(), split, context_length, locate))
        };
        let (train, held_out) = (set(Split::Train), set(Split::HeldOut));
        Ok(Self { folder, context_length, train, held_out, manifest })
    }

    pub(crate) fn train(&self) -> Arc<ShardSet> {
        Arc::clone(&self.train)
    }

    pub(crate) fn held_out(&self) -> Arc<ShardSet> {
        Arc::clone(&self.held_out)
    }

    /// The sequences of each inner step of an assignment, their shards on disk.
    pub(crate) async fn batches(
        &self,
        context: &Context,
        assignment: &Assignment,
    ) -> Result<Vec<Vec<SequenceId>>, DataError> {
        let (seed, sequences) = (context.spec.run.seed, context.spec.data.train_sequences);
        let batches: Vec<Vec<SequenceId>> = (0..assignment.steps)
            .map(|step| {
                let positions = assignment.step(step);
                positions.map(|at| SequenceId(sequence_at(seed, at, sequences))).collect()
            })
            .collect();
        self.fetch_shards(context, &self.train, &batches.concat()).await?;
        Ok(batches)
    }

    /// The held-out sequences that an evaluation reads, their shards on disk.
    pub(crate) async fn held_out_sequences(
        &self,
        context: &Context,
    ) -> Result<Vec<SequenceId>, DataError> {
        let there = self.manifest.sequence_count(Split::HeldOut, self.context_length);
        let wanted = u64::from(context.spec.data.held_out_sequences).min(there);
        let sequences: Vec<_> = (0..wanted).map(SequenceId).collect();
        self.fetch_shards(context, &self.held_out, &sequences).await?;
        Ok(sequences)
    }

    async fn fetch_shards(
        &self,
        context: &Context,
        set: &ShardSet,
        sequences: &[SequenceId],
    ) -> Result<(), DataError> {
        for digest in set.shards_for(sequences) {
            let entry = self.manifest.shards().iter().find(|shard| shard.digest == digest);
            let Some(entry) = entry else { continue };
            let path = Dataset::shard_path_in(&self.folder, &digest);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)
                    .map_err(|source| DataError::Io { path: parent.to_owned(), source })?;
            }
            let bytes_max = self.manifest.shard_bytes(entry);
            fetch(context, digest, bytes_max, path, "shard").await?;
        }
        Ok(())
    }
}

/// Fetches a file unless it is there; what was interrupted is resumed.
async fn fetch(
    context: &Context,
    digest: Digest,
    length_max: u64,
    path: PathBuf,
    what: &'static str,
) -> Result<(), DataError> {
    if path.exists() {
        return Ok(());
    }
    let mut request = FetchRequest::new(digest, context.sources(&[]), length_max);
    let on_event = Arc::clone(&context.on_event);
    request.progress = Some(Arc::new(move |progress| {
        on_event(WorkerEvent::Fetching {
            what: what.to_owned(),
            done: progress.chunks_done,
            total: progress.chunks_total,
        });
    }));
    context.data.fetch_to_file(request, &path).await?;
    Ok(())
}
