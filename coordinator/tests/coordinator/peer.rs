//! A worker or verifier that speaks the protocol and trains a model of a few thousand numbers: it adds
//! noise. It has the real machine, codec and network, and no torch.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use manyhands_gradient::codec::{Endpoints, Update, UpdateCodec};
use manyhands_gradient::error_feedback::add_sent;
use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{Layout, initial_theta, vector};
use manyhands_network::control::{
    Control, ControlConfig, ControlEvent, ControlEvents, ControlHandle, Role as ControlRole,
};
use manyhands_network::data::{
    Access, Data, DataConfig, DataHandle, FetchRequest, FileStore, Source,
};
use manyhands_network::invitation::Invitation;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    Assignment, Commitment, DeviceKind, EndState, Evaluation, Heading, Join, LossEffect,
    NumericClass, PROTOCOL_VERSION, Possession, ReplayEnd, ReplayOutcome, Replayed, Reply, Request,
    Role, SignedCommitment, SignedReplay, Start, Sync, Verdict, Weighing, open_reply,
    request_digest, seal_request,
};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, Round, Tick, TokenCount};
use manyhands_rules::worker::{Effect, Exit, Identity, Input, Trained, Worker};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};

const BLOB_BYTES_MAX: u64 = 64 << 20;
const BEAT_MS: u64 = 50;

/// How a worker behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conduct {
    Honest,
    /// Commits to an error buffer that does not follow from its states.
    ForgesItsErrorBuffer,
    /// Uploads bytes that no codec wrote.
    SendsGarbage,
    /// Changes the last bit of one value of where it ended.
    ChangesOneBit,
    /// Does other work than was assigned.
    TrainsOnOtherData,
    /// As a verifier, does not show where a replay ended.
    ShowsNothing,
}

/// What a peer tells the test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Told {
    Committed(NodeId, Round),
}

/// How a peer's run ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    pub(crate) trained: Vec<Round>,
}

pub(crate) struct Peer {
    key: NodeKey,
    spec: RunSpec,
    layout: Layout,
    role: Role,
    conduct: Conduct,
    control: ControlHandle,
    events: ControlEvents,
    data: DataHandle,
    store: Arc<FileStore>,
    _folder: TempDir,
    invitations: watch::Receiver<Invitation>,
    /// Trains only while this is open.
    gate: watch::Receiver<bool>,
    told: mpsc::Sender<Told>,
    theta: Option<(Round, Vec<f32>)>,
    /// e_next and payload by round.
    ends: BTreeMap<Round, (Vec<f32>, Vec<u8>)>,
    blobs: BTreeMap<Round, Vec<Digest>>,
    trained: Vec<Round>,
    nonce: u64,
}

/// What a test gives a peer.
pub(crate) struct Place {
    pub(crate) spec: RunSpec,
    pub(crate) invitations: watch::Receiver<Invitation>,
    pub(crate) gate: watch::Receiver<bool>,
    pub(crate) told: mpsc::Sender<Told>,
}

pub(crate) fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed([seed; 32])
}

fn now() -> Tick {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    Tick(since.as_millis() as u64)
}

impl Peer {
    pub(crate) async fn start(seed: u8, role: Role, conduct: Conduct, place: Place) -> Self {
        let key = key(seed);
        let folder = tempfile::tempdir().expect("folder");
        let store = FileStore::open(folder.path(), 1 << 30).expect("store");
        let store = Arc::new(store);
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let data =
            Data::start(DataConfig::new(key.clone(), loopback, store.clone())).expect("data");
        let listen = manyhands_coordinator::addresses::control_listen(loopback);
        let config = ControlConfig::new(key.clone(), listen, ControlRole::Worker);
        let (control, events) = Control::start(config).await.expect("control");
        let Place { spec, invitations, gate, told } = place;
        let run = invitations.borrow().run;
        control.subscribe(run).await;
        Self {
            layout: Layout::of(&spec.model).expect("layout"),
            key,
            spec,
            role,
            conduct,
            control,
            events,
            data,
            store,
            _folder: folder,
            invitations,
            gate,
            told,
            theta: None,
            ends: BTreeMap::new(),
            blobs: BTreeMap::new(),
            trained: Vec::new(),
            nonce: now().0,
        }
    }

    /// Takes part until the end.
    pub(crate) async fn run(mut self) -> Ended {
        let identity = Identity {
            join: Join {
                role: self.role,
                version: PROTOCOL_VERSION,
                class: NumericClass {
                    fingerprint: self.spec.verification.fingerprint,
                    ..NumericClass::unknown(DeviceKind::Cpu)
                },
                memory_bytes: 1 << 40,
                tokens_per_second: 1_000_000,
                addresses: vec![self.data.local_addr()],
                head_rounds: Vec::new(),
            },
            beat_ms: BEAT_MS,
        };
        let mut machine = Worker::new(self.key.node_id(), identity, None);
        loop {
            if let Some(request) = machine.poll_request(now()) {
                match self.ask(&request).await {
                    Some(reply) => {
                        machine.handle_reply(now(), &request, reply);
                        self.tell(&request).await;
                    }
                    None => machine.handle_no_reply(now()),
                }
            }
            let effects = machine.poll_effects();
            let idle = effects.is_empty();
            for effect in effects {
                if let Effect::Exit(exit) = effect {
                    self.control.shutdown().await;
                    return Ended { exit, trained: self.trained };
                }
                if let Some(input) = self.perform(effect).await {
                    machine.handle(now(), input);
                }
            }
            if idle && let Some(next) = machine.poll_timeout() {
                let wait = Duration::from_millis(next.since(now()));
                if let Ok(Some(ControlEvent::Announcement(announcement))) =
                    tokio::time::timeout(wait, self.events.next()).await
                {
                    announcement.accept();
                    machine.handle(now(), Input::Announced);
                }
            }
        }
    }

