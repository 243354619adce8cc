//! The journal: every input of the machine, hash-chained, with a snapshot of its state.
//!
//! One database file in the run's folder. What was committed is on disk before anything that follows
//! from it leaves the process, so a process that was killed starts where it was. A batch is one
//! transaction with one fsync; a torn write leaves the transaction before it.
//!
//! ```text
//! hash_i = BLAKE3("manyhands 2026 journal entry": hash_{i−1} ‖ number (8) ‖ tick (8) ‖ input as JSON)
//! ```
//! The chain starts at 32 zero bytes and goes on over snapshots, which drop the inputs before them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use manyhands_proto::{Digest, Round, Tick};
use manyhands_rules::coordinator::Input;
use redb::{Builder, Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

/// Hash of the entry before, tick and JSON of the input, by number.
const INPUTS: TableDefinition<u64, &[u8]> = TableDefinition::new("inputs");
/// JSON by name.
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// JSON of a [`BlobNote`] by digest.
const BLOBS: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("blobs");

const HEAD: &str = "head";
const SNAPSHOT: &str = "snapshot";
const SNAPSHOT_HEADING: &str = "snapshot heading";

/// Bytes of an entry before its JSON.
const ENTRY_HEADER_BYTES: usize = 40;

/// Why the journal could not be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("no space is left on the disk of {}; free some and start again: nothing is lost", path.display())]
    DiskFull { path: PathBuf },
    #[error("another coordinator uses {}; stop it, or choose another folder", path.display())]
    InUse { path: PathBuf },
    #[error("cannot use {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the journal {} is damaged: {reason}; restore it from a backup", path.display())]
    Damaged { path: PathBuf, reason: String },
}

/// What is kept of a blob beside its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobNote {
    pub digest: Digest,
    pub kind: BlobKind,
    /// The round it belongs to; the newest if there are several.
    pub round: Round,
}

/// What a blob is; it decides who may read it and when it is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlobKind {
    Theta,
    /// What broadcasts left out: whoever recomputes the next merge begins with it.
    Residual,
    Aggregate,
    Payload,
    Record,
    /// What verifiers' verdicts follow from.
    Evidence,
}

/// What is written at once.
#[derive(Debug, Default)]
pub struct Batch {
    pub inputs: Vec<(Tick, Input)>,
    /// Blobs that have come into the store.
    pub blobs: Vec<BlobNote>,
    /// Blobs that will be removed from it.
    pub forgotten: Vec<Digest>,
    /// The state after the inputs, if it is to be kept: the inputs before it are dropped.
    pub snapshot: Option<Vec<u8>>,
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.inputs.is_empty()
            && self.blobs.is_empty()
            && self.forgotten.is_empty()
            && self.snapshot.is_none()
    }
}

/// What a journal holds.
#[derive(Debug)]
pub struct Recovered {
    pub snapshot: Vec<u8>,
    /// Inputs after the snapshot, in order.
    pub inputs: Vec<(Tick, Input)>,
    pub blobs: Vec<BlobNote>,
    /// Of the last input, or of the snapshot if there is none after it.
    pub tick: Tick,
}

/// The end of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// Of the next input.
    number: u64,
    hash: Digest,
    tick: Tick,
}

#[derive(Debug, Serialize, Deserialize)]
struct SnapshotHeading {
    head: Head,
    digest: Digest,
}

/// An open journal. No other process can open it meanwhile.
#[derive(Debug)]
pub struct Journal {
    database: Database,
    path: PathBuf,
    head: Head,
}

