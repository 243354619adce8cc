//! The commands, one file each.

mod audit;
#[cfg(feature = "worker")]
mod calibrate;
#[cfg(feature = "coordinator")]
mod claim;
mod contest;
#[cfg(feature = "devnet")]
mod devnet;
mod doctor;
#[cfg(feature = "worker")]
mod export;
#[cfg(feature = "worker")]
mod fingerprint;
#[cfg(feature = "worker")]
mod generate;
mod keys;
#[cfg(feature = "coordinator")]
mod launch;
mod plan;
#[cfg(feature = "worker")]
mod prepare;
mod status;
#[cfg(feature = "worker")]
mod work;

use std::future::Future;
use std::path::PathBuf;

use clap::Subcommand;
use manyhands_chain_client::ChainClient;
use manyhands_network::invitation::Invitation;
use manyhands_proto::Digest;
use manyhands_proto::keys::NodeKey;

use crate::Globals;
use crate::failure::{Explain, Failure};
use crate::folder;
use crate::output::Output;
use crate::run_reference::{self, RunReference};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show everything on this machine, as separate processes: train, catch a cheater, pay, audit
    ///
    /// Starts a chain, a coordinator, a verifier and workers of different speed, and leaves figures and evidence in
    /// runs/demo.
    #[cfg(all(feature = "coordinator", feature = "worker", feature = "devnet"))]
    Demo(crate::demo::Args),
    /// Tell what this machine has and lacks: GPU, libtorch, ports, disk, chain
    ///
    /// Exit code 1 if something is missing that no command can do without.
    Doctor(doctor::Args),
    /// Turn text, JSONL or Parquet into token shards that a run can train on
    #[cfg(feature = "worker")]
    Prepare(prepare::Args),
    /// Tell what a run's file means: how likely cheats are found, what deters them, what checks cost
    Plan(plan::Args),
    /// Measure how far honest replays of a run's rounds end apart, and how far cheats do
    ///
    /// Trains rounds of the run's own model and data twice: with other threads, micro-batches and kernels as other machines
    /// have them, and as cheats would. Tells the margins of the file's thresholds, and which ones the figures ask for.
    #[cfg(feature = "worker")]
    Calibrate(calibrate::Args),
    /// Tell the bits that a run's own model comes to on this machine
    ///
    /// With them as verification.fingerprint a run takes only machines that come to the same, and allows no distance
    /// between replays.
    #[cfg(feature = "worker")]
    Fingerprint(fingerprint::Args),
    /// What `calibrate` starts: trains the rounds that come on standard input.
    #[cfg(feature = "worker")]
    #[command(hide = true)]
    Replay,
    /// Register a run, fund its escrow, and coordinate it until it completes
    ///
    /// Started again with the same folder, it goes on with the run.
    #[cfg(feature = "coordinator")]
    Launch(launch::Args),
    /// Work for a run with this machine
    ///
    /// Trains what the run asks for, proves it, and is paid for it. Ctrl-C leaves as soon as nobody waits for this
    /// machine's evidence; a second one ends at once. Started again, it goes on where it was.
    #[cfg(feature = "worker")]
    Join(work::JoinArgs),
    /// Replay the audited work of a run
    ///
    /// Replays the rounds that are drawn, and measures held-out loss. Ctrl-C leaves; a second one ends at once.
    #[cfg(feature = "worker")]
    Verify(work::VerifyArgs),
    /// Show how a run is doing
    Status(status::Args),
    /// Check a run's contributions against the chain
    ///
    /// Recomputes assignments, draws, aggregates, parameters and rewards from the evidence, and compares them with what
    /// the chain holds. Exit code 1 if anything does not hold; what does not is named.
    Audit(audit::Args),
    /// Withdraw what was earned in a run
    #[cfg(feature = "coordinator")]
    Claim(claim::Args),
    /// Object to what this node is accused of in a run
    ///
    /// Puts down the run's contest bond, which comes back unless verifiers find the node guilty. To what dismisses, and it
    /// was never told of, a node objects by itself; not to having shown nothing.
    Contest(MemberArgs),
    /// Write a run's model as a folder that Hugging Face transformers opens
    ///
    /// A run that is named by its folder is read from there; otherwise the coordinator is asked. Either way the
    /// parameters are checked against their digest.
    #[cfg(feature = "worker")]
    Export(export::Args),
    /// Continue a text with an exported model
    ///
    /// The same model, prompt and options give the same text on the same machine.
    #[cfg(feature = "worker")]
    Generate(generate::Args),
    /// Run the embedded chain, for development
    ///
    /// It is kept in a folder and goes on where it was when it is started again.
    #[cfg(feature = "devnet")]
    Devnet(devnet::Args),
    /// Make, show and fund the key that is chain account and peer identity
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
        Command::Plan(args) => plan::run(&args, output),
        #[cfg(feature = "worker")]
        Command::Calibrate(args) => calibrate::run(&args, output),
        #[cfg(feature = "worker")]
        Command::Replay => calibrate::replay(),
        #[cfg(feature = "worker")]
        Command::Fingerprint(args) => fingerprint::run(&args, output),
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
        Command::Contest(args) => wait(contest::run(args, output)),
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
    /// A node of the chain [default: that of `manyhands devnet`, ws://127.0.0.1:9944].
    #[arg(long, value_name = "URL", env = "MANYHANDS_CHAIN")]
    pub(crate) chain: Option<String>,
}

