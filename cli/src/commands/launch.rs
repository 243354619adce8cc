//! `launch`: a run from its file, registered, funded and coordinated.

mod dataset;
mod failures;
mod watch;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use manyhands_coordinator::service::{CoordinatorConfig, Handle};
use manyhands_coordinator::{LaunchOrder, launch, service};
use manyhands_proto::Digest;
use manyhands_proto::run_file::ChainKind;
use serde::Serialize;
use tokio::sync::watch::Receiver;

use self::dataset::Resolved;
use super::{ChainArg, DEVNET_URL, plan};
use crate::failure::{Explain, Failure};
use crate::output::Output;
use crate::remote::control_addresses;
use crate::run_reference::INVITATION_FILE;
use crate::{folder, run_file, stop};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run's file.
    file: PathBuf,
    /// Take this data set instead of the one that the file names.
    #[arg(long, value_name = "DIR")]
    dataset: Option<PathBuf>,
    /// Folder of the run: key, journal, evidence [default: $MANYHANDS_HOME/runs/NAME].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    chain: ChainArg,
    /// Where peers reach the control plane (QUIC and TCP); the data plane takes the next port. Port 0
    /// takes free ones.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:4801")]
    listen: SocketAddr,
    /// An address under which others reach this machine, if it is not its own (a forwarded port).
    #[arg(long, value_name = "IP")]
    reachable_at: Vec<IpAddr>,
    /// This machine can be reached from everywhere: relay for workers that cannot, and tell them so.
    #[arg(long)]
    public: bool,
    /// Announce the run on the local network.
    #[arg(long)]
    mdns: bool,
    /// Port of the live page on this machine; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value = "4800")]
    page_port: u16,
    /// End when the run is complete and everything is final on chain, instead of serving evidence on.
    #[arg(long)]
    exit_when_complete: bool,
}

#[derive(Debug, Serialize)]
struct Started<'a> {
    event: &'static str,
    run: manyhands_proto::RunId,
    name: &'a str,
    resumed: bool,
    parameters: u64,
    folder: &'a Path,
    invitation: &'a str,
    page: &'a str,
    account: manyhands_proto::NodeId,
    /// Given by the faucet of a development chain.
    funded: Option<manyhands_proto::Balance>,
    /// Added to the escrow of a run that stood still for want of money.
    refilled: Option<manyhands_proto::Balance>,
    key_is_new: bool,
}

pub(crate) async fn run(args: Args, output: Output, with_stdin: bool) -> Result<(), Failure> {
    let stop = stop::requested(with_stdin);
    let exit_when_complete = args.exit_when_complete;
    let handle = tokio::select! {
        handle = start(args, output) => handle?,
        // What was begun is on disk and on chain; started again, it goes on.
        () = stop::wait(stop.clone()) => return Ok(()),
    };
    coordinate(handle, output, stop, exit_when_complete).await
}

async fn start(args: Args, output: Output) -> Result<Handle, Failure> {
    let file = run_file::read(&args.file, args.dataset.as_deref())?;
    let folder = folder::choose(args.dir.clone(), Path::new("runs").join(&file.run.name))?;
    // A launch that is resumed has its terms, and knows its chain.
    let is_new = !folder.join("run.json").exists();
    if is_new {
        plan::refuse_if_cheating_pays(&file)?;
    }
    let (key, key_is_new) = folder::key(&folder)?;
    let Resolved { data, served, theta } = dataset::resolve(&file, &args.file)?;
    let on_chain = file.chain.kind == ChainKind::Substrate;
    let chain_url =
        args.chain.chain.clone().or((on_chain && is_new).then(|| DEVNET_URL.to_owned()));
    let order =
        LaunchOrder { folder: folder.clone(), key: key.clone(), file, data, served, chain_url };
    let launched = launch(order).await.map_err(failures::launch)?;

    let mut config = CoordinatorConfig::new(folder.clone(), key.clone(), launched.manifest.clone());
    config.theta = theta;
    config.control_listen = control_addresses(args.listen);
    config.data_listen = data_address(args.listen)?;
    config.page_listen = (Ipv4Addr::LOCALHOST, args.page_port).into();
    config.reachable_at = args.reachable_at;
    (config.public, config.mdns) = (args.public, args.mdns);
    let handle = service::start(config).await.map_err(failures::start)?;
    let invitation = handle.invitation();
    write_invitation(&folder, &invitation)?;
    let spec = &launched.manifest.spec;
    let started = Started {
        event: "launched",
        run: launched.manifest.run,
        name: &spec.run.name,
        resumed: launched.resumed,
        parameters: manyhands_rules::reward::layout(&spec.model).parameter_count().0,
        folder: &folder,
        invitation: &invitation,
        page: &handle.page_url(),
        account: key.node_id(),
        funded: launched.funded,
        refilled: launched.refilled,
        key_is_new,
    };
    output.event(&started, || Some(introduction(&started)));
    Ok(handle)
}

/// Until the run is complete and nobody needs the evidence any more, or until it is told to stop.
async fn coordinate(
    handle: Handle,
    output: Output,
    stop: Receiver<bool>,
    exit_when_complete: bool,
) -> Result<(), Failure> {
    let outcome = tokio::select! {
        () = stop::wait(stop.clone()) => Ok(()),
        outcome = watch::until_complete(&handle, output) => outcome,
    };
    if outcome.is_ok() && !*stop.borrow() && !exit_when_complete {
        output.event(&serde_json::json!({ "event": "serving" }), || {
            Some(
                "Evidence and parameters are served on, for claims and audits. Ctrl-C ends it."
                    .to_owned(),
            )
        });
        tokio::select! {
            () = stop::wait(stop) => {}
            () = watch::follow(&handle, output) => {}
        }
    }
    let ended = handle.shutdown().await;
    outcome?;
    ended.explain(
        "coordinator_failed",
        "start it again with the same folder: nothing that was decided is lost",
    )
}

fn introduction(started: &Started<'_>) -> String {
    let Started { run, name, resumed, parameters, folder, invitation, page, account, .. } = started;
    let what = if *resumed { "goes on" } else { "is launched" };
    let mut text =
        format!("run {name} ({run}) {what}: {parameters} parameters\nfolder  {}", folder.display());
    if started.key_is_new {
        text += &format!("\nkey     made in this folder; account 0x{account}");
    }
    if let Some(amount) = started.funded {
        text += &format!("\nmoney   {amount} of play money from the development chain's faucet");
    }
    if let Some(amount) = started.refilled {
        text += &format!(
            "\nescrow  {amount} added: the run stood still for want of money, and goes on"
        );
    }
    text + &format!(
        "\npage    {page}\n\nmanyhands join {invitation}\nmanyhands verify {invitation}\n"
    )
}

/// The port after the control plane's; any if that is any.
fn data_address(control: SocketAddr) -> Result<SocketAddr, Failure> {
    let port = match control.port() {
        0 => 0,
        port => port.checked_add(1).ok_or_else(|| {
            Failure::new(
                "port",
                "there is no port after 65535 for the data plane",
                "choose a lower one with --listen",
            )
        })?,
    };
    Ok((control.ip(), port).into())
}

fn write_invitation(folder: &Path, invitation: &str) -> Result<(), Failure> {
    let path = folder.join(INVITATION_FILE);
    std::fs::write(&path, format!("{invitation}\n")).map_err(|error| {
        Failure::new(
            "disk",
            format!("cannot write {}: {error}", path.display()),
            "make room and start again",
        )
    })
}

/// θ₀ and what is said of it.
type Theta = (Digest, Option<Vec<u8>>);