impl Journal {
    /// Makes a journal that begins with `snapshot`. The file appears whole or not at all.
    ///
    /// # Errors
    /// [`JournalError`]; also if there is a journal already.
    pub fn create(path: &Path, snapshot: Vec<u8>, now: Tick) -> Result<Self, JournalError> {
        let io_error = |source| io_error(path, source);
        if path.exists() {
            return Err(io_error(io::Error::from(io::ErrorKind::AlreadyExists)));
        }
        let beside = path.with_extension("new");
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(error)),
            Ok(()) | Err(_) => {}
        }
        let database = Builder::new().create(&beside).map_err(|error| failure(path, error))?;
        let head = Head { number: 0, hash: Digest::new([0; 32]), tick: now };
        let mut journal = Self { database, path: beside.clone(), head };
        journal.commit(&Batch { snapshot: Some(snapshot), ..Batch::default() })?;
        drop(journal);
        fs::rename(&beside, path).map_err(io_error)?;
        if let Some(parent) = path.parent() {
            File::open(parent).and_then(|folder| folder.sync_all()).map_err(io_error)?;
        }
        Ok(Self::open(path)?.0)
    }

    /// Opens a journal and checks every byte of it: pages, chain and snapshot.
    ///
    /// # Errors
    /// [`JournalError`]; the file is left as it was.
    pub fn open(path: &Path) -> Result<(Self, Recovered), JournalError> {
        let length = fs::metadata(path).map_err(|error| io_error(path, error))?.len();
        if length == 0 {
            return Err(damaged(path, "it is empty"));
        }
        let database = Builder::new()
            .set_check_integrity_on_open(true)
            .open(path)
            .map_err(|error| failure(path, error))?;
        let (recovered, head) = read(&database, path)?;
        let path = path.to_owned();
        Ok((Self { database, path, head }, recovered))
    }

    /// Tick of the last input.
    pub fn tick(&self) -> Tick {
        self.head.tick
    }

    /// Writes a batch; when this returns it is on disk.
    ///
    /// # Errors
    /// [`JournalError`]; nothing of the batch is kept then.
    pub fn commit(&mut self, batch: &Batch) -> Result<(), JournalError> {
        let head = self.write(batch).map_err(|error| failure(&self.path, error))?;
        self.head = head;
        Ok(())
    }

    fn write(&self, batch: &Batch) -> Result<Head, redb::Error> {
        let transaction = self.database.begin_write()?;
        let mut head = self.head;
        {
            let mut inputs = transaction.open_table(INPUTS)?;
            for (tick, input) in &batch.inputs {
                let json = to_json(input);
                inputs.insert(head.number, entry(head.hash, *tick, &json).as_slice())?;
                head.hash = chained(head, *tick, &json);
                head.number += 1;
                head.tick = *tick;
            }
            let mut meta = transaction.open_table(META)?;
            if let Some(snapshot) = &batch.snapshot {
                let heading = SnapshotHeading { head, digest: Digest::of(snapshot) };
                meta.insert(SNAPSHOT, snapshot.as_slice())?;
                meta.insert(SNAPSHOT_HEADING, to_json(&heading).as_slice())?;
                inputs.retain(|number, _| number >= head.number)?;
            }
            meta.insert(HEAD, to_json(&head).as_slice())?;
            let mut blobs = transaction.open_table(BLOBS)?;
            for note in &batch.blobs {
                blobs.insert(note.digest.as_bytes(), to_json(note).as_slice())?;
            }
            for digest in &batch.forgotten {
                blobs.remove(digest.as_bytes())?;
            }
        }
        transaction.commit()?;
        Ok(head)
    }
}

