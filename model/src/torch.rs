//! What every use of libtorch in this crate has to go through.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use tch::{Device, Kind, Tensor};

/// An exception of libtorch: out of memory, a kernel that the device does not have, a lost device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("libtorch failed: {0}")]
pub struct TorchError(String);

/// Runs `work`, and gives libtorch's exceptions as errors.
///
/// `tch` turns an exception into a panic in the methods that read well; a full GPU is the world's
/// failure, not ours, so that panic ends here. Every other panic goes on.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, TorchError> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| match torch_message(panic.as_ref()) {
        Some(message) => TorchError(message),
        None => resume_unwind(panic),
    })
}

/// The first line of libtorch's message, if `panic` is the `unwrap` of a `tch::TchError`.
fn torch_message(panic: &(dyn std::any::Any + Send)) -> Option<String> {
    let message = panic.downcast_ref::<String>()?;
    let rest = message.strip_prefix("called `Result::unwrap()` on an `Err` value: Torch(\"")?;
    let first_line = rest.split("\\n").next().unwrap_or(rest);
    Some(first_line.trim_end_matches("\")").to_owned())
}

/// Sets the number of threads of an operation, for work that this thread starts, and asserts that neither this
/// thread nor libtorch's flush subnormal numbers to zero: a replay elsewhere would then differ.
pub(crate) fn set_threads(threads: u32) {
    tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
    manyhands_gradient::assert_ieee();
    // Long enough that every thread of the pool gets a part of it.
    let elements = i64::from(threads.max(1)) << 16;
    let halved =
        Tensor::full([elements], f64::from(f32::MIN_POSITIVE), (Kind::Float, Device::Cpu)) * 0.5;
    let kept = halved.count_nonzero(None).int64_value(&[]);
    assert_eq!(kept, elements, "a thread of libtorch flushes subnormal numbers to zero");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_of_libtorch_becomes_an_error() {
        let two = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        let error = guarded(|| two.matmul(&two)).expect_err("2×3 times 2×3");
        assert!(error.to_string().starts_with("libtorch failed: mat1 and mat2"), "{error}");
    }

    #[test]
    fn subnormal_numbers_survive_in_every_thread() {
        set_threads(2);
    }
}
