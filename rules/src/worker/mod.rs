//! The machine of a worker or a verifier.
//!
//! # Contract
//! The driver sends what [`Worker::poll_request`] gives and hands the answer to
//! [`Worker::handle_reply`]; it starts what [`Worker::poll_effects`] gives and hands each result to
//! [`Worker::handle`]. At most one heavy effect runs at a time: training, a replay, an evaluation
//! or a synchronisation all need the device. What a result names must be on disk before the result
//! is handed in.

use manyhands_proto::message::limits::HEAD_ROUNDS_MAX;
use manyhands_proto::message::{
    Assignment, Beat, Duty, Evaluate, Evaluation, Join, Possession, Refusal, RefusalCode, Replay,
    Reply, Request, SignedCommitment, Situation, Sync, Verdict, Weigh, Weighing,
};
use manyhands_proto::{Digest, NodeId, Round, Tick};
use serde::{Deserialize, Serialize};

/// Requests in a row without an answer, after which a node that was asked to stop just goes.
const GOODBYES_MAX: u32 = 3;
/// The same for one whose evidence may still be asked for: a coordinator restarts within a minute or two.
const GOODBYES_OWING_MAX: u32 = 120;

/// What a node knows of itself when it starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    pub join: Join,
    /// Milliseconds between two beats.
    pub beat_ms: u64,
}

