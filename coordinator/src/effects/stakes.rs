//! What the chain holds for the run's members.

use manyhands_chain_client::{ChainClient, ChainState, ReadError};
use manyhands_proto::message::Role;
use manyhands_proto::{Balance, NodeId, Round, RunId};
use manyhands_rules::coordinator::Input;
use manyhands_rules::requirements;

use crate::context::Context;
use crate::retry::Backoff;

/// Looks at the stakes and bonds of a round's members until the chain answers.
pub(super) async fn check(context: &Context, round: Round, members: &[(NodeId, Role)]) -> Input {
    let Some(chain) = &context.chain else {
        return Input::StakesChecked { round, gone: Vec::new() };
    };
    let what = format!("looking up the stakes of round {round}");
    let mut backoff = Backoff::for_chain();
    let gone = loop {
        match without_stake(context, chain, members).await {
            Ok(gone) => break gone,
            Err(error) => context.notes.report(&what, error.to_string()),
        }
        backoff.wait().await;
    };
    context.notes.clear(&what);
    Input::StakesChecked { round, gone }
}

async fn without_stake(
    context: &Context,
    chain: &ChainClient,
    members: &[(NodeId, Role)],
) -> Result<Vec<NodeId>, ReadError> {
    let state = chain.state().await?;
    let mut gone = Vec::new();
    for &(node, role) in members {
        let held = held(&state, &context.run, node, role).await?;
        if held < requirements::stake_min(&context.spec, role) {
            gone.push(node);
        }
    }
    Ok(gone)
}

/// The stake or bond of a node in a run; nothing if it is on its way out.
pub(crate) async fn held(
    state: &ChainState,
    run: &RunId,
    node: NodeId,
    role: Role,
) -> Result<Balance, ReadError> {
    let held = match role {
        Role::Worker => state
            .worker(&node)
            .await?
            .filter(|worker| worker.exit_at.is_none() && worker.is_member(run))
            .map(|worker| worker.stake),
        Role::Verifier => state
            .verifier(run, &node)
            .await?
            .filter(|verifier| verifier.exit_at.is_none())
            .map(|verifier| verifier.bond),
    };
    Ok(held.unwrap_or_default())
}
