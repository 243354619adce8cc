//! What runs on the swarm. libp2p's limits, message validation and peer scores are off by default:
//! they are turned on here.

use std::io;
use std::time::Duration;

use libp2p::connection_limits::ConnectionLimits;
use libp2p::gossipsub::{self, MessageAuthenticity, PeerScoreParams, PeerScoreThresholds};
use libp2p::identity::Keypair;
use libp2p::kad::store::{MemoryStore, MemoryStoreConfig};
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    StreamProtocol, allow_block_list, autonat, connection_limits, dcutr, identify, kad, mdns,
    memory_connection_limits, ping, relay,
};

use super::codec::BoundedCodec;
use super::gate::Gate;
use super::{ControlConfig, ControlLimits, Role, StartControlError};

const REQUEST_PROTOCOL: StreamProtocol = StreamProtocol::new("/manyhands/control/1");
pub(super) const KAD_PROTOCOL: StreamProtocol = StreamProtocol::new("/manyhands/kad/1");
pub(super) const IDENTIFY_PROTOCOL: &str = "/manyhands/1";
/// Runs and providers that a node keeps for others.
const KAD_KEYS_MAX: usize = 1024;
/// Homes and laboratories share an address; only a crowd beyond this loses score.
const PEERS_PER_IP: f64 = 32.0;

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    // Limits first: they refuse a connection before the others prepare for it.
    pub(super) gate: Gate,
    pub(super) connection_limits: connection_limits::Behaviour,
    pub(super) memory_limits: memory_connection_limits::Behaviour,
    pub(super) blocked: allow_block_list::Behaviour<allow_block_list::BlockedPeers>,
    pub(super) requests: request_response::Behaviour<BoundedCodec>,
    pub(super) gossip: gossipsub::Behaviour,
    pub(super) kad: kad::Behaviour<MemoryStore>,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) autonat_client: autonat::v2::client::Behaviour,
    pub(super) autonat_server: Toggle<autonat::v2::server::Behaviour>,
    pub(super) relay_client: relay::client::Behaviour,
    pub(super) relay_server: Toggle<relay::Behaviour>,
    pub(super) dcutr: dcutr::Behaviour,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
}

impl Behaviour {
    pub(super) fn new(
        keypair: &Keypair,
        relay_client: relay::client::Behaviour,
        config: &ControlConfig,
    ) -> Result<Self, StartControlError> {
        let peer = keypair.public().to_peer_id();
        let limits = &config.limits;
        let mdns = if config.mdns {
            let mdns = mdns::tokio::Behaviour::new(mdns::Config::default(), peer);
            Some(mdns.map_err(StartControlError::Mdns)?)
        } else {
            None
        };
        Ok(Self {
            gate: Gate::new(limits.connections_per_ip),
            connection_limits: connection_limits::Behaviour::new(connection_limits(limits)),
            // The process as a whole nears the machine's memory: no newcomers.
            memory_limits: memory_connection_limits::Behaviour::with_max_percentage(0.9),
            blocked: allow_block_list::Behaviour::default(),
            requests: requests(limits, config.request_timeout),
            gossip: gossip(keypair, limits)?,
            kad: kad(keypair, config.role),
            identify: identify::Behaviour::new(
                identify::Config::new(IDENTIFY_PROTOCOL.to_owned(), keypair.public())
                    .with_agent_version(concat!("manyhands/", env!("CARGO_PKG_VERSION")).to_owned())
                    .with_push_listen_addr_updates(true),
            ),
            ping: ping::Behaviour::default(),
            autonat_client: autonat::v2::client::Behaviour::default(),
            autonat_server: config.public.then(autonat::v2::server::Behaviour::default).into(),
            relay_client,
            relay_server: config
                .public
                .then(|| relay::Behaviour::new(peer, relay::Config::default()))
                .into(),
            dcutr: dcutr::Behaviour::new(peer),
            mdns: mdns.into(),
        })
    }
}

