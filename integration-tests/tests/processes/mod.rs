//! Whole runs, each part a process of its own, as people start them by hand.

mod cheats;
mod disputes;
mod program;
mod refusals;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::{Path, PathBuf};

use serde_json::Value;

use program::{Program, run, run_json};

/// Small enough that a round takes a second, and with windows that elapse in another.
const RUN_FILE: &str = r#"
[run]
name = "tiny"
rounds = ROUNDS
workers_min = 2
evidence_rounds = 64

[model]
vocabulary_size = 512
hidden_size = 32
layers = 1
heads = 2
key_value_heads = 1
feed_forward_size = 64
context_length = 32

[training]
steps_per_round = 4
batch_sequences = 4
micro_batch_sequences = 4
learning_rate = 3e-3

[data]
dataset = "data"
held_out_sequences = 8

[aggregation]
rules = ["median_norm", "loss_gate"]

[round]
commit_ms = 60_000
upload_ms = 20_000
check_ms = 20_000
sync_ms = 10_000
silence_ms = 8_000

[verification]
verifiers_min = 1
probation_checks = 1
audit_rate_per_mille = 300

[chain]
price_per_work_unit = 1_000_000_000
vesting_rounds = 1
challenge_window_blocks = 4
contest_window_blocks = 4
fault_quorum = 1
"#;

/// A folder with a chain, a data set and a run's file.
struct Bench {
    folder: tempfile::TempDir,
    /// Killed when dropped.
    devnet: Program,
    chain: String,
    listen: String,
}

impl Bench {
    fn new(rounds: u32) -> Self {
        Self::with(&RUN_FILE.replace("ROUNDS", &rounds.to_string()))
    }

    fn with(run_file: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(path("run.toml"), run_file).expect("the run's file is written");
        run_json(&[
            "prepare",
            "--text",
            &repository("proto/src"),
            &repository("rules/src"),
            "--extensions",
            "rs",
            "--vocabulary",
            "512",
            // Of so few documents a hundredth may be none.
            "--held-out-per-mille",
            "200",
            "--out",
            &path("data"),
        ]);
        let devnet = devnet(&path("chain"), "127.0.0.1:0");
        let chain = text_of(&devnet.wait_for("serving"), "url");
        Self { devnet, chain, listen: free_address(), folder }
    }

    fn rewrite(&self, run_file: &str) {
        std::fs::write(self.path("run.toml"), run_file).expect("the run's file is written");
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn launch(&self) -> (Program, Value) {
        self.launch_with(&[])
    }

    fn launch_with(&self, more: &[&str]) -> (Program, Value) {
        let (file, folder) = (self.path("run.toml"), self.path("coordinator"));
        let mut arguments = vec!["launch", &file, "--dir", &folder, "--chain", &self.chain];
        arguments.extend(["--listen", &self.listen, "--page-port", "0"]);
        arguments.extend(more);
        let program = Program::start("coordinator", &arguments);
        let launched = program.wait_for("launched");
        (program, launched)
    }

    fn node(&self, command: &str, name: &str, invitation: &str) -> Program {
        self.node_with(command, name, invitation, &[])
    }

    fn node_with(&self, command: &str, name: &str, invitation: &str, more: &[&str]) -> Program {
        let folder = self.path(name);
        let mut arguments = vec![command, invitation, "--dir", &folder];
        arguments.extend(["--threads", "1", "--listen", "127.0.0.1:0"]);
        arguments.extend(more);
        Program::start(name, &arguments)
    }

    /// A node of the examples that cheats, with more arguments that say how. Its folder's name is its own.
    fn cheat(&self, name: &str, invitation: &str, how: &[&str]) -> Program {
        let folder = self.path(name);
        let mut arguments = vec![invitation, "--dir", &folder, "--listen", "127.0.0.1:0"];
        arguments.extend(how);
        Program::start_cheat(name, &arguments)
    }

    /// The id of a node's key.
    fn node_of(&self, name: &str) -> String {
        text_of(&run_json(&["keys", "show", "--dir", &self.path(name)]), "account")
    }

    /// Kills the chain and starts it again, in its folder and on its port.
    fn restart_devnet(&mut self) {
        self.devnet.kill();
        let listen = self.chain.trim_start_matches("ws://").to_owned();
        self.devnet = devnet(&self.path("chain"), &listen);
        self.devnet.wait_for("serving");
    }

    /// What a node's account has to spend.
    fn free(&self, name: &str) -> u128 {
        let shown = run_json(&["keys", "show", "--dir", &self.path(name), "--chain", &self.chain]);
        let free = &shown["chain"]["free"];
        free.to_string().parse().unwrap_or_else(|_| panic!("no balance in {shown}"))
    }

    /// Claims what a node earned, and checks that its account is the richer for it.
    fn claim(&self, name: &str, invitation: &str) {
        let before = self.free(name);
        let folder = self.path(name);
        run_json(&["claim", invitation, "--dir", &folder, "--chain", &self.chain]);
        assert!(self.free(name) > before, "{name} is paid");
    }

    fn audit(&self, invitation: &str) -> Value {
        let audit = run_json(&["audit", invitation, "--chain", &self.chain]);
        assert_eq!(audit["audit"], "ok", "{audit}");
        audit
    }
}

fn devnet(folder: &str, listen: &str) -> Program {
    let arguments = ["devnet", "--dir", folder, "--listen", listen, "--block-time-ms", "200"];
    Program::start("devnet", &arguments)
}

/// A folder of this repository.
fn repository(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).display().to_string()
}

