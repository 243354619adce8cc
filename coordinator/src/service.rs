//! The service: starts everything around the machine, and the handle that speaks for it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use manyhands_chain_client::ReadError;
use manyhands_gradient::{Layout, initial_theta, vector};
use manyhands_network::Multiaddr;
use manyhands_network::control::{Control, ControlConfig, ControlHandle, Role, StartControlError};
use manyhands_network::data::{Access, Data, DataConfig, DataHandle, StartDataError, StoreError};
use manyhands_network::invitation::Invitation;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Digest, Round};
use manyhands_rules::coordinator::Coordinator;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::clock::{Clock, unix_ms};
use crate::context::{Context, Notes, Whereabouts};
use crate::door::{Answerer, Door};
use crate::driver::{Driver, RunError, Work};
use crate::journal::{BlobNote, Journal, JournalError, Recovered};
use crate::launch::{ChainRefusal, RunManifest, reach_chain};
use crate::page::{self, LivePage, LiveStatus, PageError};
use crate::runner::Runner;
use crate::state::State;
use crate::store::RunStore;
use crate::{addresses, chain_watch};

/// Requests and questions that wait for the machine.
const WORK_QUEUE: usize = 1024;
/// What the blobs of a run may take on disk unless the configuration says otherwise: 1 TiB.
const BLOB_BYTES_MAX: u64 = 1 << 40;

/// How to run a coordinator. What all parties agree on is in the manifest; the rest is this node's.
#[derive(Debug, Clone)]
pub struct CoordinatorConfig {
    /// Journal, blobs and records. A restart with the same folder goes on with the run.
    pub folder: PathBuf,
    pub key: NodeKey,
    pub manifest: RunManifest,
    /// θ₀ as bytes of the canonical vector, if it does not follow from the seed. Needed once.
    pub theta: Option<Vec<u8>>,
    pub control_listen: Vec<Multiaddr>,
    pub data_listen: SocketAddr,
    /// A loopback address; port 0 takes a free one.
    pub page_listen: SocketAddr,
    /// Addresses under which others reach this machine, if they are not its own.
    pub reachable_at: Vec<IpAddr>,
    /// Reachable from everywhere: helps others to find each other.
    pub public: bool,
    /// Announces the run on the local network.
    pub mdns: bool,
    pub blob_bytes_max: u64,
}

impl CoordinatorConfig {
    /// Listens on free ports of the loopback address.
    pub fn new(folder: PathBuf, key: NodeKey, manifest: RunManifest) -> Self {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            folder,
            key,
            manifest,
            theta: None,
            control_listen: addresses::control_listen(loopback),
            data_listen: loopback,
            page_listen: loopback,
            reachable_at: Vec::new(),
            public: false,
            mdns: false,
            blob_bytes_max: BLOB_BYTES_MAX,
        }
    }
}

