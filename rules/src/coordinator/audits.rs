//! Replays and evaluations: who has to do which, and what they found.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use manyhands_proto::message::{
    Evaluate, Refusal, RefusalCode, Replay, ReplayEnd, ReplayOutcome, SignedCommitment,
    SignedReplay, Start, Verdict, Work,
};
use manyhands_proto::run_file::Verification;
use manyhands_proto::{ChunkIndex, Digest, NodeId, Round, Tick};
use serde::{Deserialize, Serialize};

use super::input::{Compared, Comparison};
use super::requests::refuse;
use crate::panel::{Attendee, Case, JUDGES_MAX, Judged, Judgement, Pair, decide, judges_needed};
use crate::record::Finding;

/// More evaluations than this would only make each reply longer.
const EVALUATIONS_AT_ONCE: usize = 16;

/// What is asked about a worker's round.
pub(super) struct Asked {
    pub(super) replay: Replay,
    /// What the worker says.
    pub(super) signed: SignedCommitment,
    /// The chunks on which ends are compared.
    pub(super) chunks: Vec<ChunkIndex>,
    /// Who may judge it, in the order in which they are asked.
    pub(super) panel: Vec<NodeId>,
    /// What machines they have.
    pub(super) classes: Vec<Attendee>,
}

/// A worker's round that verifiers have to judge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ReplayTask {
    pub(super) replay: Replay,
    /// What the worker says.
    pub(super) signed: SignedCommitment,
    /// The chunks on which ends are compared, drawn by the beacon.
    pub(super) chunks: Vec<ChunkIndex>,
    /// The merge waits for it.
    pub(super) before_merge: bool,
    /// Who may judge it, in the order in which they are asked.
    panel: Vec<NodeId>,
    pub(super) classes: Vec<Attendee>,
    /// One has let it pass, which is on record: another looks over it.
    pub(super) looked_over: bool,
    /// Who is at it, and since when.
    given: BTreeMap<NodeId, Tick>,
    /// Where verifiers ended, in the order in which they came, until it has been compared with where the worker says it
    /// did, and with where others ended: one after the other.
    ends: Vec<SignedReplay>,
    /// Could not do it, or not in time.
    unable: Vec<NodeId>,
    /// In the order in which they came.
    pub(super) judgements: Vec<Judgement>,
    /// When somebody judged first: others are waited for from then on, and not for ever.
    judged_at: Option<Tick>,
}

impl ReplayTask {
    /// Members of the panel that have neither judged nor failed, in their order.
    fn remaining(&self) -> impl Iterator<Item = NodeId> {
        let judged = |node: &NodeId| self.judgements.iter().any(|it| it.verifier() == *node);
        let done = move |node: &NodeId| self.unable.contains(node) || judged(node);
        self.panel.iter().copied().filter(move |node| !done(node))
    }

    /// What was found, and what it follows from.
    pub(super) fn case(&self, judgements: Vec<Judgement>) -> Case {
        Case {
            work: Work {
                commitment: self.signed.clone(),
                assignment: self.replay.assignment.clone(),
                head: self.replay.head.clone(),
            },
            chunks: self.chunks.clone(),
            judgements,
            attending: self.classes.clone(),
        }
    }

    fn is_compared(&self, verifier: NodeId) -> bool {
        self.ends.iter().any(|replay| replay.verifier == verifier)
    }

    fn is_accused(&self) -> bool {
        self.judgements.iter().any(|judgement| judgement.verdict.accuses())
    }

    fn judge(&mut self, now: Tick, judgement: Judgement) {
        self.judged_at.get_or_insert(now);
        self.judgements.push(judgement);
    }

    /// What follows when nothing more is waited for. Nobody is found guilty by one word where others are there that were not
    /// heard.
    fn end(&self, present: &[NodeId]) -> Option<Finding> {
        let unheard = self.remaining().any(|node| present.contains(&node));
        if self.judgements.len() == 1 && self.is_accused() && unheard {
            return Some(Finding::Undecided);
        }
        decide(self.looked_over, &self.judgements, false)
    }

    /// Who is to be given it now: of those that are there, whoever comes first in the panel and is idle. Nobody
    /// beyond the first three that could do it, or a judge could be picked by keeping others busy.
    fn next(&self, present: &[NodeId], idle: &[NodeId]) -> Option<NodeId> {
        let needed = judges_needed(self.looked_over, &self.judgements);
        let enough = self.judgements.len() + self.ends.len() + self.given.len() >= needed;
        if enough || self.unable.len() >= JUDGES_MAX {
            return None;
        }
        let places = JUDGES_MAX.saturating_sub(self.judgements.len());
        let there = self.remaining().filter(|node| present.contains(node)).take(places);
        let at_it = |node: &NodeId| self.given.contains_key(node) || self.is_compared(*node);
        there.filter(|node| !at_it(node)).find(|node| idle.contains(node))
    }