/// An address whose port and the one after it are free now.
fn free_address() -> String {
    for _ in 0..50 {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let port = socket.local_addr().expect("it has an address").port();
        if port < u16::MAX && UdpSocket::bind(("127.0.0.1", port + 1)).is_ok() {
            return format!("127.0.0.1:{port}");
        }
    }
    panic!("no two free ports in a row");
}

fn text_of(value: &Value, field: &str) -> String {
    let text = value[field].as_str();
    text.unwrap_or_else(|| panic!("expected {field} in {value}")).to_owned()
}

/// What the page's server answers.
fn get(page: &str, path: &str) -> String {
    let address = page.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = TcpStream::connect(address).expect("the page is served");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it takes a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}

/// Every node held θ of some round, and all that held θ of a round held the same one.
fn assert_same_parameters(nodes: &[&Program]) {
    let mut thetas: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
    for node in nodes {
        let synced = node.heard("synced");
        assert!(!synced.is_empty(), "{} never had any parameters", node.name());
        for event in synced {
            let round = event["round"].as_u64().expect("a round");
            thetas.entry(round).or_default().insert(text_of(&event, "theta"));
        }
    }
    for (round, thetas) in thetas {
        assert_eq!(thetas.len(), 1, "θ of round {round}");
    }
}

/// What became of a worker in the rounds that the coordinator told of.
fn outcomes(coordinator: &Program, node: &str) -> Vec<String> {
    let rounds = coordinator.heard("round");
    let results = rounds.iter().flat_map(|round| round["results"].as_array().into_iter().flatten());
    results.filter(|result| result[0] == node).map(|result| text_of(&result[1], "kind")).collect()
}

/// Whether a round merged nothing of a worker.
fn closed_without(round: &Value, worker: &str) -> bool {
    let results = round["results"].as_array().expect("a round has results");
    results.iter().all(|result| result[0] != worker || result[1]["kind"] != "admitted")
}

