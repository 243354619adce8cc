//! What a run needs to know of its data set and its first parameters.
//!
//! The manifest is read here, not by the model's crate, so that a run can be launched by a build without
//! libtorch.

use std::path::{Path, PathBuf};

use manyhands_coordinator::store::ServedFile;
use manyhands_gradient::{initial_theta, vector};
use manyhands_proto::Digest;
use manyhands_proto::run_file::{DataSet, RunFile};
use manyhands_rules::reward::layout;
use serde::Deserialize;

use super::Theta;
use crate::failure::{Explain, Failure};

/// What a launch takes from `dataset.json`.
#[derive(Debug, Deserialize)]
struct Manifest {
    tokenizer: Tokenizer,
    shards: Vec<Shard>,
}

#[derive(Debug, Deserialize)]
struct Tokenizer {
    digest: Digest,
    vocabulary_size: u32,
}

#[derive(Debug, Deserialize)]
struct Shard {
    digest: Digest,
    split: Split,
    tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Split {
    Train,
    HeldOut,
}

/// What a run's file names of data and parameters.
pub(super) struct Resolved {
    /// As the run's parties will know it.
    pub(super) data: DataSet,
    pub(super) served: Vec<ServedFile>,
    /// θ₀ if it does not follow from the run's seed.
    pub(super) theta: Option<Vec<u8>>,
}

pub(super) fn resolve(file: &RunFile, file_path: &Path) -> Result<Resolved, Failure> {
    let wanted = file.model.vocabulary_size;
    let unreadable = |reason: String| {
        let remedy = format!(
            "make it with `manyhands prepare … --vocabulary {wanted} --out {}`, or name another with --dataset",
            file.data.dataset.display()
        );
        Failure::new("data_set", reason, &remedy)
    };
    let folder =
        std::path::absolute(&file.data.dataset).map_err(|error| unreadable(error.to_string()))?;
    let path = folder.join("dataset.json");
    let bytes = std::fs::read(&path)
        .map_err(|error| unreadable(format!("cannot read {}: {error}", path.display())))?;
    let manifest: Manifest = serde_json::from_slice(&bytes)
        .map_err(|error| unreadable(format!("{}: {error}", path.display())))?;
    if manifest.tokenizer.vocabulary_size > wanted {
        let reason = format!(
            "{}: model.vocabulary_size is {wanted}, the data set's tokenizer has {} tokens",
            file_path.display(),
            manifest.tokenizer.vocabulary_size
        );
        return Err(Failure::new(
            "vocabulary",
            reason,
            "raise model.vocabulary_size, or prepare the data with a smaller vocabulary",
        ));
    }
    let train_sequences = sequences(&manifest, Split::Train, file.model.context_length);
    let held_out = sequences(&manifest, Split::HeldOut, file.model.context_length);
    if train_sequences == 0 || held_out == 0 {
        let reason = format!(
            "{} has {train_sequences} sequences of {} tokens to train on and {held_out} held out",
            folder.display(),
            file.model.context_length
        );
        return Err(Failure::new(
            "too_little_text",
            reason,
            "prepare more text, or shorten model.context_length",
        ));
    }
    let (theta, given) = first_parameters(file)?;
    let data = DataSet {
        manifest: Digest::of(&bytes),
        train_sequences,
        held_out_sequences: u32::try_from(held_out)
            .unwrap_or(u32::MAX)
            .min(file.data.held_out_sequences),
        theta,
        theta_is_given: given.is_some(),
    };
    Ok(Resolved { data, served: served(&folder, path, &bytes, &manifest)?, theta: given })
}

/// One target more than inputs: the last token of a shard starts no sequence.
fn sequences(manifest: &Manifest, split: Split, context_length: u32) -> u64 {
    let shards = manifest.shards.iter().filter(|shard| shard.split == split);
    shards.map(|shard| shard.tokens.saturating_sub(1) / u64::from(context_length.max(1))).sum()
}

fn served(
    folder: &Path,
    manifest_path: PathBuf,
    manifest_bytes: &[u8],
    manifest: &Manifest,
) -> Result<Vec<ServedFile>, Failure> {
    let tokenizer =
        ServedFile { digest: manifest.tokenizer.digest, path: folder.join("tokenizer.json") };
    let shards = manifest.shards.iter().map(|shard| ServedFile {
        digest: shard.digest,
        path: folder.join("shards").join(format!("{}.tokens", shard.digest)),
    });
    let manifest = ServedFile { digest: Digest::of(manifest_bytes), path: manifest_path };
    let files: Vec<_> = [manifest, tokenizer].into_iter().chain(shards).collect();
    match files.iter().find(|file| !file.path.is_file()) {
        None => Ok(files),
        Some(missing) => {
            let reason = format!("{} is missing", missing.path.display());
            Err(Failure::new("data_set", reason, "restore the folder, or prepare it again"))
        }
    }
}

fn first_parameters(file: &RunFile) -> Result<Theta, Failure> {
    match &file.data.start_from {
        Some(folder) => given_parameters(file, folder),
        None => {
            let theta = initial_theta(&layout(&file.model), &file.model, file.run.seed);
            Ok((vector::digest(&theta), None))
        }
    }
}

#[cfg(feature = "worker")]
fn given_parameters(file: &RunFile, folder: &Path) -> Result<Theta, Failure> {
    let imported = manyhands_model::hugging_face::import(folder)
        .explain("start_from", "name a Llama-architecture folder in data.start_from")?;
    let mut found = imported.architecture;
    // A model can be trained on shorter sequences than it was made for.
    found.context_length = file.model.context_length.min(found.context_length);
    if found != file.model {
        let text = |model: &manyhands_proto::run_file::Architecture| {
            serde_json::to_string(model).unwrap_or_default()
        };
        let reason = format!(
            "the run's model is {}, that in {} is {}",
            text(&file.model),
            folder.display(),
            text(&found)
        );
        return Err(Failure::new("start_from", reason, "write the folder's numbers into [model]"));
    }
    let bytes = vector::to_bytes(&imported.theta);
    Ok((Digest::of(&bytes), Some(bytes)))
}

#[cfg(not(feature = "worker"))]
fn given_parameters(_file: &RunFile, _folder: &Path) -> Result<Theta, Failure> {
    let reason = "this build has no libtorch and cannot read data.start_from";
    Err(Failure::new(
        "start_from",
        reason,
        "launch with a full build, once; this build can go on with the run",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_counted_as_the_model_counts_them() {
        let shard = |split, tokens| Shard { digest: Digest::of(b"shard"), split, tokens };
        let manifest = Manifest {
            tokenizer: Tokenizer { digest: Digest::of(b"tokenizer"), vocabulary_size: 300 },
            shards: vec![
                shard(Split::Train, 65),
                shard(Split::Train, 64),
                shard(Split::HeldOut, 200),
            ],
        };
        assert_eq!(sequences(&manifest, Split::Train, 32), 2 + 1);
        assert_eq!(sequences(&manifest, Split::HeldOut, 32), 6);
    }
}
