//! What the coordinator answers.

use super::MessageError;
use super::field::{
    address_texts, addresses, ascending, at_most, check, count, digest, list, node, required,
    round, unexpected,
};
use crate::message::limits::{
    BLOB_BYTES_MAX, COMMIT_SET_ENTRIES_MAX, OUTER_LEARNING_RATE_MAX, SOURCES_MAX, SPEC_BYTES_MAX,
    STATUS_BYTES_MAX, VERIFIERS_MAX,
};
use crate::message::wire::reply::Kind;
use crate::message::wire::situation::Kind as DutyKind;
use crate::message::{CommitSet, Duty, Merge, Reply, Situation, Source, Sync, WaitReason, wire};
use crate::{Digest, NodeId};

impl From<&Reply> for wire::Reply {
    fn from(reply: &Reply) -> Self {
        let kind = match reply {
            Reply::Description { spec, round } => {
                Kind::Description(wire::Description { spec: spec.clone(), round: round.0 })
            }
            Reply::Situation(situation) => Kind::Situation(situation.into()),
            Reply::Refused(refusal) => Kind::Refusal(refusal.into()),
            Reply::Status(json) => Kind::Status(json.clone()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::Reply> for Reply {
    type Error = MessageError;

    fn try_from(wire: wire::Reply) -> Result<Self, MessageError> {
        Ok(match required("reply.kind", wire.kind)? {
            Kind::Description(description) => {
                count("description.spec", description.spec.len(), SPEC_BYTES_MAX)?;
                let round = round("description.round", description.round)?;
                Self::Description { spec: description.spec, round }
            }
            Kind::Situation(situation) => Self::Situation(situation.try_into()?),
            Kind::Refusal(refusal) => Self::Refused(refusal.try_into()?),
            Kind::Status(json) => {
                count("status", json.len(), STATUS_BYTES_MAX)?;
                Self::Status(json)
            }
        })
    }
}

impl From<&Situation> for wire::Situation {
    fn from(situation: &Situation) -> Self {
        let verifiers = situation.verifiers.iter().map(|node| node.as_bytes().to_vec()).collect();
        let evidence_from = situation.evidence_from.0;
        Self { kind: Some((&situation.duty).into()), verifiers, evidence_from }
    }
}

impl TryFrom<wire::Situation> for Situation {
    type Error = MessageError;

    fn try_from(wire: wire::Situation) -> Result<Self, MessageError> {
        let field = "situation.verifiers";
        Ok(Self {
            verifiers: list(field, wire.verifiers, VERIFIERS_MAX, |id| node(field, &id))?,
            evidence_from: round("situation.evidence_from", wire.evidence_from)?,
            duty: required("situation.kind", wire.kind)?.try_into()?,
        })
    }
}

impl From<&Duty> for DutyKind {
    fn from(duty: &Duty) -> Self {
        match duty {
            Duty::Gathering { workers, workers_min } => {
                let (workers, workers_min) = (*workers, *workers_min);
                Self::Gathering(wire::Gathering { workers, workers_min })
            }
            Duty::Train(assignment) => Self::Train(assignment.into()),
            Duty::Upload(set) => Self::Upload(set.into()),
            Duty::Wait { round, reason } => {
                Self::Wait(wire::Wait { round: round.0, reason: reason.code() })
            }
            Duty::Sync(sync) => Self::Sync(sync.into()),
            Duty::Tasks(tasks) => Self::Tasks(tasks.into()),
            Duty::Complete { round, theta } => {
                let theta = theta.as_bytes().to_vec();
                Self::Complete(wire::Complete { round: round.0, theta })
            }
            Duty::Dismissed(refusal) => Self::Dismissed(refusal.into()),
        }
    }
}

impl TryFrom<DutyKind> for Duty {
    type Error = MessageError;

    fn try_from(wire: DutyKind) -> Result<Self, MessageError> {
        Ok(match wire {
            DutyKind::Gathering(wire::Gathering { workers, workers_min }) => {
                Self::Gathering { workers, workers_min }
            }
            DutyKind::Train(assignment) => Self::Train(assignment.try_into()?),
            DutyKind::Upload(set) => Self::Upload(set.try_into()?),
            DutyKind::Wait(wait) => Self::Wait {
                round: round("wait.round", wait.round)?,
                reason: WaitReason::of_code(wait.reason)
                    .ok_or_else(|| unexpected("wait.reason", "a known reason", wait.reason))?,
            },
            DutyKind::Sync(sync) => Self::Sync(sync.try_into()?),
            DutyKind::Tasks(tasks) => Self::Tasks(tasks.try_into()?),
            DutyKind::Complete(complete) => Self::Complete {
                round: round("complete.round", complete.round)?,
                theta: digest("complete.theta", &complete.theta)?,
            },
            DutyKind::Dismissed(refusal) => Self::Dismissed(refusal.try_into()?),
        })
    }
}

impl From<&CommitSet> for wire::CommitSet {
    fn from(set: &CommitSet) -> Self {
        let entry = |(worker, commitment): &(NodeId, Digest)| wire::CommitSetEntry {
            worker: worker.as_bytes().to_vec(),
            commitment: commitment.as_bytes().to_vec(),
        };
        Self { round: set.round.0, entries: set.entries.iter().map(entry).collect() }
    }
}

impl TryFrom<wire::CommitSet> for CommitSet {
    type Error = MessageError;

    fn try_from(wire: wire::CommitSet) -> Result<Self, MessageError> {
        let field = "commit_set.entries";
        let entries = list(field, wire.entries, COMMIT_SET_ENTRIES_MAX, |entry| {
            let worker = node("commit_set.entries.worker", &entry.worker)?;
            Ok((worker, digest("commit_set.entries.commitment", &entry.commitment)?))
        })?;
        ascending(field, entries.iter().map(|(worker, _)| worker))?;
        Ok(Self { round: round("commit_set.round", wire.round)?, entries })
    }
}

impl From<&Source> for wire::Source {
    fn from(source: &Source) -> Self {
        let addresses = address_texts(&source.addresses);
        Self { node: source.node.as_bytes().to_vec(), addresses }
    }
}

impl TryFrom<wire::Source> for Source {
    type Error = MessageError;

    fn try_from(wire: wire::Source) -> Result<Self, MessageError> {
        Ok(Self {
            node: node("source.node", &wire.node)?,
            addresses: addresses("source.addresses", wire.addresses)?,
        })
    }
}

impl From<&Sync> for wire::Sync {
    fn from(sync: &Sync) -> Self {
        Self {
            round: sync.round.0,
            theta: sync.theta.as_bytes().to_vec(),
            theta_bytes: sync.theta_bytes,
            merge: sync.merge.as_ref().map(Into::into),
            sources: sync.sources.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<wire::Sync> for Sync {
    type Error = MessageError;

    fn try_from(wire: wire::Sync) -> Result<Self, MessageError> {
        Ok(Self {
            round: round("sync.round", wire.round)?,
            theta: digest("sync.theta", &wire.theta)?,
            theta_bytes: at_most("sync.theta_bytes", wire.theta_bytes, BLOB_BYTES_MAX)?,
            merge: wire.merge.map(TryInto::try_into).transpose()?,
            sources: list("sync.sources", wire.sources, SOURCES_MAX, TryInto::try_into)?,
        })
    }
}

impl From<&Merge> for wire::Merge {
    fn from(merge: &Merge) -> Self {
        Self {
            aggregate: merge.aggregate.as_bytes().to_vec(),
            aggregate_bytes: merge.aggregate_bytes,
            residual: merge.residual.as_bytes().to_vec(),
            outer_learning_rate: merge.outer_learning_rate,
        }
    }
}

impl TryFrom<wire::Merge> for Merge {
    type Error = MessageError;

    fn try_from(wire: wire::Merge) -> Result<Self, MessageError> {
        let rate = wire.outer_learning_rate;
        // A number that is not one fails both comparisons.
        let holds = rate > 0.0 && rate <= OUTER_LEARNING_RATE_MAX;
        Ok(Self {
            aggregate: digest("merge.aggregate", &wire.aggregate)?,
            aggregate_bytes: at_most(
                "merge.aggregate_bytes",
                wire.aggregate_bytes,
                BLOB_BYTES_MAX,
            )?,
            residual: digest("merge.residual", &wire.residual)?,
            outer_learning_rate: check(
                "merge.outer_learning_rate",
                "more than 0 and at most 10",
                rate,
                holds,
            )?,
        })
    }
}
