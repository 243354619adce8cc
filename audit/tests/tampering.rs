//! Something is changed; the audit names the link that broke. Where the coordinator is the liar, it
//! makes every digest, set and commit anew.

use manyhands_audit::{AuditOptions, AuditReport, Link, Status, Subject, Verdict, audit_run};
use manyhands_chain_client::types::Stage;
use manyhands_proto::message::{
    DeviceKind, Flagged, LossEffect, NumericClass, Signal, SignedReplay, Start,
};
use manyhands_proto::{Balance, Digest, NodeId, Round, TokenCount};
use manyhands_rules::panel::{Judged, Judgement};
use manyhands_rules::record::{
    Check, Earning, FalseEnd, Finding, Outcome, Revocation, RoundRecord, Weighed, WorkerResult,
};

use crate::stories::{NO_SECOND_LOOKS, VERIFIED, gated, honest, looked_over, with_a_late_fault};
use crate::world::{Report, World, block_on, key, node, spec};

fn other(digest: Digest) -> Digest {
    Digest::of(digest.as_bytes())
}

/// The links that failed, and that the one that must is named with its round.
fn assert_broken(report: &AuditReport, link: Link, round: Option<u32>) {
    assert_eq!(report.verdict, Verdict::Failed, "expected {link} to fail: {report}");
    assert!(!report.ok());
    let named = report.failures().any(|f| f.link == link && f.round == round.map(Round));
    assert!(named, "expected {link} of round {round:?} among the failures: {report}");
}

type Lie = fn(&mut RoundRecord);

#[test]
fn a_record_that_does_not_follow_is_found_though_all_digests_are_made_anew() {
    let lies: [(&str, Link, Lie); 23] = [
        ("who attended", Link::CommitSetAnchor, |r| r.attending.clear()),
        ("a machine", Link::CommitSetAnchor, |r| {
            r.candidates[0].class = NumericClass::unknown(DeviceKind::Cuda);
        }),
        ("what verifiers repeat", Link::CommitSetAnchor, |r| r.sequences_max = Some(1 << 20)),
        ("a speed", Link::CommitmentSignature, |r| r.candidates[0].tokens_per_second += 5_000),
        ("a position", Link::Assignments, |r| r.first_sequence += 1),
        ("a state to go on from", Link::Assignments, |r| {
            r.candidates[1].start = Start::Head {
                round: Round(0),
                commitment: Digest::of(b"another"),
                sent_values_returned: false,
                adam_step: 3,
            };
        }),
        ("a candidate", Link::Outcomes, |r| {
            r.candidates.pop();
        }),
        ("the tokens", Link::CommitmentSignature, |r| {
            r.commitments[0].commitment.tokens = TokenCount(1);
        }),
        ("the payload", Link::CommitmentSignature, |r| {
            r.commitments[0].commitment.payload = Digest::of(b"another");
        }),
        ("the payload, for the chain", Link::CommitSetAnchor, |r| {
            r.commitments[0].commitment.payload = Digest::of(b"another");
        }),
        ("who was admitted", Link::AdmittedSetAnchor, |r| r.results[0].outcome = Outcome::Late),
        ("an outcome", Link::Outcomes, |r| r.results[0].outcome = Outcome::NotUploaded),
        ("a codec check", Link::Outcomes, |r| {
            let codec = |check: &Check| check.finding != Finding::CodecPassed;
            r.checks.retain(codec);
        }),
        ("the randomness", Link::EntropyBlock, |r| {
            let entropy = r.commitments_entropy.as_mut().expect("a chain's");
            entropy.value = Digest::of(b"chosen");
        }),
        ("the block of the randomness", Link::EntropyBlock, |r| {
            let entropy = r.commitments_entropy.as_mut().expect("a chain's");
            entropy.block = entropy.block.map(|block| block + 1);
        }),
        ("the randomness of none", Link::EntropyBlock, |r| r.commitments_entropy = None),
        ("a reward", Link::Rewards, |r| r.results[1].reward.0 += 1),
        ("an earning", Link::Rewards, |r| r.earnings[0].cumulative.0 += 1),
        ("an account", Link::Rewards, |r| {
            let mut another = r.earnings[0].clone();
            another.account = NodeId::new([255; 32]);
            r.earnings.push(another);
        }),
        ("θ", Link::Theta, |r| r.theta_next = Digest::of(b"another")),
        ("the residual", Link::Aggregate, |r| {
            r.merge.as_mut().expect("merged").residual = Digest::of(b"another");
        }),
        ("the aggregate", Link::Aggregate, |r| {
            r.merge.as_mut().expect("merged").aggregate = Digest::of(b"another");
        }),
        ("a revocation", Link::Revocations, |r| {
            r.revocations.push(Revocation { round: Round(0), worker: node(1) });
        }),
    ];
    let world = honest();
    for (what, link, lie) in lies {
        let mut changed = clone(&world);
        changed.rewrite(1, lie);
        let report = changed.audit();
        assert_eq!(report.verdict, Verdict::Failed, "{what}");
        assert_broken(&report, link, Some(1));
    }
}

