//! What the owner and the service say to each other.

use libp2p::gossipsub::{MessageAcceptance, MessageId};
use libp2p::request_response::{OutboundFailure, ResponseChannel};
use libp2p::{Multiaddr, PeerId};
use manyhands_proto::{NodeId, RunId};
use tokio::sync::{mpsc, oneshot};

use super::StartControlError;

/// Why a request got no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("expected a request of at most {limit} bytes, got {got}")]
    TooLarge { limit: usize, got: usize },
    #[error("node {peer} could not be reached: {reason}")]
    Unreachable { peer: NodeId, reason: String },
    #[error("node {peer} did not answer in time")]
    Timeout { peer: NodeId },
    /// It dropped the request (too busy, or it refuses such requests), or the connection broke.
    #[error("node {peer} closed without an answer: {reason}")]
    Unanswered { peer: NodeId, reason: String },
    #[error("node {peer} does not speak this version of the control protocol")]
    Unsupported { peer: NodeId },
    #[error("{limit} requests are in flight already")]
    TooMany { limit: usize },
    #[error("the control plane has been shut down")]
    ShutDown,
}

impl RequestError {
    pub(super) fn from_failure(
        peer: NodeId,
        error: &OutboundFailure,
        dial_failure: Option<&String>,
    ) -> Self {
        match error {
            OutboundFailure::DialFailure => {
                let reason = dial_failure.map_or("none of its addresses answered", String::as_str);
                Self::Unreachable { peer, reason: reason.to_owned() }
            }
            OutboundFailure::Timeout => Self::Timeout { peer },
            OutboundFailure::ConnectionClosed => {
                Self::Unanswered { peer, reason: "the connection closed".to_owned() }
            }
            OutboundFailure::UnsupportedProtocols => Self::Unsupported { peer },
            OutboundFailure::Io(error) => Self::Unanswered { peer, reason: error.to_string() },
        }
    }
}

/// Why an announcement was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnounceError {
    #[error("expected an announcement of at most {limit} bytes, got {got}")]
    TooLarge { limit: usize, got: usize },
    #[error("no connected peer follows the run")]
    NobodyListens,
    #[error("the announcement could not be sent: {0}")]
    Failed(String),
    #[error("the control plane has been shut down")]
    ShutDown,
}

/// Why a run was not found or not made findable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    #[error("no node to ask: connect to one first")]
    NobodyToAsk,
    #[error("nobody who was asked knows where the run is")]
    NotFound,
    #[error("the record could not be kept: {0}")]
    Record(String),
    #[error("{limit} searches are under way already")]
    TooMany { limit: usize },
    #[error("the control plane has been shut down")]
    ShutDown,
}

/// Why a peer could not be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    #[error("node {peer} could not be reached: {reason}")]
    Unreachable { peer: NodeId, reason: String },
    #[error("the control plane has been shut down")]
    ShutDown,
}

/// Why an answer could not be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RespondError {
    #[error("expected an answer of at most {limit} bytes, got {got}")]
    TooLarge { limit: usize, got: usize },
    #[error("the asker is gone or has given up")]
    Gone,
}

/// A coordinator found for a run, and where it says it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    pub node: NodeId,
    pub addresses: Vec<Multiaddr>,
}

/// What happens on the control plane.
#[derive(Debug)]
pub enum ControlEvent {
    /// A peer asks; answer with [`Responder::respond`], or drop it to refuse. What is nonsense is
    /// somebody's fault: [`Responder::blame`].
    Request { peer: NodeId, bytes: Vec<u8>, reply: Responder },
    /// Judge it: it is passed on only once accepted.
    Announcement(Announcement),
    /// The first connection to a peer is up.
    Connected { peer: NodeId, address: Multiaddr },
    /// The last connection to a peer is gone.
    Disconnected { peer: NodeId },
}

/// The owner's end of the event queue.
#[derive(Debug)]
pub struct ControlEvents {
    pub(super) events: mpsc::Receiver<ControlEvent>,
}

impl ControlEvents {
    /// The next event, or `None` once the service has ended.
    pub async fn next(&mut self) -> Option<ControlEvent> {
        self.events.recv().await
    }
}

/// Answers one request.
#[derive(Debug)]
pub struct Responder {
    pub(super) asker: PeerId,
    pub(super) channel: ResponseChannel<Vec<u8>>,
    pub(super) commands: mpsc::WeakSender<Command>,
    pub(super) response_bytes_max: usize,
}

