//! Between the control plane and the machine: opens envelopes, refuses what is no business of the
//! machine, looks up what the machine needs to know about a newcomer.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use manyhands_chain_client::{ChainClient, ReadError};
use manyhands_network::control::{ControlEvent, ControlEvents, Responder};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    Heading, Join, OpenError, Refusal, RefusalCode, Reply, Request, Role, Signed,
    open_announcement, open_request, request_digest, seal_reply,
};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use manyhands_rules::coordinator::Facts;
use tokio::sync::{Semaphore, mpsc};

use crate::addresses::ip_of;
use crate::clock::unix_ms;
use crate::driver::Work;
use crate::effects::stakes;
use crate::metrics::REQUESTS;

/// Newcomers that are looked up on chain at the same time.
const LOOKUPS_MAX: usize = 32;
/// Addresses of a newcomer that the coordinator adds to its own.
const OBSERVED_MAX: usize = 4;

/// Seals and sends answers.
#[derive(Debug)]
pub(crate) struct Answerer {
    pub(crate) key: NodeKey,
    pub(crate) run: RunId,
    nonce: AtomicU64,
}

/// How a request is answered.
#[derive(Debug)]
pub(crate) struct Asker {
    responder: Responder,
    /// Digest of the sealed request, which the answer names.
    request: Digest,
}

/// A request whose signature held, with what the machine needs to know of its sender.
#[derive(Debug)]
pub(crate) struct Knock {
    pub(crate) from: NodeId,
    pub(crate) nonce: u64,
    pub(crate) request: Request,
    pub(crate) facts: Facts,
    pub(crate) asker: Asker,
}

impl Answerer {
    pub(crate) fn new(key: NodeKey, run: RunId) -> Self {
        // Greater than any of an earlier process: no process answers a million times in a millisecond.
        let nonce = AtomicU64::new(unix_ms().0.saturating_mul(1_000_000));
        Self { key, run, nonce }
    }

    pub(crate) fn next_nonce(&self) -> u64 {
        self.nonce.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends the answer on a task of its own: a slow peer keeps nobody waiting.
    pub(crate) fn answer(self: &Arc<Self>, asker: Asker, round: Round, reply: Reply) {
        let own = self.clone();
        tokio::spawn(async move {
            let heading = Heading { run: own.run, round, nonce: own.next_nonce() };
            let sealed = seal_reply(&own.key, heading, asker.request, &reply).or_else(|error| {
                // Said instead of nothing: silence would look like an outage.
                tracing::error!(%error, "an answer cannot be sealed; this is a bug");
                let reason = "the coordinator has no answer that fits a message".to_owned();
                let refusal = Refusal { code: RefusalCode::NotReady, reason };
                seal_reply(&own.key, heading, asker.request, &Reply::Refused(refusal))
            });
            match sealed {
                Ok(bytes) => {
                    if let Err(error) = asker.responder.respond(bytes).await {
                        tracing::debug!(%error, "an answer was not taken");
                    }
                }
                Err(error) => tracing::error!(%error, "a refusal cannot be sealed; this is a bug"),
            }
        });
    }
}

/// Takes the control plane's events until it ends.
pub(crate) struct Door {
    pub(crate) answerer: Arc<Answerer>,
    pub(crate) chain: Option<ChainClient>,
    pub(crate) work: mpsc::Sender<Work>,
    lookups: Arc<Semaphore>,
    /// Where connected peers were seen.
    seen: BTreeMap<NodeId, IpAddr>,
}

impl Door {
    pub(crate) fn new(
        answerer: Arc<Answerer>,
        chain: Option<ChainClient>,
        work: mpsc::Sender<Work>,
    ) -> Self {
        let lookups = Arc::new(Semaphore::new(LOOKUPS_MAX));
        Self { answerer, chain, work, lookups, seen: BTreeMap::new() }
    }

    pub(crate) async fn run(mut self, mut events: ControlEvents) {
        while let Some(event) = events.next().await {
            match event {
                ControlEvent::Request { peer, bytes, reply } => {
                    self.handle_request(peer, &bytes, reply).await;
                }
                ControlEvent::Announcement(announcement) => {
                    let own = self.answerer.key.node_id();
                    match open_announcement(&announcement.bytes, self.answerer.run, own) {
                        Ok(_) => announcement.accept(),
                        Err(error) => announcement.reject(&error.to_string()),
                    }
                }
                ControlEvent::Connected { peer, address } => {
                    if let Some(ip) = ip_of(&address) {
                        self.seen.insert(peer, ip);
                    }
                }
                ControlEvent::Disconnected { peer } => {
                    self.seen.remove(&peer);
                }
            }
        }
    }

