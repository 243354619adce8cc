//! Writes the runtime's metadata to a file, for a client's code generator:
//! `cargo run -p manyhands-chain-runtime --example dump_metadata -- PATH`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("expected the path to write to, got no argument");
        return ExitCode::FAILURE;
    };
    match std::fs::write(&path, manyhands_chain_runtime::metadata_scale()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}
