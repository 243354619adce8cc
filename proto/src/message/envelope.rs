//! Sealing and opening: every message in an envelope under its sender's signature.
//!
//! What is opened was meant by its signer for this direction, run, round and (a reply) request.
//! Whether the nonce is fresh and the signer welcome, the receiver's state decides.

use prost::Message as _;

use super::limits::{ANNOUNCEMENT_BYTES_MAX, REPLY_BYTES_MAX, REQUEST_BYTES_MAX};
use super::{MessageError, PROTOCOL_VERSION, Reply, Request, convert, wire};
use crate::keys::{self, NodeKey};
use crate::{Digest, NodeId, Round, RunId};

/// A message whose signature held.
#[derive(Debug, Clone, PartialEq)]
pub struct Signed<T> {
    pub run: RunId,
    pub round: Round,
    pub nonce: u64,
    pub signer: NodeId,
    pub message: T,
    pub signature: [u8; 64],
    /// The message's canonical wire bytes.
    pub body: Vec<u8>,
    /// [`request_digest`] of the whole envelope; of a request, what the reply must name.
    pub digest: Digest,
}

/// What the sender of a message decides beside the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heading {
    pub run: RunId,
    pub round: Round,
    /// Greater than in every earlier envelope of this key in this run.
    pub nonce: u64,
}

/// Gossip from the coordinator: something changed, ask for it. It decides nothing by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announcement {
    pub run: RunId,
    pub round: Round,
    /// The code of the round's phase; the receiver only compares it.
    pub phase: u32,
}

/// Why a message was not sealed: its receiver would refuse it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("{0}")]
    Message(#[from] MessageError),
    #[error("expected a message of at most {max} bytes, got {got}")]
    TooLarge { max: usize, got: usize },
}