/// Why the service did not start. Nothing on disk was changed but by what the journal says.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("expected the key of {expected}, which launched this run, got that of {got}")]
    OtherKey { expected: manyhands_proto::NodeId, got: manyhands_proto::NodeId },
    #[error("cannot use the run's folder {}: {source}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(
        "the run's folder {} has records but no journal: restore it from a backup, or launch into \
         another folder",
        path.display()
    )]
    JournalGone { path: PathBuf },
    #[error("the journal {} is of run {found}, expected {expected}", path.display())]
    OtherRun { path: PathBuf, expected: manyhands_proto::RunId, found: manyhands_proto::RunId },
    #[error("the journal {} holds a state that cannot be read: {reason}", path.display())]
    State { path: PathBuf, reason: String },
    #[error("cannot use the run's blobs: {0}")]
    Store(#[from] StoreError),
    #[error("θ of round {round} ({theta:?}) is not in the run's folder: restore it from a backup")]
    ThetaGone { round: Round, theta: Digest },
    #[error("expected the initial parameters {expected:?}, got {got:?}")]
    OtherTheta { expected: Digest, got: Digest },
    #[error("the run starts from given parameters: name the folder that they come from")]
    ThetaNotGiven,
    #[error(transparent)]
    Chain(#[from] ChainRefusal),
    #[error(transparent)]
    Data(#[from] StartDataError),
    #[error(transparent)]
    Control(#[from] StartControlError),
    #[error(transparent)]
    Page(#[from] PageError),
    #[error("starting panicked; this is a bug: {0}")]
    Panicked(String),
}

/// What a run came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completed {
    /// Records that were made, those that only take something back included.
    pub rounds: Round,
    /// The final parameters.
    pub theta: Digest,
}

/// Why a run is not waited for any longer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WaitError {
    #[error("the coordinator stopped: {0}")]
    Failed(Arc<RunError>),
    #[error("the coordinator was shut down before the run was complete")]
    ShutDown,
}

/// How the driver ended; none while it runs.
type End = Option<Result<(), Arc<RunError>>>;

/// Speaks for a running coordinator. Dropping it stops the service at once, as a kill would: what was
/// answered is on disk.
pub struct Handle {
    invitation: String,
    page: LivePage,
    work: mpsc::Sender<Work>,
    stop: watch::Sender<bool>,
    completed: watch::Receiver<Option<Completed>>,
    end: watch::Receiver<End>,
    context: Arc<Context>,
    control: ControlHandle,
    data: DataHandle,
    /// Aborted when dropped.
    _tasks: JoinSet<()>,
}

/// Starts the coordinator of a launched run, or goes on with it. Call within a multi-threaded tokio
/// runtime.
///
/// # Errors
/// [`StartError`].
pub async fn start(config: CoordinatorConfig) -> Result<Handle, StartError> {
    let own = config.key.node_id();
    if own != config.manifest.coordinator {
        return Err(StartError::OtherKey { expected: config.manifest.coordinator, got: own });
    }
    let chain = reach_chain(&config.manifest).await?;
    let opening = config.clone();
    let opened = tokio::task::spawn_blocking(move || Opened::open(&opening))
        .await
        .map_err(|error| StartError::Panicked(error.to_string()))??;
    let data = DataConfig::new(config.key.clone(), config.data_listen, opened.store.clone());
    let data = Data::start(data)?;
    let mut control =
        ControlConfig::new(config.key.clone(), config.control_listen.clone(), Role::Coordinator);
    (control.public, control.mdns) = (config.public, config.mdns);
    let (control, events) = Control::start(control).await?;

    let spec = config.manifest.spec.clone();
    let context = Arc::new(Context {
        layout: layout(&config.manifest),
        key: config.key.clone(),
        run: config.manifest.run,
        spec,
        store: opened.store.clone(),
        data: data.clone(),
        whereabouts: Whereabouts::default(),
        chain: chain.clone(),
        records: records_folder(&config.folder),
        notes: Notes::default(),
    });
    let (work, arriving) = mpsc::channel(WORK_QUEUE);
    let page = page::serve(config.page_listen, work.clone(), context.clone()).await?;
    let invitation = invitation(&config, &control, data.local_addr()).await;

    let answerer = Arc::new(Answerer::new(config.key.clone(), config.manifest.run));
    let (completed, completion) = watch::channel(None);
    let (stop, stopping) = watch::channel(false);
    let (ending, end) = watch::channel(None);
    let driver = opened.driver(context.clone(), answerer.clone(), control.clone(), completed);

    let mut tasks = JoinSet::new();
    tasks.spawn(Door::new(answerer, chain.clone(), work.clone()).run(events));
    if let Some(chain) = chain {
        tasks.spawn(chain_watch::watch_blocks(context.clone(), chain.clone()));
        tasks.spawn(chain_watch::finalize_rounds(context.clone(), chain));
    }
    tasks.spawn(publish(control.clone(), config.manifest.run));
    tasks.spawn(async move {
        let result = driver.run(arriving, stopping).await;
        if let Err(error) = &result {
            tracing::error!(%error, "the coordinator stops; nothing that was decided is lost");
        }
        ending.send_replace(Some(result.map_err(Arc::new)));
    });
    Ok(Handle {
        invitation: invitation.to_string(),
        page,
        work,
        stop,
        completed: completion,
        end,
        context,
        control,
        data,
        _tasks: tasks,
    })
}

/// Makes the run findable by its id, and its announcements heard.
async fn publish(control: ControlHandle, run: manyhands_proto::RunId) {
    control.subscribe(run).await;
    if let Err(error) = control.provide(run).await {
        tracing::info!(%error, "the run can only be joined with its invitation");
    }
}

async fn invitation(
    config: &CoordinatorConfig,
    control: &ControlHandle,
    data: SocketAddr,
) -> Invitation {
    let control = control.addresses().await;
    Invitation {
        run: config.manifest.run,
        coordinator: config.manifest.coordinator,
        data: addresses::data(data, &control, &config.reachable_at),
        control: addresses::control(control, &config.reachable_at),
        chain_genesis: *config.manifest.chain_genesis.as_bytes(),
        chain_url: config.manifest.chain_url.clone(),
    }
}

impl Handle {
    /// The line that workers and verifiers join with.
    pub fn invitation(&self) -> String {
        self.invitation.clone()
    }

    /// Of the live page, on this machine only.
    pub fn page_url(&self) -> String {
        self.page.url()
    }

    /// The run as of now; none if the service has stopped.
    pub async fn status(&self) -> Option<LiveStatus> {
        page::live_status(&self.work, &self.context).await
    }

    /// What the chain holds no anchor or settlement of can still be done; this ends when the run's
    /// final θ is on record.
    ///
    /// # Errors
    /// [`WaitError`] if the service stops before.
    pub async fn wait_complete(&self) -> Result<Completed, WaitError> {
        let (mut completed, mut end) = (self.completed.clone(), self.end.clone());
        tokio::select! {
            biased;
            Ok(value) = completed.wait_for(Option::is_some) => value.ok_or(WaitError::ShutDown),
            ended = end.wait_for(Option::is_some) => match ended.ok().as_deref() {
                Some(Some(Err(error))) => Err(WaitError::Failed(error.clone())),
                Some(Some(Ok(())) | None) | None => Err(WaitError::ShutDown),
            },
        }
    }

    /// Waits until every committed round is final on chain, so that nobody needs this process any
    /// more to be paid. Returns at once in a run without a chain.
    ///
    /// # Errors
    /// When the chain cannot be read.
    pub async fn wait_final(&self) -> Result<(), ReadError> {
        match &self.context.chain {
            Some(chain) => chain_watch::all_final(&self.context, chain).await,
            None => Ok(()),
        }
    }

    /// Stops between two batches and closes every connection. The run goes on when the service is
    /// started with the same folder.
    ///
    /// # Errors
    /// The [`RunError`] that had stopped it before.
    pub async fn shutdown(self) -> Result<(), Arc<RunError>> {
        self.stop.send_replace(true);
        let mut end = self.end.clone();
        let result = match end.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or(Ok(())),
            Err(_) => Ok(()),
        };
        self.control.shutdown().await;
        self.data.shutdown().await;
        result
    }
}

/// What the run's folder holds.
struct Opened {
    store: Arc<RunStore>,
    state: State,
    journal: Journal,
    blobs: Vec<BlobNote>,
}

impl Opened {
    fn open(config: &CoordinatorConfig) -> Result<Self, StartError> {
        let folder = &config.folder;
        let records = records_folder(folder);
        std::fs::create_dir_all(&records)
            .map_err(|source| StartError::Folder { path: records.clone(), source })?;
        // The journal first: its lock keeps a second process away from everything else.
        let (journal, state, blobs) = open_journal(config, &records)?;
        let path = folder.join("blobs");
        let store = RunStore::open(&path, config.blob_bytes_max, &config.manifest.served)?;
        let opened = Self { store: Arc::new(store), state, journal, blobs };
        opened.store.remove_unnoted(&opened.blobs);
        opened.ensure_theta(config)?;
        Ok(opened)
    }

    /// θ of the open round must be there; that of the first round can be made.
    fn ensure_theta(&self, config: &CoordinatorConfig) -> Result<(), StartError> {
        let machine = &self.state.machine;
        let (round, theta) = (machine.round(), machine.theta());
        if self.store.contains(theta) {
            return Ok(());
        }
        let data = &config.manifest.spec.data;
        if theta != data.theta {
            return Err(StartError::ThetaGone { round, theta });
        }
        let bytes = match (&config.theta, data.theta_is_given) {
            (Some(bytes), true) => bytes.clone(),
            (None, true) => return Err(StartError::ThetaNotGiven),
            (_, false) => {
                let spec = &config.manifest.spec;
                let layout = layout(&config.manifest);
                vector::to_bytes(&initial_theta(&layout, &spec.model, spec.run.seed))
            }
        };
        let got = Digest::of(&bytes);
        if got != theta {
            return Err(StartError::OtherTheta { expected: theta, got });
        }
        self.store.insert(&bytes, Access::Everyone)?;
        Ok(())
    }

    fn driver(
        self,
        context: Arc<Context>,
        answerer: Arc<Answerer>,
        control: ControlHandle,
        completed: watch::Sender<Option<Completed>>,
    ) -> Driver {
        let last = self.journal.tick();
        Driver {
            runner: Runner::new(context.clone()),
            context,
            state: self.state,
            clock: Clock::from(last),
            journal: self.journal,
            blobs: self.blobs.into_iter().map(|note| (note.digest, note)).collect(),
            answerer,
            control,
            completed,
            last,
            inputs_since_snapshot: 0,
            snapshot_round: None,
            announced: None,
            access: None,
        }
    }
}

fn open_journal(
    config: &CoordinatorConfig,
    records: &Path,
) -> Result<(Journal, State, Vec<BlobNote>), StartError> {
    let path = config.folder.join("journal.redb");
    let manifest = &config.manifest;
    if !path.exists() {
        let folder_error = |source| StartError::Folder { path: records.to_owned(), source };
        if std::fs::read_dir(records).map_err(folder_error)?.next().is_some() {
            return Err(StartError::JournalGone { path: config.folder.clone() });
        }
        let now = unix_ms();
        let state = State::new(Coordinator::new(manifest.run, manifest.spec.clone(), now));
        let journal = Journal::create(&path, state.to_bytes(), now)?;
        return Ok((journal, state, Vec::new()));
    }
    let (journal, Recovered { snapshot, inputs, blobs, .. }) = Journal::open(&path)?;
    let mut state: State = serde_json::from_slice(&snapshot)
        .map_err(|error| StartError::State { path: path.clone(), reason: error.to_string() })?;
    let found = state.machine.run();
    if found != manifest.run {
        return Err(StartError::OtherRun { path, expected: manifest.run, found });
    }
    let count = inputs.len();
    for (tick, input) in inputs {
        state.handle(tick, input);
    }
    tracing::info!(round = %state.machine.round(), inputs = count, "going on where the journal ends");
    Ok((journal, state, blobs))
}

/// Where a run's records are.
pub fn records_folder(folder: &Path) -> PathBuf {
    folder.join("records")
}

fn layout(manifest: &RunManifest) -> Layout {
    Layout::of(&manifest.spec.model).expect("a run's model was checked when its file was read")
}
