//! What becomes of transactions.

use codec::{Compact, Encode};
use jsonrpsee::core::client::SubscriptionClientT;
use jsonrpsee::rpc_params;
use manyhands_chain_runtime::{AccountId, Header, UNIT, genesis};
use serde_json::{Value, json};
use sp_core::{Pair as _, ed25519};

use crate::client::{Client, NO_TIMER_MS, faucet, hex, start, unhex};

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_is_final_when_the_watch_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;
    let newcomer = AccountId::new([7; 32]);

    let (block, said) = client.finalize(&client.transfer(&faucet(), 0, &newcomer, 5 * UNIT)).await;

    // A status that was overtaken before anybody looked is not sent.
    let course = [json!("ready"), json!({ "inBlock": block })];
    assert!(course.ends_with(&said) && !said.is_empty(), "{said:?}");
    assert_eq!(client.balance(&newcomer, Some(block)).await, 5 * UNIT);
    assert_eq!(client.get("chain_getFinalizedHead", json!([])).await, json!(block));
    let left = client.balance(&genesis::FAUCET_ACCOUNT, None).await;
    assert!(left < genesis::FAUCET_ENDOWMENT - 5 * UNIT, "the sender also paid a fee");
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_nonce_waits_for_the_earlier() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;
    let newcomer = AccountId::new([7; 32]);

    let second = client.transfer(&faucet(), 1, &newcomer, UNIT);
    let mut watch = client.watch(&second).await.expect("taken");
    assert_eq!(watch.next().await.expect("a status").expect("JSON"), json!("future"));
    let pending = client.get("author_pendingExtrinsics", json!([])).await;
    assert_eq!(pending, json!([hex(&second)]));
    let account = hex(genesis::FAUCET_ACCOUNT.as_ref());
    assert_eq!(client.get("system_accountNextIndex", json!([account])).await, json!(0));

    client.finalize(&client.transfer(&faucet(), 0, &newcomer, UNIT)).await;
    let mut last = Value::Null;
    while let Some(status) = watch.next().await {
        last = status.expect("JSON");
        if last.get("finalized").is_some() {
            break;
        }
    }
    assert!(last.get("finalized").is_some(), "got {last}");
    assert_eq!(client.balance(&newcomer, None).await, 2 * UNIT);
    assert_eq!(client.get("system_accountNextIndex", json!([account])).await, json!(2));
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_transaction_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;
    let newcomer = AccountId::new([7; 32]);
    let submit = "author_submitExtrinsic";
    let first = client.transfer(&faucet(), 0, &newcomer, UNIT);
    client.finalize(&first).await;

    let (code, reason) = client.refusal(submit, json!([hex(&first)])).await;
    assert!(code == 1010 && reason.contains("outdated"), "{code} {reason}");

    let pauper = ed25519::Pair::from_seed(&[9; 32]);
    let unpaid = client.transfer(&pauper, 0, &newcomer, UNIT);
    let (code, reason) = client.refusal(submit, json!([hex(&unpaid)])).await;
    assert!(code == 1010 && reason.contains("pay some fees"), "{code} {reason}");

    let mut forged = client.transfer(&faucet(), 1, &newcomer, UNIT);
    let amount = forged.len() - 1;
    forged[amount] ^= 1;
    let (code, reason) = client.refusal(submit, json!([hex(&forged)])).await;
    assert!(code == 1010 && reason.contains("bad signature"), "{code} {reason}");

    for garbage in [vec![], vec![0xff; 40], vec![0; 1 << 20 | 1], first[1..].to_vec()] {
        let (code, reason) = client.refusal(submit, json!([hex(&garbage)])).await;
        assert_eq!(code, 1001, "{reason}");
    }
    assert_eq!(client.balance(&newcomer, None).await, UNIT, "nothing of it took effect");
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_node_would_accept_every_block() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), NO_TIMER_MS).await;
    let client = Client::connect(&devnet).await;
    for nonce in 0..3 {
        let to = AccountId::new([nonce as u8 + 1; 32]);
        client.finalize(&client.transfer(&faucet(), nonce, &to, UNIT)).await;
    }

    let head = client.head_number().await;
    assert!(head >= 3);
    for number in 1..=head {
        let (header, hash) = client.header(number).await;
        let block = client.get("chain_getBlock", json!([hash])).await;
        let Value::Array(extrinsics) = &block["block"]["extrinsics"] else { panic!("a body") };
        let body: Vec<Vec<u8>> = extrinsics.iter().map(unhex).collect();
        let mut encoded = header.encode();
        Compact(body.len() as u32).encode_to(&mut encoded);
        encoded.extend(body.concat());
        let call = json!(["Core_execute_block", hex(&encoded), header.parent_hash]);
        // The runtime panics if a root, the digest or an extrinsic is not what the header says.
        client.get("state_call", call).await;

        let mut forged = encoded.clone();
        forged[40] ^= 1;
        let call = json!(["Core_execute_block", hex(&forged), header.parent_hash]);
        let (_, reason) = client.refusal("state_call", call).await;
        assert!(reason.contains("panicked"), "{reason}");
    }
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_come_without_transactions_and_a_reader_sees_each_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let devnet = start(folder.path(), 20).await;
    let client = Client::connect(&devnet).await;
    let mut heads = client
        .rpc
        .subscribe::<Header, _>(
            "chain_subscribeFinalizedHeads",
            rpc_params![],
            "chain_unsubscribeFinalizedHeads",
        )
        .await
        .expect("a subscription");

    let mut before = heads.next().await.expect("a head").expect("a header");
    for _ in 0..5 {
        let next = heads.next().await.expect("a head").expect("a header");
        assert_eq!(next.number, before.number + 1);
        assert_eq!(next.parent_hash, before.hash());
        before = next;
    }
    devnet.shutdown().await;
}
