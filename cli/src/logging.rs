//! Structured logs on standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::Globals;
use crate::failure::{Explain, Failure};

/// Warnings of every crate: what a command has to say it prints. Kademlia warns of every start, when it knows
/// nobody yet.
const FILTER: &str = "warn,libp2p_kad=error";

pub(crate) fn start(globals: &Globals) -> Result<(), Failure> {
    let filter = globals.log.as_deref().unwrap_or(FILTER);
    let filter = EnvFilter::try_new(filter)
        .explain("log_filter", "write it as `info`, or as `warn,manyhands_worker=debug`")?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    if globals.log_json {
        builder.json().init()
    } else {
        builder.init()
    }
    Ok(())
}
