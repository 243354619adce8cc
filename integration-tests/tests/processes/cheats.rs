//! The cheating workers and verifiers of the examples, processes like any other.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Bench, RUN_FILE, outcomes, text_of};

/// Runs it among two honest workers; gives what the coordinator told, the cheat's id, and the audit.
fn run_with_a_cheat(run_file: &str) -> (super::Program, String, Value) {
    let bench = Bench::with(&run_file.replace("workers_min = 2", "workers_min = 3"));
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let _verifier = bench.node("verify", "verifier", &invitation);
    let _honest = ["first", "second"].map(|name| bench.node("join", name, &invitation));
    let cheat = bench.cheat("cheat", &invitation, &[]);
    let slashed = coordinator.wait_for("slashed");
    assert!(slashed["amount"].as_u64().is_some_and(|amount| amount > 0), "{slashed}");
    coordinator.wait_for("final");
    assert!(!cheat.wait_for_exit().success(), "it is sent away with the reason");
    for name in ["first", "second", "verifier"] {
        bench.claim(name, &invitation);
    }
    (coordinator, text_of(&slashed, "worker"), bench.audit(&invitation))
}

#[test]
fn a_cheat_on_probation_is_kept_out_and_slashed() {
    let (coordinator, cheat, audit) = run_with_a_cheat(&RUN_FILE.replace("ROUNDS", "4"));
    assert_eq!(outcomes(&coordinator, &cheat), ["replay_fault"]);
    let slashes = coordinator.heard("slashed");
    assert_eq!(slashes.len(), 1, "nobody else: {slashes:?}");
    assert!(audit["findings"].as_array().is_none_or(Vec::is_empty), "{audit}");
}

#[test]
fn a_cheat_that_is_found_after_the_merge_is_taken_back_out_of_the_model() {
    let text = RUN_FILE
        .replace("ROUNDS", "6")
        .replace("probation_checks = 1", "probation_checks = 0")
        .replace("audit_rate_per_mille = 300", "audit_rate_per_mille = 1000");
    let (coordinator, cheat, _) = run_with_a_cheat(&text);
    let outcomes = outcomes(&coordinator, &cheat);
    assert_eq!(outcomes[0], "admitted", "the merge did not wait for the audit");
    assert!(outcomes.iter().all(|kind| kind != "replay_fault"), "{outcomes:?}");
    let slashes = coordinator.heard("slashed");
    assert!(slashes.iter().all(|slash| slash["worker"] == cheat.as_str()), "{slashes:?}");
}

#[test]
fn five_ways_to_cheat_are_caught_and_slashed() {
    const WAYS: [&str; 5] = ["skip-steps", "other-data", "learning-rate", "no-training", "made-up"];
    let text = RUN_FILE.replace("ROUNDS", "2").replace("workers_min = 2", "workers_min = 7");
    let bench = Bench::with(&text.replace("steps_per_round = 4", "steps_per_round = 10"));
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let _verifier = bench.node("verify", "verifier", &invitation);
    let _honest = ["first", "second"].map(|name| bench.node("join", name, &invitation));
    let cheats = WAYS.map(|way| bench.cheat(way, &invitation, &["--cheat", way]));
    coordinator.wait_for("final");
    let slashed: BTreeSet<String> =
        coordinator.heard("slashed").iter().map(|slash| text_of(slash, "worker")).collect();
    for (way, cheat) in WAYS.iter().zip(&cheats) {
        let node = bench.node_of(way);
        assert_eq!(outcomes(&coordinator, &node), ["replay_fault"], "{way}");
        assert!(slashed.contains(&node), "{way}");
        assert!(!cheat.wait_for_exit().success(), "{way} is sent away with the reason");
    }
    assert_eq!(slashed.len(), WAYS.len(), "and nobody else");
    bench.audit(&invitation);
}

#[test]
fn who_is_gone_when_it_is_to_show_what_it_did_pays() {
    let text = RUN_FILE
        .replace("ROUNDS", "2")
        .replace("workers_min = 2", "workers_min = 3")
        .replace("upload_ms = 20_000", "upload_ms = 4_000");
    let bench = Bench::with(&text);
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let _verifier = bench.node("verify", "verifier", &invitation);
    let _honest = ["first", "second"].map(|name| bench.node("join", name, &invitation));
    let _hidden = bench.cheat("hidden", &invitation, &["--cheat", "hide"]);
    coordinator.wait_for("final");
    let node = bench.node_of("hidden");
    let outcome = &outcomes(&coordinator, &node)[0];
    assert!(["not_uploaded", "withheld"].contains(&outcome.as_str()), "{outcome}");
    let slashes = coordinator.heard("slashed");
    assert_eq!(slashes.len(), 1, "{slashes:?}");
    assert_eq!(text_of(&slashes[0], "worker"), node);
    assert!(slashes[0]["amount"].as_u64().is_some_and(|amount| amount > 0), "{slashes:?}");
    bench.audit(&invitation);
}

#[test]
fn a_lazy_verifier_harms_nobody_and_loses_its_bond() {
    verify_with_a_liar("no-training");
}

#[test]
fn a_lying_verifier_harms_nobody_and_loses_its_bond() {
    verify_with_a_liar("made-up");
}

/// Two verifiers repeat rounds; the third says something else. What it says is always an accusation.
fn verify_with_a_liar(how: &str) {
    let text = RUN_FILE
        .replace("ROUNDS", "4")
        .replace("verifiers_min = 1", "verifiers_min = 3")
        // Each round is judged by two at least, so that none of three is left out for long.
        .replace("probation_checks = 1", "probation_checks = 4\nrecheck_per_mille = 1000")
        // Silence takes longer than the votes of the two others.
        .replace("contest_window_blocks = 4", "contest_window_blocks = 400");
    let bench = Bench::with(&text);
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let honest = ["one", "two"].map(|name| bench.node("verify", name, &invitation));
    let _liar = bench.cheat("liar", &invitation, &["--role", "verifier", "--cheat", how]);
    let _workers = ["first", "second"].map(|name| bench.node("join", name, &invitation));
    coordinator.wait_for("final");
    for name in ["first", "second"] {
        let outcomes = outcomes(&coordinator, &bench.node_of(name));
        assert_eq!(outcomes, ["admitted"; 4], "{name}");
    }
    let slashes = coordinator.heard("slashed");
    assert_eq!(slashes.len(), 1, "nobody else: {slashes:?}");
    let liar = bench.node_of("liar");
    assert_eq!(text_of(&slashes[0], "worker"), liar);
    for verifier in honest {
        let judged = verifier.heard("voted");
        assert!(judged.iter().all(|it| it["guilty"] == true && it["accused"] == liar.as_str()));
        assert_eq!(judged.len(), 1, "each votes from the evidence: {judged:?}");
    }
    assert!(slashes[0]["amount"].as_u64().is_some_and(|amount| amount > 0), "{slashes:?}");
    bench.audit(&invitation);
}
