//! The task that owns the machine: takes what happened, journals it, steps the machine, and only then
//! answers and acts. It decides nothing itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use manyhands_network::control::{AnnounceError, ControlHandle};
use manyhands_proto::message::{Announcement, Reply, seal_announcement};
use manyhands_proto::{Digest, NodeId, Round, Tick};
use manyhands_rules::coordinator::{Input, Phase, Status};
use tokio::sync::{mpsc, oneshot, watch};

use crate::clock::{Clock, Stopwatch};
use crate::context::Context;
use crate::door::{Answerer, Asker, Knock};
use crate::effects::{self, EffectError};
use crate::journal::{Batch, BlobKind, BlobNote, Journal, JournalError};
use crate::metrics::{COMMIT_SECONDS, INPUTS, REQUESTS, observe};
use crate::runner::{Ended, Runner};
use crate::service::Completed;
use crate::state::State;
use crate::store::{self, Needs, Readers};

/// Pieces of work that one fsync covers.
const BATCH_MAX: usize = 256;
/// Inputs after which a snapshot is taken though the round goes on: replaying them takes well under a
/// second.
const INPUTS_PER_SNAPSHOT_MAX: usize = 4096;
/// How long a deadline that is due is slept for at most before the clock is read again.
const SLEEP_MAX: Duration = Duration::from_secs(60);

/// Why the service stopped by itself. All that was decided is in the journal.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Effect(#[from] EffectError),
}

/// What other tasks bring.
#[derive(Debug)]
pub(crate) enum Work {
    Knock(Box<Knock>),
    Query(oneshot::Sender<Observed>),
}

/// The run at a moment.
#[derive(Debug)]
pub(crate) struct Observed {
    pub(crate) status: Status,
    /// What the run's clock is behind the time of day.
    pub(crate) behind_ms: u64,
}

pub(crate) struct Driver {
    pub(crate) context: Arc<Context>,
    pub(crate) state: State,
    pub(crate) clock: Clock,
    pub(crate) journal: Journal,
    pub(crate) blobs: BTreeMap<Digest, BlobNote>,
    pub(crate) runner: Runner,
    pub(crate) answerer: Arc<Answerer>,
    pub(crate) control: ControlHandle,
    pub(crate) completed: watch::Sender<Option<Completed>>,
    /// Tick of the last input: deadlines are those that were open then.
    pub(crate) last: Tick,
    pub(crate) inputs_since_snapshot: usize,
    pub(crate) snapshot_round: Option<Round>,
    pub(crate) announced: Option<(Round, u32)>,
    pub(crate) access: Option<Readers>,
}

/// Answers that wait until what they follow from is on disk.
#[derive(Default)]
struct Step {
    batch: Batch,
    answers: Vec<(Asker, Reply)>,
    /// Members that came, perhaps from elsewhere than before.
    joined: Vec<NodeId>,
}

