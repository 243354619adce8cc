//! Writes the logits of an imported folder as JSON, for `scripts/check-transformers` to compare.
//!
//! ```text
//! print_logits make FOLDER   writes a small model with made-up weights
//! print_logits FOLDER        prints {"tokens": [[…]], "logits": [[[…]]]}
//! ```

use std::path::Path;

use anyhow::{Context, bail};
use manyhands_gradient::{Layout, initial_theta};
use manyhands_model::data::TextTokenizer;
use manyhands_model::hugging_face::{export, import};
use manyhands_model::{Device, Transformer};
use manyhands_proto::run_file::{Architecture, Precision};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["make", folder] => make(Path::new(folder)),
        [folder] => print(Path::new(folder)),
        _ => bail!("expected `make FOLDER` or `FOLDER`"),
    }
}

/// Grouped heads, an untied head and a context of 256: everything that could be got wrong.
fn make(folder: &Path) -> anyhow::Result<()> {
    let architecture = Architecture {
        vocabulary_size: 512,
        hidden_size: 96,
        layers: 3,
        heads: 6,
        key_value_heads: 2,
        feed_forward_size: 200,
        context_length: 256,
        rope_theta: 50_000.0,
        norm_epsilon: 1e-5,
        tie_embeddings: false,
    };
    // Five times the usual size: at it a fresh model's logits hardly depend on anything.
    let layout = Layout::of(&architecture)?;
    let theta: Vec<f32> =
        initial_theta(&layout, &architecture, 1).iter().map(|weight| weight * 5.0).collect();
    let texts = (0..300).map(|number| format!("many hands make light work, {number} of them\n"));
    export(folder, &architecture, &theta, &TextTokenizer::train(400, texts)?)?;
    Ok(())
}

fn print(folder: &Path) -> anyhow::Result<()> {
    let imported = import(folder)?;
    let architecture = &imported.architecture;
    let model = Transformer::new(architecture, Precision::F32, &imported.theta, Device::Cpu)?;
    let length = architecture.context_length.min(64);
    let tokens: Vec<Vec<u32>> = (0..2_u32)
        .map(|row| {
            (0..length)
                .map(|at| (at * at * 7 + at * 3 + row * 101) % architecture.vocabulary_size)
                .collect()
        })
        .collect();
    let flat = model.logits(&tokens);
    let logits: Vec<Vec<&[f32]>> = flat
        .chunks(length as usize * architecture.vocabulary_size as usize)
        .map(|sequence| sequence.chunks(architecture.vocabulary_size as usize).collect())
        .collect();
    let tokenizer =
        imported.tokenizer.as_deref().context("expected a tokenizer.json in the folder")?;
    let text = "many hands make light work, naïve 🙂";
    let encoded = TextTokenizer::open(tokenizer)?.encode(text)?;
    let report =
        serde_json::json!({"tokens": tokens, "logits": logits, "text": text, "encoded": encoded});
    println!("{report}");
    Ok(())
}