#[test]
fn a_run_by_hand_from_the_chain_to_the_sample() {
    let bench = Bench::new(3);
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let deterministic = ["--deterministic"];
    let verifier = bench.node_with("verify", "verifier", &invitation, &deterministic);
    let first = bench.node_with("join", "first", &invitation, &deterministic);
    let workers = [first, bench.node("join", "second", &invitation)];
    let class_of = |node: &Program| text_of(&node.wait_for("measured"), "class");
    let [class, another] = [&workers[0], &workers[1]].map(class_of);
    assert!(class.contains("deterministic, fingerprint") && !another.contains("deterministic"));
    assert_eq!(class, class_of(&verifier), "nothing of the machine is in it");

    let page = text_of(&launched, "page");
    assert!(get(&page, "/").contains("<title>Manyhands run"), "the live page loads");
    coordinator.wait_for("final");
    assert!(get(&page, "/metrics").contains("manyhands_"), "and is measured");
    let status: Value = run_json(&["status", &invitation]);
    assert_eq!(status["phase"], "complete", "{status}");
    for worker in &workers {
        assert!(worker.wait_for_exit().success(), "a worker ends well with its run");
    }
    assert_same_parameters(&[&workers[0], &workers[1]]);
    assert!(!verifier.heard("replayed").is_empty());
    assert!(verifier.heard("voted").is_empty(), "nobody cheats");
    let weighed = verifier.heard("weighed");
    assert_eq!(weighed.len(), 3, "what updates do to held-out loss, once a round: {weighed:?}");

    bench.audit(&invitation);
    bench.claim("first", &invitation);
    bench.claim("verifier", &invitation);

    let model = bench.path("model");
    run_json(&["export", &invitation, "--to", &model]);
    assert!(PathBuf::from(&model).join("model.safetensors").exists());
    let sample = run(&["generate", &model, "--prompt", "fn main", "--tokens", "8"]);
    assert!(sample.contains("fn main"), "{sample}");

    drop(coordinator);
    let again = bench.path("model-from-folder");
    run_json(&["export", &bench.path("coordinator"), "--to", &again]);
    let weights = |folder: &str| std::fs::read(PathBuf::from(folder).join("model.safetensors"));
    assert_eq!(
        weights(&model).expect("exported"),
        weights(&again).expect("exported with nobody to ask"),
    );
}

#[test]
fn a_run_takes_only_machines_that_come_to_its_bits() {
    let text = RUN_FILE.replace("ROUNDS", "2").replace("workers_min = 2", "workers_min = 1");
    let bench = Bench::with(&text);
    let file = bench.path("run.toml");
    let asked = ["fingerprint", &file, "--deterministic", "--threads", "1", "--device", "cpu"];
    let found = run_json(&asked);
    let bits = text_of(&found, "fingerprint");
    bench.rewrite(
        &text.replace("[verification]", &format!("[verification]\nfingerprint = \"{bits}\"")),
    );
    let again = run_json(&asked);
    assert_eq!((text_of(&again, "fingerprint"), text_of(&again, "asked")), (bits.clone(), bits));

    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let own = ["--deterministic", "--device", "cpu"];
    let other = bench.node("join", "other", &invitation);
    assert!(!other.wait_for_exit().success(), "it comes to other bits");
    assert!(other.heard("enrolled").is_empty(), "and has put nothing down");
    let _verifier = bench.node_with("verify", "verifier", &invitation, &own);
    let worker = bench.node_with("join", "worker", &invitation, &own);
    let worker_id = text_of(&worker.wait_for("starting"), "node");
    coordinator.wait_for("final");
    assert_eq!(outcomes(&coordinator, &worker_id), ["admitted"; 2]);
    bench.audit(&invitation);
}