    /// Whether somebody may still judge it: who is at it, and who could be. Whoever is away is waited for until the
    /// first judgement is older than `patience_ms`.
    fn expects_more(&self, now: Tick, present: &[NodeId], patience_ms: u64) -> bool {
        let at_it = !self.given.is_empty() || !self.ends.is_empty();
        if self.judgements.len() >= JUDGES_MAX || self.unable.len() >= JUDGES_MAX {
            return at_it;
        }
        let waited = self.judged_at.is_some_and(|since| now.since(since) >= patience_ms);
        at_it || self.remaining().any(|node| !waited || present.contains(&node))
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Audits {
    next_id: u64,
    replays: BTreeMap<u64, ReplayTask>,
    /// What one verifier let pass, by the record that it is in: a draw of the next round may have another look.
    passed: BTreeMap<Round, Vec<ReplayTask>>,
    /// θ whose held-out loss is asked for.
    evaluations: BTreeMap<Round, Digest>,
}

impl Audits {
    pub(super) fn ask_replay(&mut self, asked: Asked, before_merge: bool) {
        let Asked { mut replay, signed, chunks, panel, classes } = asked;
        replay.id = self.next_id;
        self.next_id += 1;
        let task = ReplayTask {
            replay,
            signed,
            chunks,
            before_merge,
            panel,
            classes,
            looked_over: false,
            given: BTreeMap::new(),
            ends: Vec::new(),
            unable: Vec::new(),
            judgements: Vec::new(),
            judged_at: None,
        };
        self.replays.insert(task.replay.id, task);
    }

    /// Keeps a replay that one verifier let pass until it is drawn whether another looks over it.
    pub(super) fn keep_passed(&mut self, record: Round, mut task: ReplayTask) {
        task.before_merge = false;
        task.looked_over = true;
        self.passed.entry(record).or_default().push(task);
    }

    /// Has those looked over that `drawn` says of what is in the record of `record`; forgets the others. Gives back whose
    /// rounds they are.
    pub(super) fn look_over(
        &mut self,
        now: Tick,
        record: Round,
        drawn: impl Fn(Round, NodeId) -> bool,
    ) -> Vec<(Round, NodeId)> {
        let passed = self.passed.remove(&record).unwrap_or_default();
        let about = |task: &ReplayTask| (task.signed.commitment.round, task.signed.worker);
        let mut told = Vec::new();
        for mut task in passed.into_iter().filter(|task| drawn(about(task).0, about(task).1)) {
            told.push(about(&task));
            // Whoever is away is waited for from now on.
            task.judged_at = Some(now);
            self.replays.insert(task.replay.id, task);
        }
        told
    }

    /// Of records before this one nothing is drawn any more.
    pub(super) fn forget_passed_before(&mut self, record: Round) {
        self.passed.retain(|of, _| *of >= record);
    }

    /// A worker is somewhere else now. Its tasks stay what they are: whoever could renew them by coming
    /// again would never be judged.
    pub(super) fn moved(&mut self, worker: NodeId, addresses: &[SocketAddr]) {
        for task in self.replays.values_mut().chain(self.passed.values_mut().flatten()) {
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
        // Who has to show where it ended is not asked again meanwhile: it keeps few of its ends.
        let at_it = |task: &ReplayTask| -> Vec<NodeId> {
            task.given.keys().copied().chain(task.ends.iter().map(|it| it.verifier)).collect()
        };
        let busy: Vec<NodeId> = self.replays.values().flat_map(at_it).collect();
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
            task.given.values().copied().chain(task.judged_at).collect::<Vec<_>>()
        };
        self.replays.values().flat_map(since).map(|since| since.after_ms(patience_ms)).min()
    }

    /// The oldest of a worker's rounds that is replayed, or may yet be looked over: it has to keep its evidence.
    pub(super) fn oldest_round_of(&self, worker: NodeId) -> Option<Round> {
        let own = self.tasks().filter(|task| task.signed.worker == worker);
        own.map(|task| task.replay.assignment.round).min()
    }

    /// θ that replays begin with.
    pub(super) fn thetas(&self) -> impl Iterator<Item = Digest> {
        self.tasks().map(|task| task.replay.assignment.theta)
    }

    /// What is replayed, and what may be looked over.
    fn tasks(&self) -> impl Iterator<Item = &ReplayTask> {
        self.replays.values().chain(self.passed.values().flatten())
    }

    /// Takes out what has been decided, with what follows: none where nobody could do it. A task about a round before
    /// `from` is decided by what there is.
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
            let finding = if more {
                decide(task.looked_over, &task.judgements, true)
            } else {
                task.end(present)
            };
            (finding.is_some() || !more).then_some(finding)
        };
        self.take(over)
    }

