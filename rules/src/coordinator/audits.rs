//! Replays and evaluations: who has to do which, and what they found.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use manyhands_proto::message::{Distances, Evaluate, Replay, ReplayOutcome};
use manyhands_proto::run_file::Verification;
use manyhands_proto::{Digest, NodeId, Round, Tick};
use serde::{Deserialize, Serialize};

/// A verifier that could not do a task is not asked again for it; after so many the task ends.
const VERIFIERS_PER_TASK_MAX: usize = 3;

/// More evaluations than this would only make each reply longer.
const EVALUATIONS_AT_ONCE: usize = 16;

/// A replay that somebody has to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ReplayTask {
    pub(super) replay: Replay,
    /// The merge waits for it.
    pub(super) before_merge: bool,
    given_to: Option<(NodeId, Tick)>,
    failed_by: Vec<NodeId>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Audits {
    next_id: u64,
    replays: BTreeMap<u64, ReplayTask>,
    /// θ whose held-out loss is asked for.
    evaluations: BTreeMap<Round, Digest>,
}

/// How a replay ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Ended {
    Passed(Distances),
    Fault(Distances),
    Withheld(String),
    /// Nobody could do it.
    Abandoned,
}

impl Audits {
    pub(super) fn ask_replay(&mut self, mut replay: Replay, before_merge: bool) {
        replay.id = self.next_id;
        self.next_id += 1;
        let task = ReplayTask { replay, before_merge, given_to: None, failed_by: Vec::new() };
        self.replays.insert(task.replay.id, task);
    }

    /// A worker is somewhere else now. Its tasks stay what they are: whoever could renew them by coming
    /// again would never be judged.
    pub(super) fn moved(&mut self, worker: NodeId, addresses: &[SocketAddr]) {
        for task in self.replays.values_mut() {
            if task.replay.assignment.worker == worker {
                task.replay.source.addresses = addresses.to_vec();
            }
        }
    }

    pub(super) fn ask_evaluation(&mut self, round: Round, theta: Digest) {
        self.evaluations.insert(round, theta);
    }

    /// θ before this round are gone, or soon will be.
    pub(super) fn forget_evaluations_before(&mut self, round: Round) {
        self.evaluations.retain(|of, _| *of >= round);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.replays.is_empty() && self.evaluations.is_empty()
    }

    /// Gives waiting tasks to verifiers that are there and have none, those that a merge waits for first, then
    /// the oldest; takes back those of verifiers that are gone or had longer than `patience_ms`. One at a time:
    /// waiting behind others is no verifier's failure.
    pub(super) fn distribute(&mut self, now: Tick, present: &[NodeId], patience_ms: u64) {
        for task in self.replays.values_mut() {
            if let Some((verifier, since)) = task.given_to {
                if now.since(since) >= patience_ms {
                    task.failed_by.push(verifier);
                    task.given_to = None;
                } else if !present.contains(&verifier) {
                    task.given_to = None;
                }
            }
        }
        let busy: Vec<NodeId> =
            self.replays.values().filter_map(|task| task.given_to).map(|(node, _)| node).collect();
        let mut idle: Vec<NodeId> =
            present.iter().copied().filter(|node| !busy.contains(node)).collect();
        let mut waiting: Vec<_> =
            self.replays.values_mut().filter(|task| task.given_to.is_none()).collect();
        waiting.sort_by_key(|task| (!task.before_merge, task.replay.id));
        for task in waiting {
            // Nobody judges itself, in whatever role it comes back.
            let judged = task.replay.assignment.worker;
            let able = |node: &NodeId| *node != judged && !task.failed_by.contains(node);
            if let Some(at) = idle.iter().position(able) {
                task.given_to = Some((idle.remove(at), now));
            }
        }
    }

    /// When the next task is to be taken back.
    pub(super) fn next_timeout(&self, patience_ms: u64) -> Option<Tick> {
        let given = self.replays.values().filter_map(|task| task.given_to);
        given.map(|(_, since)| since.after_ms(patience_ms)).min()
    }

    /// The oldest round that waits for a replay.
    pub(super) fn oldest_round(&self) -> Option<Round> {
        self.replays.values().map(|task| task.replay.assignment.round).min()
    }

    /// Tasks that too many verifiers failed at, and those about a round before `from`.
    pub(super) fn abandon(&mut self, from: Round) -> Vec<ReplayTask> {
        self.take(|task| {
            task.failed_by.len() >= VERIFIERS_PER_TASK_MAX || task.replay.assignment.round < from
        })
    }

    /// Ends the replays that a merge no longer waits for.
    pub(super) fn end_before_merge(&mut self) {
        self.take(|task| task.before_merge);
    }

    pub(super) fn end_all(&mut self) {
        self.replays.clear();
        self.evaluations.clear();
    }

    fn take(&mut self, which: impl Fn(&ReplayTask) -> bool) -> Vec<ReplayTask> {
        let ids: Vec<u64> =
            self.replays.iter().filter(|(_, task)| which(task)).map(|(&id, _)| id).collect();
        ids.into_iter().filter_map(|id| self.replays.remove(&id)).collect()
    }

    pub(super) fn replays_of(&self, verifier: NodeId) -> Vec<Replay> {
        let given = |task: &&ReplayTask| task.given_to.is_some_and(|(node, _)| node == verifier);
        self.replays.values().filter(given).map(|task| task.replay.clone()).collect()
    }

    /// Everything is evaluated by the first verifier that is there, the newest first: that is what
    /// people wait for.
    pub(super) fn evaluations(&self) -> Vec<Evaluate> {
        let newest = self.evaluations.iter().rev().take(EVALUATIONS_AT_ONCE);
        newest.map(|(&round, &theta)| Evaluate { round, theta }).collect()
    }

    /// Whether this θ's loss was still asked for.
    pub(super) fn evaluated(&mut self, round: Round, theta: Digest) -> bool {
        let asked = self.evaluations.get(&round) == Some(&theta);
        if asked {
            self.evaluations.remove(&round);
        }
        asked
    }

    /// A verifier's answer: none if the task is not its, or goes on with another verifier.
    pub(super) fn answer(
        &mut self,
        verifier: NodeId,
        id: u64,
        outcome: &ReplayOutcome,
        terms: &Verification,
    ) -> Option<(ReplayTask, Ended)> {
        let task = self.replays.get_mut(&id)?;
        if task.given_to.is_none_or(|(node, _)| node != verifier) {
            return None;
        }
        let ended = match outcome {
            ReplayOutcome::Compared(distances) if within(distances, terms) => {
                Ended::Passed(*distances)
            }
            ReplayOutcome::Compared(distances) => Ended::Fault(*distances),
            ReplayOutcome::Withheld(reason) => Ended::Withheld(reason.clone()),
            ReplayOutcome::Failed(_) => {
                task.failed_by.push(verifier);
                task.given_to = None;
                return None;
            }
        };
        self.replays.remove(&id).map(|task| (task, ended))
    }

    pub(super) fn is_given_to(&self, verifier: NodeId, id: u64) -> bool {
        let given = self.replays.get(&id).and_then(|task| task.given_to);
        given.is_some_and(|(node, _)| node == verifier)
    }
}

/// Whether a replay came out where the worker said, each vector by its own threshold.
pub fn within(distances: &Distances, terms: &Verification) -> bool {
    distances.delta <= terms.delta_distance_max
        && distances.first_moment <= terms.first_moment_distance_max
        && distances.second_moment <= terms.second_moment_distance_max
}
