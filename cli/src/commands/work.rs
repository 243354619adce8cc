//! `join` and `verify`: taking part in a run.

mod failures;
mod show;

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use manyhands_model::determinism;
use manyhands_model::device::DeviceChoice;
use manyhands_network::invitation::Invitation;
use manyhands_proto::Balance;
use manyhands_proto::message::Role;
use manyhands_worker::{WorkerConfig, run};

use super::RunChainArg;
use super::doctor::gpu;
use crate::amount::{Amount, parse_load};
use crate::failure::Failure;
use crate::metrics::MetricsArg;
use crate::output::Output;
use crate::remote::{any_address, control_addresses};
use crate::{folder, run_reference, stop};

#[derive(Debug, clap::Args)]
pub(crate) struct JoinArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// What to put down, in tokens [default: what the run asks for].
    #[arg(long, value_name = "TOKENS")]
    stake: Option<Amount>,
    /// The share of this machine's time that training may take.
    #[arg(long, value_name = "PERCENT", default_value = "100%", value_parser = parse_load)]
    max_load: f64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    node: NodeArgs,
}

/// What this machine computes with.
#[derive(Debug, clap::Args)]
pub(super) struct MachineArgs {
    /// auto (the first of CUDA, MPS, CPU that is there), cpu, cuda, cuda:N or mps.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(super) device: DeviceChoice,
    /// CPU threads of one operation [default: all cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Compute the same bits as every machine with the same libtorch, kind of device and --threads that does so too, at about
    /// half the speed on a CPU: replays then agree to the bit.
    #[arg(long)]
    deterministic: bool,
}

impl MachineArgs {
    pub(super) fn threads(&self) -> u32 {
        self.threads.unwrap_or_else(all_cores)
    }

    /// Makes numerics deterministic, if that is asked for.
    ///
    /// What libtorch and its libraries read when they are loaded has to be there before: this process becomes another one
    /// that has it from its start.
    pub(super) fn prepare(&self) -> Result<(), Failure> {
        if !self.deterministic {
            return Ok(());
        }
        let failed = |error: &dyn std::fmt::Display| {
            Failure::new("not_deterministic", error, "leave --deterministic out")
        };
        if determinism::check_environment().is_err() {
            let program = std::env::current_exe().map_err(|error| failed(&error))?;
            let arguments = std::env::args_os().skip(1);
            let error = Command::new(program).args(arguments).envs(determinism::ENVIRONMENT).exec();
            return Err(failed(&error));
        }
        determinism::switch_on().map_err(|error| failed(&error))
    }
}

#[derive(Debug, clap::Args)]
struct NodeArgs {
    /// The invitation that `launch` printed, or a file that holds it.
    invitation: String,
    /// Folder of this node: key, data, unfinished work [default: $MANYHANDS_HOME/worker, or verifier, where
    /// $MANYHANDS_HOME is ~/.local/share/manyhands unless set].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    chain: RunChainArg,
    /// Where peers reach this node (QUIC and TCP); the data plane takes the next port. Port 0 takes free
    /// ones [default: free ones].
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Look for the run on the local network too, if its coordinator has moved.
    #[arg(long)]
    mdns: bool,
    /// Disk for updates, parameters and evidence, in GiB.
    #[arg(long, value_name = "GIB", default_value = "64", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    disk_max: u64,
    #[command(flatten)]
    metrics: MetricsArg,
}

/// What tells a worker from a verifier.
struct Part {
    role: Role,
    folder: &'static str,
    load_max: f64,
    stake: Option<Balance>,
}

pub(crate) async fn join(args: JoinArgs, output: Output, with_stdin: bool) -> Result<(), Failure> {
    let part = Part {
        role: Role::Worker,
        folder: "worker",
        load_max: args.max_load,
        stake: args.stake.map(|amount| amount.0),
    };
    take_part(args.node, part, output, with_stdin).await
}

pub(crate) async fn verify(
    args: VerifyArgs,
    output: Output,
    with_stdin: bool,
) -> Result<(), Failure> {
    let part = Part { role: Role::Verifier, folder: "verifier", load_max: 1.0, stake: None };
    take_part(args.node, part, output, with_stdin).await
}

async fn take_part(
    args: NodeArgs,
    part: Part,
    output: Output,
    with_stdin: bool,
) -> Result<(), Failure> {
    args.machine.prepare()?;
    let stop = stop::requested(with_stdin);
    args.metrics.serve()?;
    let invitation = run_reference::parse(&args.invitation)?.invitation;
    let folder = folder::choose(args.dir.clone(), part.folder)?;
    let (key, key_is_new) = folder::key(&folder)?;
    let shown = serde_json::json!({
        "event": "starting", "node": key.node_id(), "dir": folder, "key_is_new": key_is_new,
        "run": invitation.run,
    });
    output.event(&shown, || {
        let made = if key_is_new { ", made now" } else { "" };
        Some(format!("node    0x{} (key in {}{made})", key.node_id(), folder.display()))
    });
    warn_of_idle_gpu(args.machine.device, output)?;

    let screen = Arc::new(Mutex::new(show::Screen::new(output, part.role)));
    let told = Arc::clone(&screen);
    let config = WorkerConfig {
        folder,
        key,
        role: part.role,
        device: args.machine.device,
        threads: args.machine.threads(),
        load_max: part.load_max,
        control_listen: control_addresses(listen(&args, &invitation)),
        data_listen: next_port(listen(&args, &invitation)),
        mdns: args.mdns,
        store_bytes_max: args.disk_max << 30,
        chain_url: args.chain.chain,
        stake: part.stake,
        trainers: None,
        on_event: Arc::new(move |event| {
            told.lock().unwrap_or_else(PoisonError::into_inner).show(&event);
        }),
        invitation,
    };
    let exit = run(config, stop).await.map_err(failures::run)?;
    let mut screen = screen.lock().unwrap_or_else(PoisonError::into_inner);
    screen.ended(&exit)
}

fn listen(args: &NodeArgs, invitation: &Invitation) -> SocketAddr {
    args.listen.unwrap_or_else(|| any_address(invitation))
}

/// Port 0 and the last one stay as they are: the one is any, the other has no next.
fn next_port(mut address: SocketAddr) -> SocketAddr {
    if address.port() > 0 {
        address.set_port(address.port().saturating_add(1));
    }
    address
}

pub(super) fn all_cores() -> u32 {
    std::thread::available_parallelism()
        .map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX))
}

/// A build for CPUs on a machine with a GPU works, but hardly as its owner meant.
fn warn_of_idle_gpu(device: DeviceChoice, output: Output) -> Result<(), Failure> {
    let resolved = device.resolve().map_err(|error| {
        Failure::new(
            "no_device",
            error,
            "choose another with --device; `manyhands doctor` tells what is there",
        )
    })?;
    if device == DeviceChoice::Auto
        && resolved == manyhands_model::Device::Cpu
        && let Some(found) = gpu::found().first()
    {
        let shown =
            serde_json::json!({ "event": "idle_gpu", "gpu": found, "remedy": gpu::REBUILD });
        output.event(&shown, || {
            Some(format!(
                "warning: this machine has a GPU ({}), this build does not use it: {}",
                found.name,
                gpu::REBUILD
            ))
        });
    }
    Ok(())
}
