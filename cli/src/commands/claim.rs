//! `claim`: what was earned and has vested, from the run's escrow to the account; and, for whoever leaves,
//! the stake or bond as well.

mod leave;

use manyhands_chain_client::types::{
    Forfeit, RoundCommitment, RoundRecord as ChainRound, RoundState, Run, RunState, Suspension,
};
use manyhands_chain_client::{ChainClient, ChainState, ProvenLeaf, TrainingEvent};
use manyhands_coordinator::{read_record, reward_leaves};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::leaf::{RewardLeaf, merkle_proof};
use manyhands_proto::{Balance, NodeId, Round, RunId};
use manyhands_rules::record::RoundRecord;
use serde::Serialize;
use std::collections::VecDeque;

use self::leave::{Left, leave};
use super::MemberArgs;
use crate::failure::{Explain, Failure};
use crate::output::Output;
use crate::remote::Remote;
use crate::run_reference::RunReference;

/// Records of a round hold a commitment and a result of every worker: kilobytes each.
const RECORD_BYTES_MAX: u64 = 64 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    member: MemberArgs,
    /// Leave the run and take back the stake, or a verifier's bond, as far as the chain lets it go; say what
    /// is still to wait for. Given again, it goes on from there.
    #[arg(long)]
    leave: bool,
}

/// What a claim did.
#[derive(Debug, Clone, Serialize)]
struct Claimed {
    account: NodeId,
    /// The last round that was paid for.
    round: Round,
    paid: Balance,
    /// Free balance, fees included.
    before: Balance,
    after: Balance,
    block: u32,
    /// Why vested rounds after that one were not paid for.
    #[serde(skip_serializing_if = "Option::is_none")]
    barred: Option<Barred>,
}

/// What stands between an account and a vested reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "reason")]
enum Barred {
    Forfeited { from_round: Round },
    FaultUndecided { from_round: Round },
}

/// What leaving came to: the run is left whether or not there was something to claim.
#[derive(Debug, Clone, Serialize)]
struct Parting {
    #[serde(flatten)]
    claimed: Option<Claimed>,
    /// Why nothing was claimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_claimed: Option<Failure>,
    leaving: Left,
}

pub(crate) async fn run(args: Args, output: Output) -> Result<(), Failure> {
    let (key, reference, chain) = args.member.open().await?;
    let run = reference.invitation.run;
    let claimed = claim(&chain, &key, reference).await;
    if !args.leave {
        let claimed = claimed?;
        output.document(&claimed, || claimed.words());
        return Ok(());
    }
    let leaving = leave(&chain, &key, run).await?;
    let (claimed, not_claimed) = match claimed {
        Ok(claimed) => (Some(claimed), None),
        Err(failure) => (None, Some(failure)),
    };
    let parting = Parting { claimed, not_claimed, leaving };
    output.document(&parting, || parting.words());
    Ok(())
}

impl Claimed {
    fn words(&self) -> String {
        let mut text = format!(
            "{} paid for the rounds up to {}, in block {}\nbefore {}\nafter  {}",
            self.paid, self.round, self.block, self.before, self.after
        );
        if let Some(barred) = self.barred {
            text += &format!("\nnot paid: {}", barred.words());
        }
        text
    }
}

impl Barred {
    fn words(self) -> String {
        match self {
            Self::Forfeited { from_round } => format!(
                "a fault of this account in round {from_round} was found: what it earned since then \
                 and before the fault was settled is forfeited"
            ),
            Self::FaultUndecided { from_round } => format!(
                "a fault of this account in round {from_round} is reported and not decided: what it \
                 earned since then has to wait"
            ),
        }
    }

    fn failure(self) -> Failure {
        match self {
            Self::Forfeited { .. } => {
                Failure::new("forfeited", self.words(), "`manyhands status` names the fault")
            }
            Self::FaultUndecided { .. } => Failure::new(
                "fault_undecided",
                self.words(),
                "try again when it is decided; `manyhands status` names the fault",
            ),
        }
    }
}

impl Parting {
    fn words(&self) -> String {
        let mut lines: Vec<String> = self.claimed.iter().map(Claimed::words).collect();
        lines.extend(self.not_claimed.iter().map(|why| format!("nothing claimed: {}", why.reason)));
        lines.extend(self.leaving.words());
        lines.join("\n")
    }
}

