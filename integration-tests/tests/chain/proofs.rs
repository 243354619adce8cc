//! From a value back to a finalised block, trusting only its hash.

use manyhands_chain_client::types::{RoundRecord, RoundState, Run, Stage};
use manyhands_chain_client::{StorageKey, VerifyProofError};
use manyhands_proto::leaf::verify_proof;
use manyhands_proto::{Digest, Round};

use super::settlement::settle;
use super::{Chain, RUN, units};

#[tokio::test(flavor = "multi_thread")]
async fn a_round_record_is_proven_at_a_finalised_block() {
    let chain = Chain::start().await;
    let client = &chain.client;
    let (coordinator, verifier) = (chain.rich(1).await, chain.rich(2).await);
    chain.run_with(&coordinator, units(100)).await;
    client.register_verifier(&verifier, &RUN).await.expect("bonded");
    let worker = chain.worker(3).await;
    let round = settle(&chain, 0, &[&worker]);
    chain.finish(&round, &coordinator, &verifier).await;

    let block = client.finalized_head().await.expect("a head");
    let keys = [
        StorageKey::round(&RUN, Round(0)),
        StorageKey::run(&RUN),
        StorageKey::anchor(&RUN, Round(0), Stage::Admitted),
        StorageKey::claimed(&RUN, &worker.node_id()),
        StorageKey::fault(&RUN, &worker.node_id(), Round(0)),
    ];
    let proof = client.read_proof(&keys, &block.hash).await.expect("an answer");

    // From here on no node is asked.
    let (header, values) = proof.verify(&block.hash, &keys).expect("the proof holds");
    assert_eq!(header.number, block.number);
    let bytes = values[0].as_ref().expect("the round is there");
    let record = RoundRecord::from_state(bytes).expect("a round record");
    assert_eq!(record.commitment, round.commitment);
    assert_eq!(record.state, RoundState::Finalized);
    let claim = round.claim(0);
    assert!(verify_proof(
        record.commitment.contributions_root.as_bytes(),
        record.commitment.number_of_leaves,
        claim.leaf_index,
        &claim.leaf.hash(),
        &claim.siblings,
    ));
    let run = Run::from_state(values[1].as_ref().expect("the run is there")).expect("a run");
    assert_eq!(run.latest_finalized, Some(Round(0)));
    assert!(values[2].is_some());
    assert_eq!(values[3..], [None, None], "nothing claimed, no fault");

    // The same state, asked for the ordinary way.
    let state = client.state_at(&block.hash).await.expect("the state");
    assert_eq!(state.round(&RUN, Round(0)).await.expect("read"), Some(record));
    assert_eq!(state.run(&RUN).await.expect("read"), Some(run));

    let other = proof.verify(&Digest::new([1; 32]), &keys).expect_err("another block");
    assert!(matches!(other, VerifyProofError::OtherBlock { .. }));
    let mut forged = proof.clone();
    forged.header[40] ^= 1;
    assert!(forged.verify(&block.hash, &keys).is_err(), "a changed header");
    for place in 0..proof.nodes.len() {
        let mut forged = proof.clone();
        let middle = forged.nodes[place].len() / 2;
        forged.nodes[place][middle] ^= 1;
        assert!(forged.verify(&block.hash, &keys).is_err(), "a changed node");
    }
    assert!(RoundRecord::from_state(&bytes[1..]).is_err());
    chain.devnet.shutdown().await;
}
