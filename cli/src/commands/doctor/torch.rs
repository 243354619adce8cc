//! The libtorch that this build links.

use manyhands_model::Device;
use manyhands_model::device::{DeviceChoice, numeric_class};
use manyhands_proto::run_file::Precision;

use super::{Check, State, gpu};

pub(super) fn checks() -> Vec<Check> {
    let auto = DeviceChoice::Auto.resolve();
    let device = auto.unwrap_or(Device::Cpu);
    let class = match numeric_class(device, Precision::F32, 1) {
        Ok(class) => class,
        Err(error) => {
            let found = format!("it trains nothing here: {error}");
            let remedy = "join with another --device";
            return vec![Check::wanting("libtorch", State::Warning, found, remedy)];
        }
    };
    let with_gpu = matches!(device, Device::Cuda(_) | Device::Mps);
    let found = class.to_string();
    let gpus = gpu::found();
    if !with_gpu && !gpus.is_empty() {
        let found = format!("{found}: a build for CPUs on a machine with a GPU");
        return vec![Check::wanting("libtorch", State::Warning, found, gpu::REBUILD)];
    }
    vec![Check::good("libtorch", found)]
}