impl ChainArg {
    /// What was named, or where `manyhands devnet` listens.
    pub(crate) fn url(&self) -> &str {
        self.chain.as_deref().unwrap_or(DEVNET_URL)
    }
}

/// Where a node of a run's chain is.
#[derive(Debug, clap::Args)]
pub(crate) struct RunChainArg {
    /// A node of the run's chain [default: the one that its launch named].
    #[arg(long, value_name = "URL", env = "MANYHANDS_CHAIN")]
    pub(crate) chain: Option<String>,
}

impl RunChainArg {
    /// A connection to the chain that the run is on.
    pub(crate) async fn connect(self, invitation: &Invitation) -> Result<ChainClient, Failure> {
        let Some(url) = self.chain.or_else(|| invitation.chain_url.clone()) else {
            let reason = "the invitation names no node of the run's chain";
            return Err(Failure::new("no_chain", reason, "name one with --chain"));
        };
        let chain = ChainClient::connect(&url).await?;
        let genesis = Digest::new(invitation.chain_genesis);
        if chain.genesis_hash() != genesis {
            let reason =
                format!("the chain at {url} is {}, the run is on {genesis}", chain.genesis_hash());
            let remedy = "name a node of the run's chain with --chain";
            return Err(Failure::new("wrong_chain", reason, remedy));
        }
        Ok(chain)
    }
}

/// Whose business in which run.
#[derive(Debug, clap::Args)]
pub(crate) struct MemberArgs {
    /// The invitation, a file that holds it, or the folder of the run's launch.
    run: String,
    /// The folder whose `node.key` it is about [default: $MANYHANDS_HOME/worker; a verifier's is
    /// $MANYHANDS_HOME/verifier].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    chain: RunChainArg,
}

impl MemberArgs {
    /// The member's key, its run, and the chain that the run is on.
    pub(crate) async fn open(self) -> Result<(NodeKey, RunReference, ChainClient), Failure> {
        let folder = folder::choose(self.dir, "worker")?;
        let key = folder::existing_key(&folder)?;
        let reference = run_reference::parse(&self.run)?;
        let chain = self.chain.connect(&reference.invitation).await?;
        Ok((key, reference, chain))
    }
}

/// Where `manyhands devnet` listens.
const DEVNET_URL: &str = "ws://127.0.0.1:9944";