fn read(database: &Database, path: &Path) -> Result<(Recovered, Head), JournalError> {
    let fail = |error: redb::Error| failure(path, error);
    let transaction = database.begin_read().map_err(|error| fail(error.into()))?;
    let meta = transaction.open_table(META).map_err(|error| fail(error.into()))?;
    let get = |name: &'static str| {
        let value = meta.get(name).map_err(|error| fail(error.into()))?;
        let missing = || damaged(path, &format!("its {name} is missing"));
        value.map(|value| value.value().to_vec()).ok_or_else(missing)
    };
    let last: Head = parse(path, HEAD, &get(HEAD)?)?;
    let heading: SnapshotHeading = parse(path, SNAPSHOT_HEADING, &get(SNAPSHOT_HEADING)?)?;
    let snapshot = get(SNAPSHOT)?;
    if Digest::of(&snapshot) != heading.digest {
        return Err(damaged(path, "its snapshot does not hash to the digest beside it"));
    }

    let table = transaction.open_table(INPUTS).map_err(|error| fail(error.into()))?;
    let mut head = heading.head;
    let mut inputs = Vec::new();
    for row in table.iter().map_err(|error| fail(error.into()))? {
        let (number, value) = row.map_err(|error| fail(error.into()))?;
        let number = number.value();
        if number != head.number {
            return Err(damaged(path, &format!("expected input {}, got {number}", head.number)));
        }
        let (previous, tick, json) = split(value.value())
            .ok_or_else(|| damaged(path, &format!("input {number} is cut short")))?;
        if previous != head.hash || tick < head.tick {
            return Err(damaged(
                path,
                &format!("input {number} does not follow the one before it"),
            ));
        }
        head.hash = chained(head, tick, json);
        head.number += 1;
        head.tick = tick;
        inputs.push((tick, parse(path, "input", json)?));
    }
    if head != last {
        let reason = format!("it ends with input {}, expected {}", head.number, last.number);
        let reason = if head.number == last.number {
            "its last input was changed".to_owned()
        } else {
            reason
        };
        return Err(damaged(path, &reason));
    }

    let mut blobs = Vec::new();
    let table = transaction.open_table(BLOBS).map_err(|error| fail(error.into()))?;
    for row in table.iter().map_err(|error| fail(error.into()))? {
        let (_, value) = row.map_err(|error| fail(error.into()))?;
        blobs.push(parse(path, "blob", value.value())?);
    }
    Ok((Recovered { snapshot, inputs, blobs, tick: head.tick }, last))
}

fn entry(previous: Digest, tick: Tick, json: &[u8]) -> Vec<u8> {
    let mut entry = Vec::with_capacity(ENTRY_HEADER_BYTES + json.len());
    entry.extend_from_slice(previous.as_bytes());
    entry.extend_from_slice(&tick.0.to_le_bytes());
    entry.extend_from_slice(json);
    entry
}

fn split(entry: &[u8]) -> Option<(Digest, Tick, &[u8])> {
    let (previous, rest) = entry.split_first_chunk::<32>()?;
    let (tick, json) = rest.split_first_chunk::<8>()?;
    Some((Digest::new(*previous), Tick(u64::from_le_bytes(*tick)), json))
}

/// The hash of the input that follows `before`.
fn chained(before: Head, tick: Tick, json: &[u8]) -> Digest {
    let mut material = before.hash.as_bytes().to_vec();
    material.extend_from_slice(&before.number.to_le_bytes());
    material.extend_from_slice(&tick.0.to_le_bytes());
    material.extend_from_slice(json);
    Digest::derive("manyhands 2026 journal entry", &material)
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data with string keys serialises")
}

fn parse<T: serde::de::DeserializeOwned>(
    path: &Path,
    what: &str,
    json: &[u8],
) -> Result<T, JournalError> {
    serde_json::from_slice(json)
        .map_err(|error| damaged(path, &format!("its {what} cannot be read: {error}")))
}

fn damaged(path: &Path, reason: &str) -> JournalError {
    JournalError::Damaged { path: path.to_owned(), reason: reason.to_owned() }
}

fn io_error(path: &Path, source: io::Error) -> JournalError {
    let path = path.to_owned();
    if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        JournalError::DiskFull { path }
    } else {
        JournalError::Io { path, source }
    }
}

fn failure(path: &Path, error: impl Into<redb::Error>) -> JournalError {
    let error = error.into();
    if let redb::Error::DatabaseAlreadyOpen = error {
        return JournalError::InUse { path: path.to_owned() };
    }
    if let redb::Error::Io(source) = error {
        return match source.kind() == io::ErrorKind::InvalidData {
            true => damaged(path, &source.to_string()),
            false => io_error(path, source),
        };
    }
    // Whatever else redb says is about what is in the file.
    damaged(path, &error.to_string())
}

#[cfg(test)]
mod tests;
