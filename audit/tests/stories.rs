//! Runs as they should be, and what an audit says of them.

use manyhands_audit::newest_record;
use manyhands_audit::{
    AuditOptions, FolderEvidence, Link, RoundSelection, Status, Subject, Verdict, audit_run,
};
use manyhands_proto::message::{Distances, Role};
use manyhands_proto::{Digest, NodeId, Round};
use manyhands_rules::panel::Judged;
use manyhands_rules::record::{Check, Finding, Outcome, RoundRecord};

use crate::chain::TestChain;
use crate::world::{Report, World, block_on, node, owner, spec};

/// Everybody is replayed sometimes, and after one passed replay no longer before the merge.
pub(crate) const VERIFIED: &str =
    "[verification]\nprobation_checks = 1\naudit_rate_per_mille = 1000";
/// Audits by chance, so that draws differ.
pub(crate) const BY_CHANCE: &str =
    "[verification]\nprobation_checks = 1\naudit_rate_per_mille = 500";

pub(crate) fn honest() -> World {
    let mut world = World::new(spec(BY_CHANCE));
    world.run_to_the_end(3, true);
    world.claim(1);
    world
}

/// Worker 2 cheats once the merge no longer waits for its replay.
pub(crate) fn with_a_late_fault() -> World {
    let mut world = World::new(spec(VERIFIED));
    world.cheats.extend((1..5).map(|round| (2, round)));
    world.run_to_the_end(3, true);
    world.claim(1);
    world
}

#[test]
fn an_honest_run_is_ok_link_by_link() {
    let world = honest();
    let mut steps = 0;
    let spec = world.spec.canonical_bytes();
    let chain = Some(&world.chain);
    let subject = Subject { run: world.run, spec: &spec, evidence: &world.evidence, chain };
    let options = AuditOptions::default();
    let mut count = |_| steps += 1;
    let report = block_on(audit_run(subject, &options, &mut count)).expect("answers");
    assert!(report.ok(), "{report}");
    for link in Link::ALL.into_iter().filter(|link| *link != Link::Slashes) {
        assert_eq!(report.status(link), Status::Ok, "{link}: {report}");
    }
    assert_eq!(report.rounds as usize, world.records.len());
    let merged = world.records.iter().filter(|record| record.merge.is_some()).count();
    assert_eq!(report.rounds_recomputed.len(), merged);
    assert_eq!(report.contributions, 15);
    assert!(report.leaves_on_chain >= 5 * 3 && report.claimed.0 > 0);
    assert_eq!(report.theta, world.records.last().map(|record| record.theta_next));
    assert!(steps >= 3 * world.records.len());
    let json = serde_json::to_value(&report).expect("serialises");
    assert_eq!(json["verdict"], "ok");
    assert_eq!(json["links"][0]["link"], "specification");
}

const GATED: &str = "[aggregation]\nrules = [\"median_norm\", \"loss_gate\"]";

/// Worker 2's updates raise held-out loss.
pub(crate) fn gated() -> World {
    let mut world = World::new(spec(GATED));
    world.harms.insert(2);
    world.run_to_the_end(5, true);
    world
}

#[test]
fn a_merge_that_left_out_who_does_harm_is_recomputed() {
    let world = gated();
    assert!(world.records.iter().any(|record| !record.weighings.is_empty()));
    let report = world.audit();
    assert!(report.ok(), "{report}");
}

#[test]
fn a_verifier_that_came_after_a_round_had_opened_weighs_nothing_of_it() {
    let mut world = World::new(spec(GATED));
    (1..=3).for_each(|id| world.join(id, Role::Worker));
    while !world.is_training() {
        world.turn(&[1, 2]);
    }
    world.join(9, Role::Verifier);
    world.go_on_to_the_end(&[1, 2, 3, 9]);
    assert!(!world.records[0].verified && world.records[0].weighings.is_empty());
    assert!(world.records.iter().any(|record| !record.weighings.is_empty()));
    let report = world.audit();
    assert!(report.ok(), "{report}");
}

