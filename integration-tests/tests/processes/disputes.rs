//! What a coordinator says on the chain of somebody who did nothing of the kind.

use manyhands_chain_client::types::{FaultKind, FaultState, Stage};
use manyhands_chain_client::{Accusation, ChainClient};
use manyhands_network::invitation::Invitation;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Digest, NodeId, Round, RunId};
use tokio::runtime::Runtime;

use super::program::{Program, run_json};
use super::{Bench, RUN_FILE, text_of};

/// A run of two workers that go on until they are stopped. Its owner's key accuses one of them, behind the back of the
/// coordinator that runs with it.
struct Scene {
    bench: Bench,
    coordinator: Program,
    verifiers: Vec<Program>,
    accused: Program,
    _other: Program,
    accusation: Accusation,
    runtime: Runtime,
    chain: ChainClient,
    run: RunId,
    invitation: String,
}

impl Scene {
    fn new(verifiers: &[&str], kind: FaultKind) -> Self {
        let text = RUN_FILE
            .replace("ROUNDS", "100_000")
            .replace("contest_window_blocks = 4", "contest_window_blocks = 60")
            .replace("fault_quorum = 1", "fault_quorum = 2");
        let bench = Bench::with(&text);
        let (coordinator, launched) = bench.launch();
        let invitation = text_of(&launched, "invitation");
        let run = invitation.parse::<Invitation>().expect("an invitation").run;
        let runtime = Runtime::new().expect("threads");
        let chain = runtime.block_on(ChainClient::connect(&bench.chain)).expect("it answers");
        // They have a bond before there is a round.
        let verifiers: Vec<Program> =
            verifiers.iter().map(|name| bench.node("verify", name, &invitation)).collect();
        for verifier in &verifiers {
            verifier.wait_for("joined");
        }
        let accused = bench.node("join", "first", &invitation);
        let _other = bench.node("join", "second", &invitation);
        let worker: NodeId = text_of(&accused.wait_for("starting"), "node").parse().expect("an id");
        let accusation = Accusation::Worker { worker, round: Round(0), kind };
        let scene = Self {
            bench,
            coordinator,
            verifiers,
            accused,
            _other,
            accusation,
            runtime,
            chain,
            run,
            invitation,
        };
        scene.runtime.block_on(scene.accuse());
        scene
    }

    async fn accuse(&self) {
        let mut blocks = self.chain.watch_finalized().await.expect("it answers");
        let anchored = async || {
            let state = self.chain.state().await.expect("a state");
            state.anchor(&self.run, Round(0), Stage::Commit).await.expect("read").is_some()
        };
        while !anchored().await {
            blocks.next().await.expect("a block");
        }
        let key = self.owner();
        let evidence = Digest::of(b"what nobody has seen");
        self.chain.report(&key, &self.run, &self.accusation, evidence).await.expect("its run");
    }

    fn owner(&self) -> NodeKey {
        let path = std::path::PathBuf::from(self.bench.path("coordinator")).join("node.key");
        NodeKey::load_or_create(&path).expect("the owner's key").0
    }

    /// What the chain made of it.
    async fn decision(&self) -> FaultState {
        let mut blocks = self.chain.watch_finalized().await.expect("it answers");
        loop {
            let state = self.chain.state().await.expect("a state");
            let dispute = state.dispute(&self.run, &self.accusation).await.expect("read");
            let dispute = dispute.expect("it was reported");
            if dispute.decided_from().is_none() {
                return dispute.state;
            }
            blocks.next().await.expect("a block");
        }
    }

    /// Whoever looked found nothing, and nothing was taken.
    fn ends_well(&self) {
        assert_eq!(self.runtime.block_on(self.decision()), FaultState::Dismissed);
        for verifier in &self.verifiers {
            let voted = verifier.wait_for("voted");
            assert_eq!(voted["guilty"], false, "{voted}");
            assert_eq!(text_of(&voted, "accused"), self.accusation.node().to_string());
        }
        assert!(self.coordinator.heard("slashed").is_empty());
        let status = run_json(&["status", &self.bench.path("coordinator")]);
        assert_ne!(status["phase"], "complete", "the run was not held up: {status}");
    }
}

#[test]
fn two_verifiers_that_are_shown_nothing_acquit() {
    Scene::new(&["one", "two"], FaultKind::Replay).ends_well();
}

#[test]
fn a_worker_objects_to_what_its_run_says_nothing_of() {
    // One is no quorum of two: silence would let the accusation stand.
    let scene = Scene::new(&["one"], FaultKind::Replay);
    let objected = scene.accused.wait_for("objected");
    assert_eq!(objected["round"], 0);
    scene.ends_well();
}

#[test]
fn whoever_runs_a_worker_objects_by_hand_to_what_it_would_not() {
    // Who withheld something stays in the run, and is told there: its program leaves that to its owner.
    let scene = Scene::new(&["one"], FaultKind::Withheld);
    let folder = scene.bench.path("first");
    let contest = ["contest", &scene.invitation, "--dir", &folder];
    let answered = run_json(&contest);
    assert_eq!(answered["accusations"][0]["answer"], "objected", "{answered}");
    let again = run_json(&contest);
    assert_eq!(again["accusations"][0]["answer"], "objected_before", "{again}");
    scene.ends_well();
    assert!(scene.accused.heard("objected").is_empty());
}