    /// Asks the coordinator; none if it is not there.
    pub(crate) async fn ask(&mut self, request: &Request) -> Option<Reply> {
        self.nonce += 1;
        let invitation = self.invitations.borrow().clone();
        let round = request.round();
        let heading = Heading { run: invitation.run, round, nonce: self.nonce };
        let sealed = seal_request(&self.key, heading, request).expect("within the limits");
        self.send(sealed).await
    }

    /// Sends bytes as a request.
    pub(crate) async fn send(&self, sealed: Vec<u8>) -> Option<Reply> {
        let invitation = self.invitations.borrow().clone();
        let (run, coordinator) = (invitation.run, invitation.coordinator);
        let digest = request_digest(&sealed);
        let asking = self.control.request(coordinator, &invitation.control, sealed);
        let bytes = tokio::time::timeout(Duration::from_secs(5), asking).await.ok()?.ok()?;
        let reply =
            open_reply(&bytes, run, coordinator, digest).expect("signed by the coordinator");
        Some(reply.message)
    }

    async fn tell(&self, request: &Request) {
        if let Request::Commit(signed) = request {
            let told = Told::Committed(self.key.node_id(), signed.commitment.round);
            self.told.send(told).await.expect("the test listens");
        }
    }

    async fn perform(&mut self, effect: Effect) -> Option<Input> {
        match effect {
            Effect::Sync(sync) => Some(self.sync(&sync).await),
            Effect::Train(assignment) => {
                self.gate.wait_for(|open| *open).await.expect("the test holds the gate");
                Some(Input::Trained(self.train(assignment)))
            }
            Effect::Publish { round, verifiers } => {
                self.publish(round, verifiers);
                None
            }
            Effect::Replay(replay) => {
                let outcome = ReplayOutcome::Replayed(self.replay(&replay.assignment).await);
                Some(Input::Replayed(Verdict { id: replay.id, outcome }))
            }
            Effect::Evaluate(asked) => {
                let loss = 5.0 - f64::from(asked.round.0);
                let evaluation = Evaluation { round: asked.round, theta: asked.theta, loss };
                Some(Input::Evaluated(evaluation))
            }
            Effect::Weigh(asked) => {
                let effects =
                    asked.updates.iter().map(|(worker, _)| (*worker, LossEffect(-1))).collect();
                Some(Input::Weighed(Weighing { round: asked.round, effects }))
            }
            Effect::Abort | Effect::Exit(_) => None,
        }
    }

    /// From θ of the round before by the merge; the first θ from the seed; any other whole.
    async fn sync(&mut self, sync: &Sync) -> Input {
        let held = self.theta.take().filter(|(round, _)| round.next() == sync.round);
        let theta = match (held, &sync.merge) {
            (Some((_, mut theta)), Some(merge)) => {
                let Some(bytes) = self.fetch(merge.aggregate).await else { return Input::Failed };
                let broadcast = self.spec.aggregation.broadcast;
                let update = Update::parse(&bytes, &self.layout, broadcast);
                update.expect("a merge of this model").subtract_from(&self.layout, &mut theta);
                theta
            }
            (Some((_, theta)), None) => theta,
            (None, _) if sync.round == Round(0) => {
                initial_theta(&self.layout, &self.spec.model, self.spec.run.seed)
            }
            (None, _) => {
                let Some(bytes) = self.fetch(sync.theta).await else { return Input::Failed };
                vector::from_bytes(&bytes, &self.layout).expect("a vector of this model")
            }
        };
        assert_eq!(vector::digest(&theta), sync.theta, "the merge leads to the coordinator's θ");
        let proof = Possession::prove(sync.round, self.key.node_id(), &vector::to_bytes(&theta));
        self.theta = Some((sync.round, theta));
        Input::Synced(proof)
    }

    /// Fetches a public blob from the coordinator.
    pub(crate) async fn fetch(&self, digest: Digest) -> Option<bytes::Bytes> {
        let invitation = self.invitations.borrow().clone();
        let source = Source { peer: invitation.coordinator, addresses: invitation.data };
        let request = FetchRequest::new(digest, vec![source], BLOB_BYTES_MAX);
        self.data.fetch_to_memory(request).await.ok().map(|(bytes, _)| bytes)
    }

