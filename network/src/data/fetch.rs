//! Fetches one blob from several sources: which chunk from whom, and what to do when one fails.
//!
//! Every source shows its own chunk list first and its chunks are checked against that, so blame
//! falls on the right one: a list of parents instead of leaves, or with a wrong length, merges to the
//! same digest, but nobody can produce chunks for it. The first list seen is worked on; sources with
//! another list wait until all of the first kind have failed.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use manyhands_proto::tree::ChunkList;
use manyhands_proto::{Digest, NodeId};
use tokio::time::Instant;

use super::endpoint::Shared;
use super::request;
use super::request::SourceError;
use super::sink::Sink;
use super::wire::Refusal;
use crate::metrics::DATA_SOURCE_FAILURES;

/// Chunks in flight that a source starts with; it doubles its way up to the fetch's limit.
const WINDOW_START: usize = 4;
/// Stalls and lost connections in a row that a source survives; one packet storm is not a verdict.
const STRIKES_MAX: u32 = 3;
/// When a source that says it is busy is asked again, whatever it says: by its word alone it would be
/// waited for 49 days, or asked without a pause.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A source that broke is left alone for this long before it is tried again.
const STRIKE_PAUSE: Duration = Duration::from_millis(250);

/// A peer that may have a blob. Without addresses it is asked over a connection that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub peer: NodeId,
    pub addresses: Vec<SocketAddr>,
}

impl Source {
    /// A source that is connected already, in either direction.
    pub fn connected(peer: NodeId) -> Self {
        Self { peer, addresses: Vec::new() }
    }
}

/// How far a fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub chunks_done: u64,
    pub chunks_total: u64,
    pub length: u64,
}

/// Called after every chunk, on the fetching task: must not block.
pub type ProgressFn = Arc<dyn Fn(Progress) + Send + Sync>;

/// What to fetch, and from whom.
#[derive(Clone)]
pub struct FetchRequest {
    pub digest: Digest,
    /// In order of preference.
    pub sources: Vec<Source>,
    /// A source that claims more bytes than this is not believed.
    pub length_max: u64,
    pub progress: Option<ProgressFn>,
    /// When to give up, whatever has arrived by then. Without one a fetch goes on as long as a source
    /// delivers anything.
    pub deadline: Option<Instant>,
}

impl FetchRequest {
    pub fn new(digest: Digest, sources: Vec<Source>, length_max: u64) -> Self {
        Self { digest, sources, length_max, progress: None, deadline: None }
    }
}

/// A source that was given up, and why. `SourceError::Blame` is its provable fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFailure {
    pub peer: NodeId,
    pub error: SourceError,
}

/// What a successful fetch went through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FetchReport {
    /// Bytes of the blob.
    pub length: u64,
    /// Chunks that an earlier, interrupted fetch had left in the file.
    pub chunks_resumed: u64,
    /// Chunks fetched per source, in the order of the request.
    pub chunks_fetched: Vec<u64>,
    pub failures: Vec<SourceFailure>,
}

/// Why a blob could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("no source gave blob {digest:?}: {}", failures_text(failures))]
    NoSource { digest: Digest, failures: Vec<SourceFailure> },
    #[error("blob {digest:?} did not arrive in time{}", so_far(failures))]
    TooLate { digest: Digest, failures: Vec<SourceFailure> },
    #[error("cannot write {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("another fetch is filling {path}")]
    UnderWay { path: PathBuf },
}

fn failures_text(failures: &[SourceFailure]) -> String {
    if failures.is_empty() {
        return "no source was named".to_owned();
    }
    let texts: Vec<_> =
        failures.iter().map(|failure| format!("{}: {}", failure.peer, failure.error)).collect();
    texts.join("; ")
}

fn so_far(failures: &[SourceFailure]) -> String {
    if failures.is_empty() { String::new() } else { format!(": {}", failures_text(failures)) }
}

