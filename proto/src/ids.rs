//! Names of things: 32 bytes each, printed and parsed as lower-case hex.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a textual id was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected 64 hexadecimal digits, got {got:?}")]
pub struct ParseIdError {
    got: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            pub const fn new(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first eight hexadecimal digits, for people.
            pub fn short(&self) -> String {
                hex::encode(&self.0[..4])
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = ParseIdError;

            fn try_from(bytes: &[u8]) -> Result<Self, ParseIdError> {
                let bytes = <[u8; 32]>::try_from(bytes)
                    .map_err(|_| ParseIdError { got: format!("{} bytes", bytes.len()) })?;
                Ok(Self(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let mut bytes = [0; 32];
                let digits = text.strip_prefix("0x").unwrap_or(text);
                hex::decode_to_slice(digits, &mut bytes)
                    .map_err(|_| ParseIdError { got: text.chars().take(80).collect() })?;
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

id! {
    /// The plain BLAKE3 hash of a byte string.
    Digest
}

id! {
    /// A participant: its ed25519 public key. The same key is its libp2p identity (so its peer
    /// id) and its chain account, so the three are bound by construction.
    NodeId
}

id! {
    /// A training run, as the chain knows it.
    RunId
}

impl Digest {
    /// BLAKE3 of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// BLAKE3 of `bytes` under a context string, for values that must not be confused with the
    /// hash of a file (BLAKE3's key derivation mode).
    pub fn derive(context: &str, bytes: &[u8]) -> Self {
        Self(blake3::derive_key(context, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text_form_and_refuses_another_length() {
        let id = Digest::of(b"manyhands");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(format!("0x{id}").parse(), Ok(id));
        assert!("abc".parse::<Digest>().is_err());
        assert!(NodeId::try_from(&[0_u8; 31][..]).is_err());
    }
}
