//! A run from its creation to its claims, and a worker that cheats.

use manyhands_chain_client::types::{
    CloseReason, FaultKind, FaultState, PauseReason, RoundCommitment, RoundState, RunState, Stage,
};
use manyhands_chain_client::{Accusation, ProvenLeaf, Submission, SubmitError, TrainingEvent};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::leaf::{RewardLeaf, merkle_proof, merkle_root};
use manyhands_proto::{Balance, Digest, Round, WorkUnits};

use super::{Chain, RUN, UNIT, digest, terms, units};

/// A committed round: each worker's leaf, and the tree over them.
pub(super) struct Settled {
    pub(super) leaves: Vec<RewardLeaf>,
    pub(super) commitment: RoundCommitment,
}

/// `round` as the coordinator would commit it: each worker earns one token a round.
pub(super) fn settle(chain: &Chain, round: u32, workers: &[&NodeKey]) -> Settled {
    let leaves: Vec<RewardLeaf> = workers
        .iter()
        .map(|worker| RewardLeaf {
            genesis_hash: *chain.client.genesis_hash().as_bytes(),
            run: *RUN.as_bytes(),
            round,
            worker: *worker.node_id().as_bytes(),
            work_units: 100,
            cumulative_reward: u128::from(round + 1) * UNIT,
            evidence_digest: [round as u8; 32],
        })
        .collect();
    let hashes: Vec<_> = leaves.iter().map(RewardLeaf::hash).collect();
    let number_of_leaves = u32::try_from(leaves.len()).expect("few");
    let commitment = RoundCommitment {
        first_round: Round(round),
        last_round: Round(round),
        contributions_root: Digest::new(merkle_root(&hashes)),
        number_of_leaves,
        theta_digest: digest(round as u8),
        work_units: WorkUnits(u64::from(number_of_leaves) * 100),
        total_reward: Balance(leaves.iter().map(|leaf| leaf.cumulative_reward).sum()),
        evidence_digest: digest(round as u8),
    };
    Settled { leaves, commitment }
}

impl Settled {
    pub(super) fn claim(&self, place: usize) -> ProvenLeaf {
        let hashes: Vec<_> = self.leaves.iter().map(RewardLeaf::hash).collect();
        let leaf_index = u32::try_from(place).expect("few");
        ProvenLeaf {
            leaf: self.leaves[place].clone(),
            leaf_index,
            siblings: merkle_proof(&hashes, leaf_index).expect("the leaf exists"),
        }
    }
}

impl Chain {
    pub(super) async fn run_with(&self, coordinator: &NodeKey, budget: Balance) {
        self.client.create_run(coordinator, &RUN, terms(), budget).await.expect("created");
    }

