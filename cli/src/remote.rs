//! Asking a coordinator: over the control plane for its word, over the data plane for blobs.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use manyhands_network::Multiaddr;
use manyhands_network::control::{Control, ControlConfig, ControlEvents, ControlHandle, Role};
use manyhands_network::data::{
    Data, DataConfig, DataHandle, FetchError, FetchRequest, NoStore, Refusal, Source, SourceError,
};
use manyhands_network::invitation::Invitation;
use manyhands_proto::Digest;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    self, Heading, OpenError, Reply, Request, open_reply, request_digest, seal_request,
};
use manyhands_proto::run_file::RunSpec;
use manyhands_rules::coordinator::Status;
use manyhands_rules::run_id::run_id;

use crate::failure::{Explain, Failure};
use crate::folder;

const UNREACHABLE: &str =
    "check the invitation, that the run is still up, and that no firewall is in between";
const DAMAGED: &str =
    "build the version that the coordinator runs, and report this if it is the same";

/// A conversation with a run's coordinator, under a key of its own.
pub(crate) struct Remote {
    key: NodeKey,
    invitation: Invitation,
    control: ControlHandle,
    data: DataHandle,
    // Dropped, the control plane would have nobody to tell.
    _events: ControlEvents,
    nonce: u64,
}

impl Remote {
    pub(crate) async fn connect(invitation: Invitation) -> Result<Self, Failure> {
        let key = folder::passing_key()?;
        let config = ControlConfig::new(key.clone(), Vec::new(), Role::Worker);
        let (control, events) = Control::start(config)
            .await
            .explain("control_plane", "free a UDP port and try again")?;
        let listen = any_address(&invitation);
        let data = Data::start(DataConfig::new(key.clone(), listen, Arc::new(NoStore)))
            .explain("data_plane", "free a UDP port and try again")?;
        Ok(Self { key, invitation, control, data, _events: events, nonce: 0 })
    }

    /// The run's specification, checked against the run's id.
    pub(crate) async fn describe(&mut self) -> Result<RunSpec, Failure> {
        let Reply::Description { spec, .. } = self.ask(&Request::Describe).await? else {
            return Err(Failure::new(
                "unexpected_answer",
                "the coordinator described nothing",
                DAMAGED,
            ));
        };
        let spec = RunSpec::parse(&spec).explain("run_specification", DAMAGED)?;
        let Invitation { run, coordinator, chain_genesis, .. } = &self.invitation;
        let got = run_id(*chain_genesis, *coordinator, spec.digest());
        if got != *run {
            let reason = format!(
                "the coordinator's specification is that of run {got}, the invitation is for {run}"
            );
            return Err(Failure::new(
                "wrong_run",
                reason,
                "use the invitation that this run's launch printed",
            ));
        }
        Ok(spec)
    }

    pub(crate) async fn status(&mut self) -> Result<Status, Failure> {
        let Reply::Status(json) = self.ask(&Request::Status).await? else {
            return Err(Failure::new(
                "unexpected_answer",
                "the coordinator told no status",
                DAMAGED,
            ));
        };
        serde_json::from_slice(&json).explain("unexpected_answer", DAMAGED)
    }

    /// The blobs that the coordinator serves to everybody.
    pub(crate) fn blobs(&self) -> Blobs {
        let Invitation { coordinator, data, .. } = &self.invitation;
        let source = Source { peer: *coordinator, addresses: data.clone() };
        Blobs { data: self.data.clone(), source }
    }

    async fn ask(&mut self, request: &Request) -> Result<Reply, Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.nonce = u64::try_from(now.as_micros()).unwrap_or(u64::MAX).max(self.nonce + 1);
        let Invitation { run, coordinator, control, .. } = &self.invitation;
        let heading = Heading { run: *run, round: request.round(), nonce: self.nonce };
        let sealed = seal_request(&self.key, heading, request).explain("message", DAMAGED)?;
        let digest = request_digest(&sealed);
        let reply = self
            .control
            .request(*coordinator, control, sealed)
            .await
            .explain("coordinator_unreachable", UNREACHABLE)?;
        let reply = open_reply(&reply, *run, *coordinator, digest).map_err(not_opened)?;
        match reply.message {
            Reply::Refused(refusal) => Err(refused(&refusal)),
            reply @ (Reply::Description { .. } | Reply::Situation(_) | Reply::Status(_)) => {
                Ok(reply)
            }
        }
    }

    pub(crate) async fn close(self) {
        self.control.shutdown().await;
        self.data.shutdown().await;
    }
}

