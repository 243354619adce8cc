//! Whole runs, each part a process of its own, as people start them by hand.

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
evidence_rounds = 16

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

[round]
commit_ms = 60_000
upload_ms = 20_000
check_ms = 20_000
sync_ms = 10_000
silence_ms = 4_000

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
    _devnet: Program,
    chain: String,
    listen: String,
}

impl Bench {
    fn new(rounds: u32) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = |name: &str| repository.join(name).display().to_string();
        std::fs::write(
            folder.path().join("run.toml"),
            RUN_FILE.replace("ROUNDS", &rounds.to_string()),
        )
        .expect("the run's file is written");
        run_json(&[
            "prepare",
            "--text",
            &text("proto/src"),
            &text("rules/src"),
            "--extensions",
            "rs",
            "--vocabulary",
            "512",
            "--out",
            &path("data"),
        ]);
        let devnet = Program::start(
            "devnet",
            &[
                "devnet",
                "--dir",
                &path("chain"),
                "--listen",
                "127.0.0.1:0",
                "--block-time-ms",
                "200",
            ],
        );
        let chain = text_of(&devnet.wait_for("serving"), "url");
        Self { _devnet: devnet, chain, listen: free_address(), folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn launch(&self) -> (Program, Value) {
        let program = Program::start(
            "coordinator",
            &[
                "launch",
                &self.path("run.toml"),
                "--dir",
                &self.path("coordinator"),
                "--chain",
                &self.chain,
                "--listen",
                &self.listen,
                "--page-port",
                "0",
            ],
        );
        let launched = program.wait_for("launched");
        (program, launched)
    }

    fn node(&self, command: &str, name: &str, invitation: &str) -> Program {
        let folder = self.path(name);
        let arguments =
            [command, invitation, "--dir", &folder, "--threads", "1", "--listen", "127.0.0.1:0"];
        Program::start(name, &arguments)
    }
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

/// Every node that held θ of a round held the same one.
fn assert_same_parameters(nodes: &[&Program]) {
    let mut thetas: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
    for event in nodes.iter().flat_map(|node| node.heard("synced")) {
        let round = event["round"].as_u64().expect("a round");
        thetas.entry(round).or_default().insert(text_of(&event, "theta"));
    }
    assert!(!thetas.is_empty());
    for (round, thetas) in thetas {
        assert_eq!(thetas.len(), 1, "θ of round {round}");
    }
}

#[test]
fn a_run_by_hand_from_the_chain_to_the_sample() {
    let bench = Bench::new(3);
    let (coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let verifier = bench.node("verify", "verifier", &invitation);
    let workers = ["first", "second"].map(|name| bench.node("join", name, &invitation));

    let page = text_of(&launched, "page");
    assert!(get(&page, "/").contains("<html"), "the live page loads");
    coordinator.wait_for("final");
    assert!(get(&page, "/metrics").contains("manyhands_"), "and is measured");
    let status: Value = run_json(&["status", &invitation]);
    assert_eq!(status["phase"], "complete", "{status}");
    for worker in &workers {
        assert!(worker.wait_for_exit().success(), "a worker ends well with its run");
    }
    assert_same_parameters(&[&workers[0], &workers[1]]);
    assert!(verifier.heard("replayed").iter().all(|replayed| replayed["passed"] == true));

    let audit = run_json(&["audit", &invitation, "--chain", &bench.chain]);
    assert_eq!(audit["audit"], "ok", "{audit}");
    let before =
        run_json(&["keys", "show", "--dir", &bench.path("first"), "--chain", &bench.chain]);
    run_json(&["claim", &invitation, "--dir", &bench.path("first"), "--chain", &bench.chain]);
    let after = run_json(&["keys", "show", "--dir", &bench.path("first"), "--chain", &bench.chain]);
    assert_ne!(before, after, "the reward is on the account");

    run_json(&["export", &invitation, "--to", &bench.path("model")]);
    assert!(PathBuf::from(bench.path("model")).join("model.safetensors").exists());
    let sample = run(&["generate", &bench.path("model"), "--prompt", "fn main", "--tokens", "8"]);
    assert!(sample.contains("fn main"), "{sample}");
}

#[test]
fn killed_processes_come_back_and_the_run_goes_on() {
    let bench = Bench::new(6);
    let (mut coordinator, launched) = bench.launch();
    let invitation = text_of(&launched, "invitation");
    let _verifier = bench.node("verify", "verifier", &invitation);
    let steady = bench.node("join", "steady", &invitation);
    let mut unlucky = bench.node("join", "unlucky", &invitation);

    coordinator.wait_for("round");
    unlucky.kill();
    coordinator.wait_for("round");
    let back = bench.node("join", "unlucky", &invitation);
    coordinator.kill();
    let (coordinator, launched) = bench.launch();
    assert_eq!(launched["resumed"], true);
    assert_eq!(text_of(&launched, "invitation"), invitation, "it is found where it was");

    let late = bench.node("join", "late", &invitation);
    coordinator.wait_for("final");
    assert_same_parameters(&[&steady, &unlucky, &back, &late]);
    let audit = run_json(&["audit", &invitation, "--chain", &bench.chain]);
    assert_eq!(audit["audit"], "ok", "{audit}");
}
