//! What strangers send, and what they are told.

use manyhands_coordinator::{LaunchError, launch};
use manyhands_proto::message::{Heading, RefusalCode, Reply, Request, Role, seal_request};
use manyhands_proto::run_file::ChainKind;
use manyhands_proto::{Round, RunId};

use crate::peer::{Conduct, key};
use crate::world::{World, order, run_file, within};

fn code(reply: Option<Reply>) -> RefusalCode {
    match reply {
        Some(Reply::Refused(refusal)) => refusal.code,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_foreign_signatures_and_other_runs_are_refused_with_their_codes() {
    let world = World::new(run_file()).await;
    let mut peer = world.peer(1, Role::Worker, Conduct::Honest).await;
    let run = world.status().await.run.run;
    let seal = |key_seed: u8, run: RunId| {
        let heading = Heading { run, round: Round(0), nonce: 1 };
        seal_request(&key(key_seed), heading, &Request::Leave).expect("within the limits")
    };
    let sealed = |seed| seal(seed, run);
    for bytes in [vec![0xff; 1000], sealed(1)[..40].to_vec()] {
        assert_eq!(code(within("an answer", peer.send(bytes)).await), RefusalCode::Malformed);
    }
    // It says no version at all.
    let empty = within("an answer", peer.send(Vec::new())).await;
    assert_eq!(code(empty), RefusalCode::VersionMismatch);
    let heading = Heading { run, round: Round(7), nonce: 1 };
    let elsewhere = seal_request(&key(1), heading, &Request::Leave).expect("within the limits");
    assert_eq!(code(within("an answer", peer.send(elsewhere)).await), RefusalCode::Malformed);
    let mut changed = sealed(1);
    let signature = changed.len() / 2;
    changed[signature] ^= 1;
    assert_eq!(code(within("an answer", peer.send(changed)).await), RefusalCode::Malformed);
    assert_eq!(code(within("an answer", peer.send(sealed(2))).await), RefusalCode::Malformed);
    let other = seal(1, RunId::new([3; 32]));
    assert_eq!(code(within("an answer", peer.send(other)).await), RefusalCode::WrongRun);
    let stranger = within("an answer", peer.ask(&Request::Leave)).await;
    assert_eq!(code(stranger), RefusalCode::NotAMember);
}

#[tokio::test]
async fn a_folder_keeps_its_run_and_a_run_on_chain_needs_one() {
    let folder = tempfile::tempdir().expect("folder");
    let first = launch(order(folder.path(), run_file())).await.expect("launched");
    let again = launch(order(folder.path(), run_file())).await.expect("resumed");
    assert!(again.resumed);
    assert_eq!(again.manifest, first.manifest);

    let mut changed = run_file();
    changed.run.rounds = 3;
    let refused = launch(order(folder.path(), changed)).await;
    assert!(matches!(refused, Err(LaunchError::AnotherRun { .. })));
    let mut foreign = order(folder.path(), run_file());
    foreign.key = key(7);
    assert!(matches!(launch(foreign).await, Err(LaunchError::AnotherOwner { .. })));

    let elsewhere = tempfile::tempdir().expect("folder");
    let mut on_chain = run_file();
    on_chain.chain.kind = ChainKind::Substrate;
    let refused = launch(order(elsewhere.path(), on_chain)).await.expect_err("no chain is named");
    assert!(refused.to_string().contains("--chain"), "{refused}");
}
