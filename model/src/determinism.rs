//! A mode in which machines of a class compute the same bits, at a cost in speed.
//!
//! On a CPU libtorch and MKL pick kernels by the processor. Here libtorch's are those of any x86-64 with AVX2, and MKL's
//! those that it has for compatibility: those it has for AVX2 came to other bits on Intel than on AMD. On CUDA the kernels
//! that add in no fixed order are replaced by ones that do.
//!
//! What libtorch and its libraries read once, when they are loaded, has to be in the environment of the process
//! ([`ENVIRONMENT`]); the rest is switched on by [`switch_on`].

use std::ffi::c_void;

/// Variables that a process needs from its start.
#[cfg(target_arch = "x86_64")]
pub const ENVIRONMENT: [(&str, &str); 4] = [
    ("ATEN_CPU_CAPABILITY", "avx2"),
    ("MKL_CBWR", "COMPATIBLE"),
    ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    ("NVIDIA_TF32_OVERRIDE", "0"),
];
/// Variables that a process needs from its start.
#[cfg(not(target_arch = "x86_64"))]
pub const ENVIRONMENT: [(&str, &str); 2] =
    [("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), ("NVIDIA_TF32_OVERRIDE", "0")];

/// Why numerics cannot be deterministic here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotDeterministic {
    #[error("expected {name}={value} in the environment from the start of the process")]
    Environment { name: &'static str, value: &'static str },
    #[error("expected a processor with AVX2 and FMA, this one has not both")]
    Processor,
}

/// Whether this process was started with all of [`ENVIRONMENT`].
///
/// # Errors
/// With the first variable that it was not started with.
pub fn check_environment() -> Result<(), NotDeterministic> {
    let is_set = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found == value);
    match ENVIRONMENT.into_iter().find(|(name, value)| !is_set(name, value)) {
        Some((name, value)) => Err(NotDeterministic::Environment { name, value }),
        None => Ok(()),
    }
}

/// From here on, and for all of this process.
///
/// # Errors
/// When the processor or the environment is not what it has to be.
pub fn switch_on() -> Result<(), NotDeterministic> {
    check_processor()?;
    check_environment()?;
    // SAFETY: the context lives as long as the process, and these are plain switches of it.
    unsafe {
        let context = aten::global_context();
        // oneDNN generates its kernels for the processor it finds.
        aten::set_onednn(context, false);
        // Not only warn of a kernel that has no deterministic form.
        aten::set_deterministic_algorithms(context, true, false);
        // Memory that is written anyway need not be filled first.
        aten::set_fill_uninitialized_memory(context, false);
        // The backward pass of this kind of attention has no deterministic form.
        aten::set_memory_efficient_attention(context, false);
    }
    Ok(())
}

/// Kernels that are asked for are used, whether the processor has their instructions or not.
fn check_processor() -> Result<(), NotDeterministic> {
    #[cfg(target_arch = "x86_64")]
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        return Err(NotDeterministic::Processor);
    }
    Ok(())
}

/// Whether this process computes so.
pub fn is_on() -> bool {
    // SAFETY: as above; it only reads.
    unsafe { aten::deterministic_algorithms(aten::global_context()) }
}

/// Switches oneDNN, which some kernels on a CPU are taken from, on or off for all of this process.
pub fn use_onednn(used: bool) {
    // SAFETY: as above.
    unsafe { aten::set_onednn(aten::global_context(), used) };
}

/// Switches of libtorch that tch has no function for: methods of `at::Context` under their names in the library, which
/// are formed alike on Linux and macOS.
mod aten {
    use super::c_void;

    unsafe extern "C" {
        #[link_name = "_ZN2at13globalContextEv"]
        pub(super) fn global_context() -> *mut c_void;
        #[link_name = "_ZN2at7Context20setUserEnabledMkldnnEb"]
        pub(super) fn set_onednn(context: *mut c_void, used: bool);
        #[link_name = "_ZN2at7Context26setDeterministicAlgorithmsEbb"]
        pub(super) fn set_deterministic_algorithms(context: *mut c_void, on: bool, warn: bool);
        #[link_name = "_ZN2at7Context39setDeterministicFillUninitializedMemoryEb"]
        pub(super) fn set_fill_uninitialized_memory(context: *mut c_void, on: bool);
        #[link_name = "_ZN2at7Context21setSDPUseMemEfficientEb"]
        pub(super) fn set_memory_efficient_attention(context: *mut c_void, used: bool);
        #[link_name = "_ZNK2at7Context23deterministicAlgorithmsEv"]
        pub(super) fn deterministic_algorithms(context: *const c_void) -> bool;
    }
}
