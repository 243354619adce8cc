//! What stays: restarts, kills, and folders that belong to somebody else.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use manyhands_chain_devnet::{Devnet, DevnetConfig, StartDevnetError};
use manyhands_chain_runtime::{AccountId, UNIT};
use serde_json::{Value, json};
use sp_core::H256;
use sp_runtime::traits::BlakeTwo256;
use sp_state_machine::read_proof_check;
use sp_trie::StorageProof;

use crate::client::{Client, NO_TIMER_MS, account_key, config, faucet, hex, start, unhex};

/// Tells the child process of the kill test where to run.
const CHILD_FOLDER: &str = "MANYHANDS_DEVNET_TEST_FOLDER";

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_goes_on_from_the_last_block_and_old_states_stay_provable() {
    let folder = tempfile::tempdir().expect("a folder");
    let newcomer = AccountId::new([7; 32]);
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;
    let (first, _) = client.finalize(&client.transfer(&faucet(), 0, &newcomer, UNIT)).await;
    let (last, _) = client.finalize(&client.transfer(&faucet(), 1, &newcomer, UNIT)).await;
    let genesis = devnet.genesis_hash();
    drop(client);
    devnet.shutdown().await;

    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;
    assert_eq!(devnet.genesis_hash(), genesis);
    let kept = client.get("chain_getHeader", json!([last])).await;
    assert_ne!(kept, Value::Null, "the last block is still there");
    let (third, _) = client.finalize(&client.transfer(&faucet(), 2, &newcomer, UNIT)).await;

    for (block, expected) in [(first, UNIT), (last, 2 * UNIT), (third, 3 * UNIT)] {
        assert_eq!(client.balance(&newcomer, Some(block)).await, expected);
        prove_account(&client, &newcomer, block).await;
    }
    devnet.shutdown().await;
}

/// Asks for a proof and checks it as somebody would who trusts only the block's hash.
async fn prove_account(client: &Client, account: &AccountId, block: H256) {
    let key = account_key(account);
    let absent = account_key(&AccountId::new([99; 32]));
    let header = client.get("chain_getHeader", json!([block])).await;
    let header: manyhands_chain_runtime::Header = serde_json::from_value(header).expect("a header");
    assert_eq!(header.hash(), block);
    let answer = client.get("state_getReadProof", json!([[hex(&key), hex(&absent)], block])).await;
    let nodes: Vec<Vec<u8>> =
        answer["proof"].as_array().expect("nodes").iter().map(unhex).collect();
    let check = |nodes: Vec<Vec<u8>>| {
        let keys = [&key, &absent];
        read_proof_check::<BlakeTwo256, _>(header.state_root, StorageProof::new(nodes), keys)
    };

    let values = check(nodes.clone()).expect("the proof holds");
    let stored = client.get("state_getStorage", json!([hex(&key), block])).await;
    assert_eq!(values[&key], Some(unhex(&stored)));
    assert_eq!(values[&absent], None, "that nothing is there is proven too");
    for place in 0..nodes.len() {
        let mut forged = nodes.clone();
        let middle = forged[place].len() / 2;
        forged[place][middle] ^= 1;
        assert!(check(forged).is_err(), "a flipped bit in node {place} must be noticed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_or_a_folder_in_use_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let other = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let address = devnet.url().strip_prefix("ws://").expect("a web socket").parse();
    let listen = address.expect("an address");

    let second = Devnet::start(DevnetConfig { listen, ..config(other.path(), 1_000) }).await;
    let refusal = second.err().expect("the port is taken");
    assert!(matches!(refusal, StartDevnetError::PortInUse { .. }), "{refusal}");
    assert!(refusal.to_string().contains(&listen.to_string()));
    assert_eq!(std::fs::read_dir(other.path()).expect("a folder").count(), 0, "left untouched");

    let second = Devnet::start(config(folder.path(), 1_000)).await;
    let refusal = second.err().expect("the folder is taken");
    assert!(matches!(refusal, StartDevnetError::DataDirInUse { .. }), "{refusal}");

    let client = Client::connect(&devnet).await;
    client.finalize(&client.transfer(&faucet(), 0, &AccountId::new([7; 32]), UNIT)).await;
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_no_database_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("chain.redb");
    std::fs::write(&path, "my diary").expect("a file");
    let refusal = Devnet::start(config(folder.path(), 1_000)).await.err().expect("refused");
    assert!(matches!(refusal, StartDevnetError::Store { .. }), "{refusal}");
    assert_eq!(std::fs::read_to_string(&path).expect("the file"), "my diary");

    let refusal = Devnet::start(config(&path, 1_000)).await.err().expect("refused");
    assert!(matches!(refusal, StartDevnetError::DataDir { .. }), "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_was_killed_has_every_block_it_called_final() {
    let folder = tempfile::tempdir().expect("a folder");
    let newcomer = AccountId::new([7; 32]);
    let mut sent = 0;
    let mut finals = Vec::new();
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["disk::child_that_serves_until_killed", "--exact", "--ignored", "--nocapture"])
            .env(CHILD_FOLDER, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test program starts");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let url = output
            .lines()
            .map(|line| line.expect("text"))
            .find_map(|line| line.split_once("serves at ").map(|(_, url)| url.to_owned()))
            .expect("the child says where it serves");
        let client = Client::connect_to(&url).await;
        for block in &finals {
            assert_ne!(client.get("chain_getHeader", json!([block])).await, Value::Null);
        }
        assert_eq!(client.balance(&newcomer, None).await, sent * UNIT);
        for _ in 0..2 {
            let nonce = u32::try_from(sent).expect("few");
            let (block, _) =
                client.finalize(&client.transfer(&faucet(), nonce, &newcomer, UNIT)).await;
            finals.push(block);
            sent += 1;
        }
        // On Unix this is SIGKILL. The timer writes a block every few milliseconds meanwhile.
        child.kill().expect("killed");
        child.wait().expect("gone");
    }
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;
    assert_eq!(client.balance(&newcomer, None).await, sent * UNIT);
    prove_account(&client, &newcomer, *finals.last().expect("some")).await;
    devnet.shutdown().await;
}

/// Not a test: the process that the test above kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "runs only as a child of a_chain_that_was_killed_has_every_block_it_called_final"]
async fn child_that_serves_until_killed() {
    let Some(folder) = std::env::var_os(CHILD_FOLDER) else { return };
    let mut devnet = start(folder.as_ref(), 5).await;
    println!("serves at {}", devnet.url());
    let failure = devnet.failed().await;
    panic!("the devnet stopped: {failure}");
}
