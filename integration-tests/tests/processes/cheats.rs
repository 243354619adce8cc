//! The cheating worker of the examples, a process like any other.

use serde_json::Value;

use super::{Bench, RUN_FILE, outcomes, text_of};

/// Runs it among two honest workers; gives what the coordinator told, the cheat's id, and the audit.
fn run_with_a_cheat(run_file: &str) -> (super::Program, String, Value) {
    let bench = Bench::with(&run_file.replace("workers_min = 2", "workers_min = 3"));
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let _verifier = bench.node("verify", "verifier", &invitation);
    let _honest = ["first", "second"].map(|name| bench.node("join", name, &invitation));
    let cheat = bench.cheat(&invitation);
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
