//! The task that owns the swarm.

use std::collections::{HashMap, HashSet};

use futures::StreamExt;
use libp2p::gossipsub::{self, IdentTopic, PublishError, TopicHash};
use libp2p::multiaddr::Protocol;
use libp2p::request_response::{
    self, InboundRequestId, Message, OutboundRequestId, ResponseChannel,
};
use libp2p::swarm::SwarmEvent;
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::{Multiaddr, PeerId, Swarm, identify, kad, mdns};
use manyhands_proto::{NodeId, RunId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::behaviour::{Behaviour, BehaviourEvent, IDENTIFY_PROTOCOL, KAD_PROTOCOL, topic_score};
use super::codec::Asked;
use super::conduct::{Conduct, Fault};
use super::finding::{Finding, handle_inbound};
use super::messages::{
    AnnounceError, Announcement, Command, ControlEvent, ControlEvents, DialError, PendingVerdict,
    RequestError, RespondError, Responder, Verdict,
};
use super::swarm::{build, listen, state_external};
use super::{ControlConfig, ControlHandle, ControlLimits, StartControlError};
use crate::identity::{self, node_id, peer_id};
use crate::metrics::{
    CONTROL_ANNOUNCEMENTS, CONTROL_CONNECTIONS, CONTROL_EVENTS_DROPPED, CONTROL_PEERS_BLOCKED,
    CONTROL_REQUESTS_RECEIVED, CONTROL_REQUESTS_SENT,
};

/// Addresses taken from one peer's self-description.
const IDENTIFY_ADDRESSES_MAX: usize = 16;

pub(super) async fn start(
    config: ControlConfig,
) -> Result<(ControlHandle, ControlEvents), StartControlError> {
    let keypair = identity::keypair(&config.key);
    let mut swarm = build(keypair, &config)?;
    listen(&mut swarm, &config.listen).await?;
    if config.public {
        state_external(&mut swarm);
    }
    let limits = config.limits;
    let (commands, command_queue) = mpsc::channel(limits.command_queue.max(1));
    let (event_sender, events) = mpsc::channel(limits.event_queue.max(1));
    // Every event in the queue, and as many in the owner's hands, can have a verdict to send.
    let (verdicts, verdict_queue) = mpsc::channel(2 * limits.event_queue.max(1));
    let handle = ControlHandle {
        commands: commands.clone(),
        request_bytes_max: limits.request_bytes,
        announcement_bytes_max: limits.announcement_bytes,
    };
    let service = Service {
        swarm,
        conduct: Conduct::new(&limits),
        limits,
        responders: commands.downgrade(),
        events: event_sender,
        verdicts,
        outbound: HashMap::new(),
        unanswered: HashMap::new(),
        inbound: HashMap::new(),
        dials: HashMap::new(),
        dial_failures: HashMap::new(),
        runs: HashMap::new(),
        finding: Finding::default(),
    };
    tokio::spawn(service.run(command_queue, verdict_queue));
    Ok((handle, ControlEvents { events }))
}

type RequestReply = oneshot::Sender<Result<Vec<u8>, RequestError>>;
type DialReply = oneshot::Sender<Result<(), DialError>>;

struct Service {
    swarm: Swarm<Behaviour>,
    conduct: Conduct,
    limits: ControlLimits,
    /// Given to responders. Weak, so that the service ends with the last handle.
    responders: mpsc::WeakSender<Command>,
    events: mpsc::Sender<ControlEvent>,
    verdicts: mpsc::Sender<Verdict>,
    outbound: HashMap<OutboundRequestId, (NodeId, RequestReply)>,
    /// Requests that wait for the owner, per peer.
    unanswered: HashMap<PeerId, usize>,
    inbound: HashMap<InboundRequestId, PeerId>,
    dials: HashMap<PeerId, Vec<DialReply>>,
    /// Why the last dial failed, for the requests that wait for it: their own event does not say.
    dial_failures: HashMap<NodeId, String>,
    runs: HashMap<TopicHash, RunId>,
    finding: Finding,
}

impl Service {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut verdicts: mpsc::Receiver<Verdict>,
    ) {
        loop {
            let pardon = self.conduct.next_pardon();
            let pardon = async {
                match pardon {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = pardon => self.pardon(),
                command = commands.recv() => match command {
                    Some(Command::Shutdown { reply }) => {
                        drop(self);
                        // Whoever asked may have stopped waiting.
                        let _ = reply.send(());
                        return;
                    }
                    Some(command) => self.handle_command(command),
                    None => return,
                },
                Some(verdict) = verdicts.recv() => self.handle_verdict(&verdict),
                event = self.swarm.select_next_some() => self.handle_event(event),
            }
        }
    }

    /// Replies that cannot be delivered belong to callers that stopped waiting.
    fn handle_command(&mut self, command: Command) {
        match command {
            Command::Request { peer, addresses, bytes, reply } => {
                self.request(peer, addresses, bytes, reply);
            }
            Command::Respond { channel, bytes, reply } => {
                let _ = reply.send(self.respond(channel, bytes));
            }
            Command::Announce { run, bytes, reply } => {
                let _ = reply.send(self.announce(run, bytes));
            }
            Command::Subscribe { run, reply } => {
                self.subscribe(run);
                let _ = reply.send(());
            }
            Command::Provide { run, reply } => {
                let _ = reply.send(self.finding.provide(&mut self.swarm.behaviour_mut().kad, run));
            }
            Command::Find { run, coordinator, reply } => {
                let kad = &mut self.swarm.behaviour_mut().kad;
                self.finding.find(kad, run, coordinator, reply);
            }
            Command::Dial { peer, addresses, reply } => self.dial(peer, addresses, reply),
            Command::Listen { address, reply } => {
                let result = self.swarm.listen_on(address.clone()).map(drop);
                let _ = reply.send(result.map_err(|error| StartControlError::Listen {
                    address,
                    reason: error.to_string(),
                }));
            }
            Command::Blame { peer, reason } => self.blame(peer, &Fault::Nonsense(reason)),
            Command::Addresses { reply } => {
                let _ = reply.send(self.addresses());
            }
            Command::Shutdown { .. } => unreachable!("the loop ends on it"),
        }
    }

    fn request(
        &mut self,
        peer: NodeId,
        addresses: Vec<Multiaddr>,
        bytes: Vec<u8>,
        reply: RequestReply,
    ) {
        let limit = self.limits.requests_in_flight;
        if self.outbound.len() >= limit {
            let _ = reply.send(Err(RequestError::TooMany { limit }));
            return;
        }
        let requests = &mut self.swarm.behaviour_mut().requests;
        let asked = Asked::Whole(bytes);
        let id = requests.send_request_with_addresses(&peer_id(&peer), asked, addresses);
        self.outbound.insert(id, (peer, reply));
    }

    fn respond(
        &mut self,
        channel: ResponseChannel<Vec<u8>>,
        bytes: Vec<u8>,
    ) -> Result<(), RespondError> {
        let requests = &mut self.swarm.behaviour_mut().requests;
        requests.send_response(channel, bytes).map_err(|_| RespondError::Gone)
    }

    fn announce(&mut self, run: RunId, bytes: Vec<u8>) -> Result<(), AnnounceError> {
        match self.swarm.behaviour_mut().gossip.publish(topic(run), bytes) {
            Ok(_) => Ok(()),
            Err(PublishError::NoPeersSubscribedToTopic) => Err(AnnounceError::NobodyListens),
            Err(error) => Err(AnnounceError::Failed(error.to_string())),
        }
    }

    fn subscribe(&mut self, run: RunId) {
        let topic = topic(run);
        self.runs.insert(topic.hash(), run);
        let gossip = &mut self.swarm.behaviour_mut().gossip;
        // Neither can fail with our own parameters and no subscription filter.
        if let Err(error) = gossip.subscribe(&topic) {
            tracing::error!(?error, %run, "cannot follow a run");
        }
        if let Err(error) = gossip.set_topic_params(topic, topic_score()) {
            tracing::error!(error, %run, "cannot score a run's peers");
        }
    }

    fn dial(&mut self, peer: NodeId, addresses: Vec<Multiaddr>, reply: DialReply) {
        let id = peer_id(&peer);
        if self.swarm.is_connected(&id) {
            let _ = reply.send(Ok(()));
            return;
        }
        if let Some(waiting) = self.dials.get_mut(&id) {
            waiting.push(reply);
            return;
        }
        let options =
            DialOpts::peer_id(id).addresses(addresses).extend_addresses_through_behaviour().build();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.insert(id, vec![reply]);
            }
            Err(libp2p::swarm::DialError::DialPeerConditionFalse(_)) => {
                // A request or a search is dialling it already: share the outcome.
                self.dials.insert(id, vec![reply]);
            }
            Err(error) => {
                let _ = reply.send(Err(DialError::Unreachable { peer, reason: error.to_string() }));
            }
        }
    }

    /// Holds a fault against a peer, and blocks it if there were too many.
    fn blame(&mut self, peer: PeerId, fault: &Fault) {
        if self.conduct.is_too_much(peer, fault, Instant::now()) {
            self.block(peer, &fault.to_string());
        }
    }

    /// Closes the peer's connections and refuses new ones for a while.
    fn block(&mut self, peer: PeerId, reason: &str) {
        if !self.conduct.block(peer, Instant::now()) {
            return;
        }
        tracing::warn!(%peer, reason, "blocked a peer");
        metrics::counter!(CONTROL_PEERS_BLOCKED).increment(1);
        let behaviour = self.swarm.behaviour_mut();
        behaviour.blocked.block_peer(peer);
        behaviour.gossip.blacklist_peer(&peer);
    }

    /// Lets those connect again whose time is over.
    fn pardon(&mut self) {
        while let Some(peer) = self.conduct.pardon(Instant::now()) {
            let behaviour = self.swarm.behaviour_mut();
            behaviour.blocked.unblock_peer(peer);
            behaviour.gossip.remove_blacklisted_peer(&peer);
        }
    }

    fn addresses(&self) -> Vec<Multiaddr> {
        let own = Protocol::P2p(*self.swarm.local_peer_id());
        let mut seen = HashSet::new();
        self.swarm
            .external_addresses()
            .chain(self.swarm.listeners())
            .filter(|address| seen.insert((*address).clone()))
            .map(|address| match address.iter().last() {
                Some(Protocol::P2p(_)) => address.clone(),
                Some(_) | None => address.clone().with(own.clone()),
            })
            .collect()
    }

    fn handle_verdict(&mut self, verdict: &Verdict) {
        let label = match verdict.acceptance {
            gossipsub::MessageAcceptance::Accept => "accept",
            gossipsub::MessageAcceptance::Reject => "reject",
            gossipsub::MessageAcceptance::Ignore => "ignore",
        };
        metrics::counter!(CONTROL_ANNOUNCEMENTS, "verdict" => label).increment(1);
        self.swarm.behaviour_mut().gossip.report_message_validation_result(
            &verdict.message,
            &verdict.forwarder,
            verdict.acceptance,
        );
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "libp2p's event enums are open-ended; what is not named needs no reaction"
    )]
    fn handle_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Requests(event)) => self.handle_requests(event),
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(event)) => self.handle_gossip(event),
            SwarmEvent::Behaviour(BehaviourEvent::Kad(event)) => self.handle_kad(event),
            SwarmEvent::Behaviour(BehaviourEvent::Identify(event)) => self.handle_identify(event),
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(mdns::Event::Discovered(found))) => {
                for (peer, address) in found {
                    self.swarm.add_peer_address(peer, address.clone());
                    self.swarm.behaviour_mut().kad.add_address(&peer, address);
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Dcutr(event)) => {
                tracing::debug!(?event, "a direct connection was tried");
            }
            SwarmEvent::ConnectionEstablished { peer_id, endpoint, num_established, .. } => {
                metrics::gauge!(CONTROL_CONNECTIONS).increment(1.0);
                let address = endpoint.get_remote_address().clone();
                self.handle_connected(peer_id, address, num_established.get() == 1);
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established, .. } => {
                metrics::gauge!(CONTROL_CONNECTIONS).decrement(1.0);
                if num_established == 0
                    && let Ok(peer) = node_id(&peer_id)
                {
                    self.emit(ControlEvent::Disconnected { peer }, "disconnected");
                }
            }
            SwarmEvent::OutgoingConnectionError { peer_id: Some(id), error, .. } => {
                let reason = error.to_string();
                tracing::debug!(peer = %id, reason, "a dial failed");
                self.fail_dial(id, &reason);
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                tracing::info!(%address, "control plane listens");
            }
            SwarmEvent::ExternalAddrConfirmed { address } => {
                tracing::info!(%address, "control plane is reachable from outside");
            }
            SwarmEvent::ListenerError { error, .. } => {
                tracing::warn!(%error, "a control listener failed");
            }
            _ => {}
        }
    }

    fn fail_dial(&mut self, id: PeerId, reason: &str) {
        // Another dial to the same peer may have succeeded.
        if self.swarm.is_connected(&id) {
            return;
        }
        let Ok(peer) = node_id(&id) else { return };
        if self.outbound.values().any(|(waiting, _)| *waiting == peer) {
            self.dial_failures.insert(peer, reason.to_owned());
        }
        for reply in self.dials.remove(&id).into_iter().flatten() {
            let _ = reply.send(Err(DialError::Unreachable { peer, reason: reason.to_owned() }));
        }
    }

    fn handle_connected(&mut self, id: PeerId, address: Multiaddr, first: bool) {
        for reply in self.dials.remove(&id).into_iter().flatten() {
            let _ = reply.send(Ok(()));
        }
        match node_id(&id) {
            Ok(peer) if first => self.emit(ControlEvent::Connected { peer, address }, "connected"),
            Ok(_) => {}
            Err(error) => self.block(id, &error.to_string()),
        }
    }

    fn handle_requests(&mut self, event: request_response::Event<Asked, Vec<u8>>) {
        match event {
            request_response::Event::Message { peer, message, .. } => match message {
                Message::Request { request_id, request, channel } => {
                    self.handle_request(peer, request_id, request, channel);
                }
                Message::Response { request_id, response } => {
                    self.finish_request(request_id, |_| Ok(response));
                }
            },
            request_response::Event::OutboundFailure { request_id, error, .. } => {
                let failures = std::mem::take(&mut self.dial_failures);
                self.finish_request(request_id, |peer| {
                    Err(RequestError::from_failure(peer, &error, failures.get(&peer)))
                });
                self.dial_failures = failures;
                self.forget_dial_failures();
            }
            request_response::Event::InboundFailure { peer, request_id, error, .. } => {
                tracing::debug!(%peer, %error, "a request was not answered");
                self.forget_inbound(request_id, "dropped_unanswered");
            }
            request_response::Event::ResponseSent { request_id, .. } => {
                self.forget_inbound(request_id, "answered");
            }
        }
    }

    fn handle_request(
        &mut self,
        id: PeerId,
        request: InboundRequestId,
        asked: Asked,
        channel: ResponseChannel<Vec<u8>>,
    ) {
        let Ok(peer) = node_id(&id) else { return };
        // Counted before the event for a dropped channel arrives and takes it back.
        *self.unanswered.entry(id).or_default() += 1;
        self.inbound.insert(request, id);
        let bytes = match self.admit(id, asked) {
            Ok(bytes) => bytes,
            Err(fault) => {
                tracing::debug!(%peer, %fault, "dropped a request");
                metrics::counter!(CONTROL_REQUESTS_RECEIVED, "result" => fault.name()).increment(1);
                return self.blame(id, &fault);
            }
        };
        let reply = Responder {
            asker: id,
            channel,
            commands: self.responders.clone(),
            response_bytes_max: self.limits.response_bytes,
        };
        self.emit(ControlEvent::Request { peer, bytes, reply }, "request");
    }

    /// The request's bytes, if the owner should see them.
    fn admit(&mut self, peer: PeerId, asked: Asked) -> Result<Vec<u8>, Fault> {
        self.conduct.admit(peer, Instant::now())?;
        let bytes = match asked {
            Asked::Whole(bytes) => bytes,
            Asked::TooLong { announced } => {
                return Err(Fault::TooLong { limit: self.limits.request_bytes, announced });
            }
        };
        let limit = self.limits.unanswered_per_peer;
        match self.unanswered.get(&peer) {
            Some(unanswered) if *unanswered > limit => Err(Fault::Waiting { limit }),
            Some(_) | None => Ok(bytes),
        }
    }

    fn forget_inbound(&mut self, request: InboundRequestId, result: &'static str) {
        metrics::counter!(CONTROL_REQUESTS_RECEIVED, "result" => result).increment(1);
        if let Some(peer) = self.inbound.remove(&request)
            && let Some(unanswered) = self.unanswered.get_mut(&peer)
        {
            *unanswered -= 1;
            if *unanswered == 0 {
                self.unanswered.remove(&peer);
            }
        }
    }

    fn finish_request(
        &mut self,
        request: OutboundRequestId,
        result: impl FnOnce(NodeId) -> Result<Vec<u8>, RequestError>,
    ) {
        if let Some((peer, reply)) = self.outbound.remove(&request) {
            let result = result(peer);
            let label = if result.is_ok() { "answered" } else { "failed" };
            metrics::counter!(CONTROL_REQUESTS_SENT, "result" => label).increment(1);
            let _ = reply.send(result);
        }
    }

    /// Keeps the reasons that a waiting request still needs.
    fn forget_dial_failures(&mut self) {
        let waiting: HashSet<NodeId> = self.outbound.values().map(|(peer, _)| *peer).collect();
        self.dial_failures.retain(|peer, _| waiting.contains(peer));
    }

    fn handle_gossip(&mut self, event: gossipsub::Event) {
        let gossipsub::Event::Message { propagation_source, message_id, message } = event else {
            return;
        };
        let mut verdict = PendingVerdict {
            message: Some((message_id, propagation_source)),
            verdicts: self.verdicts.clone(),
        };
        // Strict validation: a message without a signature by its source does not get here.
        let author = message.source.and_then(|source| node_id(&source).ok());
        if let (Some(peer), Some(run)) = (author, self.runs.get(&message.topic).copied()) {
            let announcement = Announcement { peer, run, bytes: message.data, verdict };
            self.emit(ControlEvent::Announcement(announcement), "announcement");
        } else if let Some((message, forwarder)) = verdict.message.take() {
            // Not a node's, or of a run that we just left.
            let acceptance = gossipsub::MessageAcceptance::Ignore;
            self.handle_verdict(&Verdict { message, forwarder, acceptance });
        }
    }

    fn handle_kad(&mut self, event: kad::Event) {
        let kad = &mut self.swarm.behaviour_mut().kad;
        if let kad::Event::OutboundQueryProgressed { id, result, step, .. } = event {
            self.finding.handle_progress(kad, id, result, step.last);
        } else if let kad::Event::InboundRequest { request } = event {
            handle_inbound(kad, request);
        }
    }

    fn handle_identify(&mut self, event: identify::Event) {
        let identify::Event::Received { peer_id, info, .. } = event else { return };
        if info.protocol_version != IDENTIFY_PROTOCOL {
            tracing::debug!(peer = %peer_id, got = info.protocol_version, "a peer of another kind");
            return;
        }
        if info.protocols.contains(&KAD_PROTOCOL) {
            let kad = &mut self.swarm.behaviour_mut().kad;
            for address in info.listen_addrs.into_iter().take(IDENTIFY_ADDRESSES_MAX) {
                kad.add_address(&peer_id, address);
            }
        }
    }

    /// Hands an event to the owner, or drops it if the owner is too far behind. A dropped request
    /// closes its stream, a dropped announcement is not passed on.
    fn emit(&self, event: ControlEvent, kind: &'static str) {
        if self.events.try_send(event).is_err() {
            tracing::warn!(kind, "dropped a control event: the owner's queue is full or closed");
            metrics::counter!(CONTROL_EVENTS_DROPPED, "kind" => kind).increment(1);
        }
    }
}

fn topic(run: RunId) -> IdentTopic {
    IdentTopic::new(format!("/manyhands/run/1/{run}"))
}