impl Responder {
    /// Says that the request was nonsense, which an honest program does not send: after a few the
    /// asker is blocked for a while. It may still be answered.
    pub fn blame(&self, reason: &str) {
        let command = Command::Blame { peer: self.asker, reason: reason.to_owned() };
        // Lost if the service is far behind: the next one counts.
        let told = self.commands.upgrade().is_some_and(|to| to.try_send(command).is_ok());
        if !told {
            tracing::debug!(peer = %self.asker, "nobody was told of a peer's nonsense");
        }
    }

    /// # Errors
    /// [`RespondError`]; the asker then sees its request fail.
    pub async fn respond(self, bytes: Vec<u8>) -> Result<(), RespondError> {
        let limit = self.response_bytes_max;
        if bytes.len() > limit {
            return Err(RespondError::TooLarge { limit, got: bytes.len() });
        }
        let commands = self.commands.upgrade().ok_or(RespondError::Gone)?;
        let (reply, answer) = oneshot::channel();
        let command = Command::Respond { channel: self.channel, bytes, reply };
        commands.send(command).await.map_err(|_| RespondError::Gone)?;
        answer.await.unwrap_or(Err(RespondError::Gone))
    }
}

/// An announcement that waits for its verdict. Dropped without one it is ignored: not passed on, and
/// nobody's fault.
#[derive(Debug)]
pub struct Announcement {
    /// Who signed it.
    pub peer: NodeId,
    pub run: RunId,
    pub bytes: Vec<u8>,
    pub(super) verdict: PendingVerdict,
}

impl Announcement {
    /// Passes it on.
    pub fn accept(mut self) {
        self.verdict.send(MessageAcceptance::Accept);
    }

    /// Does not pass it on and lowers the score of whoever forwarded it: it should have checked.
    pub fn reject(mut self, reason: &str) {
        tracing::info!(peer = %self.peer, run = %self.run, reason, "rejected an announcement");
        self.verdict.send(MessageAcceptance::Reject);
    }

    /// Does not pass it on.
    pub fn ignore(mut self) {
        self.verdict.send(MessageAcceptance::Ignore);
    }
}

#[derive(Debug)]
pub(super) struct PendingVerdict {
    /// Taken when the verdict is sent.
    pub(super) message: Option<(MessageId, PeerId)>,
    pub(super) verdicts: mpsc::Sender<Verdict>,
}

impl PendingVerdict {
    fn send(&mut self, acceptance: MessageAcceptance) {
        if let Some((message, forwarder)) = self.message.take() {
            // Full only while the service is far behind; the message then expires unforwarded.
            let verdict = Verdict { message, forwarder, acceptance };
            if self.verdicts.try_send(verdict).is_err() {
                tracing::debug!("a verdict on an announcement came too late");
            }
        }
    }
}

impl Drop for PendingVerdict {
    fn drop(&mut self) {
        self.send(MessageAcceptance::Ignore);
    }
}

#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) message: MessageId,
    pub(super) forwarder: PeerId,
    pub(super) acceptance: MessageAcceptance,
}

type Reply<T> = oneshot::Sender<T>;

#[derive(Debug)]
pub(super) enum Command {
    Request {
        peer: NodeId,
        addresses: Vec<Multiaddr>,
        bytes: Vec<u8>,
        reply: Reply<Result<Vec<u8>, RequestError>>,
    },
    Respond {
        channel: ResponseChannel<Vec<u8>>,
        bytes: Vec<u8>,
        reply: Reply<Result<(), RespondError>>,
    },
    Announce {
        run: RunId,
        bytes: Vec<u8>,
        reply: Reply<Result<(), AnnounceError>>,
    },
    Subscribe {
        run: RunId,
        reply: Reply<()>,
    },
    Provide {
        run: RunId,
        reply: Reply<Result<(), FindError>>,
    },
    Find {
        run: RunId,
        coordinator: NodeId,
        reply: Reply<Result<Vec<Located>, FindError>>,
    },
    Dial {
        peer: NodeId,
        addresses: Vec<Multiaddr>,
        reply: Reply<Result<(), DialError>>,
    },
    Listen {
        address: Multiaddr,
        reply: Reply<Result<(), StartControlError>>,
    },
    Blame {
        peer: PeerId,
        reason: String,
    },
    Addresses {
        reply: Reply<Vec<Multiaddr>>,
    },
    Shutdown {
        reply: Reply<()>,
    },
}
