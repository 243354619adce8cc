//! Text for a first try: the sources of the packages in this project's Cargo.lock. They are on every machine
//! that has built it.

use std::path::{Path, PathBuf};

use manyhands_proto::Digest;
use serde::Deserialize;

use crate::failure::{Explain, Failure};

const LOCK: &str = include_str!("../../../../Cargo.lock");
pub(super) const EXTENSIONS: [&str; 2] = ["rs", "md"];
/// A package with more is generated code: bindings and tables.
const PACKAGE_BYTES_MAX: u64 = 700_000;

#[derive(Debug, Deserialize)]
struct Lock {
    package: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    /// None for the packages of this workspace.
    source: Option<String>,
}

/// Folders of packages that together hold so much text, chosen by the hashes of their names.
pub(super) fn folders(text_bytes_min: u64) -> Result<Vec<PathBuf>, Failure> {
    let lock: Lock =
        toml::from_str(LOCK).explain("dependencies", "report this: Cargo.lock is damaged")?;
    let registries = registries()?;
    let mut packages: Vec<Package> =
        lock.package.into_iter().filter(|package| package.source.is_some()).collect();
    packages.sort_by_key(|package| Digest::of(package.name.as_bytes()));
    let mut chosen = Vec::new();
    let mut bytes = 0;
    for package in &packages {
        let name = format!("{}-{}", package.name, package.version);
        let Some(folder) =
            registries.iter().map(|root| root.join(&name)).find(|path| path.is_dir())
        else {
            continue;
        };
        let size = text_bytes(&folder);
        if size == 0 || size > PACKAGE_BYTES_MAX {
            continue;
        }
        bytes += size;
        chosen.push(folder);
        if bytes >= text_bytes_min {
            return Ok(chosen);
        }
    }
    let reason = format!(
        "the sources of this project's dependencies hold {bytes} bytes of text in {} packages, {text_bytes_min} are wanted",
        chosen.len()
    );
    Err(Failure::new(
        "dependencies",
        reason,
        "fetch them with `cargo fetch --locked` in the clone, or name other text with --text",
    ))
}

/// Where cargo unpacks the packages of each registry.
fn registries() -> Result<Vec<PathBuf>, Failure> {
    let cargo = std::env::var_os("CARGO_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    let cargo =
        cargo.or_else(|| std::env::home_dir().map(|home| home.join(".cargo"))).unwrap_or_default();
    let sources = cargo.join("registry/src");
    let folders = std::fs::read_dir(&sources).map_err(|error| {
        let reason = format!("cannot look for cargo's sources in {}: {error}", sources.display());
        Failure::new("dependencies", reason, "set CARGO_HOME, or name other text with --text")
    })?;
    let mut folders: Vec<_> = folders.filter_map(|entry| Some(entry.ok()?.path())).collect();
    folders.sort();
    Ok(folders)
}

/// Bytes of the files that would be read.
fn text_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| {
            let path = entry.path();
            let Ok(kind) = entry.file_type() else { return 0 };
            let extension = path.extension().and_then(|extension| extension.to_str());
            if kind.is_dir() {
                text_bytes(&path)
            } else if kind.is_file() && extension.is_some_and(|it| EXTENSIONS.contains(&it)) {
                entry.metadata().map_or(0, |metadata| metadata.len())
            } else {
                0
            }
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_file_of_this_build_is_read() {
        let lock: Lock = toml::from_str(LOCK).expect("Cargo.lock");
        assert!(
            lock.package.iter().any(|package| package.name == "tch" && package.source.is_some())
        );
        assert!(
            lock.package
                .iter()
                .any(|package| package.name == "manyhands-proto" && package.source.is_none())
        );
    }

    #[test]
    fn only_text_is_counted() {
        let folder = tempfile::tempdir().expect("folder");
        std::fs::create_dir(folder.path().join("src")).expect("folder");
        std::fs::write(folder.path().join("src/lib.rs"), "1234567").expect("write");
        std::fs::write(folder.path().join("README.md"), "123").expect("write");
        std::fs::write(folder.path().join("data.bin"), "12345").expect("write");
        assert_eq!(text_bytes(folder.path()), 10);
    }
}