/// A world's records, evidence and chain, for another lie.
fn clone(world: &World) -> World {
    let mut copy = World::new(world.spec.clone());
    copy.evidence = world.evidence.clone();
    copy.chain = world.chain.clone();
    copy.records = world.records.clone();
    copy
}

#[test]
fn draws_cannot_be_chosen() {
    let world = honest();
    let at = world.records.iter().position(|record| !record.draws.is_empty()).expect("a draw");
    let drawn = world.records[at].draws[0].round.0;

    let mut changed = clone(&world);
    changed.rewrite(at, |record| match record.draws[0].drawn.pop() {
        Some(_) => {}
        None => record.draws[0].drawn.push(node(1)),
    });
    assert_broken(&changed.audit(), Link::AuditDraw, Some(drawn));

    let mut changed = clone(&world);
    changed.rewrite(at, |record| record.draws[0].entropy.value = Digest::of(b"chosen"));
    assert_broken(&changed.audit(), Link::EntropyBlock, Some(drawn));

    let mut changed = clone(&world);
    changed.rewrite(at, |record| record.draws.clear());
    assert_broken(&changed.audit(), Link::AuditDraw, Some(drawn));

    // A replay of somebody who was not drawn, and one before the merge that was left out.
    let mut changed = clone(&world);
    let found = world.records[0].checks.iter().find(|check| !check.is_of_codec());
    let mut check = found.expect("probation").clone();
    check.worker = node(77);
    changed.rewrite(2, move |record| record.checks.push(check));
    assert_broken(&changed.audit(), Link::AuditDraw, Some(0));

    let mut changed = clone(&world);
    changed.rewrite(0, |record| record.checks.retain(Check::is_of_codec));
    assert_broken(&changed.audit(), Link::AuditDraw, Some(0));
}

#[test]
fn a_verdict_against_its_distances_and_a_dropped_fault_are_found() {
    let world = with_a_late_fault();
    let is_fault = |check: &Check| matches!(check.finding, Finding::ReplayFault(_));
    let at = world
        .records
        .iter()
        .position(|record| record.checks.iter().any(is_fault))
        .expect("a fault");
    let fault_round = world.records[at].checks.iter().find(|c| is_fault(c)).expect("it").round.0;

    let mut changed = clone(&world);
    changed.rewrite(at, |record| {
        for check in &mut record.checks {
            if let Finding::ReplayFault(distances) = check.finding {
                check.finding = Finding::ReplayPassed(distances);
            }
        }
    });
    let report = changed.audit();
    assert_broken(&report, Link::Outcomes, Some(fault_round));
    assert_broken(&report, Link::Slashes, Some(fault_round));

    // Its reward is kept from being taken away.
    let mut changed = clone(&world);
    changed.rewrite(at, |record| record.checks.retain(|check| !is_fault(check)));
    assert_broken(&changed.audit(), Link::Rewards, Some(at as u32));

    let revoking =
        world.records.iter().position(|record| !record.revocations.is_empty()).expect("one");
    let mut changed = clone(&world);
    changed.rewrite(revoking, |record| record.revocations.clear());
    assert_broken(&changed.audit(), Link::Revocations, Some(revoking as u32));
}