#[test]
fn killed_processes_come_back_and_the_run_goes_on() {
    // Longer than the restarts take on any machine: a round is more than a second of training.
    let text = RUN_FILE.replace("ROUNDS", "30");
    let mut bench = Bench::with(&text.replace("steps_per_round = 4", "steps_per_round = 100"));
    let (mut coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let mut verifier = bench.node("verify", "verifier", &invitation);
    let steady = bench.node("join", "steady", &invitation);
    let mut unlucky = bench.node("join", "unlucky", &invitation);
    let unlucky_id = text_of(&unlucky.wait_for("starting"), "node");

    // By then it has the end states of several rounds to come back with.
    for _ in 0..3 {
        coordinator.wait_for("round");
    }
    unlucky.kill();
    // It may have been killed after its update was there.
    while !closed_without(&coordinator.wait_for("round"), &unlucky_id) {}
    let back = bench.node("join", "unlucky", &invitation);
    back.wait_for("committed");
    verifier.kill();
    let verifier = bench.node("verify", "verifier", &invitation);
    verifier.wait_for("joined");
    bench.restart_devnet();
    coordinator.kill();
    let (coordinator, launched) = bench.launch();
    assert_eq!(launched["resumed"], true);
    assert_eq!(text_of(&launched, "invitation"), invitation, "it is found where it was");

    let late = bench.node("join", "late", &invitation);
    coordinator.wait_for("final");
    assert_same_parameters(&[&steady, &unlucky, &back, &late]);
    bench.audit(&invitation);
}

#[test]
fn a_worker_that_is_killed_after_its_commitment_still_answers_for_it() {
    let text = RUN_FILE.replace("ROUNDS", "2");
    let bench = Bench::with(&text.replace("steps_per_round = 4", "steps_per_round = 60"));
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let _verifier = bench.node("verify", "verifier", &invitation);
    let mut unlucky = bench.node("join", "unlucky", &invitation);
    // It trains for a long time after the other has committed.
    let (folder, load) = (bench.path("slow"), ["--max-load", "15%"]);
    let mut arguments = vec!["join", &invitation, "--dir", &folder, "--threads", "1"];
    arguments.extend(["--listen", "127.0.0.1:0"].iter().chain(&load));
    let slow = Program::start("slow", &arguments);
    let unlucky_id = text_of(&unlucky.wait_for("starting"), "node");
    unlucky.wait_for("committed");
    unlucky.kill();
    assert!(slow.heard("committed").is_empty(), "the commitments are still open");
    let _back = bench.node("join", "unlucky", &invitation);
    coordinator.wait_for("final");
    // Codec check and replay, both before the merge, found everything that was committed.
    assert_eq!(outcomes(&coordinator, &unlucky_id)[0], "admitted");
    bench.audit(&invitation);
}

#[test]
fn a_worker_that_leaves_is_paid_and_the_run_goes_on_without_it() {
    let bench = Bench::new(6);
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let _verifier = bench.node("verify", "verifier", &invitation);
    let _steady = bench.node("join", "steady", &invitation);
    let leaver = bench.node("join", "leaver", &invitation);
    leaver.wait_for("committed");
    leaver.interrupt();
    assert!(leaver.wait_for_exit().success());
    assert_eq!(leaver.heard("left").len(), 1);
    coordinator.wait_for("final");
    bench.claim("leaver", &invitation);
}

#[test]
fn a_worker_leaves_though_the_coordinator_is_gone() {
    let bench = Bench::new(6);
    let (mut coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    // Alone, it has nothing to do yet and owes nobody anything.
    let waiting = bench.node("join", "waiting", &invitation);
    waiting.wait_for("joined");
    coordinator.kill();
    waiting.interrupt();
    assert!(waiting.wait_for_exit().success());
}

#[test]
fn one_folder_serves_one_run_after_another() {
    let folder = tempfile::tempdir().expect("a folder");
    let home = folder.path().display().to_string();
    for vocabulary in ["512", "400"] {
        let text = RUN_FILE.replace("ROUNDS", "2").replace("workers_min = 2", "workers_min = 1");
        let bench = Bench::with(&text.replace("learning_rate = 3e-3", "learning_rate = 2e-3"));
        let data = bench.path("other");
        let source = bench.path("run.toml");
        run_json(&[
            "prepare",
            "--text",
            &source,
            &repository("rules/src"),
            "--vocabulary",
            vocabulary,
            "--held-out-per-mille",
            "200",
            "--out",
            &data,
        ]);
        let (coordinator, launched) = bench.launch_with(&["--dataset", &data]);
        let invitation = text_of(&launched, "invitation");
        let _verifier = bench.node("verify", "verifier", &invitation);
        let arguments =
            ["join", &invitation, "--dir", &home, "--threads", "1", "--listen", "127.0.0.1:0"];
        let worker = Program::start("worker", &arguments);
        coordinator.wait_for("final");
        assert!(worker.wait_for_exit().success());
        let id = text_of(&worker.heard("starting")[0], "node");
        assert_eq!(outcomes(&coordinator, &id), ["admitted", "admitted"]);
    }
}
