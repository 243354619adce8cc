//! The run's data, fetched from peers as it is needed: manifest and tokenizer at once, a shard when a
//! sequence of it is assigned.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use manyhands_model::data::{Dataset, Manifest, SequenceId, ShardSet, Split};
use manyhands_network::data::{FetchError, FetchRequest, ProgressFn};
use manyhands_proto::Digest;
use manyhands_proto::message::Assignment;
use manyhands_proto::run_file::RunSpec;
use manyhands_rules::quarantine::step_sequences;

use crate::context::{Context, WorkerEvent};

/// A manifest lists shards of megabytes each: this is enough for 10¹³ tokens, and more is not parsed.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Sequences of one assignment, whatever the run's terms would allow: their numbers take 128 MiB, and
/// no machine trains so many in a round.
const SEQUENCES_MAX: u64 = 1 << 24;

/// Why data could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DataError {
    #[error("cannot fetch the data set: {0}")]
    Fetch(#[from] FetchError),
    #[error("the data set's manifest is refused: {0}")]
    Manifest(String),
    #[error("expected an assignment of at most {limit} {what}, got {got}")]
    Assignment { what: &'static str, limit: u64, got: u64 },
    #[error("cannot use {path}: {source}; free some space or choose another folder with --dir")]
    Io { path: PathBuf, source: io::Error },
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
        let expected = context.spec.data.manifest;
        // Another run's may lie there: what it names would be the wrong sequences.
        let bytes = match manifest_on_disk(&path, expected)? {
            Some(bytes) => bytes,
            None => {
                fetch(context, expected, MANIFEST_BYTES_MAX, &path, "data set").await?;
                std::fs::read(&path)
                    .map_err(|source| DataError::Io { path: path.clone(), source })?
            }
        };
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
        check_size(&context.spec, assignment)?;
        let (spec, train, assignment) = (context.spec.clone(), self.train(), assignment.clone());
        let work = tokio::task::spawn_blocking(move || {
            let sequences = |step| step_sequences(&spec, &assignment, step);
            let batches: Vec<Vec<SequenceId>> = (0..assignment.steps)
                .map(|step| sequences(step).into_iter().map(SequenceId).collect())
                .collect();
            let shards: BTreeSet<Digest> =
                batches.iter().flat_map(|batch| train.shards_for(batch)).collect();
            (batches, shards)
        });
        let (batches, shards) = work.await.expect("counting sequences does not panic");
        self.fetch_shards(context, &shards).await?;
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
        self.fetch_shards(context, &self.held_out.shards_for(&sequences)).await?;
        Ok(sequences)
    }

    async fn fetch_shards(
        &self,
        context: &Context,
        shards: &BTreeSet<Digest>,
    ) -> Result<(), DataError> {
        for digest in shards {
            let entry = self.manifest.shards().iter().find(|shard| shard.digest == *digest);
            let Some(entry) = entry else { continue };
            let path = Dataset::shard_path_in(&self.folder, digest);
            // Its name is its digest, which is checked when it is opened.
            if path.exists() {
                continue;
            }
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)
                    .map_err(|source| DataError::Io { path: parent.to_owned(), source })?;
            }
            let bytes_max = self.manifest.shard_bytes(entry);
            fetch(context, *digest, bytes_max, &path, "shard").await?;
        }
        Ok(())
    }
}

/// The manifest's bytes, if the file holds the one with this digest.
fn manifest_on_disk(path: &Path, expected: Digest) -> Result<Option<Vec<u8>>, DataError> {
    let read = || {
        if std::fs::metadata(path)?.len() > MANIFEST_BYTES_MAX {
            return Ok(None);
        }
        std::fs::read(path).map(|bytes| (Digest::of(&bytes) == expected).then_some(bytes))
    };
    match read() {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DataError::Io { path: path.to_owned(), source }),
    }
}

