//! Replays and evaluations: who has to do which, and what they found.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use manyhands_proto::message::{Evaluate, Replay, ReplayOutcome};
use manyhands_proto::run_file::Verification;
use manyhands_proto::{Digest, NodeId, Round, Tick};
use serde::{Deserialize, Serialize};

use crate::panel::{JUDGES_MAX, Judged, Judgement, decide, judges_needed};
use crate::record::Finding;

/// More evaluations than this would only make each reply longer.
const EVALUATIONS_AT_ONCE: usize = 16;

/// A worker's round that verifiers have to judge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ReplayTask {
    pub(super) replay: Replay,
    /// The merge waits for it.
    pub(super) before_merge: bool,
    /// Who may judge it, in the order in which they are asked.
    panel: Vec<NodeId>,
    /// How many judge it while nobody accuses.
    judges: usize,
    /// Who is at it, and since when.
    given: BTreeMap<NodeId, Tick>,
    /// Could not do it, or not in time.
    unable: Vec<NodeId>,
    /// In the order in which they came.
    pub(super) judgements: Vec<Judgement>,
    /// When somebody accused first: others are waited for from then on, and not for ever.
    accused_at: Option<Tick>,
}

impl ReplayTask {
    /// Members of the panel that have neither judged nor failed, in their order.
    fn remaining(&self) -> impl Iterator<Item = NodeId> {
        let judged = |node: &NodeId| self.judgements.iter().any(|it| it.verifier == *node);
        let done = move |node: &NodeId| self.unable.contains(node) || judged(node);
        self.panel.iter().copied().filter(move |node| !done(node))
    }

    fn is_accused(&self) -> bool {
        self.accused_at.is_some()
    }

    /// Who is to be given it now: of those that are there, whoever comes first in the panel and is idle. Nobody
    /// beyond the first three that could do it, or a judge could be picked by keeping others busy.
    fn next(&self, present: &[NodeId], idle: &[NodeId]) -> Option<NodeId> {
        let needed = judges_needed(self.judges, &self.judgements);
        let enough = self.judgements.len() + self.given.len() >= needed;
        if enough || self.unable.len() >= JUDGES_MAX {
            return None;
        }
        let places = JUDGES_MAX.saturating_sub(self.judgements.len());
        let there = self.remaining().filter(|node| present.contains(node)).take(places);
        there.filter(|node| !self.given.contains_key(node)).find(|node| idle.contains(node))
    }

