//! Runs from the first round to the last.

use manyhands_coordinator::{read_record, service::records_folder};
use manyhands_gradient::codec::Update;
use manyhands_gradient::{Layout, initial_theta, vector};
use manyhands_proto::message::{Distances, ReplayEvidence, Reply, Request, Role, UpdateEvidence};
use manyhands_proto::{ChunkIndex, Digest, NodeId, Round};
use manyhands_rules::evidence::{Subject, distances};
use manyhands_rules::panel::Judged;
use manyhands_rules::record::{Finding, Outcome, RoundRecord};
use manyhands_rules::update_evidence::find_fault;
use manyhands_rules::worker::Exit;

use crate::peer::{Conduct, key};
use crate::world::{World, run_file, within};

/// The run's records in order, checked to be a chain from the specification.
pub(crate) fn records(world: &World, rounds: Round) -> Vec<RoundRecord> {
    let folder = records_folder(world.folder());
    let records: Vec<_> =
        (0..rounds.0).map(|round| read_record(&folder, Round(round)).expect("a record")).collect();
    let mut previous = world.spec.digest();
    for record in &records {
        assert_eq!(record.previous, previous);
        previous = record.digest();
    }
    records
}

/// θ at the end, from θ₀ and the merges that a stranger can fetch.
pub(crate) async fn follow(world: &World, records: &[RoundRecord]) -> Digest {
    let stranger = world.peer(200, Role::Worker, Conduct::Honest).await;
    let layout = Layout::of(&world.spec.model).expect("layout");
    let mut theta = initial_theta(&layout, &world.spec.model, world.spec.run.seed);
    for record in records {
        assert_eq!(vector::digest(&theta), record.theta);
        if let Some(merge) = &record.merge {
            let bytes = within("a merge", stranger.fetch(merge.aggregate)).await.expect("public");
            let update = Update::parse(&bytes, &layout, world.spec.aggregation.broadcast);
            update.expect("a merge").subtract_from(&layout, &mut theta);
        }
        assert_eq!(vector::digest(&theta), record.theta_next);
    }
    vector::digest(&theta)
}

