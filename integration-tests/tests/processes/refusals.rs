//! Bad input at the door: a code, a reason and a remedy, and nothing left behind.

use super::program::{Program, run_refused};
use super::{Bench, RUN_FILE, text_of};

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

#[test]
fn a_port_that_is_taken_and_a_chain_that_is_not_there_are_named() {
    let bench = Bench::new(2);
    let listen = bench.chain.trim_start_matches("ws://");
    let complaint = run_refused(&["devnet", "--dir", &bench.path("second"), "--listen", listen]);
    assert!(complaint.contains("port_in_use") && complaint.contains(listen), "{complaint}");

    let (file, folder) = (bench.path("run.toml"), bench.path("run"));
    let complaint =
        run_refused(&["launch", &file, "--dir", &folder, "--chain", "ws://127.0.0.1:1"]);
    assert!(complaint.contains("chain_unreachable"), "{complaint}");
}

#[test]
fn an_invitation_to_a_run_that_is_no_more_is_not_taken_for_an_outage() {
    let bench = Bench::new(2);
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    drop(coordinator);

    // The same coordinator, at the same place, with another run.
    let (file, folder) = (bench.path("other.toml"), bench.path("other"));
    let text = RUN_FILE.replace("ROUNDS", "2").replace("\"tiny\"", "\"other\"");
    std::fs::write(&file, text).expect("the file is written");
    std::fs::create_dir(&folder).expect("a folder");
    let key = |folder: &str| std::path::Path::new(folder).join("node.key");
    std::fs::copy(key(&bench.path("coordinator")), key(&folder)).expect("the key is copied");
    let arguments = ["launch", &file, "--dir", &folder, "--chain", &bench.chain];
    let place = ["--listen", &bench.listen, "--page-port", "0"];
    let other = Program::start("other", &[arguments.as_slice(), place.as_slice()].concat());
    other.wait_for("launched");

    let arguments = ["join", &invitation, "--dir", &bench.path("late"), "--listen", "127.0.0.1:0"];
    let complaint = run_refused(&arguments);
    assert!(complaint.contains("wrong_run"), "{complaint}");
    let complaint = run_refused(&["status", &invitation]);
    assert!(complaint.contains("wrong_run"), "{complaint}");
}
