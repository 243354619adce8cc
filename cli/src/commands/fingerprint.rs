//! `fingerprint`: the bits that a run's own model comes to on this machine.

use std::path::PathBuf;

use manyhands_model::run_fingerprint;
use manyhands_proto::Digest;
use serde::Serialize;

use super::work::MachineArgs;
use crate::failure::{Explain, Failure};
use crate::output::Output;
use crate::run_file;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run's file. Its data set need not be there.
    file: PathBuf,
    #[command(flatten)]
    machine: MachineArgs,
}

#[derive(Debug, Serialize)]
struct Fingerprint {
    /// None: the same training does not come to the same bits twice.
    fingerprint: Option<Digest>,
    /// What the run's file asks for.
    asked: Option<Digest>,
}

pub(crate) fn run(args: &Args, output: Output) -> Result<(), Failure> {
    args.machine.prepare()?;
    let file = run_file::read(&args.file, None)?;
    let remedy = "check the run's file, or choose another --device";
    let device = args.machine.device.resolve().explain("fingerprint", remedy)?;
    let fingerprint = run_fingerprint(&file.model, &file.training, device, args.machine.threads())
        .explain("fingerprint", remedy)?;
    let found = Fingerprint { fingerprint, asked: file.verification.fingerprint };
    output.document(&found, || text(&found));
    Ok(())
}

fn text(found: &Fingerprint) -> String {
    let Some(fingerprint) = found.fingerprint else {
        return "This machine does not come to the same bits twice; try --deterministic."
            .to_owned();
    };
    match found.asked {
        Some(asked) if asked == fingerprint => {
            format!("{fingerprint}\nThese are the bits that the run asks for.")
        }
        Some(asked) => format!("{fingerprint}\nThe run asks for other bits: {asked}"),
        None => format!(
            "{fingerprint}\nTo take only machines that come to these bits, add to the run's file:\n\n\
             [verification]\nfingerprint = \"{fingerprint}\""
        ),
    }
}