fn outcome(record: &RoundRecord, worker: NodeId) -> &Outcome {
    let result = record.results.iter().find(|result| result.worker == worker);
    &result.expect("it was a candidate").outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_and_a_verifier_finish_a_run_that_anybody_can_follow() {
    let world = World::new(run_file()).await;
    let verifier = world.join(9, Role::Verifier, Conduct::Honest).await;
    let workers = [
        world.join(1, Role::Worker, Conduct::Honest).await,
        world.join(2, Role::Worker, Conduct::Honest).await,
    ];
    let completed = within("the run", world.handle().wait_complete()).await.expect("complete");
    for peer in workers.into_iter().chain([verifier]) {
        let ended = within("a peer's end", peer).await.expect("no panic");
        assert!(matches!(ended.exit, Exit::Complete { theta, .. } if theta == completed.theta));
    }
    let records = records(&world, completed.rounds);
    assert_eq!(follow(&world, &records).await, completed.theta);
    for record in &records[..2] {
        assert_eq!(outcome(record, key(1).node_id()), &Outcome::Admitted);
        assert_eq!(outcome(record, key(2).node_id()), &Outcome::Admitted);
        let passed = record.checks.iter().filter(|check| check.finding == Finding::CodecPassed);
        assert_eq!(passed.count(), 2);
    }
    let status = world.status().await;
    assert!(status.problems.is_empty());
    assert_eq!(status.run.history[0].held_out_loss, Some(5.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_error_buffer_and_a_garbage_payload_are_faults_and_the_round_merges_the_rest() {
    let mut file = run_file();
    (file.run.rounds, file.run.workers_min) = (1, 3);
    let world = World::new(file).await;
    let peers = [
        world.join(9, Role::Verifier, Conduct::Honest).await,
        world.join(1, Role::Worker, Conduct::Honest).await,
        world.join(2, Role::Worker, Conduct::ForgesItsErrorBuffer).await,
        world.join(3, Role::Worker, Conduct::SendsGarbage).await,
    ];
    let completed = within("the run", world.handle().wait_complete()).await.expect("complete");
    let records = records(&world, completed.rounds);
    assert_eq!(outcome(&records[0], key(1).node_id()), &Outcome::Admitted);
    let Outcome::CodecFault(fault) = outcome(&records[0], key(2).node_id()) else {
        panic!("it is found: {:?}", records[0].results)
    };
    assert!(matches!(outcome(&records[0], key(3).node_id()), Outcome::Malformed(_)));
    let [_, honest, forger, garbage] = peers;
    assert!(matches!(honest.await.expect("no panic").exit, Exit::Complete { .. }));
    for cheat in [forger, garbage] {
        assert!(matches!(within("its end", cheat).await.expect("no panic").exit, Exit::Refused(_)));
    }
    let faults = world.status().await.run.faults;
    assert_eq!(faults.len(), 2);
    // Anybody can see that it is so.
    let stranger = world.peer(201, Role::Worker, Conduct::Honest).await;
    let layout = Layout::of(&world.spec.model).expect("layout");
    let shown = within("evidence", stranger.fetch(fault.evidence)).await.expect("public");
    let shown = UpdateEvidence::parse(&shown).expect("evidence");
    assert_eq!(shown.work.worker(), key(2).node_id());
    let payload = shown.work.commitment.commitment.payload;
    let payload = within("a payload", stranger.fetch(payload)).await.expect("public");
    let (run, terms) = (shown.work.commitment.run, (&layout, &world.spec.codec));
    let found = find_fault(&shown, run, terms, (Some(&payload), None));
    assert_eq!(found, Ok(fault.reason.clone()));
    assert_eq!(follow(&world, &records).await, completed.theta);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_same_bits_are_asked_for_a_single_one_is_found() {
    for fingerprint in [None, Some(Digest::of(b"bits"))] {
        let mut file = run_file();
        (file.run.rounds, file.run.workers_min) = (1, 2);
        (file.verification.verifiers_min, file.verification.probation_checks) = (2, 1);
        file.verification.fingerprint = fingerprint;
        let world = World::new(file).await;
        let peers = [
            world.join(8, Role::Verifier, Conduct::Honest).await,
            world.join(9, Role::Verifier, Conduct::Honest).await,
            world.join(1, Role::Worker, Conduct::Honest).await,
            world.join(2, Role::Worker, Conduct::ChangesOneBit).await,
        ];
        let completed = within("the run", world.handle().wait_complete()).await.expect("complete");
        let record = &records(&world, completed.rounds)[0];
        assert_eq!(outcome(record, key(1).node_id()), &Outcome::Admitted);
        let changed = outcome(record, key(2).node_id());
        match fingerprint {
            None => assert_eq!(changed, &Outcome::Admitted, "far inside the tolerance"),
            Some(_) => assert_eq!(changed, &Outcome::ReplayFault(Distances::FARTHEST)),
        }
        for peer in peers {
            within("a peer's end", peer).await.expect("no panic");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_trains_on_other_data_is_found_and_anybody_can_see_that_it_is_so() {
    let mut file = run_file();
    (file.run.rounds, file.run.workers_min) = (1, 3);
    (file.verification.verifiers_min, file.verification.probation_checks) = (3, 1);
    let world = World::new(file).await;
    let mut peers = Vec::new();
    for id in [7, 8, 9] {
        peers.push(world.join(id, Role::Verifier, Conduct::Honest).await);
    }
    peers.push(world.join(1, Role::Worker, Conduct::Honest).await);
    peers.push(world.join(2, Role::Worker, Conduct::Honest).await);
    peers.push(world.join(3, Role::Worker, Conduct::TrainsOnOtherData).await);
    let completed = within("the run", world.handle().wait_complete()).await.expect("complete");
    let records = records(&world, completed.rounds);
    let record = &records[0];
    assert_eq!(outcome(record, key(1).node_id()), &Outcome::Admitted);
    assert_eq!(outcome(record, key(2).node_id()), &Outcome::Admitted);
    let Outcome::ReplayFault(found) = outcome(record, key(3).node_id()) else {
        panic!("it is found: {:?}", record.results)
    };
    let check = record.checks.iter().find(|check| matches!(check.finding, Finding::ReplayFault(_)));
    let check = check.expect("its check");
    assert_eq!(check.judgements.len(), 2, "two of three found against it");
    let layout = Layout::of(&world.spec.model).expect("layout");
    let stranger = world.peer(200, Role::Worker, Conduct::Honest).await;
    for judgement in &check.judgements {
        let blob = judgement.evidence.expect("what it follows from is kept");
        let bytes = within("evidence", stranger.fetch(blob)).await.expect("public");
        let evidence = ReplayEvidence::parse(&bytes).expect("evidence");
        let chunks: Vec<_> = (0..layout.chunk_count() as u32).map(ChunkIndex).collect();
        let subject =
            Subject { layout: &layout, start: record.theta, chunks: &chunks, exact: false };
        let shown = distances(&evidence, subject).expect("it leads where it should");
        assert_eq!(judgement.verdict, Judged::Fault(shown));
    }
    assert!(found.delta > 0.5, "{found:?}");
    for peer in peers {
        within("a peer's end", peer).await.expect("no panic");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verifier_that_does_not_show_where_it_ended_judges_nobody() {
    let mut file = run_file();
    (file.run.rounds, file.run.workers_min) = (1, 1);
    (file.verification.verifiers_min, file.verification.probation_checks) = (2, 1);
    file.round.check_ms = 2_000;
    let world = World::new(file).await;
    let peers = [
        world.join(8, Role::Verifier, Conduct::ShowsNothing).await,
        world.join(9, Role::Verifier, Conduct::ShowsNothing).await,
        world.join(1, Role::Worker, Conduct::Honest).await,
    ];
    let completed = within("the run", world.handle().wait_complete()).await.expect("complete");
    let records = records(&world, completed.rounds);
    // Neither passed nor blamed.
    assert_eq!(outcome(&records[0], key(1).node_id()), &Outcome::Unverified);
    assert!(records[0].checks.iter().all(|check| check.is_of_codec()));
    for peer in peers {
        within("a peer's end", peer).await.expect("no panic");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_described_to_whoever_asks() {
    let world = World::new(run_file()).await;
    let mut stranger = world.peer(1, Role::Worker, Conduct::Honest).await;
    let reply = within("the answer", stranger.ask(&Request::Describe)).await.expect("answered");
    let Reply::Description { spec, round } = reply else { panic!("got {reply:?}") };
    assert_eq!((spec, round), (world.spec.canonical_bytes(), Round(0)));
}
