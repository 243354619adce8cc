//! `export`: a run's newest parameters as a folder of Hugging Face transformers.

use std::path::{Path, PathBuf};

use manyhands_audit::{Evidence, FolderEvidence, newest_record};
use manyhands_gradient::{CHUNK, vector};
use manyhands_model::data::{Manifest, TextTokenizer};
use manyhands_model::hugging_face::export;
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, Round};
use manyhands_rules::record::RoundRecord;
use manyhands_rules::reward::layout;

use crate::failure::{Explain, Failure};
use crate::output::Output;
use crate::remote::Remote;
use crate::run_reference::{self, LaunchFolder, RunReference};

const DATA_REMEDY: &str = "ask the run's owner: its data set is damaged";
const FOLDER_REMEDY: &str =
    "name the folder of a run's launch, whole, or the run by its invitation";
/// Records of a round hold a commitment and a result of every worker: kilobytes each.
const RECORD_BYTES_MAX: u64 = 64 << 20;
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

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
            "{}: {parameters} parameters, θ {theta}\n\
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
        return Err(Failure::new("folder_exists", reason, "choose another folder with --to"));
    }
    let RunReference { invitation, folder } = run_reference::parse(run)?;
    let found = match folder {
        Some(folder) => in_folder(&folder).await?,
        None => at_coordinator(Remote::connect(invitation).await?).await?,
    };
    let Found { spec, round, theta, theta_bytes, tokenizer } = found;
    let layout = layout(&spec.model);
    let values = vector::from_bytes(&theta_bytes, &layout)
        .explain("parameters", "ask the run's owner: its parameters are damaged")?;
    let tokenizer = TextTokenizer::parse(tokenizer).explain("data_set", DATA_REMEDY)?;
    export(to, &spec.model, &values, &tokenizer)
        .explain("export", "make room, or choose another folder with --to")?;
    Ok(Exported { round, theta, parameters: layout.parameter_count().0 })
}

/// What an export is made of.
struct Found {
    spec: RunSpec,
    round: Round,
    theta: Digest,
    theta_bytes: Vec<u8>,
    tokenizer: Vec<u8>,
}

async fn at_coordinator(mut remote: Remote) -> Result<Found, Failure> {
    let spec = remote.describe().await?;
    let status = remote.status().await?;
    let blobs = remote.blobs();
    let theta_bytes = blobs.get(status.theta, theta_bytes_of(&spec)).await?;
    let manifest = blobs.get(spec.data.manifest, MANIFEST_BYTES_MAX).await?;
    let tokenizer = blobs.get(tokenizer_of(&manifest)?, TOKENIZER_BYTES_MAX).await?;
    remote.close().await;
    Ok(Found { spec, round: status.round, theta: status.theta, theta_bytes, tokenizer })
}

/// From what `launch` keeps; no coordinator needs to run.
async fn in_folder(folder: &Path) -> Result<Found, Failure> {
    let LaunchFolder { spec, served } = LaunchFolder::read(folder)?;
    let blobs = FolderEvidence::new(folder.join("blobs"));
    let newest = newest_record(&folder.join("records")).explain("run_folder", FOLDER_REMEDY)?;
    let (round, theta) = match newest {
        None => (Round(0), spec.data.theta),
        Some(digest) => {
            let record = blob(&blobs, digest, RECORD_BYTES_MAX).await?;
            let record = RoundRecord::parse(&record).explain("run_folder", FOLDER_REMEDY)?;
            (record.round.next(), record.theta_next)
        }
    };
    let theta_bytes = blob(&blobs, theta, theta_bytes_of(&spec)).await?;
    let read = |digest: Digest| {
        let file = served.iter().find(|file| file.digest == digest);
        let path = &file.ok_or_else(|| missing(digest))?.path;
        let bytes = std::fs::read(path).map_err(|error| {
            Failure::new(
                "data_set",
                format!("cannot read {}: {error}", path.display()),
                DATA_REMEDY,
            )
        })?;
        if Digest::of(&bytes) == digest { Ok(bytes) } else { Err(missing(digest)) }
    };
    let tokenizer = read(tokenizer_of(&read(spec.data.manifest)?)?)?;
    Ok(Found { spec, round, theta, theta_bytes, tokenizer })
}

async fn blob(blobs: &FolderEvidence, digest: Digest, bytes_max: u64) -> Result<Vec<u8>, Failure> {
    let found = blobs.blob(digest, bytes_max).await.explain("run_folder", FOLDER_REMEDY)?;
    found.ok_or_else(|| missing(digest))
}

fn missing(digest: Digest) -> Failure {
    Failure::new("run_folder", format!("the run's folder lacks {digest}"), FOLDER_REMEDY)
}

fn theta_bytes_of(spec: &RunSpec) -> u64 {
    (layout(&spec.model).chunk_count() * CHUNK * 4) as u64
}

fn tokenizer_of(manifest: &[u8]) -> Result<Digest, Failure> {
    let manifest = Manifest::parse(manifest).explain("data_set", DATA_REMEDY)?;
    Ok(manifest.tokenizer().digest)
}