impl Driver {
    /// Runs until `stop` says so.
    ///
    /// # Errors
    /// [`RunError`]; the journal then holds all that was answered or acted upon.
    pub(crate) async fn run(
        mut self,
        mut work: mpsc::Receiver<Work>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<(), RunError> {
        // What the journal says is wanted, after a restart too.
        self.step(Vec::new(), Vec::new(), false)?;
        let mut arrived = Vec::with_capacity(BATCH_MAX);
        loop {
            let deadline = self.state.machine.poll_timeout(self.last).map(|(tick, _)| tick);
            let sleep = deadline.map(|tick| self.clock.until(tick).min(SLEEP_MAX));
            let mut ended = Vec::new();
            tokio::select! {
                _ = stop.changed() => return Ok(()),
                count = work.recv_many(&mut arrived, BATCH_MAX) => if count == 0 { return Ok(()) },
                done = self.runner.next() => ended.extend(done?),
                () = tokio::time::sleep(sleep.unwrap_or(SLEEP_MAX)) => {}
            }
            while let Some(done) = self.runner.try_next()? {
                ended.push(done);
            }
            let due = deadline.is_some_and(|tick| self.clock.now() >= tick);
            self.step(std::mem::take(&mut arrived), ended, due)?;
        }
    }

    fn step(&mut self, arrived: Vec<Work>, ended: Vec<Ended>, due: bool) -> Result<(), RunError> {
        let now = self.clock.now();
        let mut step = Step::default();
        if due {
            self.take(&mut step, now, Input::Timeout);
        }
        for (effect, done) in ended {
            self.note_blobs(&mut step.batch, done.blobs);
            // Only an answer to something that is still asked: the machine may have moved on.
            if self.state.machine.is_wanted(&effect) {
                self.take(&mut step, now, done.input);
            }
        }
        for work in arrived {
            match work {
                Work::Knock(knock) => self.take_knock(&mut step, now, *knock),
                Work::Query(asker) => {
                    // Dropped if the asker has gone.
                    let status = self.state.machine.status(now);
                    let _ = asker.send(Observed { status, behind_ms: self.clock.behind_ms() });
                }
            }
        }
        self.take_snapshot(&mut step.batch);
        let Step { batch, answers, joined } = step;
        let forgotten = batch.forgotten.clone();
        self.persist(&batch)?;

        // From here on the world may know.
        let round = self.state.machine.round();
        for (asker, reply) in answers {
            self.answerer.answer(asker, round, reply);
        }
        self.context.store.remove(&forgotten);
        self.update_access();
        self.act(&joined);
        self.announce();
        self.tell_completion();
        Ok(())
    }

    /// Steps the machine and notes the input for the journal.
    fn take(&mut self, step: &mut Step, now: Tick, input: Input) -> Option<Reply> {
        self.last = now;
        step.batch.inputs.push((now, input.clone()));
        self.state.handle(now, input)
    }

    fn take_knock(&mut self, step: &mut Step, now: Tick, knock: Knock) {
        let Knock { from, nonce, request, facts, asker } = knock;
        if let Some(reply) = self.state.machine.answer_quietly(now, from, &request) {
            metrics::counter!(REQUESTS, "result" => "quiet").increment(1);
            step.answers.push((asker, reply));
            return;
        }
        metrics::counter!(REQUESTS, "result" => "answered").increment(1);
        let joins = matches!(request, manyhands_proto::message::Request::Join(_));
        let input = Input::Message { from, nonce, request, facts };
        if let Some(reply) = self.take(step, now, input) {
            if joins && matches!(reply, Reply::Situation(_)) {
                step.joined.push(from);
            }
            step.answers.push((asker, reply));
        }
    }

    fn note_blobs(&mut self, batch: &mut Batch, blobs: Vec<BlobNote>) {
        for mut note in blobs {
            if let Some(known) = self.blobs.get(&note.digest) {
                note.round = note.round.max(known.round);
                // A worker may send what is a record or an aggregate already: it stays that.
                if note.kind == BlobKind::Payload {
                    note.kind = known.kind;
                }
            }
            self.blobs.insert(note.digest, note);
            batch.blobs.push(note);
            self.access = None;
        }
    }

    /// At the start of a round, and in a long one now and then: keeps the state, drops the inputs
    /// before it and what has expired.
    fn take_snapshot(&mut self, batch: &mut Batch) {
        self.inputs_since_snapshot += batch.inputs.len();
        let machine = &self.state.machine;
        let (round, theta) = (machine.round(), machine.theta());
        let begins = self.snapshot_round != Some(round);
        if !begins && self.inputs_since_snapshot < INPUTS_PER_SNAPSHOT_MAX {
            return;
        }
        let evidence_from = machine.evidence_from();
        let verdicts = machine.evidence().map(|(digest, _)| digest);
        let disputed = machine.disputed_payloads();
        let used: BTreeSet<Digest> = machine.parameters().chain(verdicts).chain(disputed).collect();
        self.note_blobs(batch, vec![BlobNote { digest: theta, kind: BlobKind::Theta, round }]);
        let notes: Vec<BlobNote> = self.blobs.values().copied().collect();
        let vector_bytes = self.context.vector_bytes();
        let needs = Needs { evidence_from, open: round, used: &used };
        batch.forgotten = store::expired(&notes, vector_bytes, needs);
        for digest in &batch.forgotten {
            self.blobs.remove(digest);
        }
        batch.snapshot = Some(self.state.to_bytes());
        self.snapshot_round = Some(round);
        self.inputs_since_snapshot = 0;
    }

    fn persist(&mut self, batch: &Batch) -> Result<(), RunError> {
        if batch.is_empty() {
            return Ok(());
        }
        let began = Stopwatch::start();
        let count = batch.inputs.len() as u64;
        // An fsync takes milliseconds; other tasks of this thread must not wait for it.
        let journal = &mut self.journal;
        tokio::task::block_in_place(|| journal.commit(batch))?;
        metrics::histogram!(COMMIT_SECONDS).record(began.seconds());
        metrics::counter!(INPUTS).increment(count);
        Ok(())
    }

    fn update_access(&mut self) {
        let machine = &self.state.machine;
        let decided = machine.evidence().filter(|(_, decided)| *decided);
        let readers = Readers {
            open: machine.round(),
            verifiers: machine.verifiers(),
            decided: decided.map(|(digest, _)| digest).collect(),
        };
        if self.access.as_ref() != Some(&readers) {
            let notes: Vec<BlobNote> = self.blobs.values().copied().collect();
            self.context.store.set_access(&notes, &readers);
            self.access = Some(readers);
        }
    }

    /// Starts what is newly wanted and stops what is not wanted any more.
    fn act(&mut self, joined: &[NodeId]) {
        let new = self.state.machine.poll_effects();
        let machine = &self.state.machine;
        self.runner.keep(|effect| machine.is_asked(effect));
        let peers = new.iter().flat_map(effects::peers);
        for node in joined.iter().copied().chain(peers) {
            self.context.whereabouts.set(node, machine.addresses(node));
        }
        for effect in new {
            self.runner.start(effect);
        }
    }

    /// Wakes the members when there may be something new to do. It is only a hint: they ask anyway.
    fn announce(&mut self) {
        let machine = &self.state.machine;
        let (round, phase) = (machine.round(), phase_code(machine.phase()));
        if self.announced == Some((round, phase)) {
            return;
        }
        self.announced = Some((round, phase));
        tracing::info!(%round, phase = machine.phase().name(), "the run goes on");
        observe(&machine.status(self.last));
        let (control, answerer) = (self.control.clone(), self.answerer.clone());
        tokio::spawn(async move {
            let announcement = Announcement { run: answerer.run, round, phase };
            let nonce = answerer.next_nonce();
            match seal_announcement(&answerer.key, nonce, &announcement) {
                Ok(bytes) => match control.announce(answerer.run, bytes).await {
                    Ok(()) | Err(AnnounceError::NobodyListens) => {}
                    Err(error) => tracing::debug!(%error, "an announcement was not sent"),
                },
                Err(error) => tracing::error!(%error, "an announcement cannot be sealed"),
            }
        });
    }

    fn tell_completion(&self) {
        let machine = &self.state.machine;
        if machine.phase() == Phase::Complete && self.completed.borrow().is_none() {
            let completed = Completed { rounds: machine.round(), theta: machine.theta() };
            self.completed.send_replace(Some(completed));
        }
    }
}

/// What announcements call a phase; receivers only compare it.
const fn phase_code(phase: Phase) -> u32 {
    match phase {
        Phase::Gathering { .. } => 0,
        Phase::Training { .. } => 1,
        Phase::Uploading { .. } => 2,
        Phase::Checking { .. } => 3,
        Phase::Merging => 4,
        Phase::Finishing { .. } => 5,
        Phase::Complete => 6,
    }
}
