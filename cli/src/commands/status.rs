//! `status`: one screen about a run.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use manyhands_proto::message::Role;
use manyhands_rules::coordinator::{MemberStatus, RoundStatus, Status};

use crate::failure::Failure;
use crate::output::{Output, table};
use crate::remote::Remote;
use crate::{run_reference, stop};

/// Rounds and happenings that fit a screen.
const ROUNDS_SHOWN: usize = 8;
const EVENTS_SHOWN: usize = 8;
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The invitation, a file that holds it, or the folder of the run's launch.
    run: String,
    /// Look again every second until the run is complete.
    #[arg(long)]
    watch: bool,
}

pub(crate) async fn run(args: Args, output: Output) -> Result<(), Failure> {
    let mut remote = Remote::connect(run_reference::parse(&args.run)?.invitation).await?;
    if !args.watch {
        let status = remote.status().await?;
        output.document(&status, || screen(&status));
        remote.close().await;
        return Ok(());
    }
    let stop = stop::requested(false);
    loop {
        let status = remote.status().await?;
        if std::io::stdout().is_terminal() && !output.is_json() {
            // Home, and clear what is below.
            let _ = std::io::stdout().write_all(b"\x1b[H\x1b[J");
        }
        output.event(&status, || Some(screen(&status)));
        if status.phase == "complete" {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
            () = stop::wait(stop.clone()) => break,
        }
    }
    remote.close().await;
    Ok(())
}

fn screen(status: &Status) -> String {
    let mut text = format!(
        "run {} ({})\nround {} of {}: {} for {} s   θ {}\n",
        status.name,
        status.run,
        status.round,
        status.rounds,
        status.phase,
        status.phase_ms / 1_000,
        status.theta.short()
    );
    if !status.verified {
        text += "No verifier is here: nothing is replayed, and there is no held-out loss.\n";
    }
    let mut rows = vec![words(
        "round",
        &["merged", "tokens", "train loss", "held-out loss", "seconds", "longest wait"],
    )];
    rows.extend(status.history.iter().rev().take(ROUNDS_SHOWN).map(round_row));
    let _ = write!(text, "\n{}\n", table(&rows));
    let mut rows = vec![words(
        "member",
        &["role", "tokens/s", "steps", "merged", "earned", "credibility", "state"],
    )];
    rows.extend(status.members.iter().map(member_row));
    let _ = write!(text, "\n{}\n", table(&rows));
    for fault in &status.faults {
        let slashed = fault
            .slashed
            .map_or("not settled yet".to_owned(), |amount| format!("slashed {amount}"));
        let _ = write!(
            text,
            "\nfault: {} in round {}: {} ({slashed})",
            fault.worker.short(),
            fault.round,
            fault.reason
        );
    }
    text.push('\n');
    for event in status.events.iter().rev().take(EVENTS_SHOWN).rev() {
        let _ = write!(text, "\n{}", event.text);
    }
    text
}

fn words(first: &str, others: &[&str]) -> Vec<String> {
    std::iter::once(first).chain(others.iter().copied()).map(str::to_owned).collect()
}

fn round_row(round: &RoundStatus) -> Vec<String> {
    let loss = |loss: Option<f64>| loss.map_or("-".to_owned(), |loss| format!("{loss:.3}"));
    vec![
        round.round.to_string(),
        format!("{} of {}", round.admitted, round.results.len()),
        round.tokens.to_string(),
        loss(round.train_loss),
        loss(round.held_out_loss),
        format!("{:.1}", round.duration_ms as f64 / 1e3),
        format!("{:.0} %", round.waiting_share_max() * 100.0),
    ]
}

fn member_row(member: &MemberStatus) -> Vec<String> {
    let state = match (&member.barred, member.present, member.on_probation) {
        (Some(reason), _, _) => format!("barred: {reason}"),
        (None, false, _) => "gone".to_owned(),
        (None, true, true) => "on probation".to_owned(),
        (None, true, false) => "trusted".to_owned(),
    };
    let worker = member.role == Role::Worker;
    vec![
        member.node.short(),
        if worker { "worker" } else { "verifier" }.to_owned(),
        member.tokens_per_second.to_string(),
        format!("{}/{}", member.steps_done, member.steps),
        member.rounds_admitted.to_string(),
        member.earned.to_string(),
        member.credibility.to_string(),
        if worker {
            state
        } else if member.present {
            "here".to_owned()
        } else {
            "gone".to_owned()
        },
    ]
}
