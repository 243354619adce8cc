//! Every number that has a unit, as a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

unit! {
    /// Number of a round, from 0.
    Round(u32)
}
unit! {
    /// Milliseconds on the clock of whoever steps the machine; the only notion of time in `rules`.
    Tick(u64)
}
unit! {
    /// Number of a chunk (4,096 consecutive values) of the canonical vector.
    ChunkIndex(u32)
}
unit! {
    /// Number of scalar parameters.
    ParameterCount(u64)
}
unit! {
    /// Number of training tokens.
    TokenCount(u64)
}
unit! {
    /// Verified training tokens × the model's floating-point operations per token, in 10⁶ operations.
    WorkUnits(u64)
}

/// An amount in the chain's smallest unit (10⁻¹² of a token); printed in tokens.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Balance(pub u128);

impl Balance {
    /// A token has 10¹² of the smallest unit.
    pub const DECIMALS: usize = 12;
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = 10_u128.pow(Self::DECIMALS as u32);
        let (whole, mut part) = (self.0 / unit, self.0 % unit);
        write!(f, "{whole}")?;
        if part > 0 {
            let mut digits = Self::DECIMALS;
            while part.is_multiple_of(10) {
                (part, digits) = (part / 10, digits - 1);
            }
            write!(f, ".{part:0digits$}")?;
        }
        f.write_str(if self.0 == unit { " token" } else { " tokens" })
    }
}

impl Round {
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Tick {
    pub const fn after_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to `self`, 0 if `earlier` is later.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
