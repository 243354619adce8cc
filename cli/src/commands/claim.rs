//! `claim`: what was earned and has vested, from the run's escrow to the account.

use std::collections::VecDeque;
use std::path::PathBuf;

use manyhands_chain_client::types::{
    RoundCommitment, RoundRecord as ChainRound, RoundState, Run, RunState,
};
use manyhands_chain_client::{ChainClient, ChainState, ProvenLeaf};
use manyhands_coordinator::{read_record, reward_leaves};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::leaf::{RewardLeaf, merkle_proof};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use manyhands_rules::record::RoundRecord;
use serde::Serialize;

use super::ChainArg;
use crate::amount::tokens;
use crate::failure::{Explain, Failure};
use crate::folder;
use crate::output::Output;
use crate::remote::Remote;
use crate::run_reference::{self, RunReference};

/// Records of a round hold a commitment and a result of every worker: kilobytes each.
const RECORD_BYTES_MAX: u64 = 64 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The invitation, a file that holds it, or the folder of the run's launch.
    run: String,
    /// The folder whose `node.key` earned [default: that of `join`].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    chain: ChainArg,
}

/// What a claim did.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Claimed {
    pub(crate) account: NodeId,
    /// The last round that was paid for.
    pub(crate) round: Round,
    pub(crate) paid: Balance,
    /// Free balance, fees included.
    pub(crate) before: Balance,
    pub(crate) after: Balance,
    pub(crate) block: u32,
}

pub(crate) async fn run(args: Args, output: Output) -> Result<(), Failure> {
    let folder = folder::choose(args.dir, "worker")?;
    let key = folder::existing_key(&folder)?;
    let claimed = claim(&key, run_reference::parse(&args.run)?, args.chain.chain).await?;
    output.document(&claimed, || {
        format!(
            "{} paid for the rounds up to {}, in block {}\nbefore {}\nafter  {}",
            tokens(claimed.paid),
            claimed.round,
            claimed.block,
            tokens(claimed.before),
            tokens(claimed.after)
        )
    });
    Ok(())
}

/// Claims everything that has vested for the key's account.
pub(crate) async fn claim(
    key: &NodeKey,
    reference: RunReference,
    chain_url: Option<String>,
) -> Result<Claimed, Failure> {
    let account = key.node_id();
    let invitation = &reference.invitation;
    let run = invitation.run;
    let Some(url) = chain_url.or_else(|| invitation.chain_url.clone()) else {
        return Err(Failure::new(
            "no_chain",
            "the invitation names no node of the run's chain",
            "name one with --chain",
        ));
    };
    let chain = ChainClient::connect(&url).await?;
    let genesis = Digest::new(invitation.chain_genesis);
    if chain.genesis_hash() != genesis {
        let reason =
            format!("the chain at {url} is {}, the run is on {genesis}", chain.genesis_hash());
        return Err(Failure::new(
            "wrong_chain",
            reason,
            "name a node of the run's chain with --chain",
        ));
    }
    let state = chain.state().await?;
    let on_chain = state.run(&run).await?.ok_or_else(|| {
        Failure::new(
            "unknown_run",
            format!("the chain does not know run {run}"),
            "name a node of the run's chain with --chain",
        )
    })?;
    let (round, commit) = newest_vested(&state, run, &on_chain).await?;
    let forfeit = state.forfeit(&run, &account).await?;
    if forfeit.is_some_and(|forfeit| {
        round >= forfeit.from_round && commit.committed_at <= forfeit.until_block
    }) {
        let reason = "a fault of this account was found: what it earned since is forfeited";
        return Err(Failure::new("forfeited", reason, "`manyhands status` names the fault"));
    }
    let leaves = leaves_of(&chain, reference, &commit).await?;
    let claim = proven(&leaves, account, round)?;
    let paid_before = state.claimed(&run, &account).await?;
    let paid = Balance(claim.leaf.cumulative_reward.saturating_sub(paid_before.0));
    if paid == Balance(0) {
        let reason = format!("everything up to round {round} is paid already");
        return Err(Failure::new("nothing_to_claim", reason, "wait until more rounds have vested"));
    }
    let before = state.balance(&account).await?.free;
    let submission = chain.claim_reward(key, claim).await?;
    let after = chain.balance(&account).await?.free;
    Ok(Claimed { account, round, paid, before, after, block: submission.block().number })
}

/// The newest commit whose rewards can be paid.
async fn newest_vested(
    state: &ChainState,
    id: RunId,
    run: &Run,
) -> Result<(Round, ChainRound), Failure> {
    let vesting = run.terms.vesting_rounds;
    let block = state.block().number;
    let all_vested = match run.state {
        RunState::Active | RunState::Paused(_) => false,
        // The claim is executed in a later block than the one whose state is read here.
        RunState::Closed { vests_at, .. } => block + 1 >= vests_at,
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
    let rounds = state.rounds(&id).await?;
    let vested = rounds
        .into_iter()
        .rev()
        .find(|(round, commit)| commit.state == RoundState::Finalized && has_vested(*round));
    vested.ok_or_else(|| {
        let when = match run.state {
            RunState::Closed { vests_at, .. } => {
                format!("everything vests at block {vests_at}, this is block {block}")
            }
            RunState::Active | RunState::Paused(_) | RunState::Settled => {
                format!("a round's reward vests when {vesting} later rounds are final")
            }
        };
        Failure::new(
            "nothing_vested",
            format!("no reward has vested yet: {when}"),
            "try again later",
        )
    })
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
    let mut records = VecDeque::new();
    let mut digest = commitment.evidence_digest;
    loop {
        let bytes = remote.blobs().get(digest, RECORD_BYTES_MAX).await?;
        let record = RoundRecord::parse(&bytes)
            .explain("record", "ask the run's owner: its evidence is damaged")?;
        let (round, previous) = (record.round, record.previous);
        records.push_front(record);
        if round <= commitment.first_round {
            return Ok(records.into());
        }
        digest = previous;
    }
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
