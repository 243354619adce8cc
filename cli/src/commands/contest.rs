//! `contest`: objects on the chain to what this node is accused of.

use manyhands_chain_client::{Accusation, ChainClient, Dispute};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Balance, NodeId, RunId};
use serde::Serialize;

use super::MemberArgs;
use crate::failure::Failure;
use crate::output::Output;

/// What became of the accusations.
#[derive(Debug, Clone, Serialize)]
struct Contested {
    account: NodeId,
    accusations: Vec<Answered>,
    /// Held for each that was objected to.
    bond: Balance,
    /// Blocks for which the verifiers vote.
    resolution_window: u32,
}

#[derive(Debug, Clone, Serialize)]
struct Answered {
    #[serde(flatten)]
    accusation: Accusation,
    answer: Answer,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Objected,
    ObjectedBefore,
    TooLate,
    Failed(String),
}

pub(crate) async fn run(member: MemberArgs, output: Output) -> Result<(), Failure> {
    let (key, reference, chain) = member.open().await?;
    let run = reference.invitation.run;
    let state = chain.state().await?;
    let Some(on_chain) = state.run(&run).await? else {
        let reason = format!("the chain does not know run {run}");
        return Err(Failure::new("no_run", reason, "name the run's own chain with --chain"));
    };
    let account = key.node_id();
    let mut open = state.disputes(&run).await?;
    open.retain(|it| it.accusation.node() == account && it.decided_from().is_some());
    if open.is_empty() {
        let reason = format!("nobody accuses account {account} in this run");
        return Err(Failure::new("nothing_to_contest", reason, "name another key with --dir"));
    }
    let mut accusations = Vec::with_capacity(open.len());
    for dispute in open {
        let answer = object(&chain, &key, (&run, state.block().number), &dispute).await;
        accusations.push(Answered { accusation: dispute.accusation, answer });
    }
    let contested = Contested {
        account,
        accusations,
        bond: on_chain.terms.contest_bond,
        resolution_window: on_chain.terms.resolution_window,
    };
    output.document(&contested, || contested.words());
    let failed = contested.accusations.iter().any(|it| matches!(it.answer, Answer::Failed(_)));
    if failed {
        let reason = "the chain did not take every objection";
        return Err(Failure::new(
            "not_contested",
            reason,
            "mend what it says, and try again in time",
        ));
    }
    Ok(())
}

async fn object(
    chain: &ChainClient,
    key: &NodeKey,
    (run, block): (&RunId, u32),
    dispute: &Dispute,
) -> Answer {
    if dispute.is_contested() {
        return Answer::ObjectedBefore;
    }
    // A call is executed in a later block than the one whose state was read.
    if dispute.decided_from().is_none_or(|end| block.saturating_add(1) >= end) {
        return Answer::TooLate;
    }
    match chain.contest(key, run, &dispute.accusation, dispute.evidence_digest).await {
        Ok(_) => Answer::Objected,
        Err(error) => Answer::Failed(error.to_string()),
    }
}

impl Contested {
    fn words(&self) -> String {
        let lines: String =
            self.accusations.iter().map(|one| format!("{}\n", one.words())).collect();
        format!(
            "{lines}each objection holds a bond of {}; verifiers vote for {} blocks",
            self.bond, self.resolution_window
        )
    }
}

impl Answered {
    fn words(&self) -> String {
        let what = match self.accusation {
            Accusation::Worker { round, .. } => format!("a fault in round {round}"),
            Accusation::Verifier { worker, round, .. } => {
                format!(
                    "a replay of round {round} of {} that is said to be made up",
                    worker.short()
                )
            }
        };
        match &self.answer {
            Answer::Objected => format!("{what}: objected"),
            Answer::ObjectedBefore => format!("{what}: objected before"),
            Answer::TooLate => format!("{what}: the time to object is over"),
            Answer::Failed(reason) => format!("{what}: NOT objected: {reason}"),
        }
    }
}
