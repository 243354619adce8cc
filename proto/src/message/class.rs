//! What decides the bits of a computation, as a machine says of itself.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::run_file::Precision;

/// Two nodes of equal class that has a fingerprint agree to the bit as far as the fingerprint's training went; others,
/// and at other sizes, to within the tolerance of their kinds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NumericClass {
    /// Its version.
    pub libtorch: String,
    pub device: DeviceKind,
    /// The processor's name, as its maker writes it.
    pub device_name: String,
    /// Vector instructions of libtorch's own CPU kernels: `default`, `avx2`, `avx512`, or `none` on a GPU.
    pub kernels: String,
    pub precision: Precision,
    /// CPU threads of an operation.
    pub threads: u32,
    /// Nothing is computed in an order that changes, and on a CPU by no kernel that only some processors have.
    pub deterministic: bool,
    /// Digest of what a fixed short training came to; none where it does not come to the same bits twice.
    pub fingerprint: Option<Digest>,
}

/// Devices of one kind add up in orders that differ by little; those of two kinds by more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    Cpu,
    Cuda,
    Mps,
}

impl DeviceKind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Mps => "mps",
        }
    }

    pub(super) fn of_name(name: &str) -> Option<Self> {
        [Self::Cpu, Self::Cuda, Self::Mps].into_iter().find(|kind| kind.name() == name)
    }
}

impl NumericClass {
    /// A machine of that kind of which nothing else is known.
    pub fn unknown(device: DeviceKind) -> Self {
        let unknown = || "unknown".to_owned();
        Self {
            libtorch: unknown(),
            device,
            device_name: unknown(),
            kernels: unknown(),
            precision: Precision::F32,
            threads: 1,
            deterministic: false,
            fingerprint: None,
        }
    }
}

impl fmt::Display for NumericClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (device, precision) = (self.device.name(), precision_name(self.precision));
        let Self { libtorch, device_name, kernels, threads, .. } = self;
        write!(
            f,
            "libtorch {libtorch}, {device} ({device_name}), kernels {kernels}, {precision}, {threads} threads"
        )?;
        if self.deterministic {
            write!(f, ", deterministic")?;
        }
        match self.fingerprint {
            Some(fingerprint) => write!(f, ", fingerprint {}", fingerprint.short()),
            None => write!(f, ", not the same bits twice"),
        }
    }
}

pub(super) const fn precision_name(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    }
}