    /// Whether somebody may still judge it: who is at it, and who could be. Whoever is away is waited for until an
    /// accusation is older than `patience_ms`.
    fn expects_more(&self, now: Tick, present: &[NodeId], patience_ms: u64) -> bool {
        if self.judgements.len() >= JUDGES_MAX || self.unable.len() >= JUDGES_MAX {
            return !self.given.is_empty();
        }
        let waited = self.accused_at.is_some_and(|since| now.since(since) >= patience_ms);
        !self.given.is_empty() || self.remaining().any(|node| !waited || present.contains(&node))
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Audits {
    next_id: u64,
    replays: BTreeMap<u64, ReplayTask>,
    /// θ whose held-out loss is asked for.
    evaluations: BTreeMap<Round, Digest>,
}

impl Audits {
    /// `panel`: who may judge it, in the order in which they are asked, of whom `judges` do if nobody accuses.
    pub(super) fn ask_replay(
        &mut self,
        mut replay: Replay,
        (panel, judges): (Vec<NodeId>, usize),
        before_merge: bool,
    ) {
        replay.id = self.next_id;
        self.next_id += 1;
        let task = ReplayTask {
            replay,
            before_merge,
            panel,
            judges,
            given: BTreeMap::new(),
            unable: Vec::new(),
            judgements: Vec::new(),
            accused_at: None,
        };
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
            let late = |since: Tick| now.since(since) >= patience_ms;
            let failed =
                task.given.iter().filter(|(_, since)| late(**since)).map(|(node, _)| *node);
            task.unable.extend(failed);
            task.given.retain(|node, since| !late(*since) && present.contains(node));
        }
        let busy: Vec<NodeId> =
            self.replays.values().flat_map(|task| task.given.keys().copied()).collect();
        let mut idle: Vec<NodeId> =
            present.iter().copied().filter(|node| !busy.contains(node)).collect();
        let mut waiting: Vec<_> = self.replays.values_mut().collect();
        waiting.sort_by_key(|task| (!task.before_merge, task.replay.id));
        for task in waiting {
            while let Some(node) = task.next(present, &idle) {
                idle.retain(|other| *other != node);
                task.given.insert(node, now);
            }
        }
    }

    /// When the next task is to be taken back, or decided without those that are away.
    pub(super) fn next_timeout(&self, patience_ms: u64) -> Option<Tick> {
        let since = |task: &ReplayTask| {
            task.given.values().copied().chain(task.accused_at).collect::<Vec<_>>()
        };
        self.replays.values().flat_map(since).map(|since| since.after_ms(patience_ms)).min()
    }

    /// The oldest round that waits for a replay.
    pub(super) fn oldest_round(&self) -> Option<Round> {
        self.replays.values().map(|task| task.replay.assignment.round).min()
    }

    /// Takes out what has been decided, with what follows: none where nobody could do it. A task about a round
    /// before `from` is decided by what there is.
    pub(super) fn ended(
        &mut self,
        now: Tick,
        present: &[NodeId],
        patience_ms: u64,
        from: Round,
    ) -> Vec<(ReplayTask, Option<Finding>)> {
        let over = |task: &ReplayTask| {
            let more = task.replay.assignment.round >= from
                && task.expects_more(now, present, patience_ms);
            let finding = decide(task.judges, &task.judgements, more);
            (finding.is_some() || !more).then_some(finding)
        };
        self.take(over)
    }

    /// The merge does not wait any longer. What nobody has accused is decided by what there is, and nothing more
    /// is asked about it; an accusation is followed up.
    pub(super) fn end_before_merge(&mut self) -> Vec<(ReplayTask, Finding)> {
        for task in self.replays.values_mut().filter(|task| task.is_accused()) {
            task.before_merge = false;
        }
        let ended = self
            .take(|task| task.before_merge.then(|| decide(task.judges, &task.judgements, false)));
        ended.into_iter().filter_map(|(task, finding)| Some((task, finding?))).collect()
    }

    pub(super) fn end_all(&mut self) {
        self.replays.clear();
        self.evaluations.clear();
    }

    /// Takes out the tasks that `which` says something of.
    fn take<T>(&mut self, which: impl Fn(&ReplayTask) -> Option<T>) -> Vec<(ReplayTask, T)> {
        let said: Vec<(u64, T)> =
            self.replays.iter().filter_map(|(&id, task)| Some((id, which(task)?))).collect();
        said.into_iter().filter_map(|(id, said)| Some((self.replays.remove(&id)?, said))).collect()
    }

    pub(super) fn replays_of(&self, verifier: NodeId) -> Vec<Replay> {
        let given = |task: &&ReplayTask| task.given.contains_key(&verifier);
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

    /// Notes a verifier's answer to a task that it was given.
    pub(super) fn answer(
        &mut self,
        now: Tick,
        verifier: NodeId,
        (id, outcome): (u64, &ReplayOutcome),
        terms: &Verification,
    ) {
        let Some(task) = self.replays.get_mut(&id) else { return };
        if task.given.remove(&verifier).is_none() {
            return;
        }
        let verdict = match outcome {
            ReplayOutcome::Compared(distances) => Judged::by(*distances, terms),
            ReplayOutcome::Withheld(reason) => Judged::Withheld(reason.clone()),
            ReplayOutcome::Failed(_) => {
                task.unable.push(verifier);
                return;
            }
        };
        if verdict.accuses() {
            task.accused_at.get_or_insert(now);
        }
        task.judgements.push(Judgement { verifier, verdict });
    }

    pub(super) fn is_given_to(&self, verifier: NodeId, id: u64) -> bool {
        self.replays.get(&id).is_some_and(|task| task.given.contains_key(&verifier))
    }
}
