//! Which device to use, what numerics it has, how fast it is, what it needs.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use manyhands_gradient::Layout;
use manyhands_gradient::layout::LayoutError;
use manyhands_proto::message::{DeviceKind, NumericClass};
use manyhands_proto::run_file::{Architecture, Precision, Training};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::determinism;
use crate::fingerprint::fingerprint;
use crate::metrics;
use crate::optimizer::AdamW;
use crate::torch::{TorchError, guarded, set_threads};
use crate::trainer::TrainError;
use crate::transformer::{Transformer, tokens_tensor};

/// What torch-sys 0.26 builds against; its build script refuses any other.
const LIBTORCH_VERSION: &str = "2.13.0";

/// A device as somebody names it: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChoice {
    /// The first CUDA device, else MPS, else the CPU.
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
    Mps,
}

/// Why a device was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    #[error("expected a device auto, cpu, cuda, cuda:N or mps, got {got:?}")]
    Name { got: String },
    #[error("expected CUDA device {wanted} to be there, libtorch sees {there}")]
    NoCuda { wanted: usize, there: usize },
    #[error("expected an Apple GPU (MPS), libtorch sees none")]
    NoMps,
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Mps => f.write_str("mps"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Name { got: name.chars().take(40).collect() };
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "mps" => Ok(Self::Mps),
            other => {
                let index = other.strip_prefix("cuda:").ok_or_else(unknown)?;
                Ok(Self::Cuda(index.parse().map_err(|_| unknown())?))
            }
        }
    }
}

impl DeviceChoice {
    /// The device, if it is there.
    ///
    /// # Errors
    /// When the device that was named is not.
    pub fn resolve(self) -> Result<Device, DeviceError> {
        let cuda_devices = || {
            if tch::Cuda::is_available() { tch::Cuda::device_count().max(0) as usize } else { 0 }
        };
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(wanted) if wanted < cuda_devices() => Ok(Device::Cuda(wanted)),
            Self::Cuda(wanted) => Err(DeviceError::NoCuda { wanted, there: cuda_devices() }),
            Self::Mps if tch::utils::has_mps() => Ok(Device::Mps),
            Self::Mps => Err(DeviceError::NoMps),
            Self::Auto if cuda_devices() > 0 => Ok(Device::Cuda(0)),
            Self::Auto if tch::utils::has_mps() => Ok(Device::Mps),
            Self::Auto => Ok(Device::Cpu),
        }
    }
}

/// The class of this process on `device`; trains a very small model there for its fingerprint.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// On a device that no [`DeviceChoice`] stands for.
pub fn numeric_class(
    device: Device,
    precision: Precision,
    threads: u32,
) -> Result<NumericClass, TrainError> {
    let fingerprint = fingerprint(device, precision, threads)?;
    let deterministic = determinism::is_on();
    let (device, device_name, kernels) = match device {
        // The processor's own name would tell machines apart that compute the same.
        Device::Cpu if deterministic => {
            (DeviceKind::Cpu, std::env::consts::ARCH.to_owned(), cpu_kernels())
        }
        Device::Cpu => (DeviceKind::Cpu, cpu_name(), cpu_kernels()),
        Device::Cuda(index) => (DeviceKind::Cuda, cuda_name(index), "none".to_owned()),
        Device::Mps => (DeviceKind::Mps, cpu_name(), "none".to_owned()),
        Device::Vulkan => panic!("nobody can choose Vulkan"),
    };
    Ok(NumericClass {
        libtorch: LIBTORCH_VERSION.to_owned(),
        device,
        device_name,
        kernels,
        precision,
        threads,
        deterministic,
        fingerprint,
    })
}

fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find(|line| line.starts_with("model name") || line.starts_with("CPU part"))
        .and_then(|line| line.split_once(':'))
        .map(|(_, name)| name.trim().to_owned());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// tch does not tell a GPU's name; its driver's own tool does.
fn cuda_name(index: usize) -> String {
    std::process::Command::new("nvidia-smi")
        .args(["--query-gpu=name", "--format=csv,noheader", &format!("--id={index}")])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .map_or_else(|| "unknown".to_owned(), |name| name.trim().to_owned())
}

/// The kernel set that libtorch picks: what `ATEN_CPU_CAPABILITY` says, else the best the processor has
/// (by the same features as ATen's `compute_cpu_capability`).
pub fn cpu_kernels() -> String {
    if let Ok(forced) = std::env::var("ATEN_CPU_CAPABILITY")
        && ["default", "avx2", "avx512"].contains(&forced.as_str())
    {
        return forced;
    }
    #[cfg(target_arch = "x86_64")]
    {
        let avx512 = is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        if avx512 && avx2 {
            return "avx512".to_owned();
        }
        if avx2 {
            return "avx2".to_owned();
        }
    }
    "default".to_owned()
}

/// Bytes that training a model takes, estimated from its shapes; the estimate is high rather than low.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Weights, gradient, moments, and what a step works on.
    pub parameter_bytes: u64,
    /// What the backward pass keeps of the forward pass of one micro-batch.
    pub activation_bytes: u64,
    /// On the host: θ at both ends of the round, moments, and a buffer for the codec's error.
    pub host_bytes: u64,
}