/// A world with a late fault, after a change to what the verifier is said to have found.
fn with_another_verdict(change: fn(&mut Judgement)) -> (World, Option<u32>) {
    let mut world = with_a_late_fault();
    let is_fault = |check: &Check| matches!(check.finding, Finding::ReplayFault(_));
    let at = world.records.iter().position(|record| record.checks.iter().any(is_fault));
    let at = at.expect("a fault");
    let mut round = None;
    world.rewrite(at, |record| {
        let check = record.checks.iter_mut().find(|check| is_fault(check)).expect("it");
        change(&mut check.judgements[0]);
        round = Some(check.round.0);
    });
    (world, round)
}

#[test]
fn an_accusation_is_held_against_the_chunks_that_were_opened() {
    let lies: [fn(&mut Judgement); 5] = [
        // Another distance than the chunks show.
        |judgement| match &mut judgement.verdict {
            Judged::Fault(distances) => distances.delta *= 2.0,
            Judged::Passed(_) | Judged::Withheld(_) => panic!("it is a fault"),
        },
        // Nothing to show for it, or what shows something else.
        |judgement| judgement.evidence = None,
        |judgement| judgement.evidence = Some(Digest::of(b"nothing")),
        // The verifier never said so.
        |judgement| judgement.replay.signature[0] ^= 1,
        |judgement| judgement.replay.verifier = node(1),
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let (mut world, round) = with_another_verdict(lie);
        world.evidence.0.insert(Digest::of(b"nothing"), b"nothing".to_vec());
        let report = world.audit();
        let held =
            report.failures().any(|f| f.link == Link::Outcomes && f.round.map(|r| r.0) == round);
        assert!(held, "lie {number}: {report}");
    }
}

#[test]
fn evidence_that_is_gone_is_said_to_be() {
    let (mut world, round) = with_another_verdict(|_| {});
    assert_eq!(world.audit().failures().count(), 0);
    let found = world.records.iter().flat_map(|record| &record.checks);
    let evidence: Vec<Digest> =
        found.flat_map(|check| &check.judgements).filter_map(|it| it.evidence).collect();
    assert!(!evidence.is_empty());
    evidence.iter().for_each(|digest| _ = world.evidence.0.remove(digest));
    let report = world.audit();
    assert_eq!(report.failures().count(), 0);
    let expired = |f: &manyhands_audit::Finding| {
        f.link == Link::Outcomes && f.status == Status::Expired && f.round.map(|r| r.0) == round
    };
    assert!(report.findings.iter().any(expired), "{report}");
}

#[test]
fn what_verifiers_weighed_is_bound_to_the_merge() {
    let world = gated();
    let weighed = world.records.iter().position(|record| !record.weighings.is_empty());
    let at = weighed.expect("some");
    // The harmful update is let through.
    let mut changed = clone(&world);
    changed.rewrite(at, |record| record.weighings.clear());
    assert_broken(&changed.audit(), Link::Aggregate, Some(at as u32));
    // One verifier's word is counted twice.
    let mut changed = clone(&world);
    changed.rewrite(at, |record| record.weighings.push(record.weighings[0].clone()));
    assert_broken(&changed.audit(), Link::Outcomes, Some(at as u32));
    // In a run that never asked for it, someone is weighed out.
    let mut changed = honest();
    changed.rewrite(0, |record| {
        let effects = vec![(record.results[0].worker, LossEffect(i64::MAX))];
        record.weighings.push(Weighed { verifier: node(9), effects });
    });
    assert_broken(&changed.audit(), Link::Outcomes, Some(0));
}

/// Lists a check of record 0 once more, and pays its verifier for it in this record and in all later
/// ones, so that the money adds up.
fn list_again(world: &World, is_wanted: fn(&Check) -> bool) -> World {
    let mut changed = clone(world);
    let position = world.records[0].checks.iter().position(is_wanted).expect("a check");
    let check = world.records[0].checks[position].clone();
    for verifier in check.judgements.iter().map(Judgement::verifier) {
        let of_worker = |r: &&WorkerResult| r.worker == check.worker;
        let result = world.records[0].results.iter().find(of_worker).expect("it was a candidate");
        let (work, reward) = (result.work.0, result.reward.0);
        assert!(reward > 0, "it was admitted, so that work and pay of a replay are the same");
        for record in &mut changed.records {
            let first = record.round == Round(0);
            let of_verifier = |e: &&mut Earning| e.account == verifier;
            if let Some(earning) = record.earnings.iter_mut().find(of_verifier) {
                earning.cumulative.0 += reward;
                earning.work.0 += if first { work } else { 0 };
            }
        }
    }
    changed.rewrite(0, |record| record.checks.insert(position, check));
    changed
}