/// What the driver has to do. Nothing is repeated until its result has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Effect {
    /// Get to θ of a round and prove it. Answered by [`Input::Synced`] or [`Input::Failed`].
    Sync(Sync),
    /// Train, write the end state and the commitment to disk. Answered by [`Input::Trained`] or
    /// [`Input::Failed`].
    Train(Assignment),
    /// From now on the coordinator may fetch the payload and open drawn evidence; these nodes may read the moments,
    /// which the next round starts from.
    Publish { round: Round, verifiers: Vec<NodeId> },
    /// Answered by [`Input::Replayed`].
    Replay(Replay),
    /// Answered by [`Input::Evaluated`] or [`Input::Failed`].
    Evaluate(Evaluate),
    /// Answered by [`Input::Weighed`] or [`Input::Failed`].
    Weigh(Weigh),
    /// Stop what is being done: the round went on without us, or something waits that is more urgent. Answered by
    /// [`Input::Failed`], or by what was done before.
    Abort,
    /// The end, with its reason.
    Exit(Exit),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Exit {
    Complete {
        round: Round,
        theta: Digest,
    },
    Refused(Refusal),
    /// Asked to leave, and said so to the coordinator.
    Left,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Input {
    Synced(Possession),
    Trained(Trained),
    Replayed(Verdict),
    Evaluated(Evaluation),
    Weighed(Weighing),
    /// The running effect could not be done; it is asked for again as long as it is a duty.
    Failed,
    /// The state that the assignment starts from is not on disk any more, or damaged.
    HeadLost {
        round: Round,
    },
    Progress {
        steps_done: u32,
    },
    /// The coordinator announced something: ask at once what it is.
    Announced,
    /// Leave when no evidence is owed any more.
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Doing {
    Nothing,
    Sync,
    Train(Round),
    Replay(u64),
    Evaluate(Round),
    Weigh(Round),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Membership {
    Outside,
    Member,
    /// Said goodbye or was turned away.
    Gone,
}

/// Work that is done and on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    pub assignment: Assignment,
    pub commitment: SignedCommitment,
}

/// The state of a worker or verifier. A value, like the coordinator's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    node: NodeId,
    identity: Identity,
    membership: Membership,
    doing: Doing,
    /// What the last training is, or was, about.
    at_work: Option<Assignment>,
    theta: Option<Possession>,
    /// The last commitment made, sent until the coordinator has it.
    trained: Option<Trained>,
    commitment_is_known: bool,
    published: Option<(Round, Vec<NodeId>)>,
    verdicts: Vec<Verdict>,
    evaluations: Vec<Evaluation>,
    weighing: Option<Weighing>,
    steps_done: u32,
    stopping: bool,
    situation: Option<Situation>,
    next_beat: Tick,
    /// Requests in a row that nobody answered.
    unanswered: u32,
    /// Nothing is said before, because nobody answered.
    silent_until: Tick,
    effects: Vec<Effect>,
}

impl Worker {
    /// `trained`: the last work on disk, so that a restart does not do the same round twice.
    pub fn new(node: NodeId, identity: Identity, trained: Option<Trained>) -> Self {
        Self {
            node,
            identity,
            membership: Membership::Outside,
            doing: Doing::Nothing,
            at_work: None,
            theta: None,
            trained,
            commitment_is_known: true,
            published: None,
            verdicts: Vec::new(),
            evaluations: Vec::new(),
            weighing: None,
            steps_done: 0,
            stopping: false,
            situation: None,
            next_beat: Tick(0),
            unanswered: 0,
            silent_until: Tick(0),
            effects: Vec::new(),
        }
    }

    pub fn node(&self) -> NodeId {
        self.node
    }

    /// What the coordinator last told this node, for display.
    pub fn situation(&self) -> Option<&Situation> {
        self.situation.as_ref()
    }

    fn duty(&self) -> Option<&Duty> {
        self.situation.as_ref().map(|situation| &situation.duty)
    }

    pub fn is_member(&self) -> bool {
        self.membership == Membership::Member
    }

    /// Whether an effect that needs the device is running.
    pub fn is_busy(&self) -> bool {
        self.doing != Doing::Nothing
    }

    /// The next thing to say to the coordinator, if it is time to say something.
    pub fn poll_request(&mut self, now: Tick) -> Option<Request> {
        if now < self.silent_until {
            return None;
        }
        match self.membership {
            Membership::Gone => return None,
            Membership::Outside if now < self.next_beat => return None,
            Membership::Outside => {
                self.next_beat = now.after_ms(self.identity.beat_ms);
                return Some(Request::Join(self.identity.join.clone()));
            }
            Membership::Member => {}
        }
        if self.may_leave() {
            return Some(Request::Leave);
        }
        if let Some(trained) = self.trained.as_ref().filter(|_| !self.commitment_is_known) {
            return Some(Request::Commit(trained.commitment.clone()));
        }
        if let Some(weighing) = &self.weighing {
            return Some(Request::Weighing(weighing.clone()));
        }
        if let Some(verdict) = self.verdicts.first() {
            return Some(Request::Verdict(verdict.clone()));
        }
        if let Some(evaluation) = self.evaluations.first() {
            return Some(Request::Evaluation(evaluation.clone()));
        }
        if now < self.next_beat {
            return None;
        }
        self.next_beat = now.after_ms(self.identity.beat_ms);
        let (theta, steps_done, leaving) = (self.theta, self.steps_done, self.stopping);
        Some(Request::Beat(Beat { theta, steps_done, leaving }))
    }

    /// When [`Self::poll_request`] will next have something to say on its own.
    pub fn poll_timeout(&self) -> Option<Tick> {
        (self.membership != Membership::Gone).then_some(self.next_beat.max(self.silent_until))
    }

    pub fn poll_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// The coordinator's answer to `request`.
    pub fn handle_reply(&mut self, now: Tick, request: &Request, reply: Reply) {
        self.unanswered = 0;
        match reply {
            Reply::Situation(situation) => {
                self.sent(request);
                if matches!(request, Request::Leave) {
                    self.exit(Exit::Left);
                    return;
                }
                self.membership = Membership::Member;
                self.take_situation(situation);
            }
            Reply::Refused(refusal) => self.take_refusal(now, request, refusal),
            // Answers to questions that this machine does not ask.
            Reply::Description { .. } | Reply::Status(_) => {}
        }
    }

    /// The request did not arrive or was not answered: it is made again a beat later. A node that
    /// was asked to stop and owes no evidence does not wait for a coordinator that is gone.
    pub fn handle_no_reply(&mut self, now: Tick) {
        self.silent_until = now.after_ms(self.identity.beat_ms);
        self.unanswered += 1;
        let tries = if self.owes_evidence() { GOODBYES_OWING_MAX } else { GOODBYES_MAX };
        if self.stopping && self.unanswered >= tries {
            self.exit(Exit::Left);
        }
    }

    /// Notes that the coordinator has what `request` carried.
    fn sent(&mut self, request: &Request) {
        match request {
            Request::Commit(_) => self.commitment_is_known = true,
            Request::Verdict(verdict) => self.verdicts.retain(|kept| kept.id != verdict.id),
            Request::Evaluation(evaluation) => {
                self.evaluations.retain(|kept| kept.round != evaluation.round);
            }
            Request::Weighing(_) => self.weighing = None,
            Request::Describe
            | Request::Join(_)
            | Request::Beat(_)
            | Request::Leave
            | Request::Status => {}
        }
    }

    fn take_refusal(&mut self, now: Tick, request: &Request, refusal: Refusal) {
        self.sent(request);
        match refusal.code {
            RefusalCode::NotAMember => {
                self.membership = Membership::Outside;
                self.next_beat = now;
                if matches!(request, Request::Leave) {
                    self.exit(Exit::Left);
                }
            }
            RefusalCode::WrongTheta => self.theta = None,
            RefusalCode::AlreadyCommitted
            | RefusalCode::WrongRound
            | RefusalCode::TooLate
            | RefusalCode::NotAssigned
            | RefusalCode::NotYourTask
            | RefusalCode::Replayed => {}
            RefusalCode::NotReady => self.next_beat = now.after_ms(self.identity.beat_ms),
            RefusalCode::WrongRun
            | RefusalCode::VersionMismatch
            | RefusalCode::TooLittleMemory
            | RefusalCode::StakeTooSmall
            | RefusalCode::NotAllowed
            | RefusalCode::RunIsFull
            | RefusalCode::Malformed
            | RefusalCode::RunIsComplete
            | RefusalCode::Barred
            | RefusalCode::ImplausibleTokens
            | RefusalCode::TooSlow
            | RefusalCode::OtherNumerics => self.exit(Exit::Refused(refusal)),
        }
    }

    fn take_situation(&mut self, situation: Situation) {
        self.follow(&situation.duty, situation.verifiers.clone());
        self.situation = Some(situation);
    }

    fn follow(&mut self, duty: &Duty, verifiers: Vec<NodeId>) {
        if self.is_overtaken(duty) {
            self.effects.push(Effect::Abort);
        }
        // A verifier that came later may be the one that has to open a past round.
        if let Some((round, _)) = self.published
            && !matches!(duty, Duty::Upload(_))
        {
            self.publish(round, verifiers.clone());
        }
        match duty {
            Duty::Gathering { .. } | Duty::Wait { .. } => {}
            Duty::Sync(_) | Duty::Tasks(_) if self.stopping => {}
            Duty::Train(assignment) => self.follow_assignment(assignment),
            Duty::Upload(commit_set) => {
                let round = commit_set.round;
                // Nothing is shown before the set that names our own commitment is closed.
                let own = self.trained.as_ref().map(|trained| trained.commitment.digest());
                if own.is_some_and(|own| commit_set.entries.contains(&(self.node, own))) {
                    self.publish(round, verifiers);
                }
            }
            Duty::Sync(sync) => {
                let held = self.theta.is_some_and(|theta| theta.round == sync.round);
                if !held && self.doing == Doing::Nothing {
                    self.start(Doing::Sync, Effect::Sync(sync.clone()));
                }
            }
            Duty::Tasks(tasks) => {
                let replay = tasks
                    .replays
                    .iter()
                    .find(|replay| self.verdicts.iter().all(|verdict| verdict.id != replay.id));
                let evaluation = tasks
                    .evaluations
                    .iter()
                    .find(|asked| self.evaluations.iter().all(|done| done.round != asked.round));
                if self.doing != Doing::Nothing {
                    return;
                }
                let weigh = tasks.weigh.as_ref().filter(|_| self.weighing.is_none());
                // A merge waits for what is weighed, and may wait for a replay; nothing waits for an evaluation.
                if let Some(asked) = weigh {
                    self.start(Doing::Weigh(asked.round), Effect::Weigh(asked.clone()));
                } else if let Some(replay) = replay {
                    self.start(Doing::Replay(replay.id), Effect::Replay(replay.clone()));
                } else if let Some(asked) = evaluation {
                    self.start(Doing::Evaluate(asked.round), Effect::Evaluate(asked.clone()));
                }
            }
            Duty::Complete { round, theta } => {
                self.exit(Exit::Complete { round: *round, theta: *theta });
            }
            Duty::Dismissed(refusal) => self.exit(Exit::Refused(refusal.clone())),
        }
    }

    /// Opens a round's evidence, or lets other verifiers see what is open already.
    fn publish(&mut self, round: Round, verifiers: Vec<NodeId>) {
        if self.published.as_ref() != Some(&(round, verifiers.clone())) {
            self.published = Some((round, verifiers.clone()));
            self.effects.push(Effect::Publish { round, verifiers });
        }
    }

    fn follow_assignment(&mut self, assignment: &Assignment) {
        let round = assignment.round;
        if self.doing != Doing::Nothing || self.stopping {
            return;
        }
        if self.trained.as_ref().is_some_and(|trained| trained.assignment == *assignment) {
            // Trained before a restart, or the commitment was lost on its way.
            self.commitment_is_known = false;
        } else {
            // What is there belongs to an opening of the round that is no more.
            self.commitment_is_known = true;
            self.at_work = Some(assignment.clone());
            self.start(Doing::Train(round), Effect::Train(assignment.clone()));
        }
    }

    /// Whether what is being done is not wanted any more, or holds up what a merge waits for.
    fn is_overtaken(&self, duty: &Duty) -> bool {
        let weigh = if let Duty::Tasks(tasks) = duty {
            tasks.weigh.as_ref().map(|asked| asked.round)
        } else {
            None
        };
        match self.doing {
            Doing::Nothing | Doing::Sync => false,
            // A round that opened again may ask for other work.
            Doing::Train(_) => {
                !matches!(duty, Duty::Train(now) if Some(now) == self.at_work.as_ref())
            }
            Doing::Weigh(round) => weigh != Some(round),
            // Whose evidence is waited for could otherwise keep others' updates from being weighed.
            Doing::Replay(_) | Doing::Evaluate(_) => weigh.is_some() && self.weighing.is_none(),
        }
    }

    fn start(&mut self, doing: Doing, effect: Effect) {
        self.doing = doing;
        self.steps_done = 0;
        self.effects.push(effect);
    }

    /// What came of an effect, or from outside.
    pub fn handle(&mut self, now: Tick, input: Input) {
        match input {
            Input::Synced(possession) => {
                self.theta = Some(possession);
                self.done(now);
            }
            Input::Trained(trained) => {
                let round = trained.assignment.round;
                self.identity.join.head_rounds = recent(&self.identity.join.head_rounds, round);
                let wanted =
                    matches!(self.duty(), Some(Duty::Train(now)) if *now == trained.assignment);
                self.trained = Some(trained);
                self.commitment_is_known = !wanted;
                self.done(now);
            }
            Input::Replayed(verdict) => {
                self.verdicts.push(verdict);
                self.done(now);
            }
            Input::Evaluated(evaluation) => {
                self.evaluations.push(evaluation);
                self.done(now);
            }
            Input::Weighed(weighing) => {
                self.weighing = Some(weighing);
                self.done(now);
            }
            Input::Failed => {
                self.doing = Doing::Nothing;
                self.next_beat = now.after_ms(self.identity.beat_ms);
            }
            Input::HeadLost { round } => {
                self.doing = Doing::Nothing;
                // Joining says which states are still here: the next round starts without.
                self.identity.join.head_rounds.retain(|kept| *kept != round);
                self.membership = Membership::Outside;
                self.next_beat = now;
            }
            Input::Progress { steps_done } => self.steps_done = steps_done,
            Input::Announced => self.next_beat = now,
            Input::Stop => {
                self.stopping = true;
                self.next_beat = now;
                if let Doing::Train(_) | Doing::Weigh(_) = self.doing {
                    self.effects.push(Effect::Abort);
                }
                if self.membership == Membership::Outside {
                    self.exit(Exit::Left);
                }
            }
        }
    }

    fn done(&mut self, now: Tick) {
        self.doing = Doing::Nothing;
        // Say so at once: the next duty may be waiting.
        self.next_beat = now;
    }

    /// A worker that asked to stop stays while its evidence is wanted: leaving in the middle would
    /// cost it the round.
    fn may_leave(&self) -> bool {
        let said = self.commitment_is_known
            && self.verdicts.is_empty()
            && self.evaluations.is_empty()
            && self.weighing.is_none();
        self.stopping && self.doing == Doing::Nothing && said && !self.owes_evidence()
    }

    /// Whether leaving now could cost a round that is committed: it may still be checked.
    fn owes_evidence(&self) -> bool {
        let committed = self.trained.as_ref().map(|trained| trained.assignment.round);
        let evidence_from = self.situation.as_ref().map(|situation| situation.evidence_from);
        committed.zip(evidence_from).is_some_and(|(committed, from)| from <= committed)
    }

    fn exit(&mut self, exit: Exit) {
        if self.membership != Membership::Gone {
            self.membership = Membership::Gone;
            self.effects.push(Effect::Exit(exit));
        }
    }
}

/// The newest rounds.
fn recent(rounds: &[Round], new: Round) -> Vec<Round> {
    let mut rounds: Vec<_> = rounds.iter().copied().filter(|round| *round != new).collect();
    rounds.push(new);
    rounds.sort_unstable();
    rounds.split_off(rounds.len().saturating_sub(HEAD_ROUNDS_MAX))
}

#[cfg(test)]
mod tests;