/// A coordinator's numbers must not size this node's memory: `plan` gives nobody more steps than a
/// round has, more sequences than all workers together get, or a step without a sequence.
fn check_size(spec: &RunSpec, assignment: &Assignment) -> Result<(), DataError> {
    let training = &spec.training;
    let all = u64::from(spec.run.workers_max)
        .saturating_mul(training.batch_sequences.into())
        .saturating_mul(training.steps_per_round.into());
    let (steps, sequences) = (u64::from(assignment.steps), u64::from(assignment.sequences));
    let limits = [
        ("sequences", all.min(SEQUENCES_MAX), sequences),
        ("steps", sequences.min(training.steps_per_round.into()), steps),
    ];
    match limits.into_iter().find(|(_, limit, got)| got > limit) {
        Some((what, limit, got)) => Err(DataError::Assignment { what, limit, got }),
        None => Ok(()),
    }
}

/// Fetches a file; what was interrupted is resumed.
async fn fetch(
    context: &Context,
    digest: Digest,
    length_max: u64,
    path: &Path,
    what: &'static str,
) -> Result<(), DataError> {
    let mut request = FetchRequest::new(digest, context.sources(&[]), length_max);
    request.progress = Some(progress(context, what));
    context.data.fetch_to_file(request, path).await?;
    Ok(())
}

/// Tells how far a fetch is.
pub(crate) fn progress(context: &Context, what: &'static str) -> ProgressFn {
    let on_event = Arc::clone(&context.on_event);
    Arc::new(move |progress| {
        on_event(WorkerEvent::Fetching {
            what: what.to_owned(),
            done: progress.chunks_done,
            total: progress.chunks_total,
        });
    })
}

#[cfg(test)]
mod tests {
    use manyhands_network::data::Access;
    use manyhands_proto::message::Start;
    use manyhands_proto::{NodeId, Round};

    use manyhands_proto::message::{DeviceKind, NumericClass};

    use super::*;
    use crate::sync::testing::Place;

    fn manifest(documents: u64) -> Vec<u8> {
        let text = format!(
            r#"{{"format":1,"tokenizer":{{"digest":"{}","vocabulary_size":512,"end_of_text":0}},"#,
            Digest::of(b"tokenizer")
        ) + &format!(
            r#""documents":{documents},"unigram_loss_micronats":1,"shards":[{{"digest":"{}","#,
            Digest::of(b"shard")
        ) + r#""split":"train","tokens":100}]}"#;
        text.into_bytes()
    }

    #[tokio::test]
    async fn the_manifest_of_another_data_set_is_not_used() {
        let mut place = Place::new(1).await;
        let wanted = manifest(2);
        place.source.insert(&wanted, Access::Everyone).expect("insert");
        place.context.spec.data.manifest = Digest::of(&wanted);
        let folder = place.context.folder.join("data");
        std::fs::create_dir_all(&folder).expect("folder");
        let path = Dataset::manifest_path(&folder);
        std::fs::write(&path, manifest(1)).expect("write");

        let data = RunData::open(&place.context).await.expect("fetched again");
        assert_eq!(data.manifest.documents(), 2);
        assert_eq!(std::fs::read(&path).expect("read"), wanted);

        // And is not fetched a third time: its source has gone.
        place.source.remove(Digest::of(&wanted)).expect("remove");
        RunData::open(&place.context).await.expect("it is on disk");
    }

    #[tokio::test]
    async fn an_assignment_that_no_plan_gives_is_refused_before_it_takes_memory() {
        let place = Place::new(2).await;
        let spec = &place.context.spec;
        let assignment = |sequences, steps| Assignment {
            round: Round(1),
            worker: NodeId::new([1; 32]),
            theta: Digest::of(b"theta"),
            class: NumericClass::unknown(DeviceKind::Cpu),
            first_sequence: 0,
            sequences,
            steps,
            first_step: 0,
            start: Start::Fresh,
            left_out: Vec::new(),
            commit_deadline_ms: 1,
        };
        // Four steps of four sequences for each of at most 256 workers.
        for (sequences, steps) in [(1, 1), (16, 4), (4_096, 4)] {
            check_size(spec, &assignment(sequences, steps)).expect("a plan may give this");
        }
        for (sequences, steps, expected) in
            [(4_097, 4, "sequences"), (1 << 30, 4, "sequences"), (16, 5, "steps"), (2, 3, "steps")]
        {
            let refused = check_size(spec, &assignment(sequences, steps));
            assert!(
                matches!(refused, Err(DataError::Assignment { what, .. }) if what == expected),
                "{refused:?}"
            );
        }
    }
}
