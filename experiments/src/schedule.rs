//! Many experiments, one process each, as many at a time as there are cores.

use std::collections::VecDeque;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::experiment::Experiment;
use crate::job::{self, Place};
use crate::result::ExperimentResult;

/// How the work is divided and when it stops.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Experiments at a time.
    pub(crate) processes: usize,
    /// No experiment begins later than this.
    pub(crate) time: Duration,
}

/// An experiment that is to be run.
struct Waiting {
    name: String,
    /// The experiment whose end it starts with.
    start: Option<String>,
    /// Whether others start with its end.
    keeps_end: bool,
}

struct Running {
    name: String,
    child: Child,
}

impl Drop for Running {
    /// An error ends what still runs, and Ctrl-C reaches it as it reaches this program; checkpoints stay.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What has no result yet, and before it what that starts with.
fn waiting(plan: &[Experiment], place: &Place) -> anyhow::Result<VecDeque<Waiting>> {
    let mut waiting: VecDeque<Waiting> = VecDeque::new();
    for experiment in plan {
        if ExperimentResult::find(&place.results, experiment, &place.origin)?.is_some() {
            continue;
        }
        if let Some(start) = experiment.start.as_deref()
            && !job::has_end(start, place)?
        {
            match waiting.iter_mut().find(|it| it.name == start.name) {
                Some(found) => found.keeps_end = true,
                None => waiting.push_front(Waiting {
                    name: start.name.clone(),
                    start: None,
                    keeps_end: true,
                }),
            }
        }
        if waiting.iter().all(|it| it.name != experiment.name) {
            let start = experiment.start.as_ref().map(|start| start.name.clone());
            waiting.push_back(Waiting { name: experiment.name.clone(), start, keeps_end: false });
        }
    }
    Ok(waiting)
}

/// The first that need not wait for another.
fn take_ready(waiting: &mut VecDeque<Waiting>, running: &[Running]) -> Option<Waiting> {
    let is_under_way = |name: &String| {
        waiting.iter().any(|it| it.name == *name) || running.iter().any(|it| it.name == *name)
    };
    let ready = waiting.iter().position(|it| !it.start.as_ref().is_some_and(is_under_way))?;
    waiting.remove(ready)
}

/// Runs what has no result yet. An interrupted one goes on from its checkpoint.
pub(crate) fn run(plan: &[Experiment], place: &Place, limits: Limits) -> anyhow::Result<()> {
    let mut waiting = waiting(plan, place)?;
    let (all, mut done) = (waiting.len(), 0);
    eprintln!("{} of {} experiments have a result", plan.len().saturating_sub(all), plan.len());
    let program = std::env::current_exe().context("this program's own path")?;
    let began = Instant::now();
    let mut running: Vec<Running> = Vec::new();
    let mut failed = Vec::new();
    while !waiting.is_empty() || !running.is_empty() {
        while running.len() < limits.processes && began.elapsed() < limits.time {
            let Some(next) = take_ready(&mut waiting, &running) else { break };
            let child = spawn(&program, &next, place)?;
            running.push(Running { name: next.name, child });
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
                        waiting.retain(|it| it.start.as_ref() != Some(&job.name));
                        failed.push(job.name.clone());
                    }
                }
            }
        }
        running = still;
    }
    if failed.is_empty() { Ok(()) } else { bail!("these failed: {}", failed.join(", ")) }
}

fn spawn(program: &Path, next: &Waiting, place: &Place) -> anyhow::Result<Child> {
    Command::new(program)
        .arg("one")
        .arg(&next.name)
        .args(next.keeps_end.then_some("--keep-end"))
        .args(["--device", &place.device_name()])
        .args(["--text".as_ref(), place.text.folder.as_os_str()])
        .args(["--work".as_ref(), place.work.as_os_str()])
        .args(["--results".as_ref(), place.results.as_os_str()])
        // One core each: an experiment must not depend on how many run beside it.
        .env("RAYON_NUM_THREADS", "1")
        .env("OMP_NUM_THREADS", "1")
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}