/// Claims everything that has vested for the key's account.
async fn claim(
    chain: &ChainClient,
    key: &NodeKey,
    reference: RunReference,
) -> Result<Claimed, Failure> {
    let (account, run) = (key.node_id(), reference.invitation.run);
    let state = chain.state().await?;
    let on_chain = state.run(&run).await?.ok_or_else(|| {
        Failure::new(
            "unknown_run",
            format!("the chain does not know run {run}"),
            "name a node of the run's chain with --chain",
        )
    })?;
    let vested = vested(&state, run, &on_chain).await?;
    let forfeit = state.forfeit(&run, &account).await?;
    let suspension = state.suspension(&run, &account).await?;
    let (commit, barred) = newest_payable(vested, forfeit, suspension);
    let nothing = |otherwise: Failure| barred.map_or(otherwise, Barred::failure);
    let Some((round, commit)) = commit else {
        return Err(nothing(nothing_vested(&state, &on_chain)));
    };
    let leaves = leaves_of(chain, reference, &commit).await?;
    let claim = proven(&leaves, account, round).map_err(nothing)?;
    let paid_before = state.claimed(&run, &account).await?;
    if claim.leaf.cumulative_reward <= paid_before.0 {
        let reason = format!("everything up to round {round} is paid already");
        let remedy = "wait until more rounds have vested";
        return Err(nothing(Failure::new("nothing_to_claim", reason, remedy)));
    }
    let before = state.balance(&account).await?.free;
    let submission = chain.claim_reward(key, claim).await?;
    // Anybody may claim for the account: then this says nothing was paid now.
    let paid = Balance(submission.events().iter().map(|event| rewarded(event).0).sum());
    let after = chain.balance(&account).await?.free;
    let block = submission.block().number;
    Ok(Claimed { account, round, paid, before, after, block, barred })
}

/// What an event says to have been paid.
fn rewarded(event: &TrainingEvent) -> Balance {
    if let TrainingEvent::RewardClaimed { amount, .. } = event { *amount } else { Balance(0) }
}

/// The final commits whose rewards have vested, newest first.
async fn vested(
    state: &ChainState,
    id: RunId,
    run: &Run,
) -> Result<Vec<(Round, ChainRound)>, Failure> {
    let vesting = run.terms.vesting_rounds;
    let all_vested = match run.state {
        RunState::Active | RunState::Paused(_) => false,
        // The claim is executed in a later block than the one whose state is read here.
        RunState::Closed { vests_at, .. } => state.block().number + 1 >= vests_at,
        RunState::Settled => {
            let reason = "the run is settled, its time to claim is over";
            return Err(Failure::new("claim_window_over", reason, "nothing can be done"));
        }
    };
    let has_vested = |round: Round| {
        all_vested
            || run
                .latest_finalized
                .is_some_and(|latest| round.0.saturating_add(vesting) <= latest.0)
    };
    let mut rounds = state.rounds(&id).await?;
    rounds.retain(|(round, commit)| commit.state == RoundState::Finalized && has_vested(*round));
    rounds.reverse();
    Ok(rounds)
}

/// The newest of the vested commits that pays the account, and what bars those after it. Earlier commits
/// than a fault's are paid whatever becomes of the fault, and so are those that take it into account.
fn newest_payable(
    vested: Vec<(Round, ChainRound)>,
    forfeit: Option<Forfeit>,
    suspension: Option<Suspension>,
) -> (Option<(Round, ChainRound)>, Option<Barred>) {
    let mut newest_barred = None;
    for (round, commit) in vested {
        let undecided = suspension.filter(|suspension| round >= suspension.from_round);
        let forfeited = forfeit.filter(|forfeit| forfeit.bars(round, commit.committed_at));
        let barred = match (undecided, forfeited) {
            (None, None) => return (Some((round, commit)), newest_barred),
            (Some(Suspension { from_round, .. }), _) => Barred::FaultUndecided { from_round },
            (None, Some(Forfeit { from_round, .. })) => Barred::Forfeited { from_round },
        };
        newest_barred = newest_barred.or(Some(barred));
    }
    (None, newest_barred)
}

fn nothing_vested(state: &ChainState, run: &Run) -> Failure {
    let when = match run.state {
        RunState::Closed { vests_at, .. } => {
            format!("everything vests at block {vests_at}, this is block {}", state.block().number)
        }
        RunState::Active | RunState::Paused(_) | RunState::Settled => {
            let vesting = run.terms.vesting_rounds;
            format!("a round's reward vests when {vesting} later rounds are final")
        }
    };
    let reason = format!("no reward has vested yet: {when}");
    Failure::new("nothing_vested", reason, "try again later")
}

/// The leaves of a commit, made again from the run's records: those in its folder if that is at hand, else
/// the coordinator's. They hash to what is on chain, or the chain refuses the claim.
async fn leaves_of(
    chain: &ChainClient,
    reference: RunReference,
    commit: &ChainRound,
) -> Result<Vec<RewardLeaf>, Failure> {
    const REMEDY: &str = "ask the run's owner: its evidence is damaged";
    let run = reference.invitation.run;
    let commitment = &commit.commitment;
    let records = match reference.folder {
        Some(folder) => {
            let records = folder.join("records");
            (commitment.first_round.0..=commitment.last_round.0)
                .map(|round| read_record(&records, Round(round)))
                .collect::<Result<Vec<_>, _>>()
                .explain("record", REMEDY)?
        }
        None => {
            let remote = Remote::connect(reference.invitation).await?;
            let records = fetch_records(&remote, commitment).await?;
            remote.close().await;
            records
        }
    };
    Ok(reward_leaves(chain.genesis_hash(), run, &records))
}

