//! Many experiments, one process each, as many at a time as there are cores.

use std::collections::VecDeque;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::cluster::Text;
use crate::experiment::Experiment;
use crate::job::Folders;
use crate::result::ExperimentResult;

/// How the work is divided and when it stops.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Experiments at a time.
    pub(crate) processes: usize,
    /// No experiment begins later than this.
    pub(crate) time: Duration,
}

struct Running {
    name: String,
    child: Child,
}

impl Drop for Running {
    /// Whatever ends this program ends its experiments; their checkpoints stay.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs what has no result yet. An interrupted one goes on from its checkpoint.
pub(crate) fn run(plan: &[Experiment], folders: &Folders, limits: Limits) -> anyhow::Result<()> {
    let text = Text::open(&folders.text)?.digest().to_string();
    let mut waiting = VecDeque::new();
    for experiment in plan {
        if ExperimentResult::find(&folders.results, experiment, &text)?.is_none() {
            waiting.push_back(experiment.name.clone());
        }
    }
    let (all, mut done) = (plan.len(), plan.len() - waiting.len());
    eprintln!("{done} of {all} experiments have a result");
    let program = std::env::current_exe().context("this program's own path")?;
    let began = Instant::now();
    let mut running: Vec<Running> = Vec::new();
    let mut failed = Vec::new();
    while !waiting.is_empty() || !running.is_empty() {
        while running.len() < limits.processes && began.elapsed() < limits.time {
            let Some(name) = waiting.pop_front() else { break };
            running.push(Running { child: spawn(&program, &name, folders)?, name });
        }
        if running.is_empty() {
            eprintln!("the time is over; {} experiments wait for another start", waiting.len());
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
        let mut still = Vec::new();
        for mut job in running {
            match job.child.try_wait()? {
                None => still.push(job),
                Some(status) => {
                    done += 1;
                    let outcome = if status.success() { "done" } else { "FAILED" };
                    eprintln!(
                        "{outcome}: {} ({done} of {all}, {:.0} min)",
                        job.name,
                        began.elapsed().as_secs_f64() / 60.0
                    );
                    if !status.success() {
                        failed.push(job.name.clone());
                    }
                }
            }
        }
        running = still;
    }
    if failed.is_empty() { Ok(()) } else { bail!("these failed: {}", failed.join(", ")) }
}

fn spawn(program: &Path, name: &str, folders: &Folders) -> anyhow::Result<Child> {
    Command::new(program)
        .arg("one")
        .arg(name)
        .args(["--text".as_ref(), folders.text.as_os_str()])
        .args(["--work".as_ref(), folders.work.as_os_str()])
        .args(["--results".as_ref(), folders.results.as_os_str()])
        // One core each: an experiment must not depend on how many run beside it.
        .env("RAYON_NUM_THREADS", "1")
        .env("OMP_NUM_THREADS", "1")
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}