/// Why received bytes were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("expected a message of at most {max} bytes, got {got}")]
    TooLarge { max: usize, got: usize },
    #[error("expected protobuf of the {part}, got {source}")]
    Decode { part: &'static str, source: prost::DecodeError },
    #[error("expected protocol version {expected}, got {got}")]
    Version { expected: u32, got: u32 },
    #[error("expected the {part} in its one canonical form, got another")]
    NotCanonical { part: &'static str },
    #[error("expected run {expected}, got {got}")]
    Run { expected: RunId, got: RunId },
    #[error("expected a message of {expected}, got one of {got}")]
    Signer { expected: NodeId, got: NodeId },
    #[error("expected the reply to request {expected}, got that to {got}")]
    AnotherRequest { expected: Digest, got: Digest },
    #[error("expected a signature of {signer} over this message, got another")]
    Signature { signer: NodeId },
    #[error("{0}")]
    Message(#[from] MessageError),
}

/// Seals what a peer asks.
///
/// # Errors
/// [`SealError`] where the receiver would refuse the message.
pub fn seal_request(
    key: &NodeKey,
    heading: Heading,
    request: &Request,
) -> Result<Vec<u8>, SealError> {
    seal(key, heading, None, request)
}

/// Opens what a peer asks, in any run and from anybody.
///
/// # Errors
/// [`OpenError`].
pub fn open_request(bytes: &[u8]) -> Result<Signed<Request>, OpenError> {
    open(bytes, &Expected::default())
}

/// What a reply names the sealed request by.
pub fn request_digest(sealed: &[u8]) -> Digest {
    Digest::derive("manyhands 2026 sealed request", sealed)
}

/// Seals the answer to the one request with the digest `request`.
///
/// # Errors
/// [`SealError`] where the receiver would refuse the message.
pub fn seal_reply(
    key: &NodeKey,
    heading: Heading,
    request: Digest,
    reply: &Reply,
) -> Result<Vec<u8>, SealError> {
    seal(key, heading, Some(request), reply)
}

/// Opens the answer that `signer` gave in `run` to the request with the digest `request`.
///
/// # Errors
/// [`OpenError`].
pub fn open_reply(
    bytes: &[u8],
    run: RunId,
    signer: NodeId,
    request: Digest,
) -> Result<Signed<Reply>, OpenError> {
    open(bytes, &Expected { run: Some(run), signer: Some(signer), request: Some(request) })
}

/// Seals gossip; run and round are the announcement's.
///
/// # Errors
/// [`SealError`] where the receiver would refuse the message.
pub fn seal_announcement(
    key: &NodeKey,
    nonce: u64,
    announcement: &Announcement,
) -> Result<Vec<u8>, SealError> {
    let Announcement { run, round, phase: _ } = *announcement;
    seal(key, Heading { run, round, nonce }, None, announcement)
}

/// Opens gossip of `signer` about `run`.
///
/// # Errors
/// [`OpenError`].
pub fn open_announcement(
    bytes: &[u8],
    run: RunId,
    signer: NodeId,
) -> Result<Signed<Announcement>, OpenError> {
    open(bytes, &Expected { run: Some(run), signer: Some(signer), request: None })
}

/// What an envelope can hold, and how its signature is kept apart from that of other kinds.
pub(super) trait Body: Sized {
    type Wire: prost::Message + Default;
    /// No context has a zero byte.
    const CONTEXT: &str;
    const NAME: &str;
    /// Of the whole envelope.
    const BYTES_MAX: usize;

    fn wire(&self) -> Self::Wire;
    fn parse(wire: Self::Wire, heading: Heading, signer: NodeId) -> Result<Self, MessageError>;
}

impl Body for Request {
    type Wire = wire::Request;
    const CONTEXT: &str = "manyhands 2026 request";
    const NAME: &str = "request";
    const BYTES_MAX: usize = REQUEST_BYTES_MAX;

    fn wire(&self) -> wire::Request {
        self.into()
    }

    fn parse(wire: wire::Request, heading: Heading, signer: NodeId) -> Result<Self, MessageError> {
        Self::parse(wire, heading.run, signer)
    }
}

impl Body for Reply {
    type Wire = wire::Reply;
    const CONTEXT: &str = "manyhands 2026 reply";
    const NAME: &str = "reply";
    const BYTES_MAX: usize = REPLY_BYTES_MAX;

    fn wire(&self) -> wire::Reply {
        self.into()
    }

    fn parse(wire: wire::Reply, _: Heading, _: NodeId) -> Result<Self, MessageError> {
        wire.try_into()
    }
}

impl Body for Announcement {
    type Wire = wire::Announcement;
    const CONTEXT: &str = "manyhands 2026 announcement";
    const NAME: &str = "announcement";
    const BYTES_MAX: usize = ANNOUNCEMENT_BYTES_MAX;

    fn wire(&self) -> wire::Announcement {
        wire::Announcement { phase: self.phase }
    }

    fn parse(wire: wire::Announcement, heading: Heading, _: NodeId) -> Result<Self, MessageError> {
        Ok(Self { run: heading.run, round: heading.round, phase: wire.phase })
    }
}

/// What the receiver knows beforehand.
#[derive(Default)]
struct Expected {
    run: Option<RunId>,
    signer: Option<NodeId>,
    /// None where the message is no reply.
    request: Option<Digest>,
}

/// The fields that are signed, for both sides the same.
struct Sealed<'a> {
    heading: Heading,
    signer: NodeId,
    request: Option<Digest>,
    body: &'a [u8],
}

impl Sealed<'_> {
    /// Context, a zero byte, version, run, round, nonce, signer, request (replies have one, and
    /// nothing else does), body. Integers are little-endian, and all but the body have one length
    /// per context, so two different messages never sign the same bytes.
    fn preimage<T: Body>(&self) -> Vec<u8> {
        let Heading { run, round, nonce } = self.heading;
        let mut preimage = Vec::with_capacity(T::CONTEXT.len() + 128 + self.body.len());
        preimage.extend_from_slice(T::CONTEXT.as_bytes());
        preimage.push(0);
        preimage.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        preimage.extend_from_slice(run.as_bytes());
        preimage.extend_from_slice(&round.0.to_le_bytes());
        preimage.extend_from_slice(&nonce.to_le_bytes());
        preimage.extend_from_slice(self.signer.as_bytes());
        if let Some(request) = &self.request {
            preimage.extend_from_slice(request.as_bytes());
        }
        preimage.extend_from_slice(self.body);
        preimage
    }
}