#[test]
fn who_is_worth_a_closer_look_follows_from_the_updates_and_is_drawn() {
    let mut world = honest();
    let is_new = |record: &RoundRecord| record.flagged.iter().all(|it| it.worker != node(1));
    let at = world.records.iter().position(|it| is_new(it) && it.merge.is_some()).expect("one");
    world.rewrite(at, |record| {
        record.flagged.insert(0, Flagged { worker: node(1), signal: Signal::Loud })
    });
    assert_broken(&world.audit(), Link::AuditDraw, Some(at as u32));
}

#[test]
fn no_verdict_counts_twice() {
    let world = honest();
    let of_replay: fn(&Check) -> bool = |check| !check.is_of_codec();
    for is_wanted in [of_replay, Check::is_of_codec] {
        let report = list_again(&world, is_wanted).audit();
        assert_broken(&report, Link::Outcomes, Some(0));
        let money = |f: &manyhands_audit::Finding| f.link == Link::Rewards;
        assert!(!report.failures().any(money), "the pay follows from what is listed: {report}");
    }
    // The same in the record of a later round.
    let mut changed = clone(&world);
    let replay = world.records[0].checks.iter().find(|check| !check.is_of_codec());
    let replay = replay.expect("probation").clone();
    changed.rewrite(2, |record| record.checks.push(replay));
    assert_broken(&changed.audit(), Link::AuditDraw, Some(0));
}

#[test]
fn a_second_look_is_neither_left_out_nor_invented_nor_of_another_beginning() {
    let world = looked_over(8);
    let is_second = |check: &Check| check.judgements.len() > 1;
    let (at, check) = world
        .records
        .iter()
        .enumerate()
        .find_map(|(at, record)| Some((at, record.checks.iter().find(|it| is_second(it))?)))
        .expect("somebody looked over something");
    let of = check.round;
    let mut left_out = clone(&world);
    left_out.rewrite(at, |record| record.checks.retain(|it| !is_second(it)));
    assert!(left_out.audit().is_unchecked(Link::AuditDraw, Some(of)));

    let mut begins_elsewhere = clone(&world);
    begins_elsewhere.rewrite(at, |record| {
        let mut seconds = record.checks.iter_mut().filter(|it| is_second(it));
        seconds.next().expect("one").judgements.swap(0, 1);
    });
    assert_broken(&begins_elsewhere.audit(), Link::AuditDraw, Some(of.0));

    // A run in which nothing is to be looked over.
    let mut invented = World::new(spec(NO_SECOND_LOOKS));
    invented.run_with_three_verifiers();
    assert!(invented.audit().ok(), "{}", invented.audit());
    let first =
        invented.records[0].checks.iter().find(|it| !it.is_of_codec()).expect("one").clone();
    let Judgement { replay, verdict, .. } = first.judgements[0].clone();
    let another = (7..=9).find(|id| node(*id) != replay.verifier).expect("there are three");
    let signed = SignedReplay::sign(&key(another), invented.run, replay.replayed.clone());
    let judgements = [replay, signed].map(|replay| Judgement {
        replay,
        verdict: verdict.clone(),
        evidence: None,
        near: Vec::new(),
    });
    let judgements = judgements.to_vec();
    invented.rewrite(2, |record| record.checks.push(Check { judgements, ..first }));
    assert_broken(&invented.audit(), Link::AuditDraw, Some(0));
}

#[test]
fn a_commit_of_more_rounds_than_the_run_can_have_is_refused_before_it_is_read() {
    let mut world = honest();
    let mut endless = world.chain.commits.values().next_back().expect("a commit").clone();
    endless.last_round = u32::MAX - 1;
    world.chain.commits.insert(endless.last_round, endless);
    assert_broken(&world.audit(), Link::RecordChain, None);
}

type ChainLie = fn(&mut World);

