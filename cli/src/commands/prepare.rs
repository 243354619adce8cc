//! `prepare`: text in, a data set's folder out.

mod dependencies;

use std::path::PathBuf;

use manyhands_model::data::{
    PrepareError, PrepareOptions, PrepareProgress, SourceSet, Split, TokenizerChoice, prepare,
};

use crate::failure::{Explain, Failure};
use crate::output::Output;
use crate::progress::Progress;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Files, and folders to walk. `.jsonl` and `.parquet` are read as such, everything else as text.
    #[arg(long, value_name = "PATH", required_unless_present = "dependencies", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Instead of --text, for a first try: about so much of the sources of the packages that this program
    /// was built from, where cargo keeps them.
    #[arg(long, value_name = "BYTES", conflicts_with = "text")]
    dependencies: Option<u64>,
    /// The data set's folder; must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Of a folder take only files that end so, as `rs,md` [default: all].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    extensions: Vec<String>,
    /// The field or column with the text, in JSONL and Parquet.
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_field: String,
    /// Train a tokenizer of so many tokens on the text: 256 bytes, an end of text, and what is frequent.
    #[arg(long, value_name = "TOKENS", default_value = "32768", conflicts_with = "tokenizer",
        value_parser = clap::value_parser!(u32).range(257..))]
    vocabulary: u32,
    /// Load a `tokenizer.json` instead of training one.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Train the tokenizer on a sample of at most so many bytes.
    #[arg(long, value_name = "BYTES", default_value = "67108864")]
    tokenizer_sample: u64,
    /// Hold out so many of a thousand documents for evaluation.
    #[arg(long, value_name = "N", default_value = "10")]
    held_out_per_mille: u32,
    /// Tokens of a shard.
    #[arg(long, value_name = "TOKENS", default_value = "4194304")]
    shard_tokens: u32,
    /// Use about so much of the text, chosen by hash [default: all].
    #[arg(long, value_name = "BYTES")]
    text_max: Option<u64>,
}

pub(crate) fn run(args: &Args, output: Output) -> Result<(), Failure> {
    let (text, extensions) = match args.dependencies {
        None => (args.text.clone(), args.extensions.clone()),
        Some(bytes) => {
            (dependencies::folders(bytes)?, dependencies::EXTENSIONS.map(str::to_owned).to_vec())
        }
    };
    let sources = SourceSet::find(&text, &extensions, &args.text_field)
        .explain("text", "name files or folders that exist and hold text")?;
    let tokenizer = match &args.tokenizer {
        Some(path) => TokenizerChoice::Load(path.clone()),
        None => TokenizerChoice::Train {
            vocabulary_size: args.vocabulary,
            sample_bytes_max: args.tokenizer_sample,
        },
    };
    let options = PrepareOptions {
        sources,
        tokenizer,
        folder: args.out.clone(),
        held_out_per_mille: args.held_out_per_mille,
        shard_tokens: args.shard_tokens,
        text_bytes_max: args.text_max,
    };
    let mut progress = Progress::default();
    let prepared = prepare(&options, &mut |at| match at {
        PrepareProgress::Sampling { bytes, bytes_total } => {
            progress.set("reading a sample for the tokenizer", bytes, bytes_total);
        }
        PrepareProgress::TrainingTokenizer => progress.set("training the tokenizer", 0, 1),
        PrepareProgress::Tokenizing { bytes, bytes_total, .. } => {
            progress.set("writing token shards", bytes, bytes_total);
        }
    });
    progress.clear();
    let prepared = prepared.map_err(failure)?;
    let manifest = prepared.dataset.manifest();
    let document = serde_json::json!({
        "folder": args.out,
        "digest": manifest.digest(),
        "text_bytes": prepared.text_bytes,
        "documents": manifest.documents(),
        "files_not_utf8": prepared.files_not_utf8,
        "vocabulary": manifest.tokenizer().vocabulary_size,
        "train_tokens": manifest.tokens(Split::Train),
        "held_out_tokens": manifest.tokens(Split::HeldOut),
        "shards": manifest.shards().len(),
        "unigram_loss": manifest.unigram_loss(),
    });
    output.document(&document, || {
        format!(
            "{}: {} documents, {} tokens to train on and {} held out, a vocabulary of {}\n\
             Token frequencies alone give a loss of {:.3} nats; a model has to beat that.\ndigest {}",
            args.out.display(),
            manifest.documents(),
            manifest.tokens(Split::Train),
            manifest.tokens(Split::HeldOut),
            manifest.tokenizer().vocabulary_size,
            manifest.unigram_loss(),
            manifest.digest()
        )
    });
    Ok(())
}

fn failure(error: PrepareError) -> Failure {
    let (code, remedy) = match &error {
        PrepareError::FolderExists(_) => {
            ("folder_exists", "remove it, or choose another with --out")
        }
        PrepareError::Option { .. } => ("option", "give a value in this range"),
        PrepareError::Document(_) => ("text", "correct or leave out that file"),
        PrepareError::Tokenizer(_) => ("tokenizer", "choose another vocabulary size or tokenizer"),
        PrepareError::Write { .. } => ("disk", "make room, or choose another folder with --out"),
        PrepareError::TooLittleText { .. } => {
            ("too_little_text", "give more documents, or raise --held-out-per-mille")
        }
        PrepareError::Manifest(_) => {
            ("data_set", "give less text, or larger shards with --shard-tokens")
        }
    };
    Failure::new(code, error, remedy)
}
