//! A node's one key: its peer identity, its chain account and its signature.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use crate::NodeId;

/// An ed25519 key pair. Its public half is the [`NodeId`].
#[derive(Clone)]
pub struct NodeKey(SigningKey);

/// Why a key file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("cannot read or write the key file {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "the key file {path} does not hold 64 hexadecimal digits; restore it from a backup or move it away to get a new key"
    )]
    Format { path: PathBuf },
}

impl NodeKey {
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(SigningKey::from_bytes(&seed))
    }

    /// The secret: whoever has it is this node and owns its balance.
    pub fn seed(&self) -> [u8; 32] {
        self.0.to_bytes()
    }

    pub fn node_id(&self) -> NodeId {
        NodeId::new(self.0.verifying_key().to_bytes())
    }

    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }

    /// Reads a key file, or makes one from the operating system's randomness, readable by its
    /// owner alone. Returns whether it was made.
    ///
    /// # Errors
    /// [`KeyFileError`]; an existing file is never overwritten.
    pub fn load_or_create(path: &Path) -> Result<(Self, bool), KeyFileError> {
        let io_error = |source| KeyFileError::Io { path: path.to_owned(), source };
        match fs::read_to_string(path) {
            Ok(text) => {
                let mut seed = [0; 32];
                hex::decode_to_slice(text.trim(), &mut seed)
                    .map_err(|_| KeyFileError::Format { path: path.to_owned() })?;
                Ok((Self::from_seed(seed), false))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut seed = [0; 32];
                getrandom::fill(&mut seed).map_err(|error| io_error(io::Error::other(error)))?;
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent).map_err(io_error)?;
                }
                write_private(path, &hex::encode(seed)).map_err(io_error)?;
                Ok((Self::from_seed(seed), true))
            }
            Err(error) => Err(io_error(error)),
        }
    }
}

impl std::fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeKey({})", self.node_id().short())
    }
}

/// Whether `signature` is `signer`'s over `message`. Strict: no malleable or small-order keys.
pub fn verify(signer: &NodeId, message: &[u8], signature: &[u8; 64]) -> bool {
    VerifyingKey::from_bytes(signer.as_bytes())
        .is_ok_and(|key| key.verify_strict(message, &Signature::from_bytes(signature)).is_ok())
}

/// Written beside and renamed, so that a crash leaves either no key or a whole one.
fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&beside)?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_binds_signer_and_message() {
        let key = NodeKey::from_seed([7; 32]);
        let signature = key.sign(b"round 3");
        assert!(verify(&key.node_id(), b"round 3", &signature));
        assert!(!verify(&key.node_id(), b"round 4", &signature));
        assert!(!verify(&NodeKey::from_seed([8; 32]).node_id(), b"round 3", &signature));
        assert!(!verify(&NodeId::new([0; 32]), b"round 3", &signature));
    }

    #[test]
    fn a_key_file_is_made_once_and_a_broken_one_is_left_alone() {
        let folder = std::env::temp_dir().join(format!("manyhands-keys-{}", std::process::id()));
        let path = folder.join("node.key");
        let (made, new) = NodeKey::load_or_create(&path).expect("made");
        let (again, new_again) = NodeKey::load_or_create(&path).expect("read");
        assert!(new && !new_again);
        assert_eq!(made.node_id(), again.node_id());
        fs::write(&path, "nonsense").expect("write");
        assert!(matches!(NodeKey::load_or_create(&path), Err(KeyFileError::Format { .. })));
        assert_eq!(fs::read_to_string(&path).expect("read"), "nonsense");
        fs::remove_dir_all(folder).expect("clean up");
    }
}