pub(super) async fn fetch(
    shared: &Arc<Shared>,
    request: FetchRequest,
    sink: Sink,
) -> Result<(Sink, FetchReport), FetchError> {
    let digest = request.digest;
    let mut deadline = pin!(reached(request.deadline));
    let mut fetch = Fetch::new(shared.clone(), request, sink);
    loop {
        fetch.start_work();
        if fetch.is_complete() {
            return Ok((fetch.sink, fetch.report));
        }
        let wake = fetch.next_retry();
        if fetch.work.is_empty() && wake.is_none() {
            if fetch.adopt_another_list().await? {
                continue;
            }
            return Err(FetchError::NoSource { digest, failures: fetch.report.failures });
        }
        tokio::select! {
            () = &mut deadline => {
                return Err(FetchError::TooLate { digest, failures: fetch.report.failures });
            }
            Some(done) = fetch.work.next() => fetch.handle(done).await?,
            () = reached(wake) => {}
        }
    }
}

async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The blob as one kind of chunk list describes it.
struct Plan {
    list: Arc<ChunkList>,
    pending: VecDeque<u64>,
    in_flight: usize,
}

struct SourceState {
    source: Arc<Source>,
    stage: Stage,
    window: usize,
    in_flight: usize,
    strikes: u32,
    /// Work begun before this says nothing new about the source.
    last_strike: Option<Instant>,
    retry_at: Option<Instant>,
    busy_since: Option<Instant>,
}

#[derive(Debug, Clone)]
enum Stage {
    Waiting,
    AskingHead,
    Ready(Arc<ChunkList>),
    Out,
}

struct Done {
    source: usize,
    began: Instant,
    outcome: Outcome,
}

enum Outcome {
    Head(Result<ChunkList, SourceError>),
    Chunk { index: u64, result: Result<Vec<u8>, SourceError> },
}

struct Fetch {
    shared: Arc<Shared>,
    request: FetchRequest,
    sink: Sink,
    sources: Vec<SourceState>,
    plan: Option<Plan>,
    work: FuturesUnordered<BoxFuture<'static, Done>>,
    report: FetchReport,
}

impl Fetch {
    fn new(shared: Arc<Shared>, request: FetchRequest, sink: Sink) -> Self {
        let state = |source: &Source| SourceState {
            source: Arc::new(source.clone()),
            stage: Stage::Waiting,
            window: WINDOW_START,
            in_flight: 0,
            strikes: 0,
            last_strike: None,
            retry_at: None,
            busy_since: None,
        };
        let sources: Vec<_> = request.sources.iter().map(state).collect();
        let report = FetchReport { chunks_fetched: vec![0; sources.len()], ..Default::default() };
        Self { shared, request, sink, sources, plan: None, work: FuturesUnordered::new(), report }
    }

