//! The demo's children: separate processes whose lines of JSON are read as they come.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::failure::{Explain, Failure};

/// Lines of a log that a failure shows.
const LAST_LINES: usize = 12;
/// How long a child may take to end once it is asked to.
const PATIENCE: Duration = Duration::from_secs(15);

/// What a child did.
#[derive(Debug)]
pub(super) enum Happening {
    /// A line of JSON with a field `event`.
    Event {
        process: String,
        value: Value,
    },
    /// It said why it cannot go on.
    Refused {
        failure: Failure,
    },
    Ended {
        process: String,
        status: ExitStatus,
    },
}

/// Where children are started, and where what they do arrives.
#[derive(Debug)]
pub(super) struct Stage {
    logs: PathBuf,
    sender: mpsc::Sender<Happening>,
}

/// A running child. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) name: String,
    /// Our own program ends when this is closed, by us or by our death.
    stdin: Option<ChildStdin>,
    task: JoinHandle<()>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Stage {
    pub(super) fn new(logs: PathBuf) -> Result<(Self, mpsc::Receiver<Happening>), Failure> {
        std::fs::create_dir_all(&logs)
            .explain("demo_folder", "choose another folder with --dir")?;
        let (sender, happenings) = mpsc::channel(1024);
        Ok((Self { logs, sender }, happenings))
    }

    /// Starts this very program with these arguments.
    pub(super) fn start_own(&self, name: &str, arguments: &[OsString]) -> Result<Process, Failure> {
        let mut arguments = arguments.to_vec();
        arguments.extend(["--json".into(), "--stop-with-stdin".into()]);
        self.start(name, &own_program()?, &arguments)
    }

    /// Starts a program that goes on by itself.
    pub(super) fn start(
        &self,
        name: &str,
        program: &Path,
        arguments: &[OsString],
    ) -> Result<Process, Failure> {
        let log = self.log(name)?;
        let mut child = self.spawn(program, arguments, &log)?;
        let stdin = child.stdin.take();
        let follow = follow(name.to_owned(), child, log, self.sender.clone());
        Ok(Process { name: name.to_owned(), stdin, task: tokio::spawn(follow) })
    }

    /// Runs this very program to its end and gives the document that it prints.
    pub(super) async fn run_own(
        &self,
        name: &str,
        arguments: &[OsString],
    ) -> Result<Value, Failure> {
        let mut arguments = arguments.to_vec();
        arguments.push("--json".into());
        let mut log = self.log(name)?;
        let child = self.spawn(&own_program()?, &arguments, &log)?;
        let output = child.wait_with_output().await.explain("demo_process", "look at the log")?;
        let _ = log.write_all(&output.stdout);
        let document: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        if let Some(failure) = document.as_ref().and_then(|document| refusal(name, document)) {
            return Err(failure);
        }
        match document {
            Some(document) if output.status.success() => Ok(document),
            Some(_) | None => Err(self.failed(name, output.status)),
        }
    }

    fn spawn(&self, program: &Path, arguments: &[OsString], log: &File) -> Result<Child, Failure> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        command.stderr(log.try_clone().explain("demo_folder", "make room on the disk")?);
        // Ctrl-C is for us alone: we end the children.
        #[cfg(unix)]
        command.process_group(0);
        command.spawn().map_err(|error| {
            let reason = format!("cannot start {}: {error}", program.display());
            Failure::new(
                "demo_process",
                reason,
                "check that the program is there and can be executed",
            )
        })
    }

    fn log(&self, name: &str) -> Result<File, Failure> {
        let file = OpenOptions::new().create(true).append(true).open(self.log_path(name));
        file.explain("demo_folder", "make the folder writable, or choose another with --dir")
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// A child that ended as it should not, with its last words.
    pub(super) fn failed(&self, name: &str, status: ExitStatus) -> Failure {
        let path = self.log_path(name);
        let text = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n  ");
        let reason = format!("{name} ended with {status}; its last words:\n  {last}");
        Failure::new("demo_process", reason, &format!("read {}", path.display()))
    }
}

impl Process {
    /// Asks the child to end and waits for it; one that takes too long is killed.
    pub(super) async fn stop(mut self, happenings: &mut mpsc::Receiver<Happening>) {
        drop(self.stdin.take());
        let ended = async {
            loop {
                tokio::select! {
                    _ = &mut self.task => return,
                    // Nobody else reads along now, and a full queue would hold the child up.
                    Some(_) = happenings.recv() => {}
                }
            }
        };
        if tokio::time::timeout(PATIENCE, ended).await.is_err() {
            tracing::warn!(process = self.name, "did not end in time and is killed");
        }
    }
}

fn own_program() -> Result<PathBuf, Failure> {
    std::env::current_exe().explain("demo_process", "start the program by its full path")
}

/// Reads a child's lines until it ends. Its log gets all of them.
async fn follow(name: String, mut child: Child, mut log: File, sender: mpsc::Sender<Happening>) {
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let _ = writeln!(log, "{line}");
            let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
            if let Some(failure) = refusal(&name, &value) {
                let _ = sender.send(Happening::Refused { failure }).await;
            } else if value.get("event").is_some() {
                let _ = sender.send(Happening::Event { process: name.clone(), value }).await;
            }
        }
    }
    if let Ok(status) = child.wait().await {
        let _ = sender.send(Happening::Ended { process: name, status }).await;
    }
}

/// The refusal that a child printed, as ours.
fn refusal(process: &str, document: &Value) -> Option<Failure> {
    let error = document.get("error")?;
    let field = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    let reason = format!("{process}: {}", field("reason"));
    Some(Failure::new(&field("code"), reason, &field("remedy")))
}
