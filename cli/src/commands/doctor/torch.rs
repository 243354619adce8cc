//! The libtorch that this build links.

use manyhands_model::Device;
use manyhands_model::device::{DeviceChoice, numeric_class};
use manyhands_proto::run_file::Precision;

use super::{Check, State, gpu};

pub(super) fn checks() -> Vec<Check> {
    let auto = DeviceChoice::Auto.resolve();
    let device = auto.unwrap_or(Device::Cpu);
    let class = numeric_class(device, Precision::F32, 1);
    let with_gpu = matches!(device, Device::Cuda(_) | Device::Mps);
    let found = format!("{} on {} ({})", class.libtorch, class.device.name(), class.device_name);
    let gpus = gpu::found();
    if !with_gpu && !gpus.is_empty() {
        let found = format!("{found}: a build for CPUs on a machine with a GPU");
        return vec![Check::wanting("libtorch", State::Warning, found, gpu::REBUILD)];
    }
    vec![Check::good("libtorch", found)]
}
