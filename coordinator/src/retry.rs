//! Waiting between attempts.

use std::time::Duration;

/// Doubles from attempt to attempt up to a limit.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    next: Duration,
    limit: Duration,
}

impl Backoff {
    /// For peers: a payload may be published in a moment.
    pub(crate) const fn for_peers() -> Self {
        Self { next: Duration::from_millis(50), limit: Duration::from_secs(2) }
    }

    /// For the chain: often enough to notice the next block, seldom enough to spare a node in trouble.
    pub(crate) const fn for_chain() -> Self {
        Self { next: Duration::from_millis(250), limit: Duration::from_secs(10) }
    }

    pub(crate) async fn wait(&mut self) {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(self.limit);
    }
}