    fn is_complete(&self) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.pending.is_empty() && plan.in_flight == 0)
    }

    /// Asks more sources for their list, and ready sources for chunks.
    fn start_work(&mut self) {
        let now = Instant::now();
        for source in &mut self.sources {
            if source.retry_at.is_some_and(|at| at <= now) {
                source.retry_at = None;
            }
        }
        // A source that was told to wait gives its place to another meanwhile.
        let in_use = |source: &&SourceState| {
            let works = matches!(source.stage, Stage::AskingHead) || self.follows_plan(source);
            works && source.retry_at.is_none()
        };
        let used = self.sources.iter().filter(in_use).count();
        let room = self.shared.limits.sources_in_use.max(1).saturating_sub(used);
        let waiting: Vec<usize> = (0..self.sources.len())
            .filter(|&index| {
                let source = &self.sources[index];
                matches!(source.stage, Stage::Waiting) && source.retry_at.is_none()
            })
            .take(room)
            .collect();
        for index in waiting {
            self.ask_head(index);
        }
        while self.ask_chunk() {}
    }

    fn follows_plan(&self, source: &SourceState) -> bool {
        match (&source.stage, &self.plan) {
            (Stage::Ready(list), Some(plan)) => *list == plan.list,
            (Stage::Waiting | Stage::AskingHead | Stage::Ready(_) | Stage::Out, _) => false,
        }
    }

    fn ask_head(&mut self, index: usize) {
        let state = &mut self.sources[index];
        state.stage = Stage::AskingHead;
        let (shared, source) = (self.shared.clone(), state.source.clone());
        let (digest, length_max) = (self.request.digest, self.request.length_max);
        let work = async move {
            let began = Instant::now();
            let result = request::head(&shared, &source, digest, length_max).await;
            Done { source: index, began, outcome: Outcome::Head(result) }
        };
        self.work.push(work.boxed());
    }

    /// Gives the next chunk to the least loaded source; false if there is no chunk or no source.
    fn ask_chunk(&mut self) -> bool {
        let fits = |source: &SourceState| {
            source.in_flight < source.window
                && source.retry_at.is_none()
                && self.follows_plan(source)
        };
        let best = (0..self.sources.len())
            .filter(|&index| fits(&self.sources[index]))
            .min_by_key(|&index| (self.sources[index].strikes, self.sources[index].in_flight));
        let (Some(best), Some(plan)) = (best, &mut self.plan) else { return false };
        if plan.in_flight >= self.shared.limits.chunks_in_flight {
            return false;
        }
        let Some(index) = plan.pending.pop_front() else { return false };
        plan.in_flight += 1;
        let list = plan.list.clone();
        let state = &mut self.sources[best];
        state.in_flight += 1;
        let (shared, source) = (self.shared.clone(), state.source.clone());
        let work = async move {
            let began = Instant::now();
            let result = request::chunk(&shared, &source, &list, index).await;
            Done { source: best, began, outcome: Outcome::Chunk { index, result } }
        };
        self.work.push(work.boxed());
        true
    }

    async fn handle(&mut self, done: Done) -> Result<(), FetchError> {
        let Done { source, began, outcome } = done;
        match outcome {
            Outcome::Head(Ok(list)) => self.handle_head(source, list).await,
            Outcome::Head(Err(error)) => {
                self.sources[source].stage = Stage::Waiting;
                self.handle_failure(source, began, error);
                Ok(())
            }
            Outcome::Chunk { index, result } => {
                self.sources[source].in_flight -= 1;
                match result {
                    Ok(bytes) => self.handle_chunk(source, began, index, bytes).await?,
                    Err(error) => {
                        self.handle_failure(source, began, error);
                        self.put_back(index);
                    }
                }
                if let Some(plan) = &mut self.plan {
                    plan.in_flight -= 1;
                }
                Ok(())
            }
        }
    }

    async fn handle_head(&mut self, source: usize, list: ChunkList) -> Result<(), FetchError> {
        self.sources[source].recover();
        let list = match &self.plan {
            // The same allocation, so that following the plan is cheap to compare.
            Some(plan) if *plan.list == list => plan.list.clone(),
            Some(_) => Arc::new(list),
            None => {
                let list = Arc::new(list);
                self.work_on(list.clone()).await?;
                list
            }
        };
        self.sources[source].stage = Stage::Ready(list);
        Ok(())
    }

    async fn handle_chunk(
        &mut self,
        source: usize,
        began: Instant,
        index: u64,
        bytes: Vec<u8>,
    ) -> Result<(), FetchError> {
        self.sink.store(index, bytes).await?;
        self.report.chunks_fetched[source] += 1;
        let state = &mut self.sources[source];
        state.recover();
        // A slow line must not have so many chunks in flight that each one misses its deadline.
        if began.elapsed() < self.shared.timeouts.request / 8 {
            state.window = (state.window + 1).min(self.shared.limits.chunks_in_flight.max(1));
        }
        self.report_progress();
        Ok(())
    }

    fn report_progress(&self) {
        let (Some(plan), Some(report)) = (&self.plan, &self.request.progress) else { return };
        let fetched: u64 = self.report.chunks_fetched.iter().sum();
        report(Progress {
            chunks_done: self.report.chunks_resumed + fetched,
            chunks_total: plan.list.chunk_count(),
            length: plan.list.length(),
        });
    }

    fn put_back(&mut self, index: u64) {
        if let Some(plan) = &mut self.plan {
            plan.pending.push_front(index);
        }
    }

    fn handle_failure(&mut self, source: usize, began: Instant, error: SourceError) {
        let state = &mut self.sources[source];
        if matches!(state.stage, Stage::Out) {
            return;
        }
        let now = Instant::now();
        let forgiven = match &error {
            SourceError::Refused(Refusal::Busy { retry_after }) => {
                let busy_until = *state.busy_since.get_or_insert(now) + self.shared.timeouts.busy;
                state.window = (state.window / 2).max(1);
                let retry_at = now + (*retry_after).clamp(RETRY_MIN, RETRY_MAX);
                state.retry_at = Some(retry_at.min(busy_until));
                now < busy_until
            }
            SourceError::Stalled { .. }
            | SourceError::TooSlow { .. }
            | SourceError::Lost(_)
            | SourceError::Connect(_) => {
                // All chunks in flight fail together when a line breaks: that is one strike.
                if state.last_strike.is_none_or(|last| began > last) {
                    state.strikes += 1;
                    state.last_strike = Some(now);
                    state.window = (state.window / 2).max(1);
                    state.retry_at = Some(now + STRIKE_PAUSE);
                }
                state.strikes < STRIKES_MAX && !matches!(error, SourceError::Connect(_))
            }
            SourceError::Refused(_)
            | SourceError::Blame(_)
            | SourceError::TooLarge { .. }
            | SourceError::GroupCount { .. } => false,
        };
        if forgiven {
            return;
        }
        let peer = state.source.peer;
        tracing::info!(%peer, %error, digest = %self.request.digest, "gave up a source");
        metrics::counter!(DATA_SOURCE_FAILURES, "reason" => error.name()).increment(1);
        state.stage = Stage::Out;
        state.retry_at = None;
        self.report.failures.push(SourceFailure { peer, error });
    }

    /// When a source that was told to wait may be asked again.
    fn next_retry(&self) -> Option<Instant> {
        let useful =
            |source: &&SourceState| source.is_waiting_to_retry() || self.follows_plan(source);
        self.sources.iter().filter(useful).filter_map(|source| source.retry_at).min()
    }

    /// Turns to the list of a source that disagreed, once nobody is left who agrees.
    async fn adopt_another_list(&mut self) -> Result<bool, FetchError> {
        let other = self.sources.iter().find_map(|source| match &source.stage {
            Stage::Ready(list) if !self.follows_plan(source) => Some(list.clone()),
            Stage::Ready(_) | Stage::Waiting | Stage::AskingHead | Stage::Out => None,
        });
        match other {
            Some(list) => self.work_on(list).await.map(|()| true),
            None => Ok(false),
        }
    }

    async fn work_on(&mut self, list: Arc<ChunkList>) -> Result<(), FetchError> {
        let missing = self.sink.missing(list.clone()).await?;
        let fetched: u64 = self.report.chunks_fetched.iter().sum();
        let present = list.chunk_count() - missing.len() as u64;
        self.report.chunks_resumed = present.saturating_sub(fetched);
        self.report.length = list.length();
        self.plan = Some(Plan { list, pending: missing.into(), in_flight: 0 });
        self.report_progress();
        Ok(())
    }
}

impl SourceState {
    fn is_waiting_to_retry(&self) -> bool {
        matches!(self.stage, Stage::Waiting) && self.retry_at.is_some()
    }

    fn recover(&mut self) {
        self.strikes = 0;
        self.busy_since = None;
    }
}
