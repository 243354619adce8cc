//! Making a run on a chain that holds something of its id already.

use std::path::Path;

use manyhands_chain_client::RunMismatch;
use manyhands_chain_client::types::{PauseReason, RoundCommitment, Run, RunState, RunTerms};
use manyhands_coordinator::launch::ChainRefusal;
use manyhands_coordinator::{LaunchError, LaunchOrder, Launched, launch};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Balance, Round, RunId, WorkUnits};

use super::{Chain, data_set, digest, key, run_file, units};

impl Chain {
    async fn launch(&self, folder: &Path, name: &str) -> Result<Launched, LaunchError> {
        let order = LaunchOrder {
            folder: folder.to_owned(),
            key: coordinator(),
            file: run_file(name),
            data: data_set(),
            served: Vec::new(),
            chain_url: Some(self.devnet.url().to_owned()),
        };
        launch(order).await
    }

    async fn record_of(&self, run: &RunId) -> Run {
        let state = self.client.state().await.expect("a state");
        state.run(run).await.expect("read").expect("the run is on chain")
    }
}

fn coordinator() -> NodeKey {
    key(1)
}

/// A round that is worth five tokens.
fn commitment() -> RoundCommitment {
    RoundCommitment {
        first_round: Round(0),
        last_round: Round(0),
        contributions_root: digest(3),
        number_of_leaves: 1,
        theta_digest: digest(4),
        work_units: WorkUnits(5_000_000),
        total_reward: units(5),
        evidence_digest: digest(5),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_stands_still_for_want_of_money_goes_on_when_it_is_launched_again() {
    let chain = Chain::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let first = chain.launch(folder.path(), "short-of-money").await.expect("launched");
    assert!(first.funded.is_some() && first.refilled.is_none());
    let run = first.manifest.run;
    assert_eq!(chain.record_of(&run).await.escrow, units(1));
    let again = chain.launch(folder.path(), "short-of-money").await.expect("launched");
    assert!(again.resumed && again.refilled.is_none(), "it lacks nothing yet");

    let commit = chain.client.commit_round(&coordinator(), &run, commitment()).await;
    commit.expect("taken");
    let paused = PauseReason::InsufficientFunds { required: units(5) };
    assert_eq!(chain.record_of(&run).await.state, RunState::Paused(paused));
    let again = chain.launch(folder.path(), "short-of-money").await.expect("launched");
    assert_eq!(again.refilled, Some(units(4)), "what the escrow lacks");
    let record = chain.record_of(&run).await;
    assert_eq!((record.state, record.escrow), (RunState::Active, units(5)));
    let commit = chain.client.commit_round(&coordinator(), &run, commitment()).await;
    commit.expect("taken");
    assert_eq!(chain.record_of(&run).await.next_round, Round(1));
    chain.devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_the_same_id_is_taken_only_if_it_is_the_same_run() {
    let chain = Chain::start().await;
    let (own, thief) = (chain.rich(1).await, chain.rich(2).await);
    let refused = async |name: &str, owner: &NodeKey, terms: RunTerms| {
        let run = chain.run_id(&own, &run_file(name).resolve(data_set()));
        chain.client.create_run(owner, &run, terms, units(1)).await.expect("created");
        let folder = tempfile::tempdir().expect("a folder");
        let refusal = chain.launch(folder.path(), name).await.expect_err("another run");
        assert!(!folder.path().join("run.json").exists(), "nothing is left behind");
        let LaunchError::Chain(ChainRefusal::OtherRun(why)) = refusal else {
            panic!("expected another run, got {refusal}")
        };
        why
    };
    let terms = |name: &str| RunTerms::of(&run_file(name).resolve(data_set()));

    let why = refused("stolen", &thief, terms("stolen")).await;
    assert!(matches!(why, RunMismatch::Owner { got, .. } if got == thief.node_id()), "{why}");
    let mut dearer = terms("dearer");
    dearer.price_per_unit = Balance(dearer.price_per_unit.0 + 1);
    let why = refused("dearer", &own, dearer).await;
    assert!(matches!(&why, RunMismatch::Terms(all) if all.len() == 1), "{why}");
    chain.devnet.shutdown().await;
}
