//! Opening parts of what a peer committed to.

use manyhands_network::data::GROUPS_PER_REQUEST_MAX;
use manyhands_proto::tree::Openings;
use manyhands_proto::{Digest, NodeId};
use tokio::time::Instant;

use crate::context::Context;
use crate::retry::Backoff;

/// A blob of a peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blob<'a> {
    pub(super) of: NodeId,
    /// For people.
    pub(super) name: &'a str,
    pub(super) digest: Digest,
    pub(super) bytes: u64,
}

/// Why it could not be opened: in words about its owner.
#[derive(Debug)]
pub(super) struct NotOpened(pub(super) String);

/// Opens groups of a blob, each proven. A peer that cannot be reached, or has not published yet, is asked again
/// until `deadline`, or if there is none, for as long as somebody waits.
pub(super) async fn open(
    context: &Context,
    blob: Blob<'_>,
    groups: &[u64],
    deadline: Option<Instant>,
) -> Result<Openings, NotOpened> {
    let mut opened = Openings { length: blob.bytes, groups: Vec::with_capacity(groups.len()) };
    for groups in groups.chunks(GROUPS_PER_REQUEST_MAX) {
        let asked = insist(context, blob, groups);
        let openings = match deadline {
            None => asked.await?,
            Some(deadline) => tokio::time::timeout_at(deadline, asked)
                .await
                .map_err(|_| NotOpened(format!("{} was not opened in time", blob.name)))??,
        };
        if openings.length != blob.bytes {
            let (name, expected, got) = (blob.name, blob.bytes, openings.length);
            return Err(NotOpened(format!("{name} has {expected} bytes, it opened one of {got}")));
        }
        opened.groups.extend(openings.groups);
    }
    Ok(opened)
}

async fn insist(context: &Context, blob: Blob<'_>, groups: &[u64]) -> Result<Openings, NotOpened> {
    let mut backoff = Backoff::for_peers();
    loop {
        // It may be somewhere else by now.
        let source = context.whereabouts.of(blob.of);
        match context.data.open_groups(&source, blob.digest, groups).await {
            Ok(openings) => return Ok(openings),
            Err(error) if error.is_lie() => {
                return Err(NotOpened(format!(
                    "it opened something else as {}: {error}",
                    blob.name
                )));
            }
            Err(error) => tracing::debug!(peer = %blob.of, %error, "openings are asked again"),
        }
        backoff.wait().await;
    }
}