    /// Repeats another's round and keeps where it ended for the coordinator.
    async fn replay(&self, assignment: &Assignment) -> SignedReplay {
        let Assignment { round, worker, theta: start, .. } = *assignment;
        let theta = self.fetch(start).await.expect("public");
        let theta = vector::from_bytes(&theta, &self.layout).expect("a vector of this model");
        let end = add_noise(&self.layout, &theta, seed_of(round, worker));
        let invitation = self.invitations.borrow().clone();
        let access = || {
            if self.conduct == Conduct::ShowsNothing {
                Access::Nobody
            } else {
                Access::Only(BTreeSet::from([invitation.coordinator]))
            }
        };
        let insert = |bytes: &[u8]| self.store.insert(bytes, access()).expect("stored");
        let theta = insert(&vector::to_bytes(&end));
        let moments = insert(Moments8::zero(&self.layout).as_bytes());
        let end = ReplayEnd::At(EndState { theta, moments });
        let replayed = Replayed { round, worker, assignment: assignment.digest(), end };
        SignedReplay::sign(&self.key, invitation.run, replayed)
    }

    fn train(&mut self, assignment: Assignment) -> Trained {
        let round = assignment.round;
        self.trained.push(round);
        let (held, theta) = self.theta.as_ref().expect("synced before it trains");
        assert_eq!((*held, vector::digest(theta)), (round, assignment.theta));
        let elsewhere = u64::from(self.conduct == Conduct::TrainsOnOtherData) << 20;
        let seed = seed_of(round, self.key.node_id()) + elsewhere;
        let mut end = add_noise(&self.layout, theta, seed);
        if self.conduct == Conduct::ChangesOneBit {
            end[0] = f32::from_bits(end[0].to_bits() ^ 1);
        }
        let mut error = self.error_in(assignment.start);
        let codec = UpdateCodec::new(self.spec.codec.profile, self.spec.codec.error_decay);
        let ends = Endpoints { start: theta, end: &end };
        let payload = codec.expect("codec").encode(&self.layout, &mut error, ends).expect("finite");
        let mut payload = payload.into_bytes();
        match self.conduct {
            Conduct::Honest
            | Conduct::ChangesOneBit
            | Conduct::TrainsOnOtherData
            | Conduct::ShowsNothing => {}
            Conduct::ForgesItsErrorBuffer => error.iter_mut().for_each(|value| *value += 1.0),
            Conduct::SendsGarbage => payload = vec![7; 100],
        }
        let insert = |bytes: &[u8]| self.store.insert(bytes, Access::Nobody).expect("stored");
        let moments = insert(Moments8::zero(&self.layout).as_bytes());
        let commitment = Commitment {
            round,
            first_sequence: assignment.first_sequence,
            payload: insert(&payload),
            payload_bytes: payload.len() as u64,
            theta: insert(&vector::to_bytes(&end)),
            moments,
            error: insert(&vector::to_bytes(&error)),
            assignment: assignment.digest(),
            tokens: TokenCount(
                u64::from(assignment.sequences) * u64::from(self.spec.model.context_length),
            ),
            loss: 4.0,
        };
        let Commitment { payload: sent, theta: ended, moments, error: rest, .. } = commitment;
        let blobs = vec![sent, ended, moments, rest];
        self.blobs.insert(round, blobs);
        self.ends.insert(round, (error, payload));
        let run = self.invitations.borrow().run;
        let commitment = SignedCommitment::sign(&self.key, run, commitment);
        Trained { assignment, commitment }
    }

    fn error_in(&self, start: Start) -> Vec<f32> {
        match start {
            Start::Fresh => vec![0.0; self.layout.vector_len()],
            Start::Head { round, sent_values_returned, .. } => {
                let (mut error, payload) = self.ends[&round].clone();
                if sent_values_returned {
                    let profile = self.spec.codec.profile;
                    let sent = Update::parse(&payload, &self.layout, profile).expect("its own");
                    add_sent(&self.layout, &mut error, &sent);
                }
                error
            }
        }
    }

    fn publish(&self, round: Round, verifiers: Vec<NodeId>) {
        let mut readers: BTreeSet<NodeId> = verifiers.into_iter().collect();
        readers.insert(self.invitations.borrow().coordinator);
        let kept = self.ends.keys().filter(|kept| **kept <= round);
        for digest in kept.flat_map(|kept| &self.blobs[kept]) {
            self.store.set_access(*digest, Access::Only(readers.clone())).expect("stored");
        }
    }
}

/// What the work of a round follows from.
fn seed_of(round: Round, worker: NodeId) -> u64 {
    u64::from(round.0) << 8 | u64::from(worker.as_bytes()[0])
}

/// Every real value moved a little, differently for every seed.
fn add_noise(layout: &Layout, theta: &[f32], seed: u64) -> Vec<f32> {
    let mut end = theta.to_vec();
    for tensor in layout.tensors() {
        for index in tensor.range() {
            let mixed = (index as u64 ^ seed << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            end[index] += (mixed as f32 / 16_777_216.0 - 0.5) * 0.01;
        }
    }
    end
}
