//! `devnet`: the embedded chain in a process of its own.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;

use manyhands_chain_devnet::{Devnet, DevnetConfig, RunDevnetError, StartDevnetError};

use crate::failure::Failure;
use crate::folder;
use crate::metrics::MetricsArg;
use crate::output::Output;
use crate::stop;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the chain [default: $MANYHANDS_HOME/devnet].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where JSON-RPC is served; port 0 takes a free one. Everybody who reaches it may use the chain.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9944")]
    listen: SocketAddr,
    /// A block is made at least this often, in milliseconds.
    #[arg(long, value_name = "MS", default_value = "1000")]
    block_time_ms: NonZeroU64,
    #[command(flatten)]
    metrics: MetricsArg,
}

pub(crate) async fn run(args: Args, output: Output, with_stdin: bool) -> Result<(), Failure> {
    let stop = stop::requested(with_stdin);
    args.metrics.serve()?;
    let data_dir = folder::choose(args.dir, "devnet")?;
    let config = DevnetConfig {
        data_dir: data_dir.clone(),
        listen: args.listen,
        block_time_ms: args.block_time_ms,
    };
    let mut devnet = Devnet::start(config).await.map_err(start_failure)?;
    let genesis: String = devnet.genesis_hash().iter().map(|byte| format!("{byte:02x}")).collect();
    let started = serde_json::json!({
        "event": "serving", "url": devnet.url(), "genesis": genesis, "dir": data_dir,
    });
    output.event(&started, || {
        Some(format!(
            "A development chain, its money worthless, is served at {}\ngenesis  0x{genesis}\nfolder   {}\nCtrl-C stops it; started again, it goes on.",
            devnet.url(),
            data_dir.display()
        ))
    });
    let failed = tokio::select! {
        () = stop::wait(stop) => None,
        error = devnet.failed() => Some(error),
    };
    match failed {
        None => {
            devnet.shutdown().await;
            Ok(())
        }
        Some(error) => Err(run_failure(&error)),
    }
}

fn start_failure(error: StartDevnetError) -> Failure {
    let (code, remedy) = match &error {
        StartDevnetError::PortInUse { .. } | StartDevnetError::Listen { .. } => {
            ("port_in_use", "choose another port with --listen, or stop the program that has it")
        }
        StartDevnetError::DataDir { .. } | StartDevnetError::DataDirInUse { .. } => {
            ("folder_in_use", "choose another folder with --dir, or stop the devnet that uses it")
        }
        StartDevnetError::OtherGenesis { .. } => {
            ("other_genesis", "choose another folder with --dir, or remove this one to start anew")
        }
        StartDevnetError::DiskFull { .. } => ("disk_full", "make room and start again"),
        StartDevnetError::Store { .. } => {
            ("chain_damaged", "restore the folder, or choose another with --dir")
        }
        StartDevnetError::Genesis { .. } => ("no_genesis", "report this: the build is broken"),
    };
    Failure::new(code, error, remedy)
}

fn run_failure(error: &RunDevnetError) -> Failure {
    let (code, remedy) = match error {
        RunDevnetError::DiskFull => ("disk_full", "make room and start again"),
        RunDevnetError::Store(_) => ("chain_write", "check the disk and start again"),
        RunDevnetError::Panicked => ("panic", "report this"),
    };
    Failure::new(code, error, remedy)
}