    /// The merge does not wait any longer. What nobody has accused is decided by what there is, and nothing more
    /// is asked about it; an accusation is followed up, and so is what is being compared: whoever opens its end late
    /// enough would otherwise never be judged.
    pub(super) fn end_before_merge(&mut self) -> Vec<(ReplayTask, Finding)> {
        let goes_on = |task: &&mut ReplayTask| task.is_accused() || !task.ends.is_empty();
        for task in self.replays.values_mut().filter(goes_on) {
            task.before_merge = false;
        }
        let ended = self.take(|task| {
            task.before_merge.then(|| decide(task.looked_over, &task.judgements, false))
        });
        ended.into_iter().filter_map(|(task, finding)| Some((task, finding?))).collect()
    }

    /// Nothing is waited for any more: all is decided by what there is.
    pub(super) fn end_all(&mut self, present: &[NodeId]) -> Vec<(ReplayTask, Option<Finding>)> {
        self.evaluations.clear();
        self.take(|task| Some(task.end(present)))
    }

    /// Nothing that this verifier said of what is not decided yet counts.
    pub(super) fn exclude(&mut self, verifier: NodeId) {
        for task in self.replays.values_mut() {
            task.given.remove(&verifier);
            task.ends.retain(|replay| replay.verifier != verifier);
            // A first verdict that is looked over is on record, whoever gave it.
            let on_record = usize::from(task.looked_over);
            let mut at = 0;
            task.judgements.retain(|judgement| {
                at += 1;
                at <= on_record || judgement.verifier() != verifier
            });
            for judgement in &mut task.judgements {
                judgement.near.retain(|other| *other != verifier);
            }
            if task.panel.contains(&verifier) && !task.unable.contains(&verifier) {
                task.unable.push(verifier);
            }
        }
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

    /// Notes where a verifier ended, or that it could not do it.
    ///
    /// # Errors
    /// When the task is not its, or it answers another.
    pub(super) fn answer(&mut self, from: NodeId, verdict: &Verdict) -> Result<(), Refusal> {
        let task = self.replays.get_mut(&verdict.id);
        let Some(task) = task.filter(|task| task.given.contains_key(&from)) else {
            let reason = format!("task {} is not yours", verdict.id);
            return refuse(RefusalCode::NotYourTask, reason);
        };
        match &verdict.outcome {
            ReplayOutcome::Failed(_) => task.unable.push(from),
            ReplayOutcome::Replayed(signed) => {
                let (replayed, assignment) = (&signed.replayed, &task.replay.assignment);
                let about = (replayed.round, replayed.worker, replayed.assignment);
                if about != (assignment.round, assignment.worker, assignment.digest()) {
                    let reason = "the replay is of another round than the task's".to_owned();
                    return refuse(RefusalCode::Malformed, reason);
                }
                let from_nothing = assignment.start == Start::Fresh;
                if replayed.end == ReplayEnd::Nowhere && from_nothing {
                    // Nothing of the worker's led it there.
                    task.unable.push(from);
                } else {
                    task.ends.push(signed.clone());
                }
            }
        }
        task.given.remove(&from);
        Ok(())
    }

    /// The ends that are to be compared now.
    pub(super) fn comparisons(&self) -> impl Iterator<Item = Comparison> {
        self.replays.values().filter_map(|task| {
            let replay = task.ends.first()?.clone();
            let case = task.case(task.judgements.clone());
            Some(Comparison { id: task.replay.id, case, replay })
        })
    }

    /// What came of a comparison; whether somebody was accused by it.
    pub(super) fn compared(
        &mut self,
        now: Tick,
        (id, verifier): (u64, NodeId),
        compared: Compared,
        terms: &Verification,
    ) -> bool {
        let Some(task) = self.replays.get_mut(&id) else { return false };
        let at = task.ends.iter().position(|it| it.verifier == verifier);
        let Some(at) = at else { return false };
        let replay = task.ends.remove(at);
        let (verdict, evidence, near) = match compared {
            Compared::Distances { distances, evidence, near } => {
                let judge = task.classes.iter().find(|it| it.verifier == verifier);
                let Some(judge) = judge else { return false };
                let pair = Pair { worker: &task.replay.assignment.class, verifier: &judge.class };
                (Judged::by(distances, terms, pair), evidence, near)
            }
            Compared::Withheld(reason) => (Judged::Withheld(reason), None, Vec::new()),
            Compared::Unopened(_) => {
                task.unable.push(verifier);
                return false;
            }
        };
        let accuses = verdict.accuses();
        let near = if matches!(verdict, Judged::Fault(_)) { near } else { Vec::new() };
        task.judge(now, Judgement { replay, verdict, evidence, near });
        accuses
    }

    /// Blobs behind judgements of what is not decided yet, or may be looked over.
    pub(super) fn evidence(&self) -> impl Iterator<Item = Digest> {
        let judgements = self.tasks().flat_map(|task| &task.judgements);
        judgements.filter_map(|judgement| judgement.evidence)
    }
}
