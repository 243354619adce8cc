//! Questions, wrong questions, and rubbish.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use codec::{Decode, Encode};
use jsonrpsee::core::client::{ClientT, SubscriptionClientT};
use jsonrpsee::http_client::HttpClientBuilder;
use jsonrpsee::rpc_params;
use manyhands_chain_runtime::{AccountId, UNIT, VERSION, genesis};
use serde_json::{Value, json};

use crate::client::{Client, NO_TIMER_MS, account_key, faucet, hex, start, unhex};

#[tokio::test(flavor = "multi_thread")]
async fn a_new_chain_introduces_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;

    assert_eq!(client.genesis.0, devnet.genesis_hash());
    assert_eq!(client.get("system_chainType", json!([])).await, json!("Development"));
    let health = client.get("system_health", json!([])).await;
    assert_eq!(health["isSyncing"], json!(false));
    let version = client.get("state_getRuntimeVersion", json!([])).await;
    assert_eq!(version["specVersion"], json!(VERSION.spec_version));
    // The version that clients are built from; `state_getMetadata` answers in an older one.
    let asked = json!(["Metadata_metadata_at_version", hex(&16_u32.encode())]);
    let metadata = unhex(&client.get("state_call", asked).await);
    let metadata = Option::<Vec<u8>>::decode(&mut metadata.as_slice()).expect("bytes, or none");
    assert!(metadata == Some(manyhands_chain_runtime::metadata_scale()), "another metadata");
    let endowment = client.balance(&genesis::FAUCET_ACCOUNT, Some(client.genesis)).await;
    assert_eq!(endowment, genesis::FAUCET_ENDOWMENT);

    let methods = client.get("rpc_methods", json!([])).await;
    let methods: Vec<String> =
        serde_json::from_value(methods["methods"].clone()).expect("a list of names");
    for needed in ["chain_getBlock", "state_getReadProof", "author_submitAndWatchExtrinsic"] {
        assert!(methods.iter().any(|method| method == needed), "{needed} is missing");
    }
    assert!(!methods.iter().any(|method| method.starts_with("chainHead")));
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_can_be_paged_queried_and_followed() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;
    let newcomer = AccountId::new([7; 32]);
    let key = hex(&account_key(&newcomer));
    let mut changes = client
        .rpc
        .subscribe::<Value, _>(
            "state_subscribeStorage",
            rpc_params![[key.clone()]],
            "state_unsubscribeStorage",
        )
        .await
        .expect("a subscription");
    let before = changes.next().await.expect("the value now").expect("JSON");
    assert_eq!(before["changes"], json!([[key, null]]));

    let (block, _) = client.finalize(&client.transfer(&faucet(), 0, &newcomer, UNIT)).await;
    let after = changes.next().await.expect("the change").expect("JSON");
    assert_eq!(after["block"], json!(block));
    let value = client.get("state_getStorage", json!([key])).await;
    assert_eq!(after["changes"], json!([[key, value]]));

    let at_genesis = client.get("state_queryStorageAt", json!([[key], client.genesis])).await;
    assert_eq!(at_genesis[0]["changes"], json!([[key, null]]));

    let prefix = hex(&account_key(&newcomer)[..32]);
    let mut keys: Vec<String> = Vec::new();
    loop {
        let page = json!([prefix, 1, keys.last(), block]);
        let page: Vec<String> =
            serde_json::from_value(client.get("state_getKeysPaged", page).await).expect("keys");
        if page.is_empty() {
            break;
        }
        keys.extend(page);
    }
    let mut expected = [hex(&account_key(&genesis::FAUCET_ACCOUNT)), key];
    expected.sort();
    assert_eq!(keys, expected);
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runtime_can_be_called_and_its_panics_are_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;

    let account = hex(genesis::FAUCET_ACCOUNT.as_ref());
    let nonce = client.get("state_call", json!(["AccountNonceApi_account_nonce", account])).await;
    assert_eq!(u32::decode(&mut unhex(&nonce).as_slice()), Ok(0));
    let transfer = client.transfer(&faucet(), 0, &AccountId::new([7; 32]), UNIT);
    let info = client.get("payment_queryInfo", json!([hex(&transfer)])).await;
    let fee: u128 = info["partialFee"].as_str().expect("text").parse().expect("a number");
    assert!(fee > 0);

    for (method, arguments) in [
        ("Core_execute_block", vec![0xff; 10]),
        ("TaggedTransactionQueue_validate_transaction", vec![]),
        ("BlockBuilder_finalize_block", vec![]),
        ("Metadata_metadata_at_version", vec![1, 2, 3]),
        ("No_such_method", 5_u32.encode()),
    ] {
        client.refusal("state_call", json!([method, hex(&arguments)])).await;
    }
    client.finalize(&transfer).await;
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_parameters_are_refused_with_what_was_expected() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;
    let unknown = hex(&[9; 32]);

    assert_eq!(client.get("chain_getBlockHash", json!([4_000_000])).await, Value::Null);
    assert_eq!(client.get("chain_getHeader", json!([unknown])).await, Value::Null);
    for (method, params, expected) in [
        ("chain_getBlockHash", json!(["first"]), "block number"),
        ("chain_getHeader", json!(["0x12"]), "32 bytes"),
        ("state_getStorage", json!([7]), "hexadecimal"),
        ("state_getStorage", json!(["0xzz"]), "hexadecimal"),
        ("state_getStorage", json!(["0x00", unknown]), "no block"),
        ("state_getKeysPaged", json!(["0x", 1_000_000]), "at most"),
        ("state_getReadProof", json!([vec!["0x00"; 2_000]]), "at most"),
        ("system_accountNextIndex", json!(["nobody"]), "SS58"),
        ("author_submitExtrinsic", json!([]), "hexadecimal"),
    ] {
        let (_, reason) = client.refusal(method, params).await;
        assert!(reason.contains(expected), "{method}: {reason}");
    }
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_costs_the_sender_its_connection_and_nobody_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let address = devnet.url().strip_prefix("ws://").expect("a web socket").to_owned();

    let send = |request: Vec<u8>| {
        let mut socket = TcpStream::connect(&address).expect("it listens");
        socket.set_read_timeout(Some(Duration::from_secs(2))).expect("a timeout above zero");
        // The server may hang up before it has read everything: that is its right. Our side stays
        // open: the server may take half a connection for one that is gone, and not answer.
        let _ = socket.write_all(&request);
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    send(vec![0xff; 4_096]);
    let post = |body: &str, length: u64| {
        format!(
            "POST / HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )
        .into_bytes()
    };
    let cut_short = "{\"jsonrpc\": \"2.0\", ";
    let answer = send(post(cut_short, cut_short.len() as u64));
    assert!(answer.contains("-32700"), "not JSON: {answer}");
    let answer = send(post("", 1 << 40));
    assert!(answer.contains("413") || answer.is_empty(), "too long: {answer}");

    let plain = HttpClientBuilder::default().build(format!("http://{address}")).expect("a client");
    let missing = plain.request::<Value, _>("system_format_disk", rpc_params![]).await;
    assert!(missing.is_err());
    let client = Client::connect(&devnet).await;
    client.finalize(&client.transfer(&faucet(), 0, &AccountId::new([7; 32]), UNIT)).await;
    devnet.shutdown().await;
}
