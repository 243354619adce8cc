//! What is printed of a run while it is coordinated.

use std::collections::BTreeSet;
use std::time::Duration;

use manyhands_coordinator::{Completed, Handle, LiveStatus, WaitError};
use manyhands_proto::{NodeId, Round, Tick};
use manyhands_rules::coordinator::{EventKind, RoundStatus};
use serde::Serialize;

use crate::failure::{Explain, Failure};
use crate::output::Output;

const LOOK_INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Happening<'a> {
    /// Something that the run's log says in words.
    Note {
        kind: EventKind,
        text: &'a str,
    },
    Round(&'a RoundStatus),
    HeldOutLoss {
        round: Round,
        loss: f64,
    },
    Slashed {
        round: Round,
        worker: NodeId,
        reason: &'a str,
        amount: manyhands_proto::Balance,
    },
    /// Something is tried again.
    Problem {
        what: &'a str,
        why: &'a str,
    },
    Complete {
        rounds: Round,
        theta: manyhands_proto::Digest,
    },
    Final {
        block: Option<u32>,
    },
}

/// Prints what happens until all rounds are merged, settled and final.
pub(super) async fn until_complete(handle: &Handle, output: Output) -> Result<(), Failure> {
    let mut told = Told::default();
    let completed = tokio::select! {
        completed = handle.wait_complete() => completed.map_err(stopped)?,
        () = told.follow(handle, output) => {
            let reason = "the coordinator stopped";
            return Err(Failure::new("coordinator_failed", reason, "start it again with the same folder"));
        }
    };
    told.look(handle, output).await;
    let Completed { rounds, theta } = completed;
    tell(output, &Happening::Complete { rounds, theta });
    handle
        .wait_final()
        .await
        .explain("chain_read", "start it again: the rounds still have to become final")?;
    let status = handle.status().await;
    let blocks =
        status.and_then(|status| status.chain).map(|chain| chain.blocks).unwrap_or_default();
    tell(output, &Happening::Final { block: blocks.last().map(|block| block.number) });
    Ok(())
}

/// Prints what happens, for as long as the service runs.
pub(super) async fn follow(handle: &Handle, output: Output) {
    let mut told = Told::default();
    if let Some(status) = handle.status().await {
        told.skip(&status);
    }
    told.follow(handle, output).await;
}

fn stopped(error: WaitError) -> Failure {
    Failure::new(
        "coordinator_failed",
        error,
        "start it again with the same folder: nothing that was decided is lost",
    )
}

/// What has been printed.
#[derive(Debug, Default)]
struct Told {
    last_note: Option<(Tick, String)>,
    rounds: BTreeSet<Round>,
    losses: BTreeSet<Round>,
    slashes: BTreeSet<(Round, NodeId)>,
    problems: BTreeSet<String>,
}

impl Told {
    async fn follow(&mut self, handle: &Handle, output: Output) {
        while self.look(handle, output).await {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// False once the service has stopped.
    async fn look(&mut self, handle: &Handle, output: Output) -> bool {
        let Some(status) = handle.status().await else { return false };
        for happening in self.news(&status) {
            tell(output, &happening);
        }
        true
    }

    fn skip(&mut self, status: &LiveStatus) {
        self.news(status);
    }

    fn news<'a>(&mut self, status: &'a LiveStatus) -> Vec<Happening<'a>> {
        let run = &status.run;
        let mut news = Vec::new();
        let told = self.last_note.as_ref().and_then(|(tick, text)| {
            run.events.iter().rposition(|event| event.tick == *tick && event.text == *text)
        });
        for event in &run.events[told.map_or(0, |at| at + 1)..] {
            // Told with its amount in tokens, below.
            if event.kind != EventKind::Slash {
                news.push(Happening::Note { kind: event.kind, text: &event.text });
            }
        }
        self.last_note = run.events.last().map(|event| (event.tick, event.text.clone()));
        for round in &run.history {
            if self.rounds.insert(round.round) {
                news.push(Happening::Round(round));
            }
            if let Some(loss) = round.held_out_loss
                && self.losses.insert(round.round)
            {
                news.push(Happening::HeldOutLoss { round: round.round, loss });
            }
        }
        for fault in &run.faults {
            if let Some(amount) = fault.slashed
                && self.slashes.insert((fault.round, fault.worker))
            {
                let (round, worker, reason) = (fault.round, fault.worker, &fault.reason);
                news.push(Happening::Slashed { round, worker, reason, amount });
            }
        }
        self.problems.retain(|what| status.problems.contains_key(what));
        for (what, why) in &status.problems {
            if self.problems.insert(what.clone()) {
                news.push(Happening::Problem { what, why });
            }
        }
        news
    }
}

fn tell(output: Output, happening: &Happening<'_>) {
    output.event(happening, || {
        Some(match happening {
            Happening::Note { text, .. } => (*text).to_owned(),
            Happening::Round(round) => {
                let loss = round
                    .train_loss
                    .map_or(String::new(), |loss| format!(", training loss {loss:.3}"));
                format!(
                    "round {}: {} of {} updates merged, {} tokens{loss}, {:.1} s",
                    round.round,
                    round.admitted,
                    round.results.len(),
                    round.tokens,
                    round.duration_ms as f64 / 1e3
                )
            }
            Happening::HeldOutLoss { round, loss } => {
                format!("θ of round {round}: held-out loss {loss:.4}")
            }
            Happening::Slashed { round, worker, reason, amount } => {
                format!("{} is slashed {amount} for round {round}: {reason}", worker.short())
            }
            Happening::Problem { what, why } => {
                format!("{what} does not work now and is tried again: {why}")
            }
            Happening::Complete { theta, .. } => {
                format!("the run is complete; θ is {theta}")
            }
            Happening::Final { block: Some(block) } => {
                format!("everything is final on chain as of block {block}")
            }
            Happening::Final { block: None } => "nothing is left to settle".to_owned(),
        })
    });
}
