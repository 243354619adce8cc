//! The `manyhands` command.

mod amount;
mod commands;
#[cfg(all(feature = "coordinator", feature = "worker", feature = "devnet"))]
mod demo;
mod failure;
mod folder;
mod logging;
#[cfg(any(feature = "worker", feature = "devnet"))]
mod metrics;
mod output;
mod progress;
mod remote;
mod run_file;
mod run_reference;
mod stop;

use std::process::ExitCode;

use clap::{Args, Parser};

use crate::commands::Command;
use crate::output::Output;

/// Train one language model on many machines that do not trust each other.
#[derive(Debug, Parser)]
#[command(name = "manyhands", version, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
pub(crate) struct Globals {
    /// Print one JSON document, or JSON lines where a command goes on for long.
    #[arg(long, global = true, help_heading = "Of every command")]
    json: bool,
    /// What to log on standard error, as `info` or `warn,manyhands_worker=debug` [default: warn].
    #[arg(
        long,
        global = true,
        help_heading = "Of every command",
        value_name = "FILTER",
        env = "RUST_LOG"
    )]
    log: Option<String>,
    /// Log JSON lines.
    #[arg(long, global = true, help_heading = "Of every command")]
    log_json: bool,
    /// Stop as on Ctrl-C when standard input ends: for programs that start this one.
    #[arg(long, global = true, hide = true)]
    stop_with_stdin: bool,
}

fn main() -> ExitCode {
    let Cli { globals, command } = Cli::parse();
    let output = Output::new(globals.json);
    let outcome = logging::start(&globals).and_then(|()| commands::run(command, &globals, output));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::FAILURE
        }
    }
}