/// What a coordinator serves.
#[derive(Clone)]
pub(crate) struct Blobs {
    data: DataHandle,
    source: Source,
}

impl Blobs {
    /// A blob that must be there.
    pub(crate) async fn get(&self, digest: Digest, bytes_max: u64) -> Result<Vec<u8>, Failure> {
        self.fetch(digest, bytes_max)
            .await
            .explain("blob_missing", "check that the run is still up; old evidence expires")
    }

    /// A blob; none if the coordinator does not have it any more.
    pub(crate) async fn find(
        &self,
        digest: Digest,
        bytes_max: u64,
    ) -> Result<Option<Vec<u8>>, FetchError> {
        match self.fetch(digest, bytes_max).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(FetchError::NoSource { failures, .. })
                if failures
                    .iter()
                    .any(|failure| failure.error == SourceError::Refused(Refusal::Unknown)) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn fetch(&self, digest: Digest, bytes_max: u64) -> Result<Vec<u8>, FetchError> {
        let request = FetchRequest::new(digest, vec![self.source.clone()], bytes_max);
        let (bytes, _) = self.data.fetch_to_memory(request).await?;
        Ok(bytes.to_vec())
    }
}

/// A coordinator speaks in its own run and version, whatever it was asked in.
fn not_opened(error: OpenError) -> Failure {
    let (code, remedy) = match &error {
        OpenError::Run { .. } => ("wrong_run", "use the invitation that this run's launch printed"),
        OpenError::Version { .. } => {
            ("version_mismatch", "build the version that the coordinator runs")
        }
        OpenError::TooLarge { .. }
        | OpenError::Decode { .. }
        | OpenError::NotCanonical { .. }
        | OpenError::Signer { .. }
        | OpenError::AnotherRequest { .. }
        | OpenError::Signature { .. }
        | OpenError::Message(_) => ("message", DAMAGED),
    };
    Failure::new(code, error, remedy)
}

/// A coordinator's refusal as ours.
pub(crate) fn refused(refusal: &message::Refusal) -> Failure {
    let code = serde_json::to_value(refusal.code).ok();
    let code = code.as_ref().and_then(|code| code.as_str()).unwrap_or("refused");
    Failure::new(code, &refusal.reason, refusal.code.remedy())
}

/// Any free port, of the family that reaches the coordinator.
pub(crate) fn any_address(invitation: &Invitation) -> SocketAddr {
    let v6_only = !invitation.data.is_empty() && invitation.data.iter().all(SocketAddr::is_ipv6);
    if v6_only { (Ipv6Addr::UNSPECIFIED, 0).into() } else { (Ipv4Addr::UNSPECIFIED, 0).into() }
}

/// QUIC first and TCP as fallback, on the same port.
pub(crate) fn control_addresses(address: SocketAddr) -> Vec<Multiaddr> {
    let (ip, port) = (Multiaddr::from(address.ip()).to_string(), address.port());
    [format!("{ip}/udp/{port}/quic-v1"), format!("{ip}/tcp/{port}")]
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_listened_on_over_quic_and_tcp() {
        let named = |address: &str| {
            let addresses = control_addresses(address.parse().expect("an address"));
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(named("127.0.0.1:9"), ["/ip4/127.0.0.1/udp/9/quic-v1", "/ip4/127.0.0.1/tcp/9"]);
        assert_eq!(named("[::1]:9"), ["/ip6/::1/udp/9/quic-v1", "/ip6/::1/tcp/9"]);
    }
}
