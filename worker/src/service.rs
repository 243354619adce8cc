//! The loop: what the machine wants to say is sent, what it wants done is started, and what comes of
//! either is handed back to it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use manyhands_chain_client::{ChainClient, ConnectError};
use manyhands_model::TrainError;
use manyhands_model::device::{DeviceError, SpeedError};
use manyhands_network::control::{
    Control, ControlConfig, ControlEvent, ControlEvents, ControlHandle, RequestError,
    Role as SearchRole, StartControlError,
};
use manyhands_network::data::{
    Data, DataConfig, DataHandle, FileStore, Source, StartDataError, StoreError,
};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::limits::ADDRESSES_MAX;
use manyhands_proto::message::{
    Commitment, Heading, OpenError, Possession, Refusal, Reply, Request, SealError,
    open_announcement, open_reply, request_digest, seal_request,
};
use manyhands_proto::run_file::{ChainKind, RunSpec, RunSpecError};
use manyhands_proto::{Round, RunId, Tick};
use manyhands_rules::requirements::check_numerics;
use manyhands_rules::reward::layout;
use manyhands_rules::run_id::run_id;
use manyhands_rules::worker::{Effect, Exit, Input, Trained, Worker};
use tokio::sync::{mpsc, watch};

use crate::chain::{EnrolError, enrol};
use crate::context::{Context, WorkerConfig, WorkerEvent, describe};
use crate::data::{DataError, RunData};
use crate::disk::{DiskError, WorkerDisk};
use crate::disputes::answer;
use crate::introduce::{class, introduce};
use crate::metrics;
use crate::sync::{FetchBlobError, SyncError, Theta, restore, sync};
use crate::train::{Reins, RoundError, publish, restore_access, train};
use crate::verify::{evaluation, replay, weigh};

/// A beat a second; announcements make it speak at once when something changed.
pub(crate) const BEAT_MS: u64 = 1_000;
/// The coordinator may be starting, or restarting.
const FIRST_CONTACT_ATTEMPTS: u32 = 20;
/// After so many requests that nobody answered, others are asked where the coordinator is.
const SEARCH_AFTER: u32 = 10;

