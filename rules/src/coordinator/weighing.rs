//! Measuring what a round's updates do to held-out loss, before the merge: who is asked, and what counts.

use std::collections::BTreeMap;

use manyhands_proto::message::limits::WEIGHED_MAX;
use manyhands_proto::message::{LossEffect, Refusal, RefusalCode, Weigh, Weighing};
use manyhands_proto::run_file::Rule;
use manyhands_proto::{Digest, NodeId, Tick};
use serde::{Deserialize, Serialize};

use super::Coordinator;
use super::input::CodecResult;
use super::requests::refuse;
use super::round::{OpenRound, Phase, Upload};
use crate::draw::Beacon;
use crate::record::{Entropy, Weighed};

/// Verifiers that measure what a round's updates do to held-out loss: a majority of them decides.
pub const WEIGHERS_MAX: usize = 3;

/// Verifiers measure what a round's updates do to held-out loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Measurement {
    /// Who was drawn for it.
    pub(super) verifiers: Vec<NodeId>,
    /// Workers and their payloads, in the order of the workers.
    pub(super) updates: Vec<(NodeId, Digest)>,
    pub(super) answers: BTreeMap<NodeId, Vec<(NodeId, LossEffect)>>,
}

impl Measurement {
    /// The answers, if most of the verifiers gave one.
    pub(super) fn weighed(&self) -> Vec<Weighed> {
        if 2 * self.answers.len() <= self.verifiers.len() {
            return Vec::new();
        }
        let answers = self.answers.iter();
        answers.map(|(&verifier, effects)| Weighed { verifier, effects: effects.clone() }).collect()
    }
}

impl OpenRound {
    /// What came of the codec check. Whoever opens its chunks only when updates are being weighed would be the one
    /// that nobody weighed.
    pub(super) fn note_codec(&mut self, worker: NodeId, result: CodecResult) {
        let unweighed = self.uploads.get(&worker) == Some(&Upload::InTime)
            && self.measurement.as_ref().is_some_and(|measurement| {
                measurement.updates.iter().all(|(weighed, _)| *weighed != worker)
            });
        let result = if unweighed && result == CodecResult::Passed {
            CodecResult::Withheld("opened the drawn chunks when updates were weighed".to_owned())
        } else {
            result
        };
        self.codec.insert(worker, result);
    }

    /// Updates whose effect on held-out loss can be measured: here in time, well-formed and well encoded.
    pub(super) fn weighable(&self) -> Vec<(NodeId, Digest)> {
        self.commitments
            .iter()
            .filter(|(worker, _)| self.uploads.get(worker) == Some(&Upload::InTime))
            .filter(|(worker, _)| self.codec.get(worker) == Some(&CodecResult::Passed))
            .map(|(&worker, signed)| (worker, signed.commitment.payload))
            .take(WEIGHED_MAX)
            .collect()
    }
}

impl Coordinator {
    /// What a drawn verifier still has to measure before the merge.
    pub(super) fn weigh_task(&self, node: NodeId) -> Option<Weigh> {
        let round = &self.round;
        let measurement = round.measurement.as_ref()?;
        let drawn = measurement.verifiers.contains(&node);
        let waits = matches!(round.phase, Phase::Checking { .. });
        (drawn && waits && !measurement.answers.contains_key(&node)).then(|| Weigh {
            round: round.number,
            theta: round.theta,
            updates: measurement.updates.clone(),
        })
    }

    pub(super) fn handle_weighing(
        &mut self,
        from: NodeId,
        weighing: Weighing,
    ) -> Result<(), Refusal> {
        let asked = self.weigh_task(from).filter(|asked| {
            let asked_of = asked.updates.iter().map(|(worker, _)| worker);
            asked.round == weighing.round
                && asked_of.eq(weighing.effects.iter().map(|(worker, _)| worker))
        });
        if asked.is_none() {
            let reason =
                format!("these updates of round {} are not yours to weigh", weighing.round);
            return refuse(RefusalCode::NotYourTask, reason);
        }
        if let Some(measurement) = &mut self.round.measurement {
            measurement.answers.insert(from, weighing.effects);
        }
        Ok(())
    }

    /// Asks what the updates do to held-out loss, once it is clear which there are, or when half of the time that
    /// checks have is over: a worker that opens nothing must not end the measurement for all.
    pub(super) fn ask_weighings(&mut self, now: Tick, entropy: Entropy) {
        let needed = self.round.verified && self.spec.aggregation.rules.contains(&Rule::LossGate);
        let known = self.round.codec_missing().next().is_none()
            || self.weighing_time().is_some_and(|time| now >= time);
        if !needed || !known || self.round.measurement.is_some() {
            return;
        }
        let updates = self.round.weighable();
        // Whoever committed is judged, in whatever role it comes back.
        let able = |verifier: &NodeId| !self.round.commitments.contains_key(verifier);
        let attending = self.round.attending.iter().map(|it| it.verifier);
        let able: Vec<NodeId> = attending.filter(able).collect();
        let beacon = Beacon::new(self.committed(), entropy.value);
        let count = if updates.is_empty() { 0 } else { WEIGHERS_MAX };
        let verifiers = beacon.verifiers(count, &able);
        self.round.measurement = Some(Measurement { verifiers, updates, answers: BTreeMap::new() });
    }

    /// When updates are weighed at the latest.
    pub(super) fn weighing_time(&self) -> Option<Tick> {
        let Phase::Checking { deadline: Some(deadline) } = self.round.phase else { return None };
        Some(Tick(deadline.0.saturating_sub(self.spec.round.check_ms / 2)))
    }

    /// Whether everybody who is to weigh, and is still there, has done so.
    pub(super) fn is_weighed(&self) -> bool {
        let Some(measurement) = &self.round.measurement else { return true };
        let present = self.verifiers();
        let waits =
            |verifier| present.contains(verifier) && !measurement.answers.contains_key(verifier);
        !measurement.verifiers.iter().any(waits)
    }
}
