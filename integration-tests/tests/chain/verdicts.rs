//! A verifier that is accused of a lie: once wrongly, once rightly.

use manyhands_chain_client::types::{FaultState, Finding, Stage, VerifierFault};
use manyhands_chain_client::{Accusation, StorageKey, Submission, SubmitError, TrainingEvent};
use manyhands_proto::Round;

use super::{Chain, RUN, digest, terms, units};

/// Blocks to contest in: more than pass while one submission follows another.
const CONTEST_BLOCKS: u32 = 200;

#[tokio::test(flavor = "multi_thread")]
async fn a_verifier_that_lied_loses_its_bond_and_one_that_did_not_is_paid() {
    let chain = Chain::start().await;
    let client = &chain.client;
    let (coordinator, accuser, accused) =
        (chain.rich(1).await, chain.rich(2).await, chain.rich(3).await);
    let mut patient = terms();
    patient.contest_window = CONTEST_BLOCKS;
    patient.unbonding_period += CONTEST_BLOCKS;
    client.create_run(&coordinator, &RUN, patient, units(100)).await.expect("created");
    for verifier in [&accuser, &accused] {
        client.register_verifier(verifier, &RUN).await.expect("bonded");
    }
    let worker = chain.worker(4).await.node_id();
    for round in [Round(0), Round(1)] {
        let anchored =
            client.anchor_commitments(&coordinator, &RUN, (round, Stage::Commit), digest(9));
        anchored.await.expect("anchored");
    }
    let verifier = accused.node_id();
    let said = |round| Accusation::Verifier { verifier, worker, round: Round(round) };

    let refused = client.report(&accuser, &RUN, &said(0), digest(66)).await;
    let refused = refused.expect_err("the run is not its own");
    assert!(
        matches!(&refused, SubmitError::Failed { error, .. } if error == "NotOwner"),
        "{refused}"
    );
    // The accused objects, the one other verifier finds it innocent, and the coordinator pays.
    for done_before in [false, true] {
        let reported = client.report(&coordinator, &RUN, &said(0), digest(66)).await;
        let reported = reported.expect("reported");
        assert_eq!(matches!(reported, Submission::AlreadyDone { .. }), done_before);
    }
    let record = client.state().await.expect("a state").verifier(&RUN, &verifier).await;
    assert_eq!(record.expect("read").expect("registered").open_faults, 1);
    for done_before in [false, true] {
        let contested = client.contest(&accused, &RUN, &said(0), digest(67)).await;
        let contested = contested.expect("contested");
        assert_eq!(matches!(contested, Submission::AlreadyDone { .. }), done_before);
    }
    let state = client.state().await.expect("a state");
    let fault = state.verifier_fault(&RUN, &verifier, &worker, Round(0)).await.expect("read");
    let FaultState::Contested { bond, .. } = fault.expect("on record").state else {
        panic!("it was contested")
    };
    assert_eq!(bond, units(5));
    let found = client.vote(&accuser, &RUN, &said(0), Finding::Innocent).await.expect("voted");
    assert!(found.events().iter().any(|event| matches!(
        event,
        TrainingEvent::VerifierFaultDismissed { penalty, .. } if *penalty == units(5)
    )));

    // One verifier is this run's quorum, and all that has a vote here.
    client.report(&coordinator, &RUN, &said(1), digest(66)).await.expect("reported");
    let slashed = client.vote(&accuser, &RUN, &said(1), Finding::Guilty).await.expect("voted");
    let expected = TrainingEvent::VerifierSlashed {
        run: RUN,
        verifier,
        worker,
        round: Round(1),
        amount: units(20),
        to_reporters: units(10),
        to_escrow: units(10),
        votes: 1,
    };
    assert!(slashed.events().contains(&expected), "{:?}", slashed.events());
    let again = client.vote(&accuser, &RUN, &said(1), Finding::Guilty).await;
    assert!(matches!(again.expect("no harm"), Submission::AlreadyDone { .. }));
    let other = client.vote(&accuser, &RUN, &said(1), Finding::Innocent).await;
    other.expect_err("it has voted, and otherwise");
    let again = client.decide(&accuser, &RUN, &said(1)).await;
    assert!(matches!(again.expect("no harm"), Submission::AlreadyDone { .. }));
    let state = client.state().await.expect("a state");
    let record = state.verifier(&RUN, &verifier).await.expect("read").expect("still registered");
    assert_eq!((record.bond, record.open_faults), (units(0), 0));
    let all = state.verifier_faults(&RUN).await.expect("read");
    let states: Vec<_> = all.iter().map(|(key, fault)| (*key, fault.state)).collect();
    let executed = FaultState::Executed { slashed: units(20) };
    assert_eq!(
        states,
        [
            ((verifier, worker, Round(0)), FaultState::Dismissed),
            ((verifier, worker, Round(1)), executed)
        ]
    );

    let block = state.block();
    let keys = [
        StorageKey::verifier_fault(&RUN, &verifier, &worker, Round(1)),
        StorageKey::verifier_fault(&RUN, &verifier, &worker, Round(2)),
    ];
    let proof = client.read_proof(&keys, &block.hash).await.expect("an answer");
    let (_, values) = proof.verify(&block.hash, &keys).expect("the proof holds");
    let bytes = values[0].as_ref().expect("the fault is there");
    assert_eq!(VerifierFault::from_state(bytes).expect("a fault"), all[1].1);
    assert_eq!(values[1], None);

    // It may come back with a full bond.
    let refilled = client.register_verifier(&accused, &RUN).await.expect("bonded again");
    assert!(matches!(refilled, Submission::Included { .. }));
    let record = client.state().await.expect("a state").verifier(&RUN, &verifier).await;
    assert_eq!(record.expect("read").expect("registered").bond, units(20));
    chain.devnet.shutdown().await;
}
