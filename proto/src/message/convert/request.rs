//! What a peer asks.

use super::MessageError;
use super::field::{
    address_texts, addresses, ascending, at_most, check, digest, explain, list, node, reason,
    required, round, signature, unexpected,
};
use super::shared::class;
use crate::message::limits::{COUNT_MAX, HEAD_ROUNDS_MAX, STEPS_MAX, WEIGHED_MAX};
use crate::message::wire::replayed::End;
use crate::message::wire::request::Kind;
use crate::message::wire::verdict::Outcome;
use crate::message::{
    Beat, EndState, Evaluation, Join, LossEffect, Possession, ReplayEnd, ReplayOutcome, Replayed,
    Request, Role, SignedCommitment, SignedReplay, Verdict, Weighing, wire,
};
use crate::{NodeId, Round, RunId};

impl From<&Request> for wire::Request {
    fn from(request: &Request) -> Self {
        let kind = match request {
            Request::Describe => Kind::Describe(wire::Empty {}),
            Request::Join(join) => Kind::Join(join.into()),
            Request::Beat(beat) => Kind::Beat(beat.into()),
            Request::Commit(signed) => Kind::Commit(signed.into()),
            Request::Verdict(verdict) => Kind::Verdict(verdict.into()),
            Request::Evaluation(evaluation) => Kind::Evaluation(evaluation.into()),
            Request::Weighing(weighing) => Kind::Weighing(weighing.into()),
            Request::Leave => Kind::Leave(wire::Empty {}),
            Request::Status => Kind::Status(wire::Empty {}),
        };
        Self { kind: Some(kind) }
    }
}

impl Request {
    /// `run` and `signer` are the envelope's: a commitment or a replay is signed for both.
    pub(in crate::message) fn parse(
        wire: wire::Request,
        run: RunId,
        signer: NodeId,
    ) -> Result<Self, MessageError> {
        Ok(match required("request.kind", wire.kind)? {
            Kind::Describe(wire::Empty {}) => Self::Describe,
            Kind::Join(join) => Self::Join(join.try_into()?),
            Kind::Beat(beat) => Self::Beat(beat.try_into()?),
            Kind::Commit(signed) => Self::Commit(SignedCommitment::parse(signed, run, signer)?),
            Kind::Verdict(verdict) => Self::Verdict(Verdict::parse(verdict, run, signer)?),
            Kind::Evaluation(evaluation) => Self::Evaluation(evaluation.try_into()?),
            Kind::Weighing(weighing) => Self::Weighing(weighing.try_into()?),
            Kind::Leave(wire::Empty {}) => Self::Leave,
            Kind::Status(wire::Empty {}) => Self::Status,
        })
    }
}

impl From<&Join> for wire::Join {
    fn from(join: &Join) -> Self {
        let Join { role, version, class, memory_bytes, tokens_per_second, addresses, head_rounds } =
            join;
        Self {
            role: role.code(),
            version: *version,
            class: Some(class.into()),
            memory_bytes: *memory_bytes,
            tokens_per_second: *tokens_per_second,
            addresses: address_texts(addresses),
            head_rounds: head_rounds.iter().map(|round| round.0).collect(),
        }
    }
}

impl TryFrom<wire::Join> for Join {
    type Error = MessageError;

    fn try_from(wire: wire::Join) -> Result<Self, MessageError> {
        let field = "join.head_rounds";
        let heads = list(field, wire.head_rounds, HEAD_ROUNDS_MAX, |head| round(field, head))?;
        ascending(field, heads.iter())?;
        Ok(Self {
            role: Role::of_code(wire.role)
                .ok_or_else(|| unexpected("join.role", "a known role", wire.role))?,
            version: wire.version,
            class: class("join.class", wire.class)?,
            memory_bytes: at_most("join.memory_bytes", wire.memory_bytes, COUNT_MAX)?,
            tokens_per_second: at_most(
                "join.tokens_per_second",
                wire.tokens_per_second,
                COUNT_MAX,
            )?,
            addresses: addresses("join.addresses", wire.addresses)?,
            head_rounds: heads,
        })
    }
}

impl From<&Beat> for wire::Beat {
    fn from(beat: &Beat) -> Self {
        Self {
            theta_round: beat.theta.map(|theta| theta.round.0),
            possession: beat.theta.map(|theta| theta.proof.as_bytes().to_vec()).unwrap_or_default(),
            steps_done: beat.steps_done,
            leaving: beat.leaving,
        }
    }
}

impl TryFrom<wire::Beat> for Beat {
    type Error = MessageError;

    fn try_from(wire: wire::Beat) -> Result<Self, MessageError> {
        let theta = match wire.theta_round {
            Some(theta_round) => Some(Possession {
                round: round("beat.theta_round", theta_round)?,
                proof: digest("beat.possession", &wire.possession)?,
            }),
            None => {
                let got = wire.possession.len();
                check("beat.possession", "no bytes without a round", got, got == 0)?;
                None
            }
        };
        at_most("beat.steps_done", wire.steps_done.into(), STEPS_MAX.into())?;
        Ok(Self { theta, steps_done: wire.steps_done, leaving: wire.leaving })
    }
}

