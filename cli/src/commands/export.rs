//! `export`: a run's newest parameters as a folder of Hugging Face transformers.

use std::path::{Path, PathBuf};

use manyhands_gradient::{CHUNK, vector};
use manyhands_model::data::{Manifest, TextTokenizer};
use manyhands_model::hugging_face::export;
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, Round};
use manyhands_rules::reward::layout;

use crate::failure::{Explain, Failure};
use crate::output::Output;
use crate::remote::Remote;
use crate::run_reference;

const MANIFEST_BYTES_MAX: u64 = 64 << 20;
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// The coordinator is asked for the parameters, which are checked against their digest.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The invitation, a file that holds it, or the folder of the run's launch.
    run: String,
    /// The folder to write; must not exist.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
}

/// What was exported.
pub(crate) struct Exported {
    pub(crate) round: Round,
    pub(crate) theta: Digest,
    pub(crate) parameters: u64,
}

pub(crate) async fn run(args: Args, output: Output) -> Result<(), Failure> {
    let exported = export_run(&args.run, &args.to).await?;
    let Exported { round, theta, parameters } = exported;
    let document = serde_json::json!({
        "folder": args.to, "round": round, "theta": theta, "parameters": parameters,
    });
    output.document(&document, || {
        format!(
            "{}: {parameters} parameters after {round} rounds, θ {theta}\n\
             transformers opens it with AutoModelForCausalLM.from_pretrained; \
             `manyhands generate {}` samples from it",
            args.to.display(),
            args.to.display()
        )
    });
    Ok(())
}

/// Writes the newest θ of a run to a folder.
pub(crate) async fn export_run(run: &str, to: &Path) -> Result<Exported, Failure> {
    if to.exists() {
        let reason = format!("{} exists already", to.display());
        return Err(Failure::new(
            "folder_exists",
            reason,
            "remove it, or choose another folder with --to",
        ));
    }
    let mut remote = Remote::connect(run_reference::parse(run)?.invitation).await?;
    let spec = remote.describe().await?;
    let status = remote.status().await?;
    let layout = layout(&spec.model);
    let theta_bytes = (layout.chunk_count() * CHUNK * 4) as u64;
    let theta = remote.blobs().get(status.theta, theta_bytes).await?;
    let tokenizer = tokenizer(&remote, &spec).await?;
    remote.close().await;
    let theta = vector::from_bytes(&theta, &layout)
        .explain("parameters", "ask the run's owner: its parameters are damaged")?;
    export(to, &spec.model, &theta, &tokenizer)
        .explain("export", "make room, or choose another folder with --to")?;
    Ok(Exported {
        round: status.round,
        theta: status.theta,
        parameters: layout.parameter_count().0,
    })
}

async fn tokenizer(remote: &Remote, spec: &RunSpec) -> Result<TextTokenizer, Failure> {
    const REMEDY: &str = "ask the run's owner: its data set is damaged";
    let manifest = remote.blobs().get(spec.data.manifest, MANIFEST_BYTES_MAX).await?;
    let manifest = Manifest::parse(&manifest).explain("data_set", REMEDY)?;
    let bytes = remote.blobs().get(manifest.tokenizer().digest, TOKENIZER_BYTES_MAX).await?;
    TextTokenizer::parse(bytes).explain("data_set", REMEDY)
}
