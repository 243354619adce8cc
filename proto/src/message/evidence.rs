//! What the distances of a replay follow from, as one blob that anybody can check years later.

use prost::Message as _;

use super::convert::{MessageError, node, run};
use super::limits::BLOB_BYTES_MAX;
use super::{SignedCommitment, SignedReplay, wire};
use crate::tree::{GROUP_BYTES, OpenedGroup, Opening, Openings};

/// A worker's word, a verifier's, and chunks of the states that both name. One that was parsed carries both
/// signatures.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplayEvidence {
    pub commitment: SignedCommitment,
    pub replay: SignedReplay,
    /// None if the replay led nowhere.
    pub opened: Option<OpenedEnds>,
}

/// Chunks of where a round started, of where its worker says it ended, and of where a verifier ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedEnds {
    /// Of θ_t.
    pub start: Openings,
    pub claimed: OpenedEnd,
    pub replayed: OpenedEnd,
}

/// Of an end state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedEnd {
    /// Of θ_H.
    pub theta: Openings,
    /// Of the moments, rounded to 8 bits.
    pub moments: Openings,
}

/// Why bytes are no evidence.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ParseEvidenceError {
    #[error("not evidence: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error("{0}")]
    Field(#[from] MessageError),
    #[error("not the canonical form of evidence")]
    NotCanonical,
}

impl ReplayEvidence {
    /// The only form.
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::ReplayEvidence::from(self).encode_to_vec()
    }

    /// Takes memory in proportion to `bytes`.
    ///
    /// # Errors
    /// [`ParseEvidenceError`]. Whether the openings lead where they should, [`Openings::verify`] tells.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseEvidenceError> {
        let evidence = Self::try_from(wire::ReplayEvidence::decode(bytes)?)?;
        if evidence.to_bytes() != bytes {
            return Err(ParseEvidenceError::NotCanonical);
        }
        Ok(evidence)
    }
}

impl From<&ReplayEvidence> for wire::ReplayEvidence {
    fn from(evidence: &ReplayEvidence) -> Self {
        let ReplayEvidence { commitment, replay, opened } = evidence;
        let opened = opened.as_ref();
        Self {
            run: commitment.run.as_bytes().to_vec(),
            worker: commitment.worker.as_bytes().to_vec(),
            commitment: Some(commitment.into()),
            verifier: replay.verifier.as_bytes().to_vec(),
            replay: Some(replay.into()),
            start: opened.map(|opened| (&opened.start).into()),
            claimed: opened.map(|opened| (&opened.claimed).into()),
            replayed: opened.map(|opened| (&opened.replayed).into()),
        }
    }
}

impl TryFrom<wire::ReplayEvidence> for ReplayEvidence {
    type Error = MessageError;

    fn try_from(wire: wire::ReplayEvidence) -> Result<Self, MessageError> {
        let run = run("evidence.run", &wire.run)?;
        let worker = node("evidence.worker", &wire.worker)?;
        let verifier = node("evidence.verifier", &wire.verifier)?;
        let missing = |field| MessageError::Missing { field };
        let commitment = wire.commitment.ok_or_else(|| missing("evidence.commitment"))?;
        let replay = wire.replay.ok_or_else(|| missing("evidence.replay"))?;
        let opened = match (wire.start, wire.claimed, wire.replayed) {
            (None, None, None) => None,
            (start, claimed, replayed) => Some(OpenedEnds {
                start: openings("evidence.start", start)?,
                claimed: end("evidence.claimed", claimed)?,
                replayed: end("evidence.replayed", replayed)?,
            }),
        };
        Ok(Self {
            commitment: SignedCommitment::parse(commitment, run, worker)?,
            replay: SignedReplay::parse(replay, run, verifier)?,
            opened,
        })
    }
}

impl From<&OpenedEnd> for wire::OpenedEnd {
    fn from(end: &OpenedEnd) -> Self {
        Self { theta: Some((&end.theta).into()), moments: Some((&end.moments).into()) }
    }
}

fn end(field: &'static str, wire: Option<wire::OpenedEnd>) -> Result<OpenedEnd, MessageError> {
    let wire = wire.ok_or(MessageError::Missing { field })?;
    Ok(OpenedEnd { theta: openings(field, wire.theta)?, moments: openings(field, wire.moments)? })
}

impl From<&Openings> for wire::Openings {
    fn from(openings: &Openings) -> Self {
        let group = |group: &OpenedGroup| wire::OpenedGroup {
            group: group.opening.group,
            siblings: group.opening.siblings.concat(),
            bytes: group.bytes.clone(),
        };
        Self { length: openings.length, groups: openings.groups.iter().map(group).collect() }
    }
}

fn openings(field: &'static str, wire: Option<wire::Openings>) -> Result<Openings, MessageError> {
    let wire = wire.ok_or(MessageError::Missing { field })?;
    let at_most = |value: u64, max: u64| {
        if value > max {
            return Err(MessageError::TooMany { field, max, got: value });
        }
        Ok(value)
    };
    let length = at_most(wire.length, BLOB_BYTES_MAX)?;
    let groups = wire.groups.into_iter().map(|wire| {
        at_most(wire.bytes.len() as u64, GROUP_BYTES)?;
        let (siblings, rest) = wire.siblings.as_chunks::<32>();
        if !rest.is_empty() {
            let got = wire.siblings.len();
            return Err(MessageError::Length { field, expected: 32 * siblings.len(), got });
        }
        let opening = Opening { group: wire.group, siblings: siblings.to_vec() };
        Ok(OpenedGroup { opening, bytes: wire.bytes })
    });
    Ok(Openings { length, groups: groups.collect::<Result<_, MessageError>>()? })
}
