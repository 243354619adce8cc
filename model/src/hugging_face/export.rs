//! θ to a folder that `transformers` opens.

use std::path::{Path, PathBuf};

use manyhands_gradient::layout::LayoutError;
use manyhands_gradient::{Layout, vector};
use manyhands_proto::run_file::Architecture;

use super::config::LlamaConfig;
use crate::data::TextTokenizer;

/// Why a model was not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("{0} exists already: remove it or choose another folder")]
    FolderExists(PathBuf),
    #[error("expected θ of {expected} values, got {got}")]
    ThetaLength { expected: usize, got: usize },
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("cannot write the weights: {0}")]
    Weights(#[from] safetensors::SafeTensorError),
}

/// Writes the model and its tokenizer to `folder`, which appears whole or not at all.
///
/// # Errors
/// When the folder exists, θ is not this architecture's, or the disk refuses.
pub fn export(
    folder: &Path,
    architecture: &Architecture,
    theta: &[f32],
    tokenizer: &TextTokenizer,
) -> Result<(), ExportError> {
    if folder.exists() {
        return Err(ExportError::FolderExists(folder.to_owned()));
    }
    let layout = Layout::of(architecture)?;
    if theta.len() != layout.vector_len() {
        return Err(ExportError::ThetaLength { expected: layout.vector_len(), got: theta.len() });
    }
    let written = |path: &Path| {
        let path = path.to_owned();
        move |source| ExportError::Write { path, source }
    };
    let parent = match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(written(parent))?;
    let partial =
        tempfile::Builder::new().prefix(".export-").tempdir_in(parent).map_err(written(parent))?;

    for (name, bytes) in text_files(architecture, tokenizer) {
        let path = partial.path().join(name);
        std::fs::write(&path, bytes).map_err(written(&path))?;
    }
    let path = partial.path().join("model.safetensors");
    let weights = vector::to_safetensors(&layout, theta)?;
    std::fs::write(&path, weights).map_err(written(&path))?;

    std::fs::rename(partial.keep(), folder).map_err(written(folder))
}

fn text_files(
    architecture: &Architecture,
    tokenizer: &TextTokenizer,
) -> [(&'static str, Vec<u8>); 4] {
    let end_of_text = tokenizer.end_of_text();
    let name = tokenizer.end_of_text_name();
    let pretty = |value: &serde_json::Value| {
        let mut bytes = serde_json::to_vec_pretty(value).expect("a JSON value serialises");
        bytes.push(b'\n');
        bytes
    };
    let config = serde_json::to_value(LlamaConfig::of(architecture, end_of_text))
        .expect("plain values serialise");
    let generation = serde_json::json!({
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "do_sample": true,
        "temperature": 0.8,
        "top_k": 50,
    });
    let tokenizer_config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": architecture.context_length,
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": false,
    });
    [
        ("config.json", pretty(&config)),
        ("generation_config.json", pretty(&generation)),
        ("tokenizer_config.json", pretty(&tokenizer_config)),
        ("tokenizer.json", tokenizer.bytes().to_vec()),
    ]
}
