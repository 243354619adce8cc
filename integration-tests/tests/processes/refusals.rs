//! Bad input at the door: a code, a reason and a remedy, and nothing left behind.

use super::RUN_FILE;
use super::program::run_refused;

fn launch(text: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("run.toml");
    std::fs::write(&file, text).expect("the file is written");
    let dir = folder.path().join("run").display().to_string();
    run_refused(&["launch", &file.display().to_string(), "--dir", &dir])
}

#[test]
fn an_unknown_field_is_named_with_its_line() {
    let text = RUN_FILE.replace("rounds = ROUNDS", "rounds = 3\nroundz = 4");
    let complaint = launch(&text);
    assert!(complaint.contains("line 5") && complaint.contains("roundz"), "{complaint}");
}

#[test]
fn a_contradiction_is_named_with_its_line_and_a_remedy() {
    let text = RUN_FILE.replace("rounds = ROUNDS", "rounds = 3").replace("heads = 2", "heads = 3");
    let complaint = launch(&text);
    assert!(complaint.contains("model.heads") && complaint.contains("choose"), "{complaint}");
}

#[test]
fn an_invitation_that_was_copied_badly_is_refused() {
    let complaint = run_refused(&["join", "manyhands1abc"]);
    assert!(complaint.contains("invitation") || complaint.contains("copied"), "{complaint}");
}
