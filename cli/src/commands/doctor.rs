//! `doctor`: what this machine has and lacks.

pub(crate) mod gpu;
#[cfg(feature = "worker")]
mod torch;

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::Path;

use manyhands_chain_client::ChainClient;
use serde::Serialize;

use super::ChainArg;
use crate::failure::Failure;
use crate::folder;
use crate::output::{Output, table};

/// Ports that commands take when they are told nothing else.
const PORTS: [(u16, &str); 4] = [
    (4800, "launch: the live page"),
    (4801, "launch: the control plane"),
    (4802, "launch: the data plane"),
    (9944, "devnet"),
];
/// A demo takes about a third of this, a run of 1 B parameters much more.
const DISK_BYTES_MIN: u64 = 4 << 30;
const MEMORY_BYTES_MIN: u64 = 2 << 30;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    chain: ChainArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Good,
    /// Some commands need it.
    Warning,
    /// Nothing works without it.
    Bad,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    what: String,
    state: State,
    found: String,
    remedy: Option<String>,
}

impl Check {
    fn good(what: &str, found: impl Into<String>) -> Self {
        Self { what: what.to_owned(), state: State::Good, found: found.into(), remedy: None }
    }

    fn wanting(what: &str, state: State, found: impl Into<String>, remedy: &str) -> Self {
        Self { what: what.to_owned(), state, found: found.into(), remedy: Some(remedy.to_owned()) }
    }
}

pub(crate) async fn run(args: Args, output: Output) -> Result<(), Failure> {
    let home = folder::home()?;
    let mut checks = vec![processor(), memory()];
    checks.extend(gpus());
    #[cfg(feature = "worker")]
    checks.extend(torch::checks());
    checks.push(state_folder(&home));
    checks.push(disk(&home));
    checks.extend(PORTS.map(|(port, use_of)| this_port(port, use_of)));
    checks.push(chain(args.chain.url()).await);
    let healthy = checks.iter().all(|check| check.state != State::Bad);
    let document = serde_json::json!({ "healthy": healthy, "checks": checks });
    if healthy || !output.is_json() {
        output.document(&document, || text(&checks));
    }
    if healthy {
        return Ok(());
    }
    let bad: Vec<_> = checks
        .iter()
        .filter(|check| check.state == State::Bad)
        .map(|check| check.what.as_str())
        .collect();
    let reason = format!("this machine lacks: {}", bad.join(", "));
    Err(Failure::new("unhealthy", reason, "each line says what to do").with_document(document))
}

fn text(checks: &[Check]) -> String {
    let rows: Vec<Vec<String>> = checks
        .iter()
        .map(|check| {
            let mark = match check.state {
                State::Good => "ok",
                State::Warning => "note",
                State::Bad => "BAD",
            };
            let remedy =
                check.remedy.as_ref().map_or(String::new(), |remedy| format!(": {remedy}"));
            vec![mark.to_owned(), check.what.clone(), check.found.clone() + &remedy]
        })
        .collect();
    table(&rows)
}

fn processor() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Check::good("processor", format!("{cores} cores, {}", std::env::consts::ARCH))
}

fn memory() -> Check {
    let Ok(mut system) = sysinfo::System::new() else {
        return Check::wanting(
            "memory",
            State::Warning,
            "the operating system does not tell",
            "look yourself whether there is enough",
        );
    };
    system.refresh_memory();
    let (free, all) = (system.available_memory(), system.total_memory());
    let found = format!("{} of {} MiB are free", free >> 20, all >> 20);
    if free < MEMORY_BYTES_MIN {
        return Check::wanting(
            "memory",
            State::Warning,
            found,
            "end other programs before joining a run",
        );
    }
    Check::good("memory", found)
}

fn gpus() -> Vec<Check> {
    let found = gpu::found();
    if found.is_empty() {
        return vec![Check::good("GPU", "no NVIDIA driver answers; the CPU is used")];
    }
    found
        .iter()
        .map(|gpu| {
            Check::good("GPU", format!("{}, {}, driver {}", gpu.name, gpu.memory, gpu.driver))
        })
        .collect()
}

fn state_folder(home: &Path) -> Check {
    let probe = home.join(".doctor");
    let written = std::fs::create_dir_all(home)
        .and_then(|()| std::fs::write(&probe, b"can be written"))
        .and_then(|()| std::fs::remove_file(&probe));
    match written {
        Ok(()) => Check::good("folder", home.display().to_string()),
        Err(error) => Check::wanting(
            "folder",
            State::Bad,
            format!("cannot write in {}: {error}", home.display()),
            "make it writable, or set MANYHANDS_HOME",
        ),
    }
}

fn disk(home: &Path) -> Check {
    let disks = sysinfo::Disks::new_with_refreshed_list();
    let home = home.canonicalize().unwrap_or_else(|_| home.to_owned());
    // The mount point that is nearest above the folder.
    let holding = disks
        .iter()
        .flat_map(|disks| disks.iter())
        .filter(|disk| home.starts_with(disk.mount_point()));
    let Some(disk) = holding.max_by_key(|disk| disk.mount_point().components().count()) else {
        return Check::wanting(
            "disk",
            State::Warning,
            "the operating system names none",
            "look yourself whether there is room",
        );
    };
    let free = disk.available_space();
    let found = format!("{} GiB are free for {}", free >> 30, home.display());
    if free < DISK_BYTES_MIN {
        return Check::wanting("disk", State::Bad, found, "make room, or set MANYHANDS_HOME");
    }
    Check::good("disk", found)
}

fn this_port(port: u16, use_of: &str) -> Check {
    let address = (Ipv4Addr::LOCALHOST, port);
    let free = TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok();
    let what = format!("port {port}");
    if free {
        return Check::good(&what, format!("free ({use_of})"));
    }
    Check::wanting(
        &what,
        State::Warning,
        format!("in use ({use_of})"),
        "that command runs already, or needs another port",
    )
}

async fn chain(url: &str) -> Check {
    let connected = async {
        let chain = ChainClient::connect(url).await?;
        let head = chain.finalized_head().await?;
        Ok::<_, Failure>((chain.is_development(), head.number))
    };
    match connected.await {
        Ok((development, head)) => {
            let kind = if development { "a development chain" } else { "a chain" };
            Check::good("chain", format!("{kind} at {url}, block {head} is final"))
        }
        Err(Failure { reason, remedy, .. }) => {
            Check::wanting("chain", State::Warning, reason, &remedy)
        }
    }
}
