//! What a worker's errors mean for whoever runs it.

use manyhands_chain_client::ConnectError;
use manyhands_worker::{EnrolError, RunWorkerError};

use crate::failure::Failure;
use crate::remote::refused;

pub(super) fn run(error: RunWorkerError) -> Failure {
    let (code, remedy) = match error {
        RunWorkerError::Chain(ConnectError::Unreachable { .. }) => (
            "chain_unreachable",
            "check that this node can be reached from here, or name another with --chain",
        ),
        RunWorkerError::Chain(
            error @ (ConnectError::Address { .. }
            | ConnectError::OtherRuntime { .. }
            | ConnectError::Node { .. }),
        ) => return error.into(),
        RunWorkerError::Enrol(error) => return enrol(error),
        RunWorkerError::Refused(refusal) => return refused(&refusal),
        RunWorkerError::Disk(_) | RunWorkerError::Store(_) | RunWorkerError::DiskFails(_) => {
            ("disk", "make room, or choose another folder with --dir; what is on disk is kept")
        }
        RunWorkerError::Version { .. } => {
            ("version_mismatch", "build the version that the coordinator runs")
        }
        RunWorkerError::Control(_) | RunWorkerError::Data(_) => {
            ("port_in_use", "choose another port with --listen, or stop the program that has it")
        }
        RunWorkerError::Unreachable(_) => (
            "coordinator_unreachable",
            "check the invitation, that the run is still up, and that no firewall is in between",
        ),
        RunWorkerError::Spec(_) => {
            ("run_specification", "build the version that the coordinator runs")
        }
        RunWorkerError::WrongRun { .. } => {
            ("wrong_run", "use the invitation that this run's launch printed")
        }
        RunWorkerError::WrongChain { .. } => {
            ("wrong_chain", "name a node of the run's chain with --chain")
        }
        RunWorkerError::NoChain => ("no_chain", "name a node of the run's chain with --chain"),
        RunWorkerError::Device(_) => {
            ("no_device", "choose another with --device; `manyhands doctor` tells what is there")
        }
        RunWorkerError::Speed(_) | RunWorkerError::Class(_) => {
            ("device_failed", "choose another with --device, or a smaller run")
        }
        RunWorkerError::Memory(_) => {
            ("no_memory_size", "report this with the name of the operating system")
        }
        RunWorkerError::RunData(_) => ("data_set", "start again; what was fetched is kept"),
        RunWorkerError::State(_) => {
            ("node_folder", "remove the damaged file, or choose another folder with --dir")
        }
    };
    Failure::new(code, error, remedy)
}

fn enrol(error: EnrolError) -> Failure {
    match error {
        EnrolError::Read(error) => error.into(),
        EnrolError::Submit(error) => error.into(),
        EnrolError::Faucet(error) => error.into(),
        EnrolError::StakeTooSmall { .. } => {
            Failure::new("stake_too_small", error, "raise it with --stake, or leave --stake out")
        }
        EnrolError::NoRun { .. } => {
            Failure::new("unknown_run", error, "name a node of the run's chain with --chain")
        }
        EnrolError::OtherOwner { .. } | EnrolError::OtherTerms(_) => Failure::new(
            "other_run",
            error,
            "do not join it; tell the run's coordinator, who has to launch it under another name",
        ),
        EnrolError::Leaving { .. } => Failure::new(
            "leaving",
            error,
            "take the stake back with `manyhands claim --leave`, then join again",
        ),
        EnrolError::Funds { .. } => Failure::new(
            "account_empty",
            error,
            "send the missing amount to this account and start again",
        ),
    }
}
