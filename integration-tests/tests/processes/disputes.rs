//! What is said on the chain of somebody who did nothing of the kind.

use manyhands_chain_client::types::{FaultKind, FaultState, Stage};
use manyhands_chain_client::{ChainClient, FaultReport};
use manyhands_network::invitation::Invitation;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};

use tokio::runtime::Runtime;

use super::program::{Program, run_json};
use super::{Bench, RUN_FILE, text_of};

/// Names with a bond, and nothing else.
struct Strangers {
    chain: ChainClient,
    run: RunId,
    keys: Vec<NodeKey>,
}

impl Strangers {
    async fn bonded(chain: &str, run: RunId, count: usize) -> Self {
        let chain = ChainClient::connect(chain).await.expect("it answers");
        let keys: Vec<NodeKey> =
            (200..).take(count).map(|seed| NodeKey::from_seed([seed; 32])).collect();
        for key in &keys {
            let funded =
                chain.fund_from_faucet(&key.node_id(), Balance(u128::from(u64::MAX))).await;
            funded.expect("a development chain has a faucet");
            chain
                .register_verifier(key, &run)
                .await
                .expect("anybody may be a verifier of this run");
        }
        Self { chain, run, keys }
    }

    /// All say that the worker cheated in the first round, which they have never seen.
    async fn accuse(&self, worker: NodeId) {
        let mut blocks = self.chain.watch_finalized().await.expect("it answers");
        let anchored = async || {
            let state = self.chain.state().await.expect("a state");
            state.anchor(&self.run, Round(0), Stage::Commit).await.expect("read").is_some()
        };
        while !anchored().await {
            blocks.next().await.expect("a block");
        }
        for key in &self.keys {
            let report = FaultReport {
                run: self.run,
                worker,
                round: Round(0),
                kind: FaultKind::Replay,
                evidence_digest: Digest::of(b"what nobody has seen"),
            };
            self.chain.report_fault(key, report).await.expect("they have a bond");
        }
    }

    /// What the chain made of it.
    async fn decision(&self, worker: NodeId) -> FaultState {
        let mut blocks = self.chain.watch_finalized().await.expect("it answers");
        loop {
            let state = self.chain.state().await.expect("a state");
            let fault = state.fault(&self.run, &worker, Round(0)).await.expect("read");
            match fault.expect("it was reported").state {
                FaultState::Reported { .. } | FaultState::Contested { .. } => {
                    blocks.next().await.expect("a block");
                }
                decided @ (FaultState::Executed { .. } | FaultState::Dismissed) => return decided,
            }
        }
    }
}

/// A run of two workers that go on until they are stopped, and the strangers' accusation of one of them.
struct Scene {
    bench: Bench,
    coordinator: Program,
    verifiers: Vec<Program>,
    accused: Program,
    _other: Program,
    worker: NodeId,
    runtime: Runtime,
    strangers: Strangers,
}

impl Scene {
    fn new(strangers: usize, verifiers: &[&str]) -> Self {
        let text = RUN_FILE
            .replace("ROUNDS", "100_000")
            .replace("contest_window_blocks = 4", "contest_window_blocks = 60")
            .replace("fault_quorum = 1", "fault_quorum = 2");
        let bench = Bench::with(&text);
        let (coordinator, launched) = bench.launch();
        let invitation = text_of(&launched, "invitation");
        let run = invitation.parse::<Invitation>().expect("an invitation").run;
        let runtime = Runtime::new().expect("threads");
        let strangers = runtime.block_on(Strangers::bonded(&bench.chain, run, strangers));
        // They have a bond before there is a round.
        let verifiers: Vec<Program> =
            verifiers.iter().map(|name| bench.node("verify", name, &invitation)).collect();
        for verifier in &verifiers {
            verifier.wait_for("joined");
        }
        let accused = bench.node("join", "first", &invitation);
        let _other = bench.node("join", "second", &invitation);
        let worker = text_of(&accused.wait_for("starting"), "node").parse().expect("an id");
        runtime.block_on(strangers.accuse(worker));
        Self { bench, coordinator, verifiers, accused, _other, worker, runtime, strangers }
    }

    /// Whoever looked found nothing, and nothing was taken.
    fn ends_well(&self) {
        let decided = self.runtime.block_on(self.strangers.decision(self.worker));
        assert_eq!(decided, FaultState::Dismissed);
        for verifier in &self.verifiers {
            let judged = verifier.wait_for("judged");
            assert_eq!(judged["guilty"], false, "{judged}");
            assert_eq!(text_of(&judged, "accused"), self.worker.to_string());
        }
        assert!(self.coordinator.heard("slashed").is_empty());
        let status = run_json(&["status", &self.bench.path("coordinator")]);
        assert_ne!(status["phase"], "complete", "the run was not held up: {status}");
    }
}

#[test]
fn two_bonded_strangers_are_outvoted_by_three_verifiers_that_look() {
    Scene::new(2, &["one", "two", "three"]).ends_well();
}

#[test]
fn a_worker_objects_to_what_its_run_says_nothing_of() {
    // One on each side is no quorum of two: silence would let the accusation stand.
    let scene = Scene::new(1, &["one"]);
    let objected = scene.accused.wait_for("objected");
    let accuser = scene.strangers.keys[0].node_id();
    assert_eq!(text_of(&objected, "by"), accuser.to_string());
    scene.ends_well();
}
