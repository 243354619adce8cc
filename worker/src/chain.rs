//! Becoming a worker or a verifier on the chain: a stake or a bond, and the run's terms accepted.

use manyhands_chain_client::types::RunTerms;
use manyhands_chain_client::{
    ChainClient, ChainState, FaucetError, ReadError, RunMismatch, SubmitError, WorkerCard,
};
use manyhands_network::identity::peer_id;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::Role;
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Balance, Digest, NodeId, RunId};
use manyhands_rules::run_id::run_id;

/// What is left on the account beside the stake and a contest's bond, for fees and the existential deposit.
const FEES: Balance = Balance(1_000_000_000_000);

/// Why a node could not enrol.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("expected a stake of at least {minimum}, which this run asks for, got {got}")]
    StakeTooSmall { minimum: Balance, got: Balance },
    #[error("the chain does not know run {run}")]
    NoRun { run: RunId },
    #[error(
        "on chain run {run} belongs to account {owner}, who is not its coordinator: somebody took \
         its id, and would decide over the stake"
    )]
    OtherOwner { run: RunId, owner: NodeId },
    #[error("nothing is put down for this run: {0}")]
    OtherTerms(#[from] RunMismatch),
    #[error(
        "account {account} is leaving all its runs: its stake comes back from block {exit_at} on, \
         and then it can join again"
    )]
    Leaving { account: NodeId, exit_at: u32 },
    #[error(
        "account {account} has {free}, it needs {needed}: {missing} is missing; send that much to \
         this account and start again"
    )]
    Funds { account: NodeId, free: Balance, needed: Balance, missing: Balance },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Faucet(#[from] FaucetError),
}

/// What enrolling did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Enrolment {
    /// On hold now.
    pub stake: Balance,
    /// Whether the account was given its money by the development chain's faucet.
    pub funded: bool,
}

/// What there is to be put down.
struct Due {
    /// On hold in the end.
    wanted: Balance,
    /// On hold already; none if the account is not registered.
    held: Option<Balance>,
}

impl Due {
    fn missing(&self) -> Balance {
        Balance(self.wanted.0.saturating_sub(self.held.unwrap_or_default().0))
    }
}

/// Makes sure that `key` is a worker or verifier of the run with enough on hold; on a development
/// chain the money comes from the faucet. Doing it again changes nothing. Nothing is put down
/// unless the run on chain has the terms that follow from its specification.
///
/// # Errors
/// [`EnrolError`]: on other chains the missing amount is named.
pub async fn enrol(
    chain: &ChainClient,
    key: &NodeKey,
    run: RunId,
    spec: &RunSpec,
    role: Role,
    stake: Option<Balance>,
) -> Result<Enrolment, EnrolError> {
    let me = key.node_id();
    let state = chain.state().await?;
    let terms = check_run(chain, &state, run, spec).await?;
    let due = match role {
        Role::Worker => {
            let wanted = stake.unwrap_or(spec.chain.stake_min);
            worker_due(&state, me, (run, spec), wanted).await?
        }
        Role::Verifier => {
            let held = state.verifier(&run, &me).await?.map(|verifier| verifier.bond);
            Due { wanted: spec.chain.verifier_bond, held }
        }
    };
    // Whoever puts something down can be accused, and has to have what it takes to object.
    let beside = if due.missing() > Balance(0) { terms.contest_bond.0 } else { 0 };
    let needed = Balance(due.missing().0.saturating_add(FEES.0).saturating_add(beside));
    let funded = fund(chain, &state, me, needed).await?;
    match role {
        Role::Worker => put_down_stake(chain, key, (run, spec), &due).await?,
        Role::Verifier => {
            chain.register_verifier(key, &run).await?;
        }
    }
    Ok(Enrolment { stake: due.held.unwrap_or_default().max(due.wanted), funded })
}

/// The run's terms on chain, if its record there is the one that its coordinator made.
async fn check_run(
    chain: &ChainClient,
    state: &ChainState,
    run: RunId,
    spec: &RunSpec,
) -> Result<RunTerms, EnrolError> {
    let on_chain = state.run(&run).await?.ok_or(EnrolError::NoRun { run })?;
    let owner = on_chain.owner;
    // A run's id is a digest of chain, coordinator and specification: the coordinator is whose id
    // gives it. Anybody can make a run of any id on the chain.
    if run_id(*chain.genesis_hash().as_bytes(), owner, spec.digest()) != run {
        return Err(EnrolError::OtherOwner { run, owner });
    }
    on_chain.check(&owner, spec)?;
    Ok(on_chain.terms)
}

async fn worker_due(
    state: &ChainState,
    me: NodeId,
    (run, spec): (RunId, &RunSpec),
    wanted: Balance,
) -> Result<Due, EnrolError> {
    let minimum = spec.chain.stake_min;
    if wanted < minimum {
        return Err(EnrolError::StakeTooSmall { minimum, got: wanted });
    }
    let Some(worker) = state.worker(&me).await? else {
        return Ok(Due { wanted, held: None });
    };
    if let Some(exit_at) = worker.exit_at {
        return Err(EnrolError::Leaving { account: me, exit_at });
    }
    // The one stake answers for all runs of the account, so it must cover each of them.
    let pledged = state.pledged(&worker, &run).await?;
    Ok(Due { wanted: Balance(wanted.0.saturating_add(pledged.0)), held: Some(worker.stake) })
}

/// Sees to it that `needed` is free on the account; whether the faucet had to give it.
async fn fund(
    chain: &ChainClient,
    state: &ChainState,
    account: NodeId,
    needed: Balance,
) -> Result<bool, EnrolError> {
    let free = state.balance(&account).await?.free;
    if free >= needed {
        return Ok(false);
    }
    if !chain.is_development() {
        let missing = Balance(needed.0 - free.0);
        return Err(EnrolError::Funds { account, free, needed, missing });
    }
    chain.fund_from_faucet(&account, needed).await?;
    Ok(true)
}

async fn put_down_stake(
    chain: &ChainClient,
    key: &NodeKey,
    (run, spec): (RunId, &RunSpec),
    due: &Due,
) -> Result<(), EnrolError> {
    if due.held.is_none() {
        let capability_digest =
            Digest::derive("manyhands 2026 capability", spec.run.name.as_bytes());
        let peer_id = peer_id(&key.node_id()).to_bytes();
        chain.register_worker(key, WorkerCard { peer_id, capability_digest }, due.wanted).await?;
    } else if due.missing() > Balance(0) {
        chain.increase_stake(key, due.missing()).await?;
    }
    chain.join_run(key, &run).await?;
    Ok(())
}