#[test]
fn colluders_found_one_after_the_other_are_taken_back_in_merges_that_can_be_recomputed() {
    let mut world = World::new(spec(VERIFIED));
    world.cheats.extend((2..=4).flat_map(|id| (1..5).map(move |round| (id, round))));
    world.replays_at_once = 1;
    world.run_to_the_end(5, true);
    let merges_that_take_back = |round| {
        let of_round =
            |record: &&RoundRecord| record.revocations.iter().any(|it| it.round == round);
        world.records.iter().filter(of_round).count()
    };
    let found_in_turn = (0..5).map(Round).any(|round| merges_that_take_back(round) > 1);
    assert!(found_in_turn, "one round is corrected more than once");
    let report = world.audit();
    assert!(report.ok(), "{report}");
}

pub(crate) const NO_SECOND_LOOKS: &str =
    "[verification]\nprobation_checks = 1\naudit_rate_per_mille = 500\nrecheck_per_mille = 0";

/// Every pass is looked over; worker 2 cheats, and this verifier is its accomplice.
pub(crate) fn looked_over(accomplice: u8) -> World {
    let mut world = World::new(spec(&format!("{VERIFIED}\nrecheck_per_mille = 1000")));
    world.cheats.extend((1..5).map(|round| (2, round)));
    world.accomplices.insert(accomplice);
    world.run_with_three_verifiers();
    world
}

#[test]
fn what_one_verifier_let_pass_is_looked_over_by_others_once_a_later_round_has_drawn_so() {
    let mut hid_it = false;
    for accomplice in 7..=9 {
        hid_it |= follow_what_was_looked_over(accomplice);
    }
    assert!(hid_it, "one of three was asked first");
}

/// Whether the accomplice let the cheat pass at first.
fn follow_what_was_looked_over(accomplice: u8) -> bool {
    let world = looked_over(accomplice);
    let checks = || {
        let of_record = |record: &RoundRecord| {
            record.checks.iter().map(|it| (record.round, it.clone())).collect::<Vec<_>>()
        };
        world.records.iter().flat_map(of_record).filter(|(_, check)| !check.is_of_codec())
    };
    let second_of = |first: &Check| {
        checks().find(|(_, it)| {
            (it.round, it.worker) == (first.round, first.worker) && it.judgements.len() > 1
        })
    };
    let let_pass: Vec<_> = checks().filter(|(_, check)| check.judgements.len() == 1).collect();
    assert!(let_pass.len() > 4, "{}", let_pass.len());
    for (record, first) in &let_pass {
        let (later, second) = second_of(first).expect("all are looked over");
        let draws_come = record.0 + 1 < world.spec.run.rounds;
        let soonest = if draws_come { record.next() } else { *record };
        assert!(later > soonest, "after the next round's draw, where one comes");
        assert_eq!(second.judgements[0].replay, first.judgements[0].replay);
    }
    let report = world.audit();
    assert!(report.ok(), "{report}");
    assert!(world.records.iter().flat_map(|r| &r.revocations).any(|it| it.worker == node(2)));
    let hidden = let_pass.iter().find(|(_, it)| it.worker == node(2) && it.round > Round(0));
    let Some((_, hidden)) = hidden else { return false };
    let (_, found) = second_of(hidden).expect("looked over");
    assert!(matches!(found.finding, Finding::ReplayFault(_)), "{:?}", found.finding);
    let mut false_ends = world.records.iter().flat_map(|record| &record.false_ends);
    assert!(false_ends.any(|end| end.verifier == node(accomplice)));
    true
}

#[test]
fn a_verifier_that_makes_its_replays_up_is_outvoted_and_on_record() {
    let mut world = World::new(spec(VERIFIED));
    world.liars.insert(8);
    world.run_with_three_verifiers();
    let found: Vec<NodeId> =
        world.records.iter().flat_map(|r| &r.false_ends).map(|end| end.verifier).collect();
    assert_eq!(found, [node(8)], "once, and then it is out");
    let earned = world.records.iter().flat_map(|record| &record.earnings);
    assert!(earned.into_iter().all(|earning| earning.account != node(8)));
    let report = world.audit();
    assert!(report.ok(), "{report}");

    // Somebody else is named, or nobody.
    let at = world.records.iter().position(|record| !record.false_ends.is_empty());
    let at = at.expect("one");
    world.rewrite(at, |record| record.false_ends[0].verifier = node(9));
    assert!(world.audit().failures().any(|finding| finding.link == Link::Outcomes));
}