#[test]
fn what_the_chain_holds_is_compared_and_proven() {
    let lies: [(Link, Option<u32>, ChainLie); 20] = [
        (Link::Specification, None, |w| w.chain.terms.config_digest = Digest::of(b"another")),
        // Whatever the chain enforces must be what the specification says.
        (Link::Specification, None, |w| w.chain.terms.unbonding_period -= 1),
        (Link::Specification, None, |w| w.chain.terms.slashes.replay.0 += 1),
        (Link::Specification, None, |w| w.chain.terms.verifiers.push(node(1))),
        (Link::Specification, None, |w| w.chain.owner = node(1)),
        (Link::RecordChain, Some(1), |w| {
            let commit = w.chain.commits.get_mut(&1).expect("committed");
            commit.evidence = other(commit.evidence);
        }),
        (Link::CommitSetAnchor, Some(2), |w| {
            let anchor = w.chain.anchors.get_mut(&(2, Stage::Commit)).expect("anchored");
            anchor.0 = other(anchor.0);
        }),
        (Link::AdmittedSetAnchor, Some(2), |w| {
            w.chain.anchors.remove(&(2, Stage::Admitted));
        }),
        (Link::EntropyBlock, Some(2), |w| {
            let anchor = w.chain.anchors.get_mut(&(2, Stage::Commit)).expect("anchored");
            anchor.1 += 1;
        }),
        (Link::LeafRoot, Some(3), |w| {
            w.chain.commits.get_mut(&3).expect("committed").root[0] ^= 1;
        }),
        (Link::LeafRoot, Some(3), |w| w.chain.commits.get_mut(&3).expect("committed").leaves += 1),
        (Link::Totals, Some(3), |w| w.chain.commits.get_mut(&3).expect("committed").total += 1),
        (Link::Totals, Some(3), |w| w.chain.commits.get_mut(&3).expect("committed").work -= 1),
        (Link::Theta, Some(3), |w| {
            w.chain.commits.get_mut(&3).expect("committed").theta = Digest::of(b"another");
        }),
        (Link::Theta, None, |w| w.chain.final_theta = Some(Digest::of(b"another"))),
        (Link::Escrow, None, |w| w.chain.escrow -= 1),
        (Link::Slashes, Some(1), |w| {
            let evidence = Digest::of(b"nothing");
            let fault = crate::chain::Fault { kind: 0, evidence, slashed: Some(50) };
            w.chain.faults.insert((node(1), 1), fault);
        }),
        (Link::Slashes, Some(1), |w| {
            let (round, worker, verifier) = (Round(1), node(1), node(9));
            let end = FalseEnd { round, worker, verifier };
            w.chain.slashed_verifiers.push((end, Digest::of(b"nothing")));
        }),
        (Link::StorageProof, None, |w| w.chain.forged_proof = true),
        (Link::Finality, None, |w| w.chain.other_head = true),
    ];
    let world = honest();
    for (link, round, lie) in lies {
        let mut changed = clone(&world);
        lie(&mut changed);
        assert_broken(&changed.audit(), link, round);
    }
}

#[test]
fn nobody_is_paid_more_than_a_final_leaf_says() {
    let mut world = honest();
    let claim = world.chain.claims.get_mut(&node(1)).expect("claimed");
    *claim -= 1;
    world.chain.escrow += 1;
    let report = world.audit();
    let failure = report.failures().next().expect("a failure");
    assert_eq!((failure.link, failure.worker), (Link::Claims, Some(node(1))));
}

#[test]
fn a_slash_costs_what_the_terms_say_and_rests_on_the_recorded_evidence() {
    let world = with_a_late_fault();
    let accused = *world.chain.faults.keys().next().expect("slashed");
    let mut changed = clone(&world);
    let most = world.chain.terms.slashes.replay.0;
    changed.chain.faults.get_mut(&accused).expect("it").slashed = Some(most + 1);
    assert_broken(&changed.audit(), Link::Slashes, Some(accused.1));
    let mut changed = clone(&world);
    changed.chain.faults.get_mut(&accused).expect("it").evidence = Digest::of(b"another");
    assert_broken(&changed.audit(), Link::Slashes, Some(accused.1));
}

