//! Where this machine keeps what is its own: keys, runs, the chain.

use std::path::{Path, PathBuf};

use manyhands_proto::keys::{KeyFileError, NodeKey};

use crate::failure::{Explain, Failure};

const KEY_FILE: &str = "node.key";

/// `$MANYHANDS_HOME`, or else `~/.local/share/manyhands`.
pub(crate) fn home() -> Result<PathBuf, Failure> {
    if let Some(home) = std::env::var_os("MANYHANDS_HOME").filter(|home| !home.is_empty()) {
        return Ok(home.into());
    }
    let user = std::env::home_dir().ok_or_else(|| {
        Failure::new(
            "no_home",
            "this user has no home folder",
            "set MANYHANDS_HOME, or name a folder with --dir",
        )
    })?;
    Ok(user.join(".local/share/manyhands"))
}

/// The folder that was named, or the one for this purpose.
pub(crate) fn choose(
    named: Option<PathBuf>,
    purpose: impl AsRef<Path>,
) -> Result<PathBuf, Failure> {
    match named {
        Some(folder) => Ok(folder),
        None => Ok(home()?.join(purpose)),
    }
}

pub(crate) fn key_path(folder: &Path) -> PathBuf {
    folder.join(KEY_FILE)
}

/// The folder's key, made if there is none, and whether it was made.
pub(crate) fn key(folder: &Path) -> Result<(NodeKey, bool), Failure> {
    NodeKey::load_or_create(&key_path(folder)).map_err(key_failure)
}

/// The folder's key, which must be there.
pub(crate) fn existing_key(folder: &Path) -> Result<NodeKey, Failure> {
    let path = key_path(folder);
    if !path.exists() {
        let reason = format!("there is no key in {}", folder.display());
        return Err(Failure::new(
            "no_key",
            reason,
            "make one with `manyhands keys new`, or name its folder with --dir",
        ));
    }
    key(folder).map(|(key, _)| key)
}

fn key_failure(error: KeyFileError) -> Failure {
    let remedy = match &error {
        KeyFileError::Io { .. } => {
            "make the folder readable and writable, or choose another with --dir"
        }
        KeyFileError::Format { .. } => "restore it from a backup, or move it away to get a new key",
    };
    Failure::new("key_file", error, remedy)
}

/// A key for one conversation, of which nothing is kept.
pub(crate) fn passing_key() -> Result<NodeKey, Failure> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)
        .explain("no_randomness", "the operating system gives no random numbers")?;
    Ok(NodeKey::from_seed(seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_named_is_taken_as_it_is() {
        let named = PathBuf::from("/somewhere");
        assert_eq!(choose(Some(named.clone()), "worker"), Ok(named));
    }

    #[test]
    fn a_key_is_not_made_where_one_is_expected() {
        let folder = tempfile::tempdir().expect("folder");
        assert_eq!(existing_key(folder.path()).expect_err("no key").code, "no_key");
        assert!(key(folder.path()).expect("made").1);
        assert!(existing_key(folder.path()).is_ok());
    }
}