#[test]
fn where_the_same_bits_are_asked_for_a_digest_is_a_verdict() {
    let bits = Digest::of(b"bits");
    let mut world = World::new(spec(&format!("{VERIFIED}\nfingerprint = \"{bits}\"")));
    world.cheats.insert((3, 0));
    world.liars.insert(8);
    world.run_with_three_verifiers();
    let results = world.records[0].results.iter();
    let cheats: Vec<_> = results.filter(|result| result.outcome.fault().is_some()).collect();
    assert_eq!(cheats.len(), 1);
    assert_eq!(cheats[0].worker, node(3));
    let found = world.records.iter().flat_map(|record| &record.false_ends);
    assert_eq!(found.map(|end| end.verifier).collect::<Vec<_>>(), [node(8)]);
    let report = world.audit();
    assert!(report.ok(), "{report}");

    // Another digest than the worker's passes for near enough.
    let is_fault = |check: &&mut Check| matches!(check.finding, Finding::ReplayFault(_));
    let near = Distances { delta: 1e-6, first_moment: 0.0, second_moment: 0.0 };
    world.rewrite(0, |record| {
        let check = record.checks.iter_mut().find(is_fault).expect("the cheat's");
        for judgement in &mut check.judgements {
            (judgement.verdict, judgement.evidence) = (Judged::Passed(near), None);
            judgement.near.clear();
        }
        check.finding = Finding::ReplayPassed(near);
    });
    let said = |finding: &manyhands_audit::Finding| {
        finding.link == Link::Outcomes
            && finding.to_string().contains("the verdicts that follow from where replays ended")
    };
    let report = world.audit();
    assert!(report.failures().any(said), "{report}");
}

/// Rounds of worker 3 that nobody repeats, and the records that say so.
fn unstable(terms: &str, of: &[u32]) -> (World, Vec<usize>) {
    let mut world = World::new(spec(terms));
    world.unstable.extend(of.iter().map(|round| (3, *round)));
    world.run_with_three_verifiers();
    let is_unstable = |record: &&RoundRecord| {
        record.checks.iter().any(|check| check.finding == Finding::Irreproducible)
    };
    let records = world.records.iter().filter(is_unstable).map(|it| it.round.0 as usize);
    let records = records.collect();
    (world, records)
}

#[test]
fn a_round_that_nobody_repeats_costs_its_pay_and_nothing_else() {
    let (before, at) = unstable(VERIFIED, &[0]);
    assert_eq!(at, [0]);
    let result = before.records[0].results.iter().find(|it| it.worker == node(3)).expect("one");
    assert_eq!(result.outcome, Outcome::Irreproducible);
    let (mut after, at) = unstable(VERIFIED, &[1, 2, 3, 4, 5]);
    let revoked = after.records.iter().flat_map(|record| &record.revocations);
    assert!(revoked.into_iter().any(|it| it.worker == node(3)), "found after the merge");
    for world in [&before, &after] {
        assert!(world.chain.faults.is_empty());
        assert!(world.records.iter().all(|record| record.false_ends.is_empty()));
        let report = world.audit();
        assert!(report.ok(), "{report}");
    }
    // Two of them are said to have ended at the same place.
    after.rewrite(at[0], |record| {
        let mut checks = record.checks.iter_mut();
        let check = checks.find(|it| it.finding == Finding::Irreproducible).expect("one");
        let first = check.judgements[0].verifier();
        check.judgements[1].near = vec![first];
        let Judged::Fault(distances) = check.judgements[0].verdict else { panic!("a fault") };
        check.finding = Finding::ReplayFault(distances);
    });
    let report = after.audit();
    let said = |finding: &manyhands_audit::Finding| {
        finding.link == Link::Outcomes && finding.to_string().contains("an end near nobody's")
    };
    assert!(report.failures().any(said), "{report}");
}

#[test]
fn a_fault_found_after_the_merge_is_followed_through_revocation_forfeit_and_slash() {
    let world = with_a_late_fault();
    let revoked: usize = world.records.iter().map(|record| record.revocations.len()).sum();
    assert!(revoked > 0 && !world.chain.faults.is_empty());
    let report = world.audit();
    assert!(report.ok(), "{report}");
    assert_eq!(report.status(Link::Slashes), Status::Ok);
    assert_eq!(report.status(Link::Revocations), Status::Ok);
    assert_eq!(report.slashes as usize, world.chain.faults.len());
}

