//! `contest`: objects on the chain to what this node is accused of.

use std::path::PathBuf;

use manyhands_chain_client::types::{Fault, FaultState, VerifierFault};
use manyhands_chain_client::{ChainClient, ChainState, ReadError};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use serde::Serialize;

use super::RunChainArg;
use crate::failure::Failure;
use crate::folder;
use crate::output::Output;
use crate::run_reference;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The invitation, a file that holds it, or the folder of the run's launch.
    run: String,
    /// The folder whose `node.key` is accused [default: $MANYHANDS_HOME/worker; a verifier's is
    /// $MANYHANDS_HOME/verifier].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    chain: RunChainArg,
}

/// What the node is accused of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "accused")]
enum Accusation {
    Worker {
        round: Round,
    },
    /// Of what it said, as a verifier, about that worker's round.
    Verifier {
        worker: NodeId,
        round: Round,
    },
}

/// An accusation that stands, as the chain has it.
#[derive(Debug, Clone, Copy, Serialize)]
struct Open {
    #[serde(flatten)]
    accusation: Accusation,
    #[serde(skip)]
    evidence: Digest,
    #[serde(skip)]
    state: FaultState,
}

/// What was objected to.
#[derive(Debug, Clone, Serialize)]
struct Contested {
    account: NodeId,
    now: Vec<Accusation>,
    before: Vec<Accusation>,
    /// Held for each.
    bond: Balance,
    /// Blocks for which the verifiers vote.
    resolution_window: u32,
}

impl Open {
    fn of_worker(round: Round, fault: &Fault) -> Option<Self> {
        let accusation = Accusation::Worker { round };
        Self::new(accusation, fault.evidence_digest, fault.state)
    }

    fn of_verifier(worker: NodeId, round: Round, fault: &VerifierFault) -> Option<Self> {
        let accusation = Accusation::Verifier { worker, round };
        Self::new(accusation, fault.evidence_digest, fault.state)
    }

    fn new(accusation: Accusation, evidence: Digest, state: FaultState) -> Option<Self> {
        match state {
            FaultState::Reported { .. } | FaultState::Contested { .. } => {
                Some(Self { accusation, evidence, state })
            }
            FaultState::Executed { .. } | FaultState::Dismissed => None,
        }
    }

    fn is_contested(&self) -> bool {
        matches!(self.state, FaultState::Contested { .. })
    }
}

pub(crate) async fn run(args: Args, output: Output) -> Result<(), Failure> {
    let folder = folder::choose(args.dir, "worker")?;
    let key = folder::existing_key(&folder)?;
    let reference = run_reference::parse(&args.run)?;
    let run = reference.invitation.run;
    let chain = args.chain.connect(&reference.invitation).await?;
    let state = chain.state().await?;
    let Some(on_chain) = state.run(&run).await? else {
        let reason = format!("the chain does not know run {run}");
        return Err(Failure::new("no_run", reason, "name the run's own chain with --chain"));
    };
    let all = open(&state, &run, key.node_id()).await?;
    if all.is_empty() {
        let reason = format!("nobody accuses account {} in this run", key.node_id());
        return Err(Failure::new("nothing_to_contest", reason, "name another key with --dir"));
    }
    let (before, new): (Vec<Open>, Vec<Open>) = all.into_iter().partition(Open::is_contested);
    for open in &new {
        contest(&chain, &key, &run, open).await?;
    }
    let accusations = |of: Vec<Open>| of.into_iter().map(|open| open.accusation).collect();
    let contested = Contested {
        account: key.node_id(),
        now: accusations(new),
        before: accusations(before),
        bond: on_chain.terms.contest_bond,
        resolution_window: on_chain.terms.resolution_window,
    };
    output.document(&contested, || contested.words());
    Ok(())
}

async fn open(state: &ChainState, run: &RunId, me: NodeId) -> Result<Vec<Open>, ReadError> {
    let workers = state.faults(run).await?;
    let mut all: Vec<Open> = workers
        .iter()
        .filter(|((worker, _), _)| *worker == me)
        .filter_map(|((_, round), fault)| Open::of_worker(*round, fault))
        .collect();
    let verifiers = state.verifier_faults(run).await?;
    all.extend(
        verifiers
            .iter()
            .filter(|((verifier, ..), _)| *verifier == me)
            .filter_map(|((_, worker, round), fault)| Open::of_verifier(*worker, *round, fault)),
    );
    Ok(all)
}

async fn contest(
    chain: &ChainClient,
    key: &NodeKey,
    run: &RunId,
    open: &Open,
) -> Result<(), Failure> {
    match open.accusation {
        Accusation::Worker { round } => {
            chain.contest_fault(key, run, round, open.evidence).await?;
        }
        Accusation::Verifier { worker, round } => {
            chain.contest_verifier_fault(key, run, (&worker, round), open.evidence).await?;
        }
    }
    Ok(())
}

impl Contested {
    fn words(&self) -> String {
        let lines = |all: &[Accusation], what: &str| -> String {
            all.iter().map(|one| format!("{what} {}\n", one.words())).collect()
        };
        format!(
            "{}{}each with a bond of {}; verifiers vote for {} blocks",
            lines(&self.now, "objected to"),
            lines(&self.before, "objected to before:"),
            self.bond,
            self.resolution_window
        )
    }
}

impl Accusation {
    fn words(&self) -> String {
        match self {
            Self::Worker { round } => format!("a fault in round {round}"),
            Self::Verifier { worker, round } => {
                format!(
                    "a replay of round {round} of {} that is said to be made up",
                    worker.short()
                )
            }
        }
    }
}
