//! What a node says of itself when it joins: its class, its speed on the run's own model, its memory, and the rounds that it
//! has the end states of.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use manyhands_model::device::{SpeedTask, measure_speed, numeric_class};
use manyhands_model::{Device, TrainError, run_fingerprint};
use manyhands_proto::message::limits::HEAD_ROUNDS_MAX;
use manyhands_proto::message::{Join, NumericClass, PROTOCOL_VERSION, Role};
use manyhands_proto::run_file::RunSpec;
use manyhands_rules::worker::Identity;

use crate::context::{Context, WorkerEvent};
use crate::service::{BEAT_MS, RunWorkerError};

/// How long the speed measurement trains on made-up tokens.
const MEASURE: Duration = Duration::from_secs(2);

/// What decides the bits that this machine computes; where the run asks for certain ones, which its own model comes to here.
pub(crate) fn class(
    spec: &RunSpec,
    device: Device,
    threads: u32,
) -> Result<NumericClass, TrainError> {
    let RunSpec { model, training, verification, .. } = spec;
    let mut class = numeric_class(device, training.precision, threads)?;
    if verification.fingerprint.is_some() {
        class.fingerprint = run_fingerprint(model, training, device, threads)?;
    }
    Ok(class)
}

/// Measures this machine on the run's own model.
pub(crate) async fn introduce(
    context: &Arc<Context>,
    role: Role,
) -> Result<Identity, RunWorkerError> {
    let shared = Arc::clone(context);
    let measuring = tokio::task::spawn_blocking(move || {
        measure_speed(&SpeedTask {
            architecture: &shared.spec.model,
            training: &shared.spec.training,
            device: shared.device,
            threads: shared.threads,
            duration: MEASURE,
        })
    });
    let speed = measuring.await.expect("a measuring thread does not panic")?;
    let tokens_per_second = (speed.tokens_per_second * context.load_max) as u64;
    let memory_bytes = memory_bytes(context.device)?;
    let shown = context.class.to_string();
    context.tell(WorkerEvent::Measured { class: shown, tokens_per_second, memory_bytes });
    let states = context.disk.rounds()?;
    // The newest, ascending.
    let newest = &states[states.len().saturating_sub(HEAD_ROUNDS_MAX)..];
    let head_rounds = newest.iter().map(|state| state.trained.assignment.round).collect();
    let join = Join {
        role,
        version: PROTOCOL_VERSION,
        class: context.class.clone(),
        memory_bytes,
        tokens_per_second,
        addresses: data_addresses(context),
        head_rounds,
    };
    Ok(Identity { join, beat_ms: BEAT_MS })
}

/// Free memory of the device: a CUDA device's own, as its driver tells; the machine's for all others, whose
/// memory it is.
fn memory_bytes(device: Device) -> Result<u64, RunWorkerError> {
    if let Device::Cuda(index) = device
        && let Some(free) = cuda_memory_bytes(index)
    {
        return Ok(free);
    }
    let mut system =
        sysinfo::System::new().map_err(|error| RunWorkerError::Memory(error.to_string()))?;
    system.refresh_memory();
    Ok(system.available_memory())
}

/// None where the driver's tool is missing; the machine's memory then stands for the device's.
fn cuda_memory_bytes(index: usize) -> Option<u64> {
    let query = ["--query-gpu=memory.free", "--format=csv,noheader,nounits"];
    let output = Command::new("nvidia-smi").args(query).arg(format!("--id={index}")).output();
    let text = String::from_utf8(output.ok().filter(|output| output.status.success())?.stdout);
    let mebibytes: u64 = text.ok()?.trim().parse().ok()?;
    Some(mebibytes << 20)
}

/// Where others can reach our data plane: a wildcard address says nothing to them, and what the
/// coordinator sees of us is added by itself.
fn data_addresses(context: &Context) -> Vec<SocketAddr> {
    let local = context.data.local_addr();
    if local.ip().is_unspecified() { Vec::new() } else { vec![local] }
}
