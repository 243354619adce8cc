//! Becoming a worker or a verifier on the chain: a stake or a bond, and the run's terms accepted.

use manyhands_chain_client::{ChainClient, FaucetError, ReadError, SubmitError, WorkerCard};
use manyhands_network::identity::peer_id;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::Role;
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Balance, Digest, RunId};

/// What is left on the account beside the stake, for fees and the existential deposit.
const FEES: Balance = Balance(1_000_000_000_000);

/// Why a node could not enrol.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error(
        "account {account} has {free}, it needs {needed}: {missing} is missing; send that much to \
         this account and start again"
    )]
    Funds { account: manyhands_proto::NodeId, free: Balance, needed: Balance, missing: Balance },
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

/// Makes sure that `key` is a worker or verifier of the run with enough on hold; on a development
/// chain the money comes from the faucet. Doing it again changes nothing.
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
    let (wanted, held) = match role {
        Role::Worker => {
            let held = state.worker(&me).await?.map_or(Balance(0), |worker| worker.stake);
            (stake.unwrap_or(spec.chain.stake_min), held)
        }
        Role::Verifier => {
            let held =
                state.verifier(&run, &me).await?.map_or(Balance(0), |verifier| verifier.bond);
            (spec.chain.verifier_bond, held)
        }
    };
    let missing = Balance(wanted.0.saturating_sub(held.0));
    let needed = Balance(missing.0 + FEES.0);
    let free = state.balance(&me).await?.free;
    let mut funded = false;
    if free < needed {
        let missing = Balance(needed.0 - free.0);
        if !chain.is_development() {
            return Err(EnrolError::Funds { account: me, free, needed, missing });
        }
        chain.fund_from_faucet(&me, missing).await?;
        funded = true;
    }
    match role {
        Role::Worker => {
            if held == Balance(0) {
                let capability_digest =
                    Digest::derive("manyhands 2026 capability", spec.run.name.as_bytes());
                let card = WorkerCard { peer_id: peer_id(&me).to_bytes(), capability_digest };
                chain.register_worker(key, card, wanted).await?;
            } else if missing > Balance(0) {
                chain.increase_stake(key, missing).await?;
            }
            chain.join_run(key, &run).await?;
        }
        Role::Verifier => {
            chain.register_verifier(key, &run).await?;
        }
    }
    Ok(Enrolment { stake: Balance(held.0.max(wanted.0)), funded })
}
