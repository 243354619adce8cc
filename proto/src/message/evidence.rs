//! What the distances of a replay follow from, as one blob that anybody can check years later.

use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::convert::{MessageError, node, run};
use super::limits::BLOB_BYTES_MAX;
use super::{Assignment, Commitment, SignedCommitment, SignedReplay, Start, wire};
use crate::tree::{GROUP_BYTES, OpenedGroup, Opening, Openings};
use crate::{Digest, NodeId, Round, RunId};

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

/// A worker's round: what it committed to, for which assignment, and what it started from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Work {
    pub commitment: SignedCommitment,
    /// The commitment names its digest.
    pub assignment: Assignment,
    /// The assignment names its digest; none for a fresh start.
    pub head: Option<Commitment>,
}

/// Why statements do not belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    #[error("the commitment is not the worker's, or of another run")]
    Commitment,
    #[error("the worker committed to the work of another assignment")]
    Assignment,
    #[error("the assignment starts from another commitment")]
    Head,
}

impl Work {
    pub fn round(&self) -> Round {
        self.commitment.commitment.round
    }

    pub fn worker(&self) -> NodeId {
        self.commitment.worker
    }

    /// The head's update, whose values return to e_in.
    pub fn returned_payload(&self) -> Option<Digest> {
        match self.assignment.start {
            Start::Head { sent_values_returned: true, .. } => {
                self.head.as_ref().map(|head| head.payload)
            }
            Start::Head { .. } | Start::Fresh => None,
        }
    }

    /// Whether the worker stands for all of it.
    ///
    /// # Errors
    /// [`WorkError`].
    pub fn check(&self, run: RunId) -> Result<(), WorkError> {
        let Self { commitment, assignment, head } = self;
        if commitment.run != run || !commitment.verify() {
            return Err(WorkError::Commitment);
        }
        let about = (assignment.worker, assignment.round, assignment.digest());
        if about != (commitment.worker, self.round(), commitment.commitment.assignment) {
            return Err(WorkError::Assignment);
        }
        let named = match assignment.start {
            Start::Fresh => None,
            Start::Head { commitment, .. } => Some(commitment),
        };
        if head.as_ref().map(|head| head.digest_of(run, commitment.worker)) != named {
            return Err(WorkError::Head);
        }
        Ok(())
    }
}

/// What a worker's update is judged by, beside its payload.
#[derive(Debug, Clone, PartialEq)]
pub struct UpdateEvidence {
    pub work: Work,
    /// Of a chunk that does not follow; none if the payload alone shows it.
    pub opened: Option<OpenedStates>,
}

/// One group of each of a worker's states, all of the same chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedStates {
    /// Of θ_t.
    pub start: Openings,
    /// Of θ_H.
    pub end: Openings,
    /// Of the head's error buffer; none for a fresh start, which is all zeros.
    pub error_in: Option<Openings>,
    /// Of e_next.
    pub error_next: Openings,
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

/// Evidence of which `bytes` are the only form.
fn parse<W, T>(bytes: &[u8]) -> Result<T, ParseEvidenceError>
where
    W: prost::Message + Default + for<'a> From<&'a T>,
    T: TryFrom<W, Error = MessageError>,
{
    let evidence = T::try_from(W::decode(bytes)?)?;
    if W::from(&evidence).encode_to_vec() != bytes {
        return Err(ParseEvidenceError::NotCanonical);
    }
    Ok(evidence)
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
        parse::<wire::ReplayEvidence, _>(bytes)
    }
}

impl UpdateEvidence {
    /// The only form.
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::UpdateEvidence::from(self).encode_to_vec()
    }

    /// Takes memory in proportion to `bytes`.
    ///
    /// # Errors
    /// [`ParseEvidenceError`]. Whether its statements belong together, [`Work::check`] tells; whether the openings lead
    /// where they should, [`Openings::verify`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseEvidenceError> {
        parse::<wire::UpdateEvidence, _>(bytes)
    }
}

impl From<&UpdateEvidence> for wire::UpdateEvidence {
    fn from(evidence: &UpdateEvidence) -> Self {
        let UpdateEvidence { work: Work { commitment, assignment, head }, opened } = evidence;
        let opened = opened.as_ref();
        Self {
            run: commitment.run.as_bytes().to_vec(),
            commitment: Some(commitment.into()),
            assignment: Some(assignment.into()),
            head: head.as_ref().map(Into::into),
            start: opened.map(|opened| (&opened.start).into()),
            end: opened.map(|opened| (&opened.end).into()),
            error_in: opened.and_then(|opened| opened.error_in.as_ref()).map(Into::into),
            error_next: opened.map(|opened| (&opened.error_next).into()),
        }
    }
}

impl TryFrom<wire::UpdateEvidence> for UpdateEvidence {
    type Error = MessageError;

    fn try_from(wire: wire::UpdateEvidence) -> Result<Self, MessageError> {
        let run = run("evidence.run", &wire.run)?;
        let missing = |field| MessageError::Missing { field };
        let assignment: Assignment =
            wire.assignment.ok_or_else(|| missing("evidence.assignment"))?.try_into()?;
        let commitment = wire.commitment.ok_or_else(|| missing("evidence.commitment"))?;
        let opened = match (wire.start, wire.end, wire.error_in, wire.error_next) {
            (None, None, None, None) => None,
            (start, end, error_in, error_next) => Some(OpenedStates {
                start: openings("evidence.start", start)?,
                end: openings("evidence.end", end)?,
                error_in: error_in.map(|it| openings("evidence.error_in", Some(it))).transpose()?,
                error_next: openings("evidence.error_next", error_next)?,
            }),
        };
        let work = Work {
            commitment: SignedCommitment::parse(commitment, run, assignment.worker)?,
            assignment,
            head: wire.head.map(TryInto::try_into).transpose()?,
        };
        Ok(Self { work, opened })
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
