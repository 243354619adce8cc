//! What survives `kill -9`: the end states of the last rounds, and which θ is on disk.
//!
//! Blobs lie in the content-addressed store; a small file per round names them. The file is written
//! after its blobs and before the commitment is sent, each whole or not at all.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use manyhands_proto::{Digest, NodeId, Round};
use manyhands_rules::worker::Trained;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Rounds whose end state is kept: the last committed one and one that may not count.
const ROUNDS_KEPT: usize = 2;

/// Why the worker's own state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("cannot use {path}: {source}; free some space or choose another folder with --dir")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is damaged ({reason}); remove it to go on without that round")]
    Damaged { path: PathBuf, reason: String },
}

/// A round's end, as it is on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RoundState {
    pub(crate) trained: Trained,
    /// Optimiser steps since the moments were zero.
    pub(crate) adam_step: u64,
    /// Who may open it beside the coordinator, once the commitments are closed.
    pub(crate) published_to: Option<BTreeSet<NodeId>>,
}

impl RoundState {
    /// The blobs that belong to it: payload, θ_H, moments, e_next.
    pub(crate) fn blobs(&self) -> [Digest; 4] {
        let commitment = &self.trained.commitment.commitment;
        [commitment.payload, commitment.theta, commitment.moments, commitment.error]
    }
}

/// The parameters that are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ThetaState {
    pub(crate) round: Round,
    pub(crate) theta: Digest,
}

/// The folder of small files that name what is in the store.
#[derive(Debug, Clone)]
pub struct WorkerDisk {
    folder: PathBuf,
}

impl WorkerDisk {
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(folder: &Path) -> Result<Self, DiskError> {
        let folder = folder.join("rounds");
        fs::create_dir_all(&folder)
            .map_err(|source| DiskError::Io { path: folder.clone(), source })?;
        Ok(Self { folder })
    }

    /// The states on disk, oldest first.
    pub(crate) fn rounds(&self) -> Result<Vec<RoundState>, DiskError> {
        let io_error = |source| DiskError::Io { path: self.folder.clone(), source };
        let mut states = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(io_error)? {
            let path = entry.map_err(io_error)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with("round-") && name.ends_with(".json") {
                states.extend(read::<RoundState>(&path)?);
            }
        }
        states.sort_by_key(|state| state.trained.assignment.round);
        Ok(states)
    }

    pub(crate) fn round(&self, round: Round) -> Result<Option<RoundState>, DiskError> {
        read(&self.round_path(round))
    }

    /// Writes a round's state; the oldest ones beyond those kept are removed and returned.
    pub(crate) fn keep_round(&self, state: &RoundState) -> Result<Vec<RoundState>, DiskError> {
        write(&self.round_path(state.trained.assignment.round), state)?;
        let mut states = self.rounds()?;
        let too_many = states.len().saturating_sub(ROUNDS_KEPT);
        let gone: Vec<_> = states.drain(..too_many).collect();
        for state in &gone {
            let path = self.round_path(state.trained.assignment.round);
            fs::remove_file(&path).map_err(|source| DiskError::Io { path, source })?;
        }
        Ok(gone)
    }

    pub(crate) fn theta(&self) -> Result<Option<ThetaState>, DiskError> {
        read(&self.folder.join("theta.json"))
    }

    pub(crate) fn keep_theta(&self, theta: ThetaState) -> Result<(), DiskError> {
        write(&self.folder.join("theta.json"), &theta)
    }

    fn round_path(&self, round: Round) -> PathBuf {
        self.folder.join(format!("round-{round}.json"))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, DiskError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| DiskError::Damaged { path: path.to_owned(), reason: e.to_string() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DiskError::Io { path: path.to_owned(), source }),
    }
}

fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), DiskError> {
    let beside = path.with_extension("new");
    let bytes = serde_json::to_vec(value).expect("plain structs serialise");
    let written = fs::File::create(&beside).and_then(|mut file| {
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    });
    written.map_err(|source| DiskError::Io { path: path.to_owned(), source })
}
