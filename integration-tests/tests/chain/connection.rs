//! Connecting, losing the connection, and coming back.

use std::time::Duration;

use manyhands_chain_client::{ChainClient, ConnectError};

use super::{Chain, key, start, units};

#[tokio::test(flavor = "multi_thread")]
async fn the_client_knows_which_chain_it_talks_to() {
    let chain = Chain::start().await;
    assert_eq!(*chain.client.genesis_hash().as_bytes(), chain.devnet.genesis_hash());
    assert!(chain.client.is_development());
    let genesis = chain.client.block_hash(0).await.expect("an answer");
    assert_eq!(genesis, Some(chain.client.genesis_hash()));
    assert_eq!(chain.client.block_hash(4_000_000).await.expect("an answer"), None);

    let address = chain.devnet.url().replace("ws://", "http://");
    let refusal = ChainClient::connect(&address).await.expect_err("not a web socket address");
    assert!(matches!(refusal, ConnectError::Address { .. }), "{refusal}");
    chain.devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_sees_every_block_once_through_a_restart() {
    let chain = Chain::start().await;
    let listen = chain.devnet.url().replace("ws://", "");
    let mut blocks = chain.client.watch_finalized_from(1);
    let mut next = async |expected: u32| {
        loop {
            // While the chain is away there are errors; they are not blocks.
            if let Ok(block) = blocks.next().await {
                assert_eq!(block.number, expected);
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    for number in 1..=5 {
        next(number).await;
    }

    chain.devnet.shutdown().await;
    let devnet = start(chain.folder.path(), &listen).await;
    for number in 6..=20 {
        next(number).await;
    }
    let funded = chain.client.fund_from_faucet(&key(5).node_id(), units(3)).await;
    funded.expect("the same client goes on");
    devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_met_a_restart_happens_exactly_once() {
    let chain = Chain::start().await;
    let listen = chain.devnet.url().replace("ws://", "");
    let rich = chain.rich(6).await;
    let to = key(7).node_id();

    let client = chain.client.clone();
    let sending = tokio::spawn(async move {
        for _ in 0..8 {
            client.transfer(&rich, &to, units(1)).await.expect("the chain comes back");
        }
    });
    // Wherever in its work the sender is now, the chain goes away under it.
    chain.reach(chain.client.finalized_head().await.expect("a head").number + 4).await;
    chain.devnet.shutdown().await;
    let devnet = start(chain.folder.path(), &listen).await;
    sending.await.expect("the sender does not panic");
    assert_eq!(chain.client.balance(&to).await.expect("a balance").free, units(8));
    devnet.shutdown().await;
}