#[test]
fn a_cheat_that_was_kept_out_and_workers_that_failed_are_told_apart() {
    let mut world = World::new(spec(BY_CHANCE));
    world.cheats.insert((3, 0));
    world.idle.insert((4, 2));
    world.unsent.insert((5, 1));
    world.run_to_the_end(6, true);
    let outcome = |round: usize, id: u8| {
        let mut results = world.records[round].results.iter();
        results.find(|result| result.worker == node(id)).map(|result| result.outcome.clone())
    };
    assert!(matches!(outcome(0, 3), Some(Outcome::ReplayFault(_))));
    assert_eq!(outcome(2, 4), Some(Outcome::NotCommitted));
    assert_eq!(outcome(1, 5), Some(Outcome::NotUploaded));
    let report = world.audit();
    assert!(report.ok(), "{report}");
}

#[test]
fn a_run_without_a_chain_is_audited_and_what_cannot_be_is_named() {
    let mut world = World::without_chain(spec(BY_CHANCE));
    world.run_to_the_end(2, true);
    let newest_record = world.records.last().map(RoundRecord::digest);
    let options = AuditOptions { newest_record, coordinator: Some(owner()), ..Default::default() };
    let report = world.audit_with(&options);
    assert!(report.ok(), "{report}");
    for link in [Link::LeafRoot, Link::StorageProof, Link::EntropyBlock, Link::Escrow] {
        assert_eq!(report.status(link), Status::Unchecked, "{link}");
    }
    for link in [Link::Specification, Link::Aggregate, Link::Theta, Link::Rewards, Link::AuditDraw]
    {
        assert_eq!(report.status(link), Status::Ok, "{link}");
    }
    let other = AuditOptions { coordinator: Some(node(1)), ..options };
    assert_eq!(world.audit_with(&other).status(Link::Specification), Status::Failed);
    // On a chain the run's record names its owner, who must be the one that is meant.
    let on_chain = honest();
    let by = |coordinator| AuditOptions { coordinator, ..AuditOptions::default() };
    assert!(on_chain.audit_with(&by(Some(owner()))).ok());
    let foreign = on_chain.audit_with(&by(Some(node(1))));
    assert_eq!(foreign.status(Link::Specification), Status::Failed, "{foreign}");
}

#[test]
fn a_run_in_which_nobody_could_replay_says_so() {
    let mut world = World::new(spec(""));
    world.run_to_the_end(2, false);
    let report = world.audit();
    assert!(report.ok(), "{report}");
    assert_eq!(report.rounds_unverified, 5);
    assert!(report.is_unchecked(Link::AuditDraw, None), "{report}");
    let told = report.to_string();
    assert!(told.contains("nothing was replayed: 5 of 5 rounds (0, 1, 2, 3, 4)"), "{told}");
    let verified = honest().audit();
    assert!(!verified.is_unchecked(Link::AuditDraw, None), "{verified}");
}

#[test]
fn a_fault_that_the_chain_dismissed_is_named_where_the_record_holds_on_to_it() {
    let mut world = with_a_late_fault();
    let accused = *world.chain.faults.keys().next().expect("slashed");
    world.chain.faults.get_mut(&accused).expect("it").slashed = None;
    let report = world.audit();
    assert!(report.is_unchecked(Link::Slashes, Some(Round(accused.1))), "{report}");
    assert!(report.ok(), "whose fault it is, nothing shows: {report}");
    assert_eq!(report.slashes as usize, world.chain.faults.len() - 1);
}

#[test]
fn what_is_not_settled_yet_is_not_failed() {
    let mut world = World::new(spec(BY_CHANCE));
    for id in [1, 2] {
        world.join(id, Role::Worker);
    }
    let report = world.audit();
    assert!(report.ok());
    assert_eq!(report.status(Link::RecordChain), Status::Unchecked);
    world.run_to_the_end(2, true);
    world.chain.final_theta = None;
    let last = *world.chain.commits.keys().next_back().expect("a commit");
    world.chain.commits.get_mut(&last).expect("a commit").finalized = false;
    let report = world.audit();
    assert!(report.ok(), "{report}");
    assert!(
        report.findings.iter().any(|f| (f.link, f.status) == (Link::Finality, Status::Unchecked))
    );
}