    /// Anchors, commits and finalises a round.
    pub(super) async fn finish(&self, round: &Settled, coordinator: &NodeKey, verifier: &NodeKey) {
        let client = &self.client;
        let number = round.commitment.last_round;
        for stage in [Stage::Commit, Stage::Admitted] {
            let anchored = client.anchor_commitments(coordinator, &RUN, (number, stage), digest(9));
            anchored.await.expect("anchored");
        }
        client.commit_round(coordinator, &RUN, round.commitment).await.expect("committed");
        let record = client.state().await.expect("a state").round(&RUN, number).await;
        let record = record.expect("read").expect("the round is there");
        self.reach(record.finalizable_at).await;
        client.finalize_round(verifier, &RUN, number).await.expect("finalised");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn honest_workers_are_paid_what_they_earned_and_only_once() {
    let chain = Chain::start().await;
    let client = &chain.client;
    let (coordinator, verifier) = (chain.rich(1).await, chain.rich(2).await);
    chain.run_with(&coordinator, units(100)).await;
    client.register_verifier(&verifier, &RUN).await.expect("bonded");
    let (first, second) = (chain.worker(3).await, chain.worker(4).await);

    let again = client.create_run(&coordinator, &RUN, terms(), units(100)).await.expect("same");
    assert!(matches!(again, Submission::AlreadyDone { .. }), "after a crash nothing is done twice");
    let rounds: Vec<Settled> =
        (0..2).map(|round| settle(&chain, round, &[&first, &second])).collect();
    for round in &rounds {
        chain.finish(round, &coordinator, &verifier).await;
        let again = client.commit_round(&coordinator, &RUN, round.commitment).await.expect("same");
        assert!(matches!(again, Submission::AlreadyDone { .. }));
    }

    let early = client.claim_reward(&first, rounds[1].claim(0)).await;
    let early = early.expect_err("the newest round has not vested");
    assert!(
        matches!(&early, SubmitError::Failed { pallet, error, .. }
            if pallet == "Training" && error == "NotVested"),
        "{early}"
    );
    let before = client.balance(&first.node_id()).await.expect("a balance").free;
    // Anybody may claim for anybody; so the worker pays no fee here.
    let paid = client.claim_reward(&verifier, rounds[0].claim(0)).await.expect("paid");
    assert!(paid.events().iter().any(|event| matches!(
        event,
        TrainingEvent::RewardClaimed { amount, worker, .. }
            if *amount == units(1) && *worker == first.node_id()
    )));
    let after = client.balance(&first.node_id()).await.expect("a balance").free;
    assert_eq!(after.0 - before.0, UNIT);
    let again = client.claim_reward(&verifier, rounds[0].claim(0)).await.expect("no harm");
    assert!(matches!(again, Submission::AlreadyDone { .. }));

    client.complete_run(&coordinator, &RUN, digest(7)).await.expect("completed");
    let state = client.state().await.expect("a state");
    let run = state.run(&RUN).await.expect("read").expect("the run");
    let RunState::Closed { reason, .. } = run.state else { panic!("got {:?}", run.state) };
    assert_eq!(reason, CloseReason::Completed { final_checkpoint: digest(7) });
    assert_eq!(run.claimed, units(1));
    assert_eq!(run.escrow, units(99));
    assert_eq!(state.claims(&RUN).await.expect("read"), [(first.node_id(), units(1))]);
    assert_eq!(state.rounds(&RUN).await.expect("read").len(), 2);
    let last = state.anchor(&RUN, Round(1), Stage::Admitted).await.expect("read");
    assert_eq!(last.expect("anchored").digest, digest(9));
    chain.devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cheater_is_slashed_and_its_leaf_is_not_paid() {
    let chain = Chain::start().await;
    let client = &chain.client;
    let (coordinator, verifier) = (chain.rich(1).await, chain.rich(2).await);
    chain.run_with(&coordinator, units(100)).await;
    client.register_verifier(&verifier, &RUN).await.expect("bonded");
    let (honest, cheater) = (chain.worker(3).await, chain.worker(4).await);
    let rounds: Vec<Settled> =
        (0..2).map(|round| settle(&chain, round, &[&honest, &cheater])).collect();
    for round in &rounds {
        chain.finish(round, &coordinator, &verifier).await;
    }

    let (worker, round) = (cheater.node_id(), Round(0));
    let accusation = Accusation::Worker { worker, round, kind: FaultKind::Replay };
    client.report(&coordinator, &RUN, &accusation, digest(66)).await.expect("reported");
    let again = client.report(&coordinator, &RUN, &accusation, digest(66)).await;
    assert!(matches!(again.expect("no harm"), Submission::AlreadyDone { .. }));
    let state = client.state().await.expect("a state");
    let dispute = state.dispute(&RUN, &accusation).await.expect("read").expect("on record");
    chain.reach(dispute.decided_from().expect("not decided")).await;
    client.decide(&honest, &RUN, &accusation).await.expect("the window is over");

    let state = client.state().await.expect("a state");
    let fault = state.fault(&RUN, &cheater.node_id(), Round(0)).await.expect("read");
    let slashed = FaultState::Executed { slashed: units(20) };
    assert_eq!(fault.expect("still on record").state, slashed);
    let stake = state.worker(&cheater.node_id()).await.expect("read").expect("a worker").stake;
    assert_eq!(stake, units(30));
    assert!(state.forfeit(&RUN, &cheater.node_id()).await.expect("read").is_some());

    let refusal = client.claim_reward(&cheater, rounds[0].claim(1)).await.expect_err("forfeited");
    assert!(
        matches!(&refusal, SubmitError::Failed { error, .. } if error == "Forfeited"),
        "{refusal}"
    );
    client.claim_reward(&honest, rounds[0].claim(0)).await.expect("the honest are paid");
    chain.devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_the_escrow_does_not_cover_pauses_the_run_with_the_reason() {
    let chain = Chain::start().await;
    let client = &chain.client;
    let coordinator = chain.rich(1).await;
    chain.run_with(&coordinator, units(1)).await;
    let (first, second) = (chain.worker(3).await, chain.worker(4).await);
    let round = settle(&chain, 0, &[&first, &second]);

    for stage in [Stage::Commit, Stage::Admitted] {
        let anchored = client.anchor_commitments(&coordinator, &RUN, (Round(0), stage), digest(9));
        anchored.await.expect("anchored");
    }
    let paused = client.commit_round(&coordinator, &RUN, round.commitment).await.expect("taken");
    let reason = PauseReason::InsufficientFunds { required: units(2) };
    assert_eq!(paused.events(), [TrainingEvent::RunPaused { run: RUN, reason }]);

    client.fund_run(&first, &RUN, units(1)).await.expect("anybody may");
    client.commit_round(&coordinator, &RUN, round.commitment).await.expect("taken");
    let record = client.state().await.expect("a state").round(&RUN, Round(0)).await;
    assert_eq!(record.expect("read").expect("there").state, RoundState::Committed);
    chain.devnet.shutdown().await;
}