fn seal<T: Body>(
    key: &NodeKey,
    heading: Heading,
    request: Option<Digest>,
    message: &T,
) -> Result<Vec<u8>, SealError> {
    let signer = key.node_id();
    let body = message.wire();
    let bytes = body.encode_to_vec();
    // The receiver's own checks: a mistake of ours shows here, where it can be understood.
    convert::round("envelope.round", heading.round.0)?;
    T::parse(body, heading, signer)?;
    let sealed = seal_body::<T>(key, heading, request, bytes);
    if sealed.len() > T::BYTES_MAX {
        return Err(SealError::TooLarge { max: T::BYTES_MAX, got: sealed.len() });
    }
    Ok(sealed)
}

pub(super) fn seal_body<T: Body>(
    key: &NodeKey,
    heading: Heading,
    request: Option<Digest>,
    body: Vec<u8>,
) -> Vec<u8> {
    let signer = key.node_id();
    let preimage = Sealed { heading, signer, request, body: &body }.preimage::<T>();
    wire::Envelope {
        run: heading.run.as_bytes().to_vec(),
        round: heading.round.0,
        nonce: heading.nonce,
        signer: signer.as_bytes().to_vec(),
        signature: key.sign(&preimage).to_vec(),
        body,
        request: request.map(|request| request.as_bytes().to_vec()).unwrap_or_default(),
        version: PROTOCOL_VERSION,
    }
    .encode_to_vec()
}

fn open<T: Body>(bytes: &[u8], expected: &Expected) -> Result<Signed<T>, OpenError> {
    let envelope = unwrap::<T>(bytes)?;
    let heading = Heading {
        run: convert::run("envelope.run", &envelope.run)?,
        round: convert::round("envelope.round", envelope.round)?,
        nonce: envelope.nonce,
    };
    let signer = convert::node("envelope.signer", &envelope.signer)?;
    let signature = convert::signature("envelope.signature", &envelope.signature)?;
    let request = expected.check(heading.run, signer, &envelope.request)?;
    let body = envelope.body;
    let preimage = Sealed { heading, signer, request, body: &body }.preimage::<T>();
    if !keys::verify(&signer, &preimage, &signature) {
        return Err(OpenError::Signature { signer });
    }
    let message = T::parse(decode::<T::Wire>(T::NAME, &body)?, heading, signer)?;
    if message.wire().encode_to_vec() != body {
        return Err(OpenError::NotCanonical { part: T::NAME });
    }
    let Heading { run, round, nonce } = heading;
    let digest = request_digest(bytes);
    Ok(Signed { run, round, nonce, signer, message, signature, body, digest })
}

/// The version is looked at first: what else an envelope of another one holds is not ours to judge.
fn unwrap<T: Body>(bytes: &[u8]) -> Result<wire::Envelope, OpenError> {
    if bytes.len() > T::BYTES_MAX {
        return Err(OpenError::TooLarge { max: T::BYTES_MAX, got: bytes.len() });
    }
    let envelope = decode::<wire::Envelope>("envelope", bytes)?;
    if envelope.version != PROTOCOL_VERSION {
        return Err(OpenError::Version { expected: PROTOCOL_VERSION, got: envelope.version });
    }
    if envelope.encode_to_vec() != bytes {
        return Err(OpenError::NotCanonical { part: "envelope" });
    }
    Ok(envelope)
}

fn decode<W: prost::Message + Default>(part: &'static str, bytes: &[u8]) -> Result<W, OpenError> {
    W::decode(bytes).map_err(|source| OpenError::Decode { part, source })
}

impl Expected {
    /// The request's digest, where one is expected.
    fn check(
        &self,
        run: RunId,
        signer: NodeId,
        request: &[u8],
    ) -> Result<Option<Digest>, OpenError> {
        if let Some(expected) = self.run.filter(|expected| *expected != run) {
            return Err(OpenError::Run { expected, got: run });
        }
        if let Some(expected) = self.signer.filter(|expected| *expected != signer) {
            return Err(OpenError::Signer { expected, got: signer });
        }
        let Some(expected) = self.request else {
            if request.is_empty() {
                return Ok(None);
            }
            let got = request.len();
            let field = "envelope.request";
            return Err(MessageError::Length { field, expected: 0, got }.into());
        };
        let got = convert::digest("envelope.request", request)?;
        if got != expected {
            return Err(OpenError::AnotherRequest { expected, got });
        }
        Ok(Some(got))
    }
}
