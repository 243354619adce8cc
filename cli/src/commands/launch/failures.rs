//! What the coordinator's errors mean for whoever launches.

use manyhands_coordinator::StartError;
use manyhands_coordinator::launch::{ChainRefusal, LaunchError};

use crate::failure::Failure;

pub(super) fn launch(error: LaunchError) -> Failure {
    let (code, remedy) = match error {
        LaunchError::Chain(refusal) => return chain(refusal),
        LaunchError::Faucet(error) => return error.into(),
        LaunchError::Submit(error) => return error.into(),
        LaunchError::Manifest(_) => {
            ("run_folder", "restore the folder, or choose another with --dir")
        }
        LaunchError::AnotherRun { .. } => {
            ("another_run", "choose another folder with --dir, or undo the change")
        }
        LaunchError::AnotherOwner { .. } => ("another_owner", "restore the folder's node.key"),
        LaunchError::Unfunded { .. } => {
            ("account_empty", "send the missing amount to this account and launch again")
        }
        LaunchError::Over => (
            "run_over",
            "launch it from that folder to serve its evidence, or change run.name or run.seed",
        ),
    };
    Failure::new(code, error, remedy)
}

pub(super) fn start(error: StartError) -> Failure {
    let (code, remedy) = match error {
        StartError::Chain(refusal) => return chain(refusal),
        StartError::OtherKey { .. } => ("other_key", "restore the folder's node.key"),
        StartError::Folder { .. } | StartError::Store(_) => {
            ("run_folder", "make room and the folder writable, then start again")
        }
        StartError::Journal(_) => {
            ("journal", "stop the other process that coordinates this run, or restore the folder")
        }
        StartError::JournalGone { .. }
        | StartError::OtherRun { .. }
        | StartError::State { .. }
        | StartError::ThetaGone { .. } => {
            ("run_folder", "restore the folder from a backup, or launch into another with --dir")
        }
        StartError::OtherTheta { .. } | StartError::ThetaNotGiven => {
            ("start_from", "name the folder that the run started from in data.start_from")
        }
        StartError::Data(_) | StartError::Control(_) => {
            ("port_in_use", "choose another port with --listen, or stop the program that has it")
        }
        StartError::Page(_) => ("port_in_use", "choose another port with --page-port"),
        StartError::Panicked(_) => ("panic", "report this"),
    };
    Failure::new(code, error, remedy)
}

fn chain(refusal: ChainRefusal) -> Failure {
    let (code, remedy) = match refusal {
        ChainRefusal::Connect(error) => return error.into(),
        ChainRefusal::Read(error) => return error.into(),
        ChainRefusal::NoAddress => ("no_chain", "name one with --chain"),
        ChainRefusal::OtherGenesis { .. } => {
            ("wrong_chain", "name the run's own chain with --chain")
        }
        ChainRefusal::OtherRun(_) => {
            ("other_run", "change run.name or run.seed to make a run of another id")
        }
        ChainRefusal::NoRun { .. } => {
            ("unknown_run", "name the run's own chain with --chain, or launch into another folder")
        }
    };
    Failure::new(code, refusal, remedy)
}