/// The records of a commit's rounds, oldest first: each names the one before.
async fn fetch_records(
    remote: &Remote,
    commitment: &RoundCommitment,
) -> Result<Vec<RoundRecord>, Failure> {
    const REMEDY: &str = "ask the run's owner: its evidence is damaged";
    let mut records = VecDeque::new();
    let mut digest = commitment.evidence_digest;
    // As many as the chain says, whatever the records say of each other.
    for expected in (commitment.first_round.0..=commitment.last_round.0).rev() {
        let bytes = remote.blobs().get(digest, RECORD_BYTES_MAX).await?;
        let record = RoundRecord::parse(&bytes).explain("record", REMEDY)?;
        if record.round.0 != expected {
            let reason = format!("expected the record of round {expected}, got {}", record.round);
            return Err(Failure::new("record", reason, REMEDY));
        }
        digest = record.previous;
        records.push_front(record);
    }
    Ok(records.into())
}

fn proven(leaves: &[RewardLeaf], account: NodeId, round: Round) -> Result<ProvenLeaf, Failure> {
    let index = leaves.iter().position(|leaf| leaf.worker == *account.as_bytes());
    let found = index.and_then(|index| {
        let leaf_index = u32::try_from(index).ok()?;
        let hashes: Vec<_> = leaves.iter().map(RewardLeaf::hash).collect();
        let siblings = merkle_proof(&hashes, leaf_index)?;
        Some(ProvenLeaf { leaf: leaves[index].clone(), leaf_index, siblings })
    });
    found.ok_or_else(|| {
        let reason = format!("account {account} has earned nothing up to round {round}");
        Failure::new(
            "nothing_to_claim",
            reason,
            "name the folder of the key that worked with --dir",
        )
    })
}

#[cfg(test)]
mod tests {
    use manyhands_chain_client::types::Totals;
    use manyhands_proto::WorkUnits;

    use manyhands_proto::Digest;

    use super::*;

    /// A commit of each round, in the block of the same number, newest first.
    fn commits(rounds: std::ops::Range<u32>) -> Vec<(Round, ChainRound)> {
        let digest = Digest::of(b"commit");
        let nothing = Totals { reward: Balance(0), ceiling: Balance(0) };
        let commit = |number: u32| ChainRound {
            commitment: RoundCommitment {
                first_round: Round(number),
                last_round: Round(number),
                contributions_root: digest,
                number_of_leaves: 1,
                theta_digest: digest,
                work_units: WorkUnits(1),
                total_reward: Balance(1),
                evidence_digest: digest,
            },
            before: nothing,
            committed_at: number,
            finalizable_at: number,
            attestations: Vec::new(),
            state: RoundState::Finalized,
        };
        rounds.rev().map(|number| (Round(number), commit(number))).collect()
    }

    fn payable(
        rounds: std::ops::Range<u32>,
        forfeit: Option<Forfeit>,
        suspension: Option<Suspension>,
    ) -> (Option<u32>, Option<Barred>) {
        let (commit, barred) = newest_payable(commits(rounds), forfeit, suspension);
        (commit.map(|(round, _)| round.0), barred)
    }

    #[test]
    fn the_newest_vested_commit_that_no_fault_bars_is_claimed() {
        let forfeit = Some(Forfeit { from_round: Round(3), until_block: 6 });
        let suspension = Some(Suspension { from_round: Round(5), open_faults: 1 });
        let forfeited = Some(Barred::Forfeited { from_round: Round(3) });
        let waits = Some(Barred::FaultUndecided { from_round: Round(5) });
        assert_eq!(payable(0..0, None, None), (None, None));
        assert_eq!(payable(0..6, None, None), (Some(5), None));
        // Commits after the fault was settled take it into account.
        assert_eq!(payable(0..8, forfeit, None), (Some(7), None));
        // Those before it pay what was earned before the fault, and only there is nothing else.
        assert_eq!(payable(0..7, forfeit, None), (Some(2), forfeited));
        assert_eq!(payable(3..7, forfeit, None), (None, forfeited));
        assert_eq!(payable(0..8, None, suspension), (Some(4), waits));
        assert_eq!(payable(0..8, forfeit, suspension), (Some(2), waits));
        assert_eq!(payable(5..8, None, suspension), (None, waits));
    }
}
