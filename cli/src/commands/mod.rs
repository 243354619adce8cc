//! The commands, one file each.

mod audit;
#[cfg(feature = "coordinator")]
mod claim;
#[cfg(feature = "devnet")]
mod devnet;
mod doctor;
#[cfg(feature = "worker")]
mod export;
#[cfg(feature = "worker")]
mod generate;
mod keys;
#[cfg(feature = "coordinator")]
mod launch;
#[cfg(feature = "worker")]
mod prepare;
mod status;
#[cfg(feature = "worker")]
mod work;

use std::future::Future;

use clap::Subcommand;

use crate::Globals;
use crate::failure::{Explain, Failure};
use crate::output::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show everything on this machine, as separate processes: train, catch a cheater, pay, audit.
    #[cfg(all(feature = "coordinator", feature = "worker", feature = "devnet"))]
    Demo(crate::demo::Args),
    /// Tell what this machine has and lacks: GPU, libtorch, ports, disk, chain.
    Doctor(doctor::Args),
    /// Turn text, JSONL or Parquet into token shards that a run can train on.
    #[cfg(feature = "worker")]
    Prepare(prepare::Args),
    /// Register a run, fund its escrow, and coordinate it until it completes.
    #[cfg(feature = "coordinator")]
    Launch(launch::Args),
    /// Work for a run with this machine.
    #[cfg(feature = "worker")]
    Join(work::JoinArgs),
    /// Replay the audited work of a run.
    #[cfg(feature = "worker")]
    Verify(work::VerifyArgs),
    /// Show how a run is doing.
    Status(status::Args),
    /// Check a run's contributions against the chain.
    Audit(audit::Args),
    /// Withdraw what was earned in a run.
    #[cfg(feature = "coordinator")]
    Claim(claim::Args),
    /// Write a run's model as a folder that Hugging Face transformers opens.
    #[cfg(feature = "worker")]
    Export(export::Args),
    /// Continue a text with an exported model.
    #[cfg(feature = "worker")]
    Generate(generate::Args),
    /// Run the embedded chain, for development.
    #[cfg(feature = "devnet")]
    Devnet(devnet::Args),
    /// Make, show and fund the key that is chain account and peer identity.
    Keys(keys::Args),
}

/// Runs a command to its end.
pub(crate) fn run(command: Command, globals: &Globals, output: Output) -> Result<(), Failure> {
    let with_stdin = globals.stop_with_stdin;
    match command {
        #[cfg(all(feature = "coordinator", feature = "worker", feature = "devnet"))]
        Command::Demo(args) => wait(crate::demo::run(args, output)),
        Command::Doctor(args) => wait(doctor::run(args, output)),
        #[cfg(feature = "worker")]
        Command::Prepare(args) => prepare::run(&args, output),
        #[cfg(feature = "coordinator")]
        Command::Launch(args) => wait(launch::run(args, output, with_stdin)),
        #[cfg(feature = "worker")]
        Command::Join(args) => wait(work::join(args, output, with_stdin)),
        #[cfg(feature = "worker")]
        Command::Verify(args) => wait(work::verify(args, output, with_stdin)),
        Command::Status(args) => wait(status::run(args, output)),
        Command::Audit(args) => wait(audit::run(args, output)),
        #[cfg(feature = "coordinator")]
        Command::Claim(args) => wait(claim::run(args, output)),
        #[cfg(feature = "worker")]
        Command::Export(args) => wait(export::run(args, output)),
        #[cfg(feature = "worker")]
        Command::Generate(args) => generate::run(&args, output),
        #[cfg(feature = "devnet")]
        Command::Devnet(args) => wait(devnet::run(args, output, with_stdin)),
        Command::Keys(args) => wait(keys::run(args, output)),
    }
}

fn wait(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .explain("threads", "end other programs, or raise this user's limit of threads")?;
    let outcome = runtime.block_on(work);
    // Heavy work that nobody waits for any more must not keep the process.
    runtime.shutdown_background();
    outcome
}

/// Where a chain's node is.
#[derive(Debug, clap::Args)]
pub(crate) struct ChainArg {
    /// A node of the chain.
    #[arg(long, value_name = "URL", env = "MANYHANDS_CHAIN")]
    pub(crate) chain: Option<String>,
}

impl ChainArg {
    /// What was named, or where `manyhands devnet` listens.
    pub(crate) fn url(&self) -> &str {
        self.chain.as_deref().unwrap_or(DEVNET_URL)
    }
}

/// Where `manyhands devnet` listens.
const DEVNET_URL: &str = "ws://127.0.0.1:9944";
