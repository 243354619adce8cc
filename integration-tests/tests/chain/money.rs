//! Balances, the faucet, and the reasons why money does not move.

use manyhands_chain_client::{ChainClient, Submission, SubmitError};
use manyhands_proto::Balance;

use super::{Chain, RUN, key, terms, units};

#[tokio::test(flavor = "multi_thread")]
async fn the_faucet_fills_up_and_does_nothing_for_the_rich() {
    let chain = Chain::start().await;
    let newcomer = key(3).node_id();
    assert_eq!(chain.client.balance(&newcomer).await.expect("a balance").free, Balance(0));

    let first = chain.client.fund_from_faucet(&newcomer, units(10)).await.expect("funded");
    assert!(matches!(first, Submission::Included { .. }));
    let again = chain.client.fund_from_faucet(&newcomer, units(10)).await.expect("funded");
    assert!(matches!(again, Submission::AlreadyDone { .. }));
    let state = chain.client.state_at(&first.block().hash).await.expect("that block's state");
    assert_eq!(state.balance(&newcomer).await.expect("a balance").free, units(10));
    chain.devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_with_one_key_both_get_through() {
    let chain = Chain::start().await;
    // Two connections do not share the lock that orders one client's submissions.
    let other = ChainClient::connect(chain.devnet.url()).await.expect("it answers");
    let rich = chain.rich(4).await;
    let (left, right) = (key(5).node_id(), key(6).node_id());
    let send = async |client: &ChainClient, to| {
        for _ in 0..4 {
            client.transfer(&rich, to, units(1)).await.expect("sent");
        }
    };
    tokio::join!(send(&chain.client, &left), send(&other, &right));
    for to in [left, right] {
        assert_eq!(chain.client.balance(&to).await.expect("a balance").free, units(4));
    }
    chain.devnet.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_money_is_not_mistaken_for_anything_else() {
    let chain = Chain::start().await;
    let pauper = key(8);
    let refusal = chain.client.transfer(&pauper, &key(9).node_id(), units(1)).await;
    let refusal = refusal.expect_err("nothing to pay with");
    let SubmitError::MissingMoney { account, free, .. } = refusal else {
        panic!("expected missing money, got {refusal}");
    };
    assert_eq!((account, free), (pauper.node_id(), Balance(0)));

    let rich = chain.rich(10).await;
    let refusal = chain.client.create_run(&rich, &RUN, terms(), units(5_000)).await;
    let refusal = refusal.expect_err("it has a fifth of that");
    assert!(matches!(refusal, SubmitError::Failed { .. }), "the fee could be paid: {refusal}");
    assert_eq!(chain.client.state().await.expect("a state").run(&RUN).await.expect("read"), None);
    chain.devnet.shutdown().await;
}
