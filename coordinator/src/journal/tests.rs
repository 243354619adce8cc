//! The journal through restarts, crashes and tampering.

use manyhands_proto::NodeId;
use tempfile::TempDir;

use super::*;

fn input(round: u32) -> Input {
    let (round, worker) = (Round(round), NodeId::new([7; 32]));
    Input::PayloadArrived { round, worker, result: Err("not what the codec writes".to_owned()) }
}

fn batch(ticks: &[u64]) -> Batch {
    let inputs = ticks.iter().map(|&tick| (Tick(tick), input(tick as u32))).collect();
    Batch { inputs, ..Batch::default() }
}

fn new_journal(folder: &TempDir) -> (Journal, PathBuf) {
    let path = folder.path().join("journal.redb");
    let journal = Journal::create(&path, b"state 0".to_vec(), Tick(5)).expect("made");
    (journal, path)
}

fn ticks(recovered: &Recovered) -> Vec<u64> {
    recovered.inputs.iter().map(|(tick, _)| tick.0).collect()
}

fn damage(path: &Path) -> String {
    match Journal::open(path) {
        Err(JournalError::Damaged { reason, .. }) => reason,
        other => panic!("expected a damaged journal, got {other:?}"),
    }
}

#[test]
fn what_was_committed_is_there_after_a_restart() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut journal, path) = new_journal(&folder);
    journal.commit(&batch(&[10, 20])).expect("written");
    let note = BlobNote { digest: Digest::of(b"a"), kind: BlobKind::Payload, round: Round(1) };
    journal.commit(&Batch { blobs: vec![note], ..batch(&[20]) }).expect("written");
    drop(journal);

    let (mut journal, recovered) = Journal::open(&path).expect("whole");
    assert_eq!(recovered.snapshot, b"state 0");
    assert_eq!(ticks(&recovered), [10, 20, 20]);
    assert_eq!(recovered.inputs[0].1, input(10));
    assert_eq!((recovered.tick, recovered.blobs), (Tick(20), vec![note]));

    let snapshot = Some(b"state 4".to_vec());
    let forgotten = vec![note.digest];
    journal.commit(&Batch { snapshot, forgotten, ..batch(&[30]) }).expect("written");
    journal.commit(&batch(&[31])).expect("written");
    drop(journal);

    let (journal, recovered) = Journal::open(&path).expect("whole");
    assert_eq!(recovered.snapshot, b"state 4");
    assert_eq!(ticks(&recovered), [31]);
    assert!(recovered.blobs.is_empty());
    assert_eq!(journal.tick(), Tick(31));
}

#[test]
fn a_crash_in_the_middle_of_a_batch_leaves_the_batch_before() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut journal, path) = new_journal(&folder);
    journal.commit(&batch(&[10])).expect("written");
    let transaction = journal.database.begin_write().expect("begun");
    {
        let mut inputs = transaction.open_table(INPUTS).expect("table");
        inputs.insert(1, vec![1; 200_000].as_slice()).expect("inserted");
    }
    let crashed = folder.path().join("crashed.redb");
    fs::copy(&path, &crashed).expect("what is on disk when the power fails");
    transaction.abort().expect("aborted");
    let (_, recovered) = Journal::open(&crashed).expect("whole");
    assert_eq!(ticks(&recovered), [10]);
}

#[test]
fn a_changed_a_missing_and_a_moved_input_are_noticed() {
    type Change = fn(&mut redb::Table<'_, u64, &'static [u8]>);
    let changes: [(Change, &str); 3] = [
        (
            |inputs| {
                let json = to_json(&input(99));
                let kept = inputs.get(1).expect("read").expect("there").value()[..40].to_vec();
                inputs.insert(1, [kept, json].concat().as_slice()).expect("inserted");
            },
            "input 2 does not follow",
        ),
        (|inputs| drop(inputs.remove(2).expect("removed")), "ends with input 2, expected 3"),
        (|inputs| drop(inputs.remove(0).expect("removed")), "expected input 0, got 1"),
    ];
    for (change, expected) in changes {
        let folder = tempfile::tempdir().expect("folder");
        let (mut journal, path) = new_journal(&folder);
        journal.commit(&batch(&[10, 20, 30])).expect("written");
        let transaction = journal.database.begin_write().expect("begun");
        change(&mut transaction.open_table(INPUTS).expect("table"));
        transaction.commit().expect("committed");
        drop(journal);
        let reason = damage(&path);
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn a_changed_snapshot_and_an_empty_file_are_never_taken_for_a_new_journal() {
    let folder = tempfile::tempdir().expect("folder");
    let (journal, path) = new_journal(&folder);
    let transaction = journal.database.begin_write().expect("begun");
    {
        let mut meta = transaction.open_table(META).expect("table");
        meta.insert(SNAPSHOT, b"state 1".as_slice()).expect("inserted");
    }
    transaction.commit().expect("committed");
    drop(journal);
    assert!(damage(&path).contains("snapshot"));
    fs::write(&path, b"").expect("emptied");
    assert!(damage(&path).contains("empty"));
    fs::write(&path, vec![7; 5_000]).expect("overwritten");
    damage(&path);
    let again = Journal::create(&path, Vec::new(), Tick(0));
    assert!(matches!(again, Err(JournalError::Io { .. })));
}

#[test]
fn two_processes_cannot_have_the_same_journal() {
    let folder = tempfile::tempdir().expect("folder");
    let (_journal, path) = new_journal(&folder);
    assert!(matches!(Journal::open(&path), Err(JournalError::InUse { .. })));
}