fn connection_limits(limits: &ControlLimits) -> ConnectionLimits {
    ConnectionLimits::default()
        .with_max_pending_incoming(Some(limits.pending_connections))
        .with_max_pending_outgoing(Some(limits.pending_connections))
        .with_max_established(Some(limits.connections))
        // An eighth is left for those that this node dials: strangers must not keep it from them.
        .with_max_established_incoming(Some(limits.connections - limits.connections / 8))
        .with_max_established_per_peer(Some(limits.connections_per_peer))
}

fn requests(
    limits: &ControlLimits,
    timeout: Duration,
) -> request_response::Behaviour<BoundedCodec> {
    let codec = BoundedCodec {
        request_bytes_max: limits.request_bytes,
        response_bytes_max: limits.response_bytes,
    };
    let config = request_response::Config::default()
        .with_request_timeout(timeout)
        .with_max_concurrent_streams(limits.streams_per_connection);
    request_response::Behaviour::with_codec(
        codec,
        [(REQUEST_PROTOCOL, ProtocolSupport::Full)],
        config,
    )
}

fn gossip(
    keypair: &Keypair,
    limits: &ControlLimits,
) -> Result<gossipsub::Behaviour, StartControlError> {
    let config = gossipsub::ConfigBuilder::default()
        .validation_mode(gossipsub::ValidationMode::Strict)
        // Nothing is forwarded until the owner has judged it.
        .validate_messages()
        .max_transmit_size(limits.announcement_bytes)
        .connection_handler_queue_len(limits.gossip_queue)
        .build()
        .map_err(|error| StartControlError::Gossip(error.to_string()))?;
    let signed = MessageAuthenticity::Signed(keypair.clone());
    let mut gossip = gossipsub::Behaviour::new(signed, config)
        .map_err(|error| StartControlError::Gossip(error.to_owned()))?;
    let score = PeerScoreParams {
        ip_colocation_factor_threshold: PEERS_PER_IP,
        ip_colocation_factor_whitelist: [
            std::net::Ipv4Addr::LOCALHOST.into(),
            std::net::Ipv6Addr::LOCALHOST.into(),
        ]
        .into(),
        ..Default::default()
    };
    gossip
        .with_peer_score(score, PeerScoreThresholds::default())
        .map_err(StartControlError::Gossip)?;
    Ok(gossip)
}

/// How a run's topic counts towards a peer's score.
pub(super) fn topic_score() -> gossipsub::TopicScoreParams {
    gossipsub::TopicScoreParams {
        topic_weight: 1.0,
        // A run is quiet for minutes at a time: silence must not cost score.
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        time_in_mesh_quantum: Duration::from_secs(1),
        time_in_mesh_weight: 0.01,
        // The square of the count: three invalid messages reach the gray list at -80.
        invalid_message_deliveries_weight: -10.0,
        invalid_message_deliveries_decay: 0.9,
        ..Default::default()
    }
}

fn kad(keypair: &Keypair, role: Role) -> kad::Behaviour<MemoryStore> {
    let peer = keypair.public().to_peer_id();
    let store = MemoryStoreConfig {
        // Only "who coordinates this run" is looked up, never a value.
        max_records: 0,
        max_value_bytes: 0,
        max_provided_keys: KAD_KEYS_MAX,
        ..Default::default()
    };
    let mut config = kad::Config::new(KAD_PROTOCOL);
    config.set_record_filtering(kad::StoreInserts::FilterBoth);
    config.set_query_timeout(Duration::from_secs(20));
    let mut kad = kad::Behaviour::with_config(peer, MemoryStore::with_config(peer, store), config);
    kad.set_mode(Some(match role {
        Role::Coordinator => kad::Mode::Server,
        Role::Worker => kad::Mode::Client,
    }));
    kad
}

impl From<io::Error> for StartControlError {
    fn from(error: io::Error) -> Self {
        Self::Transport(error)
    }
}