impl From<&Verdict> for wire::Verdict {
    fn from(verdict: &Verdict) -> Self {
        let outcome = match &verdict.outcome {
            ReplayOutcome::Replayed(signed) => Outcome::Replayed(signed.into()),
            ReplayOutcome::Failed(why) => Outcome::Failed(explain(why)),
        };
        Self { id: verdict.id, outcome: Some(outcome) }
    }
}

impl Verdict {
    /// Of the run and verifier that the envelope names.
    fn parse(wire: wire::Verdict, run: RunId, verifier: NodeId) -> Result<Self, MessageError> {
        let outcome = match required("verdict.outcome", wire.outcome)? {
            Outcome::Replayed(signed) => {
                ReplayOutcome::Replayed(SignedReplay::parse(signed, run, verifier)?)
            }
            Outcome::Failed(why) => ReplayOutcome::Failed(reason("verdict.failed", why)?),
        };
        Ok(Self { id: wire.id, outcome })
    }
}

impl From<&SignedReplay> for wire::SignedReplay {
    fn from(signed: &SignedReplay) -> Self {
        Self { replayed: Some((&signed.replayed).into()), signature: signed.signature.to_vec() }
    }
}

impl SignedReplay {
    pub(in crate::message) fn parse(
        wire: wire::SignedReplay,
        run: RunId,
        verifier: NodeId,
    ) -> Result<Self, MessageError> {
        let replayed = required("replay.replayed", wire.replayed)?.try_into()?;
        let signature = signature("replay.signature", &wire.signature)?;
        let signed = Self { replayed, run, verifier, signature };
        let holds = signed.verify();
        check("replay.signature", "the verifier's over run, round and end", (), holds)?;
        Ok(signed)
    }
}

impl From<&Replayed> for wire::Replayed {
    fn from(replayed: &Replayed) -> Self {
        let end = match &replayed.end {
            ReplayEnd::At(EndState { theta, moments }) => End::At(wire::EndState {
                theta: theta.as_bytes().to_vec(),
                moments: moments.as_bytes().to_vec(),
            }),
            ReplayEnd::Nowhere => End::Nowhere(wire::Empty {}),
            ReplayEnd::Withheld(what) => End::Withheld(explain(what)),
        };
        Self {
            round: replayed.round.0,
            worker: replayed.worker.as_bytes().to_vec(),
            assignment: replayed.assignment.as_bytes().to_vec(),
            end: Some(end),
        }
    }
}

impl TryFrom<wire::Replayed> for Replayed {
    type Error = MessageError;

    fn try_from(wire: wire::Replayed) -> Result<Self, MessageError> {
        let end = match required("replayed.end", wire.end)? {
            End::At(wire::EndState { theta, moments }) => ReplayEnd::At(EndState {
                theta: digest("replayed.theta", &theta)?,
                moments: digest("replayed.moments", &moments)?,
            }),
            End::Nowhere(wire::Empty {}) => ReplayEnd::Nowhere,
            End::Withheld(what) => ReplayEnd::Withheld(reason("replayed.withheld", what)?),
        };
        Ok(Self {
            round: round("replayed.round", wire.round)?,
            worker: node("replayed.worker", &wire.worker)?,
            assignment: digest("replayed.assignment", &wire.assignment)?,
            end,
        })
    }
}

impl From<&Evaluation> for wire::Evaluation {
    fn from(evaluation: &Evaluation) -> Self {
        let Evaluation { round: Round(round), theta, loss } = evaluation;
        Self { round: *round, theta: theta.as_bytes().to_vec(), loss: *loss }
    }
}

impl TryFrom<wire::Evaluation> for Evaluation {
    type Error = MessageError;

    fn try_from(wire: wire::Evaluation) -> Result<Self, MessageError> {
        Ok(Self {
            round: round("evaluation.round", wire.round)?,
            theta: digest("evaluation.theta", &wire.theta)?,
            loss: check("evaluation.loss", "a finite number", wire.loss, wire.loss.is_finite())?,
        })
    }
}

impl From<&Weighing> for wire::Weighing {
    fn from(weighing: &Weighing) -> Self {
        let effect = |&(worker, LossEffect(effect)): &(NodeId, LossEffect)| wire::LossEffect {
            worker: worker.as_bytes().to_vec(),
            effect,
        };
        Self { round: weighing.round.0, effects: weighing.effects.iter().map(effect).collect() }
    }
}

impl TryFrom<wire::Weighing> for Weighing {
    type Error = MessageError;

    fn try_from(wire: wire::Weighing) -> Result<Self, MessageError> {
        let effects = list("weighing.effects", wire.effects, WEIGHED_MAX, |entry| {
            Ok((node("weighing.effects.worker", &entry.worker)?, LossEffect(entry.effect)))
        })?;
        ascending("weighing.effects", effects.iter().map(|(worker, _)| worker))?;
        Ok(Self { round: round("weighing.round", wire.round)?, effects })
    }
}
