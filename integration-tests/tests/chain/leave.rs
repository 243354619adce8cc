//! Leaving a run from the command line, in as many goes as the chain needs.

use std::path::{Path, PathBuf};
use std::process::Command;

use manyhands_chain_client::WorkerCard;
use manyhands_network::invitation::Invitation;
use manyhands_proto::keys::NodeKey;
use serde_json::{Value, json};

use super::{Chain, RUN, digest, terms, units};

/// Blocks for which stake and bond stay on hold: some seconds, so that the first go is not enough.
const UNBONDING_BLOCKS: u32 = 200;

/// The binary that was built beside this test.
fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let folder = test.ancestors().nth(2).expect("tests lie in a folder of the target directory");
    let binary = folder.join("manyhands");
    assert!(binary.exists(), "{} is missing: run `make test`, which builds it", binary.display());
    binary
}

/// Runs `manyhands claim --leave`, and gives what it printed.
async fn claim_and_leave(invitation: &str, folder: &Path) -> Value {
    let mut command = Command::new(binary());
    command.args(["--json", "claim", invitation, "--leave", "--dir"]).arg(folder);
    let running = tokio::task::spawn_blocking(move || command.output());
    let output = running.await.expect("no panic").expect("the binary starts");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}{complained}");
    serde_json::from_str(&told).unwrap_or_else(|error| panic!("no JSON ({error}): {told}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_verifies_too_gets_stake_and_bond_back_step_by_step() {
    let chain = Chain::start().await;
    let client = &chain.client;
    let coordinator = chain.rich(1).await;
    let mut long = terms();
    long.unbonding_period = UNBONDING_BLOCKS;
    client.create_run(&coordinator, &RUN, long, units(100)).await.expect("created");
    let folder = tempfile::tempdir().expect("a folder");
    let (key, _) = NodeKey::load_or_create(&folder.path().join("node.key")).expect("a key");
    let me = key.node_id();
    client.fund_from_faucet(&me, units(100)).await.expect("funded");
    let card = WorkerCard { peer_id: vec![1; 38], capability_digest: digest(1) };
    client.register_worker(&key, card, units(50)).await.expect("registered");
    client.join_run(&key, &RUN).await.expect("joined");
    client.register_verifier(&key, &RUN).await.expect("bonded");
    let invitation = Invitation {
        run: RUN,
        coordinator: coordinator.node_id(),
        control: Vec::new(),
        data: Vec::new(),
        chain_genesis: *client.genesis_hash().as_bytes(),
        chain_url: Some(chain.devnet.url().to_owned()),
    }
    .to_string();

    // Nothing has been earned, and that keeps nobody.
    let first = claim_and_leave(&invitation, folder.path()).await;
    assert_eq!(first["not_claimed"]["code"], "nothing_vested", "{first}");
    let leaving = &first["leaving"];
    assert_eq!(leaving["done"], json!(["leave_run", "announce_exit", "retire_verifier"]));
    let held = leaving["held"].as_array().expect("a list");
    let purposes: Vec<_> = held.iter().map(|held| held["purpose"].clone()).collect();
    assert_eq!(purposes, ["stake", "bond"], "{first}");
    assert!(held.iter().all(|held| held["waits_for"] == "unbonding"), "{first}");
    let state = client.state().await.expect("a state");
    let worker = state.worker(&me).await.expect("read").expect("still registered");
    assert!(!worker.is_member(&RUN) && worker.exit_at.is_some());

    let again = claim_and_leave(&invitation, folder.path()).await;
    assert_eq!(again["leaving"]["done"], json!([]), "{again}");
    assert_eq!(again["leaving"]["held"], first["leaving"]["held"], "it waits for the same blocks");

    let until = held.iter().filter_map(|held| held["until_block"].as_u64()).max();
    chain.reach(u32::try_from(until.expect("a block")).expect("a height")).await;
    let last = claim_and_leave(&invitation, folder.path()).await;
    assert_eq!(last["leaving"]["done"], json!(["withdraw_stake", "withdraw_bond"]), "{last}");
    assert_eq!(last["leaving"]["held"], json!([]));
    let state = client.state().await.expect("a state");
    assert_eq!(state.worker(&me).await.expect("read"), None);
    assert_eq!(state.verifier(&RUN, &me).await.expect("read"), None);
    let balance = state.balance(&me).await.expect("a balance");
    assert_eq!(balance.held.0, 0);
    assert!(balance.free > units(99), "all but the fees came back: {}", balance.free);

    let done = claim_and_leave(&invitation, folder.path()).await;
    assert_eq!(done["leaving"]["done"], json!([]), "{done}");
    chain.devnet.shutdown().await;
}
