//! Folders as Hugging Face `transformers` writes and reads them: `config.json`, `tokenizer.json`,
//! `model.safetensors`. What [`export`] writes, [`import`] reads back to the bit.

mod config;
mod export;
mod import;

pub use config::ConfigError;
pub use export::{ExportError, export};
pub use import::{ImportError, Imported, import};
