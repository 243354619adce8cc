//! Both planes on loopback: nodes are real, their sockets too; only time-outs are shortened.

mod control;
mod data;
mod hostile;

use std::time::Duration;

use manyhands_proto::keys::NodeKey;

fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed([seed; 32])
}

/// Fails the test instead of hanging it. Far longer than anything here takes.
async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(60), future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not happen"),
    }
}