    async fn handle_request(&mut self, peer: NodeId, bytes: &[u8], responder: Responder) {
        let asker = Asker { responder, request: request_digest(bytes) };
        let signed = match self.admit(peer, open_request(bytes)) {
            Ok(signed) => signed,
            Err(refusal) => {
                let malformed = refusal.code == RefusalCode::Malformed;
                if malformed {
                    // Whoever goes on so is blocked for a while.
                    asker.responder.blame(&refusal.reason);
                }
                let result = if malformed { "malformed" } else { "refused" };
                metrics::counter!(REQUESTS, "result" => result).increment(1);
                tracing::info!(%peer, code = ?refusal.code, reason = refusal.reason, "refused a request");
                self.answerer.answer(asker, Round(0), Reply::Refused(refusal));
                return;
            }
        };
        let Signed { nonce, signer, message: request, .. } = signed;
        let knock = Knock { from: signer, nonce, request, facts: Facts::default(), asker };
        if let Request::Join(join) = &knock.request {
            let observed = self.observed(signer, join);
            let role = join.role;
            self.look_up(knock, role, observed).await;
        } else {
            self.pass(knock).await;
        }
    }

    /// Whether the machine should see this message at all.
    fn admit(
        &self,
        peer: NodeId,
        opened: Result<Signed<Request>, OpenError>,
    ) -> Result<Signed<Request>, Refusal> {
        let refuse = |code, reason| Err(Refusal { code, reason });
        let signed = match opened {
            Ok(signed) => signed,
            Err(error @ OpenError::Version { .. }) => {
                return refuse(RefusalCode::VersionMismatch, error.to_string());
            }
            Err(error) => return refuse(RefusalCode::Malformed, error.to_string()),
        };
        if signed.signer != peer {
            let reason =
                format!("expected the sender's own signature, got that of {}", signed.signer);
            return refuse(RefusalCode::Malformed, reason);
        }
        if signed.run != self.answerer.run {
            let reason = format!("this is run {}, you asked for {}", self.answerer.run, signed.run);
            return refuse(RefusalCode::WrongRun, reason);
        }
        let about = signed.message.round();
        if signed.round != about {
            let reason = format!("it is about round {about} and signed for round {}", signed.round);
            return refuse(RefusalCode::Malformed, reason);
        }
        Ok(signed)
    }

    /// Where a newcomer's data plane may also be: its ports at the address it was seen at.
    fn observed(&self, node: NodeId, join: &Join) -> Vec<SocketAddr> {
        let Some(&ip) = self.seen.get(&node) else { return Vec::new() };
        let mut observed: Vec<SocketAddr> = join
            .addresses
            .iter()
            .map(|address| SocketAddr::new(ip, address.port()))
            .filter(|address| !join.addresses.contains(address))
            .collect();
        observed.sort_unstable();
        observed.dedup();
        observed.truncate(OBSERVED_MAX);
        observed
    }

    async fn look_up(&self, mut knock: Knock, role: Role, observed: Vec<SocketAddr>) {
        knock.facts.observed = observed;
        let Some(chain) = self.chain.clone() else { return self.pass(knock).await };
        let Ok(permit) = self.lookups.clone().try_acquire_owned() else {
            let reason = format!("{LOOKUPS_MAX} newcomers are being looked up on chain already");
            return self.not_ready(knock.asker, reason);
        };
        let (answerer, work) = (self.answerer.clone(), self.work.clone());
        tokio::spawn(async move {
            let _permit = permit;
            match stake(&chain, &answerer.run, knock.from, role).await {
                Ok(stake) => {
                    knock.facts.stake = stake;
                    // Closed only when the service ends.
                    let _ = work.send(Work::Knock(Box::new(knock))).await;
                }
                Err(error) => {
                    let reason = format!("the coordinator cannot read the chain now: {error}");
                    let refusal = Refusal { code: RefusalCode::NotReady, reason };
                    answerer.answer(knock.asker, Round(0), Reply::Refused(refusal));
                }
            }
        });
    }

    fn not_ready(&self, asker: Asker, reason: String) {
        metrics::counter!(REQUESTS, "result" => "dropped").increment(1);
        let refusal = Refusal { code: RefusalCode::NotReady, reason };
        self.answerer.answer(asker, Round(0), Reply::Refused(refusal));
    }

    async fn pass(&self, knock: Knock) {
        // Closed only when the service ends.
        let _ = self.work.send(Work::Knock(Box::new(knock))).await;
    }
}

async fn stake(
    chain: &ChainClient,
    run: &RunId,
    node: NodeId,
    role: Role,
) -> Result<Balance, ReadError> {
    stakes::held(&chain.state().await?, run, node, role).await
}