impl MemoryNeed {
    /// # Errors
    /// When the architecture has no layout.
    pub fn of(
        architecture: &Architecture,
        micro_batch_sequences: u32,
        precision: Precision,
    ) -> Result<Self, LayoutError> {
        let values = Layout::of(architecture)?.vector_len() as u64;
        let tokens = u64::from(micro_batch_sequences) * u64::from(architecture.context_length);
        let [hidden, feed_forward, vocabulary, layers] = [
            architecture.hidden_size,
            architecture.feed_forward_size,
            architecture.vocabulary_size,
            architecture.layers,
        ]
        .map(u64::from);
        let (value_bytes, copy_bytes) = match precision {
            Precision::F32 => (4, 0),
            Precision::Bf16 => (2, 2),
        };
        // Kept per token and layer: the residual stream, two norms with their inputs, queries, keys, values
        // before and after rotation, attention's output (about 16 hidden), and four feed-forward tensors.
        let layer_values = 16 * hidden + 4 * feed_forward;
        // Logits, their f32 copy, log-probabilities and the gradient of each.
        let logit_bytes = vocabulary * 16;
        Ok(Self {
            // θ, gradient, m, v; a step needs three more for a moment.
            parameter_bytes: values * (7 * 4 + copy_bytes),
            activation_bytes: tokens * (layers * layer_values * value_bytes + logit_bytes),
            // θ_t, θ_H, Δ and e in f32; m and v in f32 while they are rounded.
            host_bytes: values * 6 * 4,
        })
    }

    /// What the device itself has to hold.
    pub fn device_bytes(&self) -> u64 {
        self.parameter_bytes + self.activation_bytes
    }

    /// What a machine without a GPU has to hold.
    pub fn total_bytes(&self) -> u64 {
        self.device_bytes() + self.host_bytes
    }
}

/// A measured speed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    pub tokens_per_second: f64,
    pub steps: u32,
}

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct SpeedTask<'a> {
    pub architecture: &'a Architecture,
    pub training: &'a Training,
    pub device: Device,
    pub threads: u32,
    /// Measure for about so long, at least one step.
    pub duration: Duration,
}

/// Why a speed could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum SpeedError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Torch(#[from] TorchError),
}

/// Trains the run's own model on made-up tokens, one micro-batch per step, and counts targets per second.
///
/// # Errors
/// When the architecture has no layout, or the device fails (out of memory).
pub fn measure_speed(task: &SpeedTask<'_>) -> Result<Speed, SpeedError> {
    let layout = Layout::of(task.architecture)?;
    let speed = guarded(|| {
        set_threads(task.threads);
        // All zeros would make every gradient vanish, and vanished numbers can be slow to compute with.
        let theta: Vec<f32> =
            (0..layout.vector_len()).map(|index| (index % 17) as f32 * 1e-3 - 8e-3).collect();
        let model = Transformer::with_layout(
            task.architecture,
            task.training.precision,
            &layout,
            &theta,
            task.device,
        );
        let mut optimizer = AdamW::fresh(&layout, task.device);
        let sequences = task.training.micro_batch_sequences;
        let tokens_bt = made_up_tokens(task.architecture, sequences, task.device);
        let mut step = || {
            let loss = model.loss_sum(&tokens_bt, &tokens_bt);
            let gradients =
                Tensor::run_backward(&[&loss], model.parameters().weights(), false, false);
            optimizer.step(model.parameters(), &gradients, task.training, 0.0);
            // Reading a number waits for the device.
            loss.double_value(&[])
        };
        // The first steps allocate and choose kernels.
        step();
        step();
        let start = Instant::now();
        let mut steps = 0;
        while steps == 0 || start.elapsed() < task.duration {
            step();
            steps += 1;
        }
        let tokens =
            f64::from(steps) * f64::from(sequences) * f64::from(task.architecture.context_length);
        Speed { tokens_per_second: tokens / start.elapsed().as_secs_f64(), steps }
    })?;
    metrics::measured_speed(speed.tokens_per_second);
    Ok(speed)
}

fn made_up_tokens(architecture: &Architecture, sequences: u32, device: Device) -> Tensor {
    let vocabulary = architecture.vocabulary_size;
    let sequences: Vec<Vec<u32>> = (0..sequences)
        .map(|sequence| {
            (0..architecture.context_length)
                .map(|position| (sequence.wrapping_mul(31) + position.wrapping_mul(7)) % vocabulary)
                .collect()
        })
        .collect();
    tokens_tensor(&sequences, device)
}

/// The pause after `busy` time of work that brings a machine's load down to `load_max` (0 to 1).
pub fn pause_for_load(busy: Duration, load_max: f64) -> Duration {
    // Below 1 % the run would rather do without the worker.
    let load = load_max.clamp(0.01, 1.0);
    busy.mul_f64(1.0 / load - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert!(matches!("gpu".parse::<DeviceChoice>(), Err(DeviceError::Name { .. })));
        assert!(matches!("cuda:x".parse::<DeviceChoice>(), Err(DeviceError::Name { .. })));
        assert_eq!(DeviceChoice::Cpu.resolve(), Ok(Device::Cpu));
    }

    #[test]
    fn a_quarter_of_the_load_is_three_parts_of_rest() {
        assert_eq!(pause_for_load(Duration::from_millis(100), 0.25), Duration::from_millis(300));
        assert_eq!(pause_for_load(Duration::from_millis(100), 1.0), Duration::ZERO);
    }

    #[test]
    fn the_class_of_this_machine_tells_precisions_and_threads_apart() {
        let class = |precision, threads| {
            numeric_class(Device::Cpu, precision, threads).expect("a CPU trains")
        };
        let own = class(Precision::F32, 2);
        assert!(own.fingerprint.is_some(), "a CPU comes to the same bits twice");
        assert_eq!(own, class(Precision::F32, 2));
        assert_ne!(own.fingerprint, class(Precision::Bf16, 2).fingerprint);
        assert_ne!(own, class(Precision::F32, 1));
    }
}
