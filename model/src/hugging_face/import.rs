//! A folder of `transformers` to θ.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use manyhands_gradient::Layout;
use manyhands_gradient::layout::LayoutError;
use manyhands_gradient::vector::{self, ParseSafetensorsError};
use manyhands_proto::run_file::Architecture;
use serde::Deserialize;

use super::config::{ConfigError, LlamaConfig};

/// Text files above this are not what they are named.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// A model from elsewhere.
#[derive(Debug, Clone)]
pub struct Imported {
    /// As the folder's config has it; `context_length` is the longest the model was made for.
    pub architecture: Architecture,
    /// A canonical vector.
    pub theta: Vec<f32>,
    /// Its `tokenizer.json`, if there is one.
    pub tokenizer: Option<PathBuf>,
}

/// Why a folder was refused.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: expected at most {TEXT_BYTES_MAX} bytes, got {got}")]
    TooLong { path: PathBuf, got: u64 },
    #[error("{path}: {source}")]
    Config { path: PathBuf, source: ConfigError },
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("{path}: expected an index of weight files: {source}")]
    Index { path: PathBuf, source: serde_json::Error },
    #[error("{path}: {name:?} is not the name of a file in this folder")]
    WeightFileName { path: PathBuf, name: String },
    #[error(transparent)]
    Weights(#[from] ParseSafetensorsError),
}

/// Reads `config.json` and the weights (one `model.safetensors`, or several with an index).
///
/// # Errors
/// When a file cannot be read, the model is another than [`crate::Transformer`] computes, or a weight is
/// missing, unknown, of another shape or format, or not finite.
pub fn import(folder: &Path) -> Result<Imported, ImportError> {
    let config_path = folder.join("config.json");
    let architecture = LlamaConfig::parse(&read_text(&config_path)?)
        .and_then(|config| config.architecture())
        .map_err(|source| ImportError::Config { path: config_path, source })?;
    let layout = Layout::of(&architecture)?;
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|source| ImportError::Read { path: path.clone(), source })
    };
    let files = weight_files(folder)?.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let files: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
    let theta = vector::from_safetensors(&files, &layout)?;
    let tokenizer = Some(folder.join("tokenizer.json")).filter(|path| path.is_file());
    Ok(Imported { architecture, theta, tokenizer })
}

#[derive(Deserialize)]
struct WeightIndex {
    weight_map: BTreeMap<String, String>,
}

fn weight_files(folder: &Path) -> Result<BTreeSet<PathBuf>, ImportError> {
    let path = folder.join("model.safetensors.index.json");
    if !path.is_file() {
        return Ok([folder.join("model.safetensors")].into());
    }
    let index: WeightIndex = serde_json::from_slice(&read_text(&path)?)
        .map_err(|source| ImportError::Index { path: path.clone(), source })?;
    index
        .weight_map
        .into_values()
        .map(|name| {
            let plain = Path::new(&name).file_name().is_some_and(|file| file == name.as_str());
            if plain {
                Ok(folder.join(name))
            } else {
                Err(ImportError::WeightFileName { path: path.clone(), name })
            }
        })
        .collect()
}

fn read_text(path: &Path) -> Result<Vec<u8>, ImportError> {
    let read = |source| ImportError::Read { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(read)?.len();
    if size > TEXT_BYTES_MAX {
        return Err(ImportError::TooLong { path: path.to_owned(), got: size });
    }
    std::fs::read(path).map_err(read)
}
