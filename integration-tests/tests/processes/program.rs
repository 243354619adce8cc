//! A process of the `manyhands` binary, and what it says.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longer than anything takes on a busy machine; reached only when something hangs.
const PATIENCE: Duration = Duration::from_secs(240);

/// A binary that was built beside this test.
fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let folder = test.ancestors().nth(2).expect("tests lie in a folder of the target directory");
    let binary = folder.join(name);
    assert!(binary.exists(), "{} is missing: run `make test`, which builds it", binary.display());
    binary
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("manyhands"));
    command.arg("--json").args(arguments).env("MANYHANDS_HOME", std::env::temp_dir());
    command
}

/// Runs a command to its end and gives what it printed.
pub(super) fn run(arguments: &[&str]) -> String {
    let output = command(arguments).output().expect("the binary starts");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{arguments:?} ended with {}: {told}{complained}",
        output.status
    );
    told
}

pub(super) fn run_json(arguments: &[&str]) -> Value {
    let told = run(arguments);
    let last = told.lines().last().unwrap_or_default();
    serde_json::from_str(&told)
        .or_else(|_| serde_json::from_str(last))
        .unwrap_or_else(|error| panic!("{arguments:?} printed no JSON ({error}): {told}"))
}

/// Runs a command that must be refused and gives its complaint.
pub(super) fn run_refused(arguments: &[&str]) -> String {
    let output = command(arguments).output().expect("the binary starts");
    assert!(!output.status.success(), "{arguments:?} should have been refused");
    let mut told = String::from_utf8_lossy(&output.stdout).into_owned();
    told.push_str(&String::from_utf8_lossy(&output.stderr));
    told
}

/// A running process; killed when dropped.
pub(super) struct Program {
    name: String,
    child: RefCell<Child>,
    lines: Receiver<Value>,
    heard: RefCell<Vec<Value>>,
    complaints: Arc<Mutex<String>>,
}

impl Program {
    pub(super) fn start(name: &str, arguments: &[&str]) -> Self {
        Self::spawn(name, command(arguments))
    }

    /// The worker of the examples that cheats; it tells no JSON.
    pub(super) fn start_cheat(name: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(binary("cheating-worker"));
        command.args(arguments);
        Self::spawn(name, command)
    }

    fn spawn(name: &str, mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Ok(value) = serde_json::from_str(&line)
                    && sender.send(value).is_err()
                {
                    break;
                }
            }
        });
        let complaints = Arc::<Mutex<String>>::default();
        let (kept, mut stderr) = (Arc::clone(&complaints), child.stderr.take().expect("piped"));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                let mut text = kept.lock().expect("nobody panics with it");
                text.push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        let (child, heard) = (RefCell::new(child), RefCell::default());
        Self { name: name.to_owned(), child, lines, heard, complaints }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The next event of that name that was not waited for yet.
    pub(super) fn wait_for(&self, event: &str) -> Value {
        let started = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(started.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(value) => {
                    self.heard.borrow_mut().push(value.clone());
                    if value["event"] == event {
                        return value;
                    }
                }
                Err(why @ (RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)) => {
                    let complaints = self.complaints.lock().expect("nobody panics with it");
                    let heard = self.heard.borrow();
                    let last: Vec<_> = heard.iter().rev().take(12).collect();
                    panic!("{} never said {event} ({why}): {last:#?}\n{complaints}", self.name);
                }
            }
        }
    }

    /// All events of that name so far.
    pub(super) fn heard(&self, event: &str) -> Vec<Value> {
        self.heard.borrow_mut().extend(self.lines.try_iter());
        self.heard.borrow().iter().filter(|value| value["event"] == event).cloned().collect()
    }

    pub(super) fn wait_for_exit(&self) -> ExitStatus {
        // Read to the end, so that the process is never held up by a full pipe.
        while let Ok(value) = self.lines.recv_timeout(PATIENCE) {
            self.heard.borrow_mut().push(value);
        }
        self.child.borrow_mut().wait().expect("a child can be waited for")
    }

    /// Ctrl-C.
    pub(super) fn interrupt(&self) {
        let id = self.child.borrow().id().to_string();
        let sent = Command::new("kill").args(["-INT", &id]).status().expect("kill is there");
        assert!(sent.success(), "it was running");
    }

    /// `kill -9`.
    pub(super) fn kill(&mut self) {
        let mut child = self.child.borrow_mut();
        child.kill().expect("it was running");
        child.wait().expect("a child can be waited for");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let mut child = self.child.borrow_mut();
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
}