#[test]
fn only_the_chosen_rounds_are_recomputed_from_payloads() {
    let mut world = honest();
    let of = world.records.len() as u32;
    let options = |rounds| AuditOptions { rounds, ..Default::default() };
    let latest = world.audit_with(&options(RoundSelection::Latest(of - 3)));
    assert_eq!(latest.rounds_recomputed.first(), Some(&Round(3)));
    let range = RoundSelection::Range { first: Round(1), last: Round(2) };
    assert_eq!(world.audit_with(&options(range)).rounds_recomputed, [Round(1), Round(2)]);
    // The payload of another round is not looked at.
    let payload = world.records[0].commitments[0].commitment.payload;
    world.evidence.0.remove(&payload);
    assert!(world.audit_with(&options(range)).ok());
    assert!(!world.audit_with(&options(RoundSelection::All)).ok());
}

#[test]
fn evidence_that_is_gone_is_expired_and_never_ok() {
    let mut spec = spec(BY_CHANCE);
    spec.run.evidence_rounds = 2;
    spec.chain.vesting_rounds = 2;
    let mut world = World::new(spec);
    world.run_to_the_end(3, true);
    for record in &world.records[..2] {
        for signed in &record.commitments {
            world.evidence.0.remove(&signed.commitment.payload);
        }
        world.evidence.0.remove(&record.merge.expect("a merge").aggregate);
    }
    let report = world.audit();
    assert_eq!(report.verdict, Verdict::EvidenceExpired, "{report}");
    assert_eq!(report.status(Link::Aggregate), Status::Expired);
    // The rounds after them still follow from a θ that the records name.
    let rounds = RoundSelection::Latest(world.records.len() as u32 - 2);
    let report = world.audit_with(&AuditOptions { rounds, ..Default::default() });
    assert!(report.ok(), "{report}");
    assert_eq!(report.status(Link::Theta), Status::Ok);
    // But a record that is gone leaves nothing to stand on.
    world.evidence.0.remove(&world.records[1].digest());
    assert_eq!(world.audit().verdict, Verdict::EvidenceExpired);
}

#[test]
fn a_coordinators_folder_is_evidence_and_one_byte_of_any_file_matters() {
    let world = honest();
    let folder = tempfile::tempdir().expect("a folder");
    let blobs = folder.path().join("blobs");
    let records = folder.path().join("records");
    std::fs::create_dir_all(&blobs).expect("made");
    std::fs::create_dir_all(&records).expect("made");
    for (digest, bytes) in &world.evidence.0 {
        std::fs::write(blobs.join(digest.to_string()), bytes).expect("written");
    }
    for record in &world.records {
        let path = records.join(format!("{}.json", record.round));
        std::fs::write(path, record.canonical_bytes()).expect("written");
    }
    let newest = newest_record(&records).expect("readable");
    assert_eq!(newest, world.records.last().map(RoundRecord::digest));

    let evidence = FolderEvidence::new(&blobs);
    let spec = world.spec.canonical_bytes();
    let audit = || {
        let subject =
            Subject { run: world.run, spec: &spec, evidence: &evidence, chain: Some(&world.chain) };
        block_on(audit_run(subject, &AuditOptions::default(), &mut |_| {})).expect("answers")
    };
    assert!(audit().ok());

    let first = &world.records[0];
    let payload = first.commitments[1].commitment.payload;
    for (digest, link, worker) in [
        (first.digest(), Link::RecordChain, None),
        (payload, Link::Aggregate, Some(first.commitments[1].worker)),
    ] {
        let path = blobs.join(digest.to_string());
        let bytes = std::fs::read(&path).expect("readable");
        let mut changed = bytes.clone();
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        std::fs::write(&path, changed).expect("written");
        let report = audit();
        assert_eq!(report.verdict, Verdict::Failed);
        let failure = report.failures().next().expect("a failure");
        let named = (failure.link, failure.round, failure.worker);
        assert_eq!(named, (link, Some(Round(0)), worker), "{report}");
        std::fs::write(&path, bytes).expect("written");
    }
    assert!(audit().ok());
}

#[test]
fn a_genesis_of_another_chain_is_another_run() {
    let world = honest();
    let mut chain = world.chain.clone();
    chain.run = manyhands_rules::run_id::run_id([8; 32], owner(), world.spec.digest());
    let spec = world.spec.canonical_bytes();
    assert_ne!([8; 32], *TestChain::GENESIS.as_bytes());
    let subject =
        Subject { run: chain.run, spec: &spec, evidence: &world.evidence, chain: Some(&chain) };
    let report = block_on(audit_run(subject, &AuditOptions::default(), &mut |_| {}));
    assert_eq!(report.expect("answers").status(Link::Specification), Status::Failed);
}
