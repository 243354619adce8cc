//! What a worker or verifier shows of itself.

use std::time::{Duration, Instant};

use manyhands_proto::message::Role;
use manyhands_rules::worker::Exit;
use manyhands_worker::WorkerEvent;

use crate::failure::Failure;
use crate::output::Output;
use crate::progress::Progress;
use crate::remote::refused;

/// A program that reads along needs no line for every step.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Renders events as they come.
pub(super) struct Screen {
    output: Output,
    role: Role,
    progress: Progress,
    last_progress: Option<Instant>,
}

impl Screen {
    pub(super) fn new(output: Output, role: Role) -> Self {
        Self { output, role, progress: Progress::default(), last_progress: None }
    }

    pub(super) fn show(&mut self, event: &WorkerEvent) {
        match event {
            WorkerEvent::Training { round, step, steps, loss } => {
                let loss = loss.map_or(String::new(), |loss| format!(", loss {loss:.3}"));
                self.advance(event, &format!("round {round}: training{loss}"), (*step, *steps));
            }
            WorkerEvent::Replaying { round, worker, step, steps } => {
                let what = format!("round {round}: replaying {}", worker.short());
                self.advance(event, &what, (*step, *steps));
            }
            WorkerEvent::Fetching { what, done, total } => {
                self.advance(event, &format!("fetching {what}"), (*done, *total));
            }
            WorkerEvent::Described { .. }
            | WorkerEvent::Measured { .. }
            | WorkerEvent::Enrolled { .. }
            | WorkerEvent::Joined { .. }
            | WorkerEvent::Duty { .. }
            | WorkerEvent::Synced { .. }
            | WorkerEvent::Committed { .. }
            | WorkerEvent::Replayed { .. }
            | WorkerEvent::Voted { .. }
            | WorkerEvent::Objected { .. }
            | WorkerEvent::Evaluated { .. }
            | WorkerEvent::Weighed { .. }
            | WorkerEvent::Trouble { .. } => {
                let (output, role) = (self.output, self.role);
                self.progress.suspend(|| output.event(event, || line(event, role)));
            }
        }
    }

    /// How the node's part in the run ended.
    pub(super) fn ended(&mut self, exit: &Exit) -> Result<(), Failure> {
        self.progress.clear();
        match exit {
            Exit::Complete { round, theta } => {
                let shown =
                    serde_json::json!({ "event": "complete", "round": round, "theta": theta });
                self.output.event(&shown, || {
                    let what = "`manyhands claim` brings what was earned once it has vested";
                    Some(format!("the run is complete; {what}"))
                });
                Ok(())
            }
            Exit::Left => {
                self.output.event(&serde_json::json!({ "event": "left" }), || {
                    Some("left the run".to_owned())
                });
                Ok(())
            }
            Exit::Refused(refusal) => Err(refused(refusal)),
        }
    }

    fn advance(&mut self, event: &WorkerEvent, what: &str, (done, total): (u64, u64)) {
        if self.output.is_json() {
            let now = Instant::now();
            let due = self.last_progress.is_none_or(|last| now - last >= PROGRESS_INTERVAL);
            if due || done == total {
                self.last_progress = Some(now);
                self.output.event(event, || None);
            }
            return;
        }
        // The loss changes with every step; the work is the same.
        let (work, note) = what.split_once(", ").unwrap_or((what, ""));
        self.progress.set(work, done, total);
        self.progress.note(note);
    }
}

fn line(event: &WorkerEvent, role: Role) -> Option<String> {
    Some(match event {
        WorkerEvent::Described { run, name, parameters, rounds } => {
            format!("run     {name} ({}): {parameters} parameters, {rounds} rounds", run.short())
        }
        WorkerEvent::Measured { class, tokens_per_second, memory_bytes } => {
            format!(
                "machine {class}: {tokens_per_second} tokens/s, {} MiB of memory",
                memory_bytes >> 20
            )
        }
        WorkerEvent::Enrolled { stake, development, funded } => {
            let what = if role == Role::Worker { "stake" } else { "bond " };
            let made = match (development, funded) {
                (true, true) => ", funded by the development chain's faucet",
                (true, false) => ", on a development chain",
                (false, _) => "",
            };
            format!("{what}   {stake}{made}")
        }
        WorkerEvent::Joined { .. } => "joined the run".to_owned(),
        WorkerEvent::Duty { duty } => duty.clone(),
        WorkerEvent::Synced { round, theta } => format!("round {round}: has θ {}", theta.short()),
        WorkerEvent::Committed { round, payload_bytes, loss, bits_per_parameter } => format!(
            "round {round}: committed, training loss {loss:.3}, update of {payload_bytes} bytes ({bits_per_parameter:.3} bits per parameter)"
        ),
        WorkerEvent::Replayed { round, worker } => {
            format!("round {round}: replayed {}; the coordinator compares", worker.short())
        }
        WorkerEvent::Objected { round } => {
            format!("round {round}: this node is accused on the chain, and has OBJECTED")
        }
        WorkerEvent::Voted { round, accused, guilty, reason } => format!(
            "round {round}: {} is accused on the chain; this verifier finds it {}: {reason}",
            accused.short(),
            if *guilty { "GUILTY" } else { "innocent" }
        ),
        WorkerEvent::Evaluated { round, loss } => {
            format!("θ of round {round}: held-out loss {loss:.4}")
        }
        WorkerEvent::Weighed { round, updates } => {
            format!("round {round}: measured what {updates} updates do to held-out loss")
        }
        WorkerEvent::Trouble { text } => format!("trouble: {text}"),
        WorkerEvent::Training { .. }
        | WorkerEvent::Replaying { .. }
        | WorkerEvent::Fetching { .. } => return None,
    })
}