#[test]
fn a_bond_that_was_taken_rests_on_the_recorded_evidence() {
    let mut world = World::new(spec(VERIFIED));
    world.liars.insert(8);
    world.run_with_three_verifiers();
    assert!(world.audit().ok());
    let (end, _) = world.chain.slashed_verifiers[0];
    world.chain.slashed_verifiers[0].1 = Digest::of(b"another");
    assert_broken(&world.audit(), Link::Slashes, Some(end.round.0));
}

#[test]
fn every_byte_of_the_evidence_is_covered() {
    let world = honest();
    for &digest in world.evidence.0.keys() {
        // θ is recomputed, so its blobs are not needed; all else is.
        if world.records.iter().any(|r| r.theta_next == digest) {
            continue;
        }
        let is_aggregate =
            world.records.iter().any(|r| r.merge.is_some_and(|merge| merge.aggregate == digest));
        let residual_of =
            world.records.iter().rposition(|r| r.merge.is_some_and(|it| it.residual == digest));
        let merged_next = residual_of
            .and_then(|at| world.records[at + 1..].iter().find(|record| record.merge.is_some()));
        // The last merge's is the beginning of nothing.
        if residual_of.is_some() && merged_next.is_none() {
            continue;
        }
        let mut changed = clone(&world);
        let bytes = changed.evidence.0.get_mut(&digest).expect("a blob");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        // Where a round is recomputed from payloads the published aggregate is not needed either, and where
        // all are, no residual.
        let rounds = if let Some(next) = merged_next {
            manyhands_audit::RoundSelection::Range { first: next.round, last: next.round }
        } else if is_aggregate {
            manyhands_audit::RoundSelection::Latest(0)
        } else {
            manyhands_audit::RoundSelection::All
        };
        let report = changed.audit_with(&AuditOptions { rounds, ..Default::default() });
        assert_eq!(report.verdict, Verdict::Failed, "blob {digest}");
    }
}

#[test]
fn a_specification_with_a_byte_changed_is_no_specification() {
    let world = honest();
    let good = world.spec.canonical_bytes();
    for at in [0, good.len() / 3, good.len() / 2, good.len() - 1] {
        let mut spec = good.clone();
        spec[at] ^= 1;
        let chain = Some(&world.chain);
        let subject = Subject { run: world.run, spec: &spec, evidence: &world.evidence, chain };
        let report = block_on(audit_run(subject, &AuditOptions::default(), &mut |_| {}));
        assert_eq!(report.expect("answers").status(Link::Specification), Status::Failed);
    }
}

#[test]
fn a_record_of_nonsense_is_refused_without_a_panic() {
    let world = honest();
    let hostile: [Lie; 6] = [
        |r| r.first_sequence = u64::MAX,
        |r| r.candidates.iter_mut().for_each(|c| c.tokens_per_second = u64::MAX),
        |r| {
            let twice = r.candidates[0].clone();
            r.candidates.insert(0, twice);
        },
        |r| r.checks.iter_mut().for_each(|check| check.round = Round(u32::MAX)),
        |r| r.draws.iter_mut().for_each(|draw| draw.round = Round(u32::MAX)),
        |r| r.earnings.iter_mut().for_each(|earning| earning.cumulative = Balance(u128::MAX)),
    ];
    for (round, lie) in hostile.into_iter().flat_map(|lie| [(0, lie), (2, lie)]) {
        let mut changed = clone(&world);
        changed.records[round].revocations = vec![Revocation { round: Round(9), worker: node(1) }];
        lie(&mut changed.records[round]);
        // The sums of the test's own commits must not overflow: a liar's chain says what it likes.
        let commits = changed.chain.commits.clone();
        let newest = reseal(&mut changed, round);
        changed.chain.commits = commits;
        let options = AuditOptions { newest_record: Some(newest), ..Default::default() };
        assert_eq!(changed.audit_with(&options).verdict, Verdict::Failed);
    }
}

/// Links the records anew from `round` on and stores them; the newest one's digest.
fn reseal(world: &mut World, round: usize) -> Digest {
    for index in round..world.records.len() {
        if index > round {
            world.records[index].previous = world.records[index - 1].digest();
        }
        let bytes = world.records[index].canonical_bytes();
        world.evidence.insert(bytes);
    }
    world.records.last().expect("a record").digest()
}
