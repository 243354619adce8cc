//! What the coordinator hands out: training and checks.

use super::MessageError;
use super::field::{ascending, at_most, check, digest, list, node, required, round, some_at_most};
use super::shared::class;
use crate::message::limits::{
    COUNT_MAX, QUARANTINED_MAX, SEQUENCES_MAX, STEPS_MAX, TASKS_MAX, WEIGHED_MAX,
};
use crate::message::{Assignment, Commitment, Evaluate, Replay, Start, Tasks, Weigh, wire};
use crate::{Digest, NodeId, Round};

impl From<&Start> for wire::Start {
    fn from(start: &Start) -> Self {
        match *start {
            Start::Fresh => Self::default(),
            Start::Head { round, commitment, sent_values_returned, adam_step } => Self {
                head_round: Some(round.0),
                head: commitment.as_bytes().to_vec(),
                sent_values_returned,
                adam_step,
            },
        }
    }
}

impl TryFrom<wire::Start> for Start {
    type Error = MessageError;

    fn try_from(wire: wire::Start) -> Result<Self, MessageError> {
        let wire::Start { head_round, head, sent_values_returned, adam_step } = wire;
        let Some(head_round) = head_round else {
            let holds = !sent_values_returned && adam_step == 0 && head.is_empty();
            let got = (sent_values_returned, adam_step, head.len());
            check("start", "nothing returned, no steps and no digest without a head", got, holds)?;
            return Ok(Self::Fresh);
        };
        Ok(Self::Head {
            round: round("start.head_round", head_round)?,
            commitment: digest("start.head", &head)?,
            sent_values_returned,
            adam_step: at_most("start.adam_step", adam_step, COUNT_MAX)?,
        })
    }
}

impl From<&Assignment> for wire::Assignment {
    fn from(assignment: &Assignment) -> Self {
        Self {
            round: assignment.round.0,
            worker: assignment.worker.as_bytes().to_vec(),
            theta: assignment.theta.as_bytes().to_vec(),
            class: Some((&assignment.class).into()),
            first_sequence: assignment.first_sequence,
            sequences: assignment.sequences,
            steps: assignment.steps,
            first_step: assignment.first_step,
            start: Some((&assignment.start).into()),
            left_out: assignment.left_out.clone(),
            commit_deadline_ms: assignment.commit_deadline_ms,
        }
    }
}

impl TryFrom<wire::Assignment> for Assignment {
    type Error = MessageError;

    /// Sums and products of the sequence and step fields cannot overflow: their limits are 2⁵⁰,
    /// 2³⁰ and 10⁵.
    fn try_from(wire: wire::Assignment) -> Result<Self, MessageError> {
        let round = round("assignment.round", wire.round)?;
        ascending("assignment.left_out", wire.left_out.iter())?;
        Ok(Self {
            round,
            worker: node("assignment.worker", &wire.worker)?,
            theta: digest("assignment.theta", &wire.theta)?,
            class: class("assignment.class", wire.class)?,
            first_sequence: at_most("assignment.first_sequence", wire.first_sequence, COUNT_MAX)?,
            sequences: some_at_most("assignment.sequences", wire.sequences, SEQUENCES_MAX)?,
            steps: some_at_most("assignment.steps", wire.steps, STEPS_MAX)?,
            first_step: at_most("assignment.first_step", wire.first_step, COUNT_MAX)?,
            start: earlier_than(round, required("assignment.start", wire.start)?.try_into()?)?,
            left_out: list("assignment.left_out", wire.left_out, QUARANTINED_MAX, Ok)?,
            commit_deadline_ms: at_most(
                "assignment.commit_deadline_ms",
                wire.commit_deadline_ms,
                COUNT_MAX,
            )?,
        })
    }
}

fn earlier_than(round: Round, start: Start) -> Result<Start, MessageError> {
    let holds = match start {
        Start::Fresh => true,
        Start::Head { round: head, .. } => head < round,
    };
    check("start.head_round", "a round before the assignment's", start, holds)
}

impl From<&Tasks> for wire::Tasks {
    fn from(tasks: &Tasks) -> Self {
        Self {
            replays: tasks.replays.iter().map(Into::into).collect(),
            evaluations: tasks.evaluations.iter().map(Into::into).collect(),
            weigh: tasks.weigh.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<wire::Tasks> for Tasks {
    type Error = MessageError;

    fn try_from(wire: wire::Tasks) -> Result<Self, MessageError> {
        Ok(Self {
            replays: list("tasks.replays", wire.replays, TASKS_MAX, TryInto::try_into)?,
            evaluations: list("tasks.evaluations", wire.evaluations, TASKS_MAX, TryInto::try_into)?,
            weigh: wire.weigh.map(TryInto::try_into).transpose()?,
        })
    }
}

impl From<&Replay> for wire::Replay {
    fn from(replay: &Replay) -> Self {
        Self {
            id: replay.id,
            assignment: Some((&replay.assignment).into()),
            head: replay.head.as_ref().map(Into::into),
            source: Some((&replay.source).into()),
        }
    }
}

impl TryFrom<wire::Replay> for Replay {
    type Error = MessageError;

    fn try_from(wire: wire::Replay) -> Result<Self, MessageError> {
        let head: Option<Commitment> = wire.head.map(TryInto::try_into).transpose()?;
        let assignment: Assignment = required("replay.assignment", wire.assignment)?.try_into()?;
        let from_head = assignment.start != Start::Fresh;
        let holds = head.is_some() == from_head;
        check("replay.head", "some if and only if the round starts from one", (), holds)?;
        Ok(Self {
            id: wire.id,
            assignment,
            head,
            source: required("replay.source", wire.source)?.try_into()?,
        })
    }
}

impl From<&Evaluate> for wire::Evaluate {
    fn from(evaluate: &Evaluate) -> Self {
        Self { round: evaluate.round.0, theta: evaluate.theta.as_bytes().to_vec() }
    }
}

impl TryFrom<wire::Evaluate> for Evaluate {
    type Error = MessageError;

    fn try_from(wire: wire::Evaluate) -> Result<Self, MessageError> {
        Ok(Self {
            round: round("evaluate.round", wire.round)?,
            theta: digest("evaluate.theta", &wire.theta)?,
        })
    }
}

impl From<&Weigh> for wire::Weigh {
    fn from(weigh: &Weigh) -> Self {
        let update = |(worker, payload): &(NodeId, Digest)| wire::SentUpdate {
            worker: worker.as_bytes().to_vec(),
            payload: payload.as_bytes().to_vec(),
        };
        Self {
            round: weigh.round.0,
            theta: weigh.theta.as_bytes().to_vec(),
            updates: weigh.updates.iter().map(update).collect(),
        }
    }
}

impl TryFrom<wire::Weigh> for Weigh {
    type Error = MessageError;

    fn try_from(wire: wire::Weigh) -> Result<Self, MessageError> {
        let updates = list("weigh.updates", wire.updates, WEIGHED_MAX, |update| {
            let worker = node("weigh.updates.worker", &update.worker)?;
            Ok((worker, digest("weigh.updates.payload", &update.payload)?))
        })?;
        ascending("weigh.updates", updates.iter().map(|(worker, _)| worker))?;
        Ok(Self {
            round: round("weigh.round", wire.round)?,
            theta: digest("weigh.theta", &wire.theta)?,
            updates,
        })
    }
}
