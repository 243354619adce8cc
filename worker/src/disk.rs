//! What survives `kill -9`: the end states of the last rounds, and which θ is on disk.
//!
//! Blobs lie in the content-addressed store; a small file per round names them. The file is written
//! after its blobs and before the commitment is sent, each whole or not at all.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use manyhands_proto::message::{EndState, Start};
use manyhands_proto::{Digest, NodeId, Round};
use manyhands_rules::worker::Trained;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Rounds whose end state is kept in any case: the last committed one and one that may not count.
const ROUNDS_KEPT_MIN: usize = 2;
/// More are kept while they may be checked, up to this: a coordinator's word must not fill the disk.
const ROUNDS_KEPT_MAX: usize = 20;

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
    /// Who may read its moments beside the coordinator, which may open everything, once the commitments are closed.
    pub(crate) published_to: Option<BTreeSet<NodeId>>,
}

impl RoundState {
    pub(crate) fn moments(&self) -> Digest {
        self.trained.commitment.commitment.moments
    }

    /// What only the coordinator opens: with any two of these somebody could say where the round ended without
    /// repeating it.
    pub(crate) fn secrets(&self) -> [Digest; 3] {
        let commitment = &self.trained.commitment.commitment;
        [commitment.payload, commitment.theta, commitment.error]
    }

    /// The blobs that belong to it.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = Digest> {
        [self.moments()].into_iter().chain(self.secrets())
    }
}

/// Where replays ended that may still be compared: they are, one after the other, soon after they are done.
const REPLAYS_KEPT: usize = 4;

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

    /// Writes a round's state.
    pub(crate) fn keep_round(&self, state: &RoundState) -> Result<(), DiskError> {
        write(&self.round_path(state.trained.assignment.round), state)
    }

    /// Removes states that no check can be about: those of rounds from `evidence_from` on stay, and those that
    /// they started from.
    pub(crate) fn forget_rounds(&self, evidence_from: Round) -> Result<(), DiskError> {
        let mut states = self.rounds()?;
        states.reverse();
        let mut wanted = BTreeSet::new();
        for (age, state) in states.iter().take(ROUNDS_KEPT_MAX).enumerate() {
            let assignment = &state.trained.assignment;
            if age < ROUNDS_KEPT_MIN || assignment.round >= evidence_from {
                wanted.insert(assignment.round);
                if let Start::Head { round, .. } = assignment.start {
                    wanted.insert(round);
                }
            }
        }
        let gone = |state: &&RoundState| !wanted.contains(&state.trained.assignment.round);
        for state in states.iter().filter(gone) {
            let path = self.round_path(state.trained.assignment.round);
            fs::remove_file(&path).map_err(|source| DiskError::Io { path, source })?;
        }
        Ok(())
    }

    /// Where this node's last replays ended, oldest first.
    pub(crate) fn replays(&self) -> Result<Vec<EndState>, DiskError> {
        Ok(read(&self.replays_path())?.unwrap_or_default())
    }

    /// Notes where a replay ended, and forgets the oldest.
    pub(crate) fn keep_replay(&self, end: EndState) -> Result<(), DiskError> {
        let mut ends = self.replays()?;
        ends.retain(|known| *known != end);
        ends.push(end);
        ends.drain(..ends.len().saturating_sub(REPLAYS_KEPT));
        write(&self.replays_path(), &ends)
    }

    fn replays_path(&self) -> PathBuf {
        self.folder.join("replays.json")
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

#[cfg(test)]
mod tests {
    use manyhands_proto::RunId;
    use manyhands_proto::TokenCount;
    use manyhands_proto::keys::NodeKey;
    use manyhands_proto::message::{
        Assignment, Commitment, DeviceKind, NumericClass, SignedCommitment,
    };

    use super::*;

    fn state(round: u32) -> RoundState {
        let key = NodeKey::from_seed([1; 32]);
        let (round, blob) = (Round(round), Digest::of(&round.to_le_bytes()));
        let assignment = Assignment {
            round,
            worker: key.node_id(),
            theta: blob,
            class: NumericClass::unknown(DeviceKind::Cpu),
            first_sequence: 0,
            sequences: 4,
            steps: 2,
            first_step: 0,
            start: Start::Fresh,
            left_out: Vec::new(),
            commit_deadline_ms: 1_000,
        };
        let commitment = Commitment {
            round,
            first_sequence: 0,
            payload: blob,
            payload_bytes: 10,
            theta: blob,
            moments: blob,
            error: blob,
            assignment: blob,
            tokens: TokenCount(128),
            loss: 3.0,
        };
        let commitment = SignedCommitment::sign(&key, RunId::new([2; 32]), commitment);
        let trained = Trained { assignment, commitment };
        RoundState { trained, adam_step: 2, published_to: None }
    }

    #[test]
    fn states_stay_while_a_check_may_ask_for_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = WorkerDisk::open(folder.path()).expect("opens");
        for round in [5, 6, 7, 9, 10] {
            disk.keep_round(&state(round)).expect("kept");
        }
        // Round 6 did not count: round 8 started from what round 5 left.
        let mut eighth = state(8);
        let round = Round(5);
        let commitment = state(5).trained.commitment.digest();
        eighth.trained.assignment.start =
            Start::Head { round, commitment, sent_values_returned: false, adam_step: 2 };
        disk.keep_round(&eighth).expect("kept");
        disk.forget_rounds(Round(8)).expect("forgotten");
        let again = WorkerDisk::open(folder.path()).expect("opens after a restart");
        assert_eq!(again.rounds().expect("read"), [state(5), eighth, state(9), state(10)]);
        disk.forget_rounds(Round(100)).expect("forgotten");
        assert_eq!(disk.rounds().expect("read"), [state(9), state(10)]);
        for round in 0..100 {
            disk.keep_round(&state(round)).expect("kept");
        }
        disk.forget_rounds(Round(0)).expect("forgotten");
        assert_eq!(disk.rounds().expect("read").len(), ROUNDS_KEPT_MAX);
    }

    #[test]
    fn a_damaged_state_is_named_and_never_taken_for_another() {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = WorkerDisk::open(folder.path()).expect("opens");
        disk.keep_round(&state(1)).expect("kept");
        let path = disk.round_path(Round(1));
        let bytes = fs::read(&path).expect("there");
        fs::write(&path, &bytes[..bytes.len() / 2]).expect("cut short");
        let error = disk.round(Round(1)).expect_err("damaged").to_string();
        assert!(error.contains("round-1.json") && error.contains("damaged"), "{error}");
    }
}
