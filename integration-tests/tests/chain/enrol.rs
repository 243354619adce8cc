//! What a node checks before it puts money down, and how much it puts down.

use manyhands_chain_client::RunMismatch;
use manyhands_chain_client::types::RunTerms;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::Role;
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Balance, RunId};
use manyhands_worker::{EnrolError, enrol};

use super::{Chain, data_set, key, run_file, units};

impl Chain {
    /// A run of this name, made by its coordinator.
    async fn launched(&self, coordinator: &NodeKey, name: &str) -> (RunId, RunSpec) {
        let spec = run_file(name).resolve(data_set());
        let run = self.run_id(coordinator, &spec);
        self.made(coordinator, &run, RunTerms::of(&spec)).await;
        (run, spec)
    }

    async fn made(&self, owner: &NodeKey, run: &RunId, terms: RunTerms) {
        self.client.create_run(owner, run, terms, units(1)).await.expect("created");
    }

    async fn stake_of(&self, worker: &NodeKey) -> Option<Balance> {
        let state = self.client.state().await.expect("a state");
        state.worker(&worker.node_id()).await.expect("read").map(|worker| worker.stake)
    }

    /// Why a worker does not enrol. It has put nothing down, and the faucet was not asked.
    async fn refusal(&self, run: RunId, spec: &RunSpec, stake: Option<Balance>) -> EnrolError {
        let worker = key(90);
        let refused = enrol(&self.client, &worker, run, spec, Role::Worker, stake).await;
        assert_eq!(self.stake_of(&worker).await, None);
        let balance = self.client.balance(&worker.node_id()).await.expect("a balance");
        assert_eq!((balance.free, balance.held), (Balance(0), Balance(0)));
        refused.expect_err("it must not stake on this run")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_stakes_on_a_run_that_is_not_what_its_specification_says() {
    let chain = Chain::start().await;
    let (coordinator, thief) = (chain.rich(1).await, chain.rich(2).await);
    let of = |name: &str| run_file(name).resolve(data_set());

    let unknown = of("unknown");
    let refusal = chain.refusal(chain.run_id(&coordinator, &unknown), &unknown, None).await;
    assert!(matches!(refusal, EnrolError::NoRun { .. }), "{refusal}");

    let stolen = of("stolen");
    let run = chain.run_id(&coordinator, &stolen);
    chain.made(&thief, &run, RunTerms::of(&stolen)).await;
    let refusal = chain.refusal(run, &stolen, None).await;
    assert!(
        matches!(refusal, EnrolError::OtherOwner { owner, .. } if owner == thief.node_id()),
        "{refusal}"
    );

    let harsher = of("harsher");
    let run = chain.run_id(&coordinator, &harsher);
    let mut terms = RunTerms::of(&harsher);
    terms.slashes.replay = terms.minimum_stake;
    chain.made(&coordinator, &run, terms).await;
    let refusal = chain.refusal(run, &harsher, None).await;
    let EnrolError::OtherTerms(RunMismatch::Terms(differences)) = &refusal else {
        panic!("expected other terms, got {refusal}")
    };
    assert_eq!(differences.len(), 1, "{refusal}");
    assert!(refusal.to_string().contains("slash for a replay fault"), "{refusal}");

    let (run, spec) = chain.launched(&coordinator, "good").await;
    let too_little = Balance(spec.chain.stake_min.0 - 1);
    let refusal = chain.refusal(run, &spec, Some(too_little)).await;
    let EnrolError::StakeTooSmall { minimum, got } = refusal else { panic!("got {refusal}") };
    assert_eq!((minimum, got), (spec.chain.stake_min, too_little));
    chain.devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_faucet_gives_what_is_missing_to_the_whole_stake_of_every_run() {
    let chain = Chain::start().await;
    let coordinator = chain.rich(1).await;
    let (first, second) =
        (chain.launched(&coordinator, "first").await, chain.launched(&coordinator, "second").await);
    let worker = key(3);
    // Half of what is needed is there: only the rest must come, but all of the rest.
    chain.client.fund_from_faucet(&worker.node_id(), units(50)).await.expect("funded");
    let enrol = async |(run, spec): &(RunId, RunSpec)| {
        enrol(&chain.client, &worker, *run, spec, Role::Worker, None).await.expect("enrolled")
    };
    let enrolment = enrol(&first).await;
    assert_eq!((enrolment.stake, enrolment.funded), (units(100), true));
    assert_eq!(chain.stake_of(&worker).await, Some(units(100)));
    // One stake does not answer for two runs.
    assert_eq!(enrol(&second).await.stake, units(200));
    for again in [&first, &second] {
        assert_eq!(enrol(again).await.stake, units(200));
    }
    assert_eq!(chain.stake_of(&worker).await, Some(units(200)));
    chain.devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_on_its_way_out_is_told_when_it_can_come_back() {
    let chain = Chain::start().await;
    let coordinator = chain.rich(1).await;
    let (run, spec) = chain.launched(&coordinator, "left").await;
    let worker = key(3);
    let enrol = async || enrol(&chain.client, &worker, run, &spec, Role::Worker, None).await;
    enrol().await.expect("enrolled");
    chain.client.announce_exit(&worker).await.expect("announced");
    let refusal = enrol().await.expect_err("it is leaving");
    assert!(matches!(refusal, EnrolError::Leaving { .. }), "{refusal}");
    chain.devnet.shutdown().await;
}
