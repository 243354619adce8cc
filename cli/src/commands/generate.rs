//! `generate`: text from an exported model.

use std::io::Write;
use std::path::{Path, PathBuf};

use manyhands_model::data::TextTokenizer;
use manyhands_model::device::DeviceChoice;
use manyhands_model::hugging_face::import;
use manyhands_model::{GenerateOptions, Transformer, generate};
use manyhands_proto::run_file::Precision;

use crate::failure::{Explain, Failure};
use crate::output::Output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A folder that `export` wrote, or another Llama-architecture model of Hugging Face.
    folder: PathBuf,
    /// The text to continue.
    #[arg(long, value_name = "TEXT", default_value = "")]
    prompt: String,
    /// Tokens to add at most.
    #[arg(long, value_name = "N", default_value = "200")]
    tokens: u32,
    /// 0 takes the likeliest token every time.
    #[arg(long, value_name = "T", default_value = "0.8")]
    temperature: f32,
    /// Sample among so many likeliest tokens; 0: all.
    #[arg(long, value_name = "K", default_value = "50")]
    top_k: u32,
    /// Another seed, another text.
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// auto (the first of CUDA, MPS, CPU that is there), cpu, cuda, cuda:N or mps.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
}

pub(crate) fn run(args: &Args, output: Output) -> Result<(), Failure> {
    let (model, tokenizer) = load(&args.folder, args.device)?;
    let options = GenerateOptions {
        tokens_max: args.tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        seed: args.seed,
    };
    let streams = !output.is_json();
    if streams {
        say(&args.prompt);
    }
    let text = generate(&model, &tokenizer, &args.prompt, &options, &mut |piece| {
        if streams {
            say(piece);
        }
    })
    .explain("generate", "choose other options, or export the model again")?;
    if streams {
        say("\n");
        return Ok(());
    }
    output.document(&serde_json::json!({ "prompt": args.prompt, "text": text }), String::new);
    Ok(())
}

/// The model and the tokenizer of a folder.
fn load(folder: &Path, device: DeviceChoice) -> Result<(Transformer, TextTokenizer), Failure> {
    const REMEDY: &str = "name a folder that `manyhands export` wrote";
    let device = device.resolve().explain("no_device", "choose another with --device")?;
    let imported = import(folder).explain("model_folder", REMEDY)?;
    let Some(path) = imported.tokenizer else {
        let reason = format!("{} has no tokenizer.json", folder.display());
        return Err(Failure::new("model_folder", reason, REMEDY));
    };
    let tokenizer = TextTokenizer::open(&path).explain("model_folder", REMEDY)?;
    let model = Transformer::new(&imported.architecture, Precision::F32, &imported.theta, device)
        .explain("model_folder", REMEDY)?;
    Ok((model, tokenizer))
}

fn say(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}