/// Why a worker could not run.
#[derive(Debug, thiserror::Error)]
pub enum RunWorkerError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("this node's disk fails: {0}")]
    DiskFails(String),
    #[error(transparent)]
    Control(#[from] StartControlError),
    #[error(transparent)]
    Data(#[from] StartDataError),
    #[error("cannot reach the coordinator: {0}; check the invitation and that the run is still up")]
    Unreachable(String),
    #[error("the run's specification is refused: {0}")]
    Spec(#[from] RunSpecError),
    #[error("the coordinator serves run {got}, the invitation is for {expected}")]
    WrongRun { expected: RunId, got: RunId },
    #[error(
        "the coordinator speaks version {got} of the protocol, this program version {expected}"
    )]
    Version { expected: u32, got: u32 },
    #[error("{}", .0.reason)]
    Refused(Refusal),
    #[error(
        "the chain at {url} is {got}, the run is on {expected}; name a node of its chain with --chain"
    )]
    WrongChain { url: String, expected: String, got: String },
    #[error("this run is on a chain and the invitation names no node of it; name one with --chain")]
    NoChain,
    #[error("cannot reach the chain: {0}")]
    Chain(#[from] ConnectError),
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("cannot measure this machine's speed: {0}")]
    Speed(#[from] SpeedError),
    #[error("cannot tell this machine's class: {0}")]
    Class(#[from] TrainError),
    #[error("cannot tell how much memory this machine has: {0}")]
    Memory(String),
    #[error("{0}")]
    RunData(String),
    #[error("the worker's state cannot be used: {0}")]
    State(String),
}

impl From<DataError> for RunWorkerError {
    fn from(error: DataError) -> Self {
        Self::RunData(error.to_string())
    }
}

/// Takes part in a run until it is complete, the node is turned away, or `stop` says true: then it
/// leaves as soon as it owes nobody any evidence.
///
/// # Errors
/// [`RunWorkerError`]: what kept the node from taking part.
pub async fn run(
    mut config: WorkerConfig,
    mut stop: watch::Receiver<bool>,
) -> Result<Exit, RunWorkerError> {
    // Rounds, parameters and data of one run say nothing about another; the key is for all.
    config.folder = config.folder.join("runs").join(config.invitation.run.to_string());
    let store = Arc::new(FileStore::open(config.folder.join("blobs"), config.store_bytes_max)?);
    let data_config =
        DataConfig::new(config.key.clone(), config.data_listen, Arc::clone(&store) as _);
    let data = Data::start(data_config)?;
    let mut control_config =
        ControlConfig::new(config.key.clone(), config.control_listen.clone(), SearchRole::Worker);
    control_config.mdns = config.mdns;
    let (control, events) = Control::start(control_config).await?;
    let role = config.role;
    let prepared = tokio::select! {
        prepared = prepare(config, store, data.clone(), control.clone()) => prepared.map(Some),
        // Nothing is owed to anybody before the first round.
        _ = stop.wait_for(|stop| *stop) => Ok(None),
    };
    let outcome = match prepared {
        Ok(Some(service)) => {
            let answering = tokio::spawn(answer(Arc::clone(&service.context), role));
            let outcome = service.run(events, stop).await;
            answering.abort();
            outcome
        }
        Ok(None) => Ok(Exit::Left),
        Err(error) => Err(error),
    };
    control.shutdown().await;
    data.shutdown().await;
    outcome
}

/// Everything before the first word as a member.
async fn prepare(
    config: WorkerConfig,
    store: Arc<FileStore>,
    data: DataHandle,
    control: ControlHandle,
) -> Result<Service, RunWorkerError> {
    let mut line = Line {
        key: config.key.clone(),
        run: config.invitation.run,
        coordinator: config.invitation.coordinator,
        addresses: config.invitation.control.clone(),
        control: control.clone(),
        last_nonce: 0,
    };
    let spec = describe_run(&mut line, &config).await?;
    let chain = open_chain(&config, &spec).await?;
    let device = config.device.resolve()?;
    let (threads, terms) = (config.threads, spec.clone());
    let class = tokio::task::spawn_blocking(move || class(&terms, device, threads));
    let class = class.await.expect("a measuring thread does not panic")?;
    check_numerics(&spec, &class).map_err(RunWorkerError::Refused)?;
    let coordinator =
        Source { peer: config.invitation.coordinator, addresses: config.invitation.data.clone() };
    let context = Arc::new(Context {
        key: config.key,
        run: config.invitation.run,
        spec,
        coordinator,
        control,
        data,
        store,
        disk: WorkerDisk::open(&config.folder)?,
        folder: config.folder,
        device,
        threads: config.threads,
        class,
        load_max: config.load_max,
        trainers: config.trainers,
        chain,
        on_event: config.on_event,
    });
    let identity = introduce(&context, config.role).await?;
    if let Some(chain) = &context.chain {
        let enrolment =
            enrol(chain, &context.key, context.run, &context.spec, config.role, config.stake)
                .await?;
        context.tell(WorkerEvent::Enrolled {
            stake: enrolment.stake,
            development: chain.is_development(),
            funded: enrolment.funded,
        });
    }
    restore_access(&context).map_err(|error| RunWorkerError::State(error.to_string()))?;
    let trained = context.disk.rounds()?.pop().map(|state| state.trained);
    let data = Arc::new(RunData::open(&context).await?);
    // Known to the coordinator's data plane before it wants to fetch from us.
    let (node, addresses) = (context.coordinator.peer, &context.coordinator.addresses);
    if let Err(error) = context.data.connect(node, addresses).await {
        context.trouble(format!("no data connection to the coordinator yet: {error}"));
    }
    context.control.subscribe(context.run).await;
    let machine = Worker::new(context.key.node_id(), identity, trained);
    Ok(Service::new(context, data, machine, line))
}

/// The specification from the coordinator, checked against the run's id.
async fn describe_run(line: &mut Line, config: &WorkerConfig) -> Result<RunSpec, RunWorkerError> {
    let mut attempt = 0;
    let bytes = loop {
        match line.ask(&Request::Describe).await {
            Ok(Reply::Description { spec, .. }) => break spec,
            Ok(Reply::Refused(refusal)) => return Err(RunWorkerError::Refused(refusal)),
            Ok(other @ (Reply::Situation(_) | Reply::Status(_))) => {
                return Err(RunWorkerError::Unreachable(format!("it answered {other:?}")));
            }
            // It speaks for itself in its own run and version: asking again changes nothing.
            Err(AskError::Open(OpenError::Run { expected, got })) => {
                return Err(RunWorkerError::WrongRun { expected, got });
            }
            Err(AskError::Open(OpenError::Version { expected, got })) => {
                return Err(RunWorkerError::Version { expected, got });
            }
            Err(error) if attempt >= FIRST_CONTACT_ATTEMPTS => {
                return Err(RunWorkerError::Unreachable(error.to_string()));
            }
            Err(error) => {
                tracing::info!(%error, "the coordinator does not answer yet");
                if attempt == 0 {
                    let text = "the coordinator does not answer yet; trying for some minutes";
                    (config.on_event)(WorkerEvent::Trouble { text: text.to_owned() });
                }
                line.look_for_coordinator().await;
            }
        }
        attempt += 1;
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    let spec = RunSpec::parse(&bytes)?;
    let invitation = &config.invitation;
    let got = run_id(invitation.chain_genesis, invitation.coordinator, spec.digest());
    if got != invitation.run {
        return Err(RunWorkerError::WrongRun { expected: invitation.run, got });
    }
    (config.on_event)(WorkerEvent::Described {
        run: invitation.run,
        name: spec.run.name.clone(),
        parameters: layout(&spec.model).parameter_count().0,
        rounds: spec.run.rounds,
    });
    Ok(spec)
}

async fn open_chain(
    config: &WorkerConfig,
    spec: &RunSpec,
) -> Result<Option<ChainClient>, RunWorkerError> {
    if spec.chain.kind == ChainKind::None {
        return Ok(None);
    }
    let named = config.chain_url.clone().or_else(|| config.invitation.chain_url.clone());
    let url = named.ok_or(RunWorkerError::NoChain)?;
    let chain = ChainClient::connect(&url).await?;
    let expected = manyhands_proto::Digest::new(config.invitation.chain_genesis);
    if chain.genesis_hash() != expected {
        let got = chain.genesis_hash().to_string();
        return Err(RunWorkerError::WrongChain { url, expected: expected.to_string(), got });
    }
    Ok(Some(chain))
}

/// The line to the coordinator: every message signed, every answer checked.
struct Line {
    key: NodeKey,
    run: RunId,
    coordinator: manyhands_proto::NodeId,
    addresses: Vec<manyhands_network::Multiaddr>,
    control: ControlHandle,
    last_nonce: u64,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl Line {
    /// It may have moved: other peers of the run, or of this local network, may know where to.
    async fn look_for_coordinator(&mut self) {
        match self.control.find(self.run, self.coordinator).await {
            Ok(found) => {
                // Added, not believed: somebody else may have answered.
                let there = found.into_iter().filter(|at| at.node == self.coordinator);
                for address in there.flat_map(|at| at.addresses) {
                    if !self.addresses.contains(&address) && self.addresses.len() < ADDRESSES_MAX {
                        self.addresses.push(address);
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "nobody to ask where the coordinator is"),
        }
    }

    async fn ask(&mut self, request: &Request) -> Result<Reply, AskError> {
        // Microseconds grow over restarts too, without being kept anywhere.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let nonce = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        self.last_nonce = nonce.max(self.last_nonce + 1);
        let heading = Heading { run: self.run, round: request.round(), nonce: self.last_nonce };
        let sealed = seal_request(&self.key, heading, request)?;
        let digest = request_digest(&sealed);
        let reply = self.control.request(self.coordinator, &self.addresses, sealed).await?;
        let reply = open_reply(&reply, self.run, self.coordinator, digest)?;
        Ok(reply.message)
    }
}

/// What came of an effect, for the loop.
enum Done {
    Input(Box<Input>),
    Synced(Theta, Possession),
    /// This node's own disk fails: whatever is tried again fails again.
    Disk(String),
}

impl Done {
    fn input(input: Input) -> Self {
        Self::Input(Box::new(input))
    }
}

/// Why an effect was not done.
enum Undone {
    /// It may work the next time.
    Passing(String),
    HeadLost {
        round: Round,
        reason: String,
    },
    Disk(String),
}

impl From<RoundError> for Undone {
    fn from(error: RoundError) -> Self {
        let reason = error.to_string();
        match error {
            RoundError::Store(_) | RoundError::Disk(_) | RoundError::Data(DataError::Io { .. }) => {
                Self::Disk(reason)
            }
            RoundError::NoHead { round } | RoundError::DamagedHead { round, .. } => {
                Self::HeadLost { round, reason }
            }
            RoundError::Theta { .. }
            | RoundError::Data(
                DataError::Fetch(_) | DataError::Manifest(_) | DataError::Assignment { .. },
            )
            | RoundError::Train(_)
            | RoundError::Encode(_) => Self::Passing(reason),
        }
    }
}

impl From<SyncError> for Undone {
    fn from(error: SyncError) -> Self {
        let reason = error.to_string();
        match error {
            SyncError::Store(_)
            | SyncError::Disk(_)
            | SyncError::Blob(FetchBlobError::Store(_) | FetchBlobError::Read { .. }) => {
                Self::Disk(reason)
            }
            SyncError::Blob(FetchBlobError::Fetch(_))
            | SyncError::ThetaBytes { .. }
            | SyncError::Parse(_)
            | SyncError::Seed { .. } => Self::Passing(reason),
        }
    }
}

struct Service {
    context: Arc<Context>,
    data: Arc<RunData>,
    machine: Worker,
    line: Line,
    theta: Option<Theta>,
    reins: Arc<Reins>,
    done: mpsc::Sender<Done>,
    results: mpsc::Receiver<Done>,
    duty: String,
    joined: bool,
    /// Nonce of the newest announcement: an older one is a repetition.
    announced: u64,
    evidence_from: Round,
    /// Requests in a row that nobody answered.
    unanswered: u32,
}

impl Service {
    fn new(context: Arc<Context>, data: Arc<RunData>, machine: Worker, line: Line) -> Self {
        // One heavy effect runs at a time.
        let (done, results) = mpsc::channel(4);
        let theta = restore(&context);
        let reins = Arc::new(Reins::default());
        Self {
            context,
            data,
            machine,
            line,
            theta,
            reins,
            done,
            results,
            duty: String::new(),
            joined: false,
            announced: 0,
            evidence_from: Round(0),
            unanswered: 0,
        }
    }

    async fn run(
        mut self,
        mut events: ControlEvents,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Exit, RunWorkerError> {
        let mut stopping = false;
        loop {
            while let Some(request) = self.machine.poll_request(now()) {
                self.say(request).await?;
                if let Some(exit) = self.start_effects() {
                    return Ok(exit);
                }
            }
            if let Some(exit) = self.start_effects() {
                return Ok(exit);
            }
            let wake = self.machine.poll_timeout().map_or(BEAT_MS, |tick| tick.since(now()));
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(wake.max(1))) => {}
                Some(done) = self.results.recv() => self.take(done)?,
                event = events.next() => self.hear(event),
                _ = stop.wait_for(|stop| *stop), if !stopping => {
                    stopping = true;
                    self.machine.handle(now(), Input::Stop);
                }
            }
            if self.machine.is_busy() {
                let steps_done = self.reins.steps_done.load(Ordering::Relaxed);
                self.machine.handle(now(), Input::Progress { steps_done });
            }
        }
    }

    async fn say(&mut self, request: Request) -> Result<(), DiskError> {
        match self.line.ask(&request).await {
            Ok(reply) => {
                self.unanswered = 0;
                self.machine.handle_reply(now(), &request, reply);
            }
            Err(error) => {
                tracing::info!(%error, "the coordinator did not answer");
                self.machine.handle_no_reply(now());
                self.unanswered += 1;
                if self.unanswered.is_multiple_of(SEARCH_AFTER) {
                    self.line.look_for_coordinator().await;
                }
            }
        }
        if self.machine.is_member() && !self.joined {
            self.joined = true;
            self.context.tell(WorkerEvent::Joined {
                round: self.theta.as_ref().map_or(Round(0), |t| t.round),
            });
        }
        if let Some(situation) = self.machine.situation() {
            let duty = describe(situation);
            if duty != self.duty {
                self.context.tell(WorkerEvent::Duty { duty: duty.clone() });
                self.duty = duty;
            }
            if situation.evidence_from != self.evidence_from {
                self.evidence_from = situation.evidence_from;
                self.context.disk.forget_rounds(self.evidence_from)?;
            }
        }
        Ok(())
    }

    fn take_trained(&mut self, trained: Trained) -> Result<(), RunWorkerError> {
        self.context.disk.forget_rounds(self.evidence_from)?;
        let Commitment { round, payload_bytes, loss, .. } = trained.commitment.commitment;
        self.machine.handle(now(), Input::Trained(trained));
        // Said from now on, whatever else happens.
        metrics::committed(payload_bytes);
        let parameters = layout(&self.context.spec.model).parameter_count().0;
        let bits_per_parameter = payload_bytes as f64 * 8.0 / parameters as f64;
        self.context.tell(WorkerEvent::Committed {
            round,
            payload_bytes,
            loss,
            bits_per_parameter,
        });
        Ok(())
    }

    fn take(&mut self, done: Done) -> Result<(), RunWorkerError> {
        match done {
            Done::Input(input) => {
                if let Input::Trained(trained) = *input {
                    self.take_trained(trained)?;
                } else {
                    self.machine.handle(now(), *input);
                }
            }
            Done::Synced(theta, possession) => {
                self.theta = Some(theta);
                self.machine.handle(now(), Input::Synced(possession));
            }
            Done::Disk(reason) => return Err(RunWorkerError::DiskFails(reason)),
        }
        Ok(())
    }

    fn hear(&mut self, event: Option<ControlEvent>) {
        match event {
            Some(ControlEvent::Announcement(announcement)) => {
                let opened =
                    open_announcement(&announcement.bytes, self.line.run, self.line.coordinator);
                match opened {
                    Ok(signed) if signed.nonce > self.announced => {
                        self.announced = signed.nonce;
                        announcement.accept();
                        self.machine.handle(now(), Input::Announced);
                    }
                    // Not passed on: it would wake everybody again.
                    Ok(_) => announcement.reject("it was announced before"),
                    Err(error) => announcement.reject(&error.to_string()),
                }
            }
            // A worker answers no requests; dropping the responder refuses.
            Some(
                ControlEvent::Request { .. }
                | ControlEvent::Connected { .. }
                | ControlEvent::Disconnected { .. },
            )
            | None => {}
        }
    }

    fn start_effects(&mut self) -> Option<Exit> {
        for effect in self.machine.poll_effects() {
            match effect {
                Effect::Exit(exit) => return Some(exit),
                Effect::Abort => self.reins.pull(),
                Effect::Publish { round, verifiers } => {
                    let (context, done) = (Arc::clone(&self.context), self.done.clone());
                    if let Err(error) = publish(&context, round, &verifiers) {
                        let reason = format!("cannot serve round {round}: {error}");
                        // Full only when a heavy effect ends at the same time; it then fails as well.
                        let _ = done.try_send(Done::Disk(reason));
                    }
                }
                Effect::Sync(wanted) => {
                    let (context, held) = (Arc::clone(&self.context), self.theta.clone());
                    self.spawn(async move {
                        let synced = sync(&context, &wanted, held).await;
                        Ok(synced.map(|(theta, proof)| Done::Synced(theta, proof))?)
                    });
                }
                Effect::Train(assignment) => {
                    self.reins = Arc::new(Reins::default());
                    let (context, data) = (Arc::clone(&self.context), Arc::clone(&self.data));
                    let (theta, reins) = (self.theta.clone(), Arc::clone(&self.reins));
                    self.spawn(async move {
                        let trained = train(context, data, theta, assignment, reins).await;
                        Ok(trained.map(|trained| Done::input(Input::Trained(trained)))?)
                    });
                }
                Effect::Replay(task) => {
                    let (context, data) = (Arc::clone(&self.context), Arc::clone(&self.data));
                    self.spawn_on_reins(|reins| async move {
                        let verdict = replay(context, data, task, reins).await;
                        Ok(Done::input(Input::Replayed(verdict)))
                    });
                }
                Effect::Weigh(task) => {
                    let (context, data) = (Arc::clone(&self.context), Arc::clone(&self.data));
                    self.spawn_on_reins(|reins| async move {
                        let weighed = weigh(context, data, task, reins).await;
                        weighed
                            .map(|weighing| Done::input(Input::Weighed(weighing)))
                            .map_err(Undone::Passing)
                    });
                }
                Effect::Evaluate(task) => {
                    let (context, data) = (Arc::clone(&self.context), Arc::clone(&self.data));
                    self.spawn_on_reins(|reins| async move {
                        let evaluated = evaluation(context, data, task, reins).await;
                        evaluated
                            .map(|evaluation| Done::input(Input::Evaluated(evaluation)))
                            .map_err(Undone::Passing)
                    });
                }
            }
        }
        None
    }

    /// Work that ends at once, without a result, when its reins are pulled.
    fn spawn_on_reins<Work>(&mut self, work: impl FnOnce(Arc<Reins>) -> Work)
    where
        Work: Future<Output = Result<Done, Undone>> + Send + 'static,
    {
        let reins = Arc::new(Reins::default());
        self.reins = Arc::clone(&reins);
        let work = work(Arc::clone(&reins));
        self.spawn(async move {
            tokio::select! {
                // What was stopped has failed at nothing.
                biased;
                () = reins.stopped() => Ok(Done::input(Input::Failed)),
                outcome = work => outcome,
            }
        });
    }

    fn spawn(&self, work: impl Future<Output = Result<Done, Undone>> + Send + 'static) {
        let (done, context) = (self.done.clone(), Arc::clone(&self.context));
        tokio::spawn(async move {
            let outcome = work.await.unwrap_or_else(|undone| match undone {
                Undone::Passing(reason) => {
                    context.trouble(reason);
                    Done::input(Input::Failed)
                }
                Undone::HeadLost { round, reason } => {
                    context.trouble(reason);
                    Done::input(Input::HeadLost { round })
                }
                Undone::Disk(reason) => Done::Disk(reason),
            });
            // Closed only when the service has ended.
            let _ = done.send(outcome).await;
        });
    }
}

fn now() -> Tick {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Tick(u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}
