//! What each member should do now, read off the state.

use crate::reward::layout;
use manyhands_gradient::CHUNK;
use manyhands_proto::message::{
    Duty, Refusal, RefusalCode, Reply, Role, Situation, Source, Sync, Tasks,
};
use manyhands_proto::{NodeId, Round};

use super::Coordinator;
use super::membership::Member;
use super::round::Phase;

/// Other members named as sources for θ: enough to spread the load, few enough to keep the reply small.
const SOURCES_MAX: usize = 4;

/// How far audits may fall behind the open round. Workers keep the end states of so many rounds if they
/// must, ten bytes per parameter each.
const AUDIT_ROUNDS_MAX: u32 = 16;

impl Coordinator {
    pub(super) fn situation_reply(&self, node: NodeId) -> Reply {
        match self.membership.get(node) {
            None => Reply::Refused(Refusal {
                code: RefusalCode::NotAMember,
                reason: format!("node {node} has not joined"),
            }),
            Some(member) => Reply::Situation(Situation {
                duty: self.duty(node, member),
                verifiers: self.verifiers(),
                evidence_from: self.evidence_wanted_from(node),
            }),
        }
    }

    /// The oldest round of a worker's that a check may still be about. Rounds go on while audits wait for a verifier,
    /// but not for ever: what is older is abandoned.
    fn evidence_wanted_from(&self, worker: NodeId) -> Round {
        let undrawn = self.closed.iter().filter(|(_, closed)| closed.entropy.is_none());
        let wanted = undrawn.map(|(round, _)| *round).chain(self.audits.oldest_round_of(worker));
        wanted.min().unwrap_or(self.round.number).max(self.audited_from())
    }

    /// Replays of rounds before this one are not waited for any more.
    pub(super) fn audited_from(&self) -> Round {
        let rounds = AUDIT_ROUNDS_MAX.min(self.spec.run.evidence_rounds);
        // The next record must still hold what follows.
        Round((self.round.number.0 + 1).saturating_sub(rounds))
    }

    fn duty(&self, node: NodeId, member: &Member) -> Duty {
        if let Some(refusal) = &member.barred {
            return Duty::Dismissed(refusal.clone());
        }
        let round = self.round.number;
        match (self.round.phase, member.role) {
            (Phase::Complete, _) => Duty::Complete { round, theta: self.round.theta },
            (_, Role::Verifier) => self.verifier_duty(node),
            (phase, Role::Worker) => self.worker_duty(node, member, phase),
        }
    }

    fn verifier_duty(&self, node: NodeId) -> Duty {
        let evaluates = self.verifiers().first() == Some(&node);
        Duty::Tasks(Tasks {
            replays: self.audits.replays_of(node),
            evaluations: if evaluates { self.audits.evaluations() } else { Vec::new() },
            weigh: self.weigh_task(node),
        })
    }

    fn worker_duty(&self, node: NodeId, member: &Member, phase: Phase) -> Duty {
        let round = self.round.number;
        let committed = self.round.commitments.contains_key(&node);
        // Evidence is served before anything else: others wait for it.
        if committed && matches!(phase, Phase::Uploading { .. } | Phase::Checking { .. }) {
            return Duty::Upload(self.round.commit_set());
        }
        let finishing = matches!(phase, Phase::Finishing { .. });
        if member.theta != Some(round) && !finishing {
            return self.sync_duty(node);
        }
        let assignment = self.round.assignments.get(&node);
        match (phase, assignment.filter(|_| !self.round.excused.contains(&node))) {
            (Phase::Gathering { .. }, _) if round.0 == 0 => Duty::Gathering {
                workers: self.membership.ready_workers(round).count() as u32,
                workers_min: self.spec.run.workers_min,
            },
            (Phase::Training { .. }, Some(assignment)) if !committed => {
                Duty::Train(assignment.clone())
            }
            (Phase::Training { .. }, None) => {
                Duty::Wait { round, reason: manyhands_proto::message::WaitReason::NextRound }
            }
            (phase, _) => Duty::Wait { round, reason: phase.wait_reason() },
        }
    }

    fn sync_duty(&self, node: NodeId) -> Duty {
        let round = self.round.number;
        let sources = self
            .membership
            .ready_workers(round)
            .filter(|(other, member)| *other != node && !member.addresses.is_empty())
            .take(SOURCES_MAX)
            .map(|(other, member)| Source { node: other, addresses: member.addresses.clone() })
            .collect();
        let theta_bytes = layout(&self.spec.model).chunk_count() as u64 * CHUNK as u64 * 4;
        let merge = self.last_merge;
        Duty::Sync(Sync { round, theta: self.round.theta, theta_bytes, merge, sources })
    }
}
