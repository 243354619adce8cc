use manyhands_network::data::Access;
use manyhands_proto::TokenCount;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{
    Assignment, Commitment, Distances, EndState, Replayed, SignedCommitment, SignedReplay, Start,
    Work,
};

use super::*;
use crate::sync::testing::Place;

const ELSEWHERE: Distances = Distances { delta: 0.4, first_moment: 0.4, second_moment: 0.4 };

fn key(id: u8) -> NodeKey {
    NodeKey::from_seed([id; 32])
}

fn judgement(verifier: u8, verdict: Judged) -> Judgement {
    let start = Digest::of(b"theta");
    let end = ReplayEnd::At(EndState { theta: start, moments: start });
    let (round, worker) = (Round(3), key(1).node_id());
    let replayed = Replayed { round, worker, assignment: start, end };
    let replay = SignedReplay::sign(&key(verifier), RunId::new([5; 32]), replayed);
    Judgement { replay, verdict, evidence: None, near: Vec::new() }
}

/// What the verifier `me` makes of what verifiers 2, 3, … found: a fault where others found it, one somewhere else
/// (x), a pass, or nothing shown; in upper case what can be seen.
fn opinion_of(me: u8, found: &str, kind: FaultKind) -> char {
    let verdict = |letter: char| match letter.to_ascii_lowercase() {
        'f' | 'x' => Judged::Fault(ELSEWHERE),
        'p' => Judged::Passed(Distances::NONE),
        _ => Judged::Withheld("the moments".to_owned()),
    };
    let judgements = (2..).zip(found.chars()).map(|(id, letter)| {
        let mut judgement = judgement(id, verdict(letter));
        let before = (2..).zip(found.chars()).take_while(|(other, _)| *other < id);
        let near = before.filter(|(_, other)| (letter, *other) == ('F', 'F'));
        judgement.near = near.map(|(other, _)| key(other).node_id()).collect();
        (judgement, letter.is_ascii_uppercase())
    });
    let judgements: Vec<(Judgement, bool)> = judgements.collect();
    let me = key(me).node_id();
    let own = judgements.iter().map(|(it, _)| it).find(|it| it.verifier() == me);
    let proven: Vec<Judgement> =
        judgements.iter().filter(|(_, seen)| *seen).map(|(it, _)| it.clone()).collect();
    let words = judgements.iter().filter(|(it, seen)| !seen && it.verdict.accuses()).count();
    match of_worker(own, &proven, words, kind) {
        Opinion::Guilty(_) => 'g',
        Opinion::Innocent(_) => 'i',
        Opinion::None => '-',
    }
}

#[test]
fn a_verifier_believes_what_it_sees_or_found_itself() {
    let replay = |me, found| opinion_of(me, found, FaultKind::Replay);
    assert_eq!(replay(9, "FF"), 'g', "two that were drawn");
    assert_eq!(replay(9, "FFP"), 'g');
    assert_eq!(replay(2, "FF"), 'g', "and each of them");
    assert_eq!(replay(2, "f"), 'g', "alone, it knows where it was led");
    assert_eq!(replay(9, "F"), '-', "others have only one word");
    assert_eq!(replay(9, "ff"), '-', "or two, with nothing to see behind them");
    assert_eq!(replay(9, "fPP"), 'i');
    assert_eq!(replay(9, "FX"), 'i', "two that do not agree");
    assert_eq!(replay(2, "FX"), 'i');
    assert_eq!(replay(9, "FXF"), 'g');
    assert_eq!(replay(9, "FPP"), 'i', "outvoted");
    assert_eq!(replay(4, "FFP"), 'i', "whoever let it pass does not believe two others");
    assert_eq!(replay(9, ""), 'i', "nothing that was shown holds");
    let withheld = |me, found| opinion_of(me, found, FaultKind::Withheld);
    assert_eq!(withheld(9, "ww"), '-', "only those who were there know");
    assert_eq!(withheld(2, "ww"), 'g');
    assert_eq!(withheld(2, "w"), 'g');
    assert_eq!(withheld(2, "Pw"), 'i');
}

#[tokio::test]
async fn a_fault_of_an_update_is_believed_when_it_is_seen() {
    let place = Place::new(61).await;
    let (run, worker) = (place.context.run, key(1));
    let (nothing, garbage) = (Digest::of(b"nothing"), b"no codec wrote this");
    let assignment = Assignment {
        round: Round(3),
        worker: worker.node_id(),
        theta: nothing,
        class: place.context.class.clone(),
        first_sequence: 0,
        sequences: 8,
        steps: 4,
        first_step: 12,
        start: Start::Fresh,
        left_out: Vec::new(),
        commit_deadline_ms: 1_000,
    };
    let commitment = Commitment {
        round: Round(3),
        first_sequence: 0,
        payload: Digest::of(garbage),
        payload_bytes: garbage.len() as u64,
        theta: nothing,
        moments: nothing,
        error: nothing,
        assignment: assignment.digest(),
        tokens: TokenCount(256),
        loss: 3.0,
    };
    let commitment = SignedCommitment::sign(&worker, run, commitment);
    let work = Work { commitment, assignment, head: None };
    let evidence = UpdateEvidence { work, opened: None }.to_bytes();
    let (about, digest) = ((worker.node_id(), Round(3)), Digest::of(&evidence));
    let believes = async |about| update_fault(&place.context, about, digest).await;
    let insert = |bytes: &[u8]| place.source.insert(bytes, Access::Everyone).expect("inserted");

    assert!(matches!(believes(about).await, Err(Unseen::NotShown)));
    // Of what was not shown to the coordinator there is no more to see.
    let hidden = |about| hidden_from_coordinator(&evidence, run, about);
    assert_eq!(hidden(about), Some(Opinion::None));
    let another = (key(2).node_id(), Round(3));
    assert!(matches!(hidden(another), Some(Opinion::Innocent(_))));
    let elsewhere = hidden_from_coordinator(&evidence, RunId::new([9; 32]), about);
    assert!(matches!(elsewhere, Some(Opinion::Innocent(_))));
    assert_eq!(hidden_from_coordinator(b"{}", run, about), None, "a case, or nothing");
    insert(&evidence);
    assert!(matches!(believes(about).await, Err(Unseen::NotShown)), "the payload is not there");
    insert(garbage);
    assert!(matches!(believes(about).await, Ok(Opinion::Guilty(_))));
    assert!(matches!(believes(another).await, Ok(Opinion::Innocent(_))));
}

#[test]
fn time_is_counted_in_quarters_of_what_a_dispute_has() {
    use manyhands_chain_client::types::{FaultState, Votes};
    let accusation =
        Accusation::Worker { worker: key(1).node_id(), round: Round(3), kind: FaultKind::Replay };
    let dispute = |state| Dispute {
        accusation,
        evidence_digest: Digest::of(b"a case"),
        votes: Votes { guilty: Vec::new(), innocent: Vec::new() },
        reported_at: 100,
        state,
    };
    let open = dispute(FaultState::Reported { executable_at: 120 });
    let quarters = |block| quarters_over(&open, block);
    assert_eq!([99, 100, 104, 105, 110, 119, 200].map(quarters), [0, 0, 0, 1, 2, 3, 20]);
    // In a window of one block everything is late.
    let short = dispute(FaultState::Reported { executable_at: 100 });
    assert_eq!(quarters_over(&short, 100), 4);
}
