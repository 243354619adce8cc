//! The coordinator dies in the middle of a round.

use manyhands_coordinator::{CoordinatorConfig, RunManifest, StartError, start};
use manyhands_proto::Round;
use manyhands_proto::message::Role;
use manyhands_rules::worker::Exit;
use tokio::sync::watch;

use crate::peer::{Conduct, Told, key};
use crate::runs::{follow, records};
use crate::world::{World, run_file, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_coordinator_goes_on_with_the_same_round_and_nobody_trains_twice() {
    let mut world = World::new(run_file()).await;
    let (open, gate) = watch::channel(false);
    let verifier = world.join(9, Role::Verifier, Conduct::Honest).await;
    let quick = world.join(1, Role::Worker, Conduct::Honest).await;
    let slow = world.gated_peer(2, Role::Worker, Conduct::Honest, gate).await;
    let slow = tokio::spawn(slow.run());

    // The first has committed and been told so; the second still trains.
    assert_eq!(world.told().await, Told::Committed(key(1).node_id(), Round(0)));
    let before = world.status().await.run;
    world.kill();
    world.restart().await;
    let after = world.status().await.run;
    assert_eq!(
        (after.round, after.theta, &after.phase),
        (before.round, before.theta, &before.phase)
    );
    assert_eq!(after.phase, "training");
    assert_eq!(after.events, before.events);

    open.send_replace(true);
    let completed = within("the run", world.handle().wait_complete()).await.expect("complete");
    for worker in [quick, slow] {
        let ended = within("a worker's end", worker).await.expect("no panic");
        assert!(matches!(ended.exit, Exit::Complete { theta, .. } if theta == completed.theta));
        assert_eq!(ended.trained, [Round(0), Round(1)]);
    }
    within("the verifier's end", verifier).await.expect("no panic");
    let records = records(&world, completed.rounds);
    assert_eq!(records[0].commitments.len(), 2);
    assert_eq!(follow(&world, &records).await, completed.theta);

    // Complete stays complete.
    world.kill();
    world.restart().await;
    let again = within("the run", world.handle().wait_complete()).await.expect("complete");
    assert_eq!(again, completed);
    let coordinator = world.coordinator.take().expect("it runs");
    within("the shutdown", coordinator.shutdown()).await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_journal_is_an_error_and_not_a_new_run() {
    let world = World::new(run_file()).await;
    let manifest = RunManifest::read(world.folder()).expect("readable").expect("there");
    let config = CoordinatorConfig::new(world.folder().to_owned(), key(100), manifest);
    let second = start(config.clone()).await.err().expect("the folder is in use");
    assert!(second.to_string().contains("another coordinator uses"), "{second}");

    let other = CoordinatorConfig { key: key(101), ..config.clone() };
    assert!(matches!(start(other).await, Err(StartError::OtherKey { .. })));

    let elsewhere = tempfile::tempdir().expect("folder");
    let records = manyhands_coordinator::service::records_folder(elsewhere.path());
    std::fs::create_dir_all(&records).expect("made");
    std::fs::write(records.join("0.json"), "{}").expect("written");
    let lost = CoordinatorConfig { folder: elsewhere.path().to_owned(), ..config };
    assert!(matches!(start(lost).await, Err(StartError::JournalGone { .. })));
}
