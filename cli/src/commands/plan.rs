//! `plan`: what a run's file means for those who would cheat, and for those who pay for checks.

use std::fmt::Write as _;
use std::path::PathBuf;

use manyhands_proto::run_file::{ChainKind, RunFile};
use manyhands_rules::economics::{Cost, Detection, Deterrent, Economics, Traffic};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Output, table};
use crate::run_file;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run's file. Its data set need not be there.
    file: PathBuf,
}

#[derive(Debug, Serialize)]
struct Plan<'a> {
    name: &'a str,
    rounds: u32,
    workers_min: u32,
    #[serde(flatten)]
    economics: &'a Economics,
    cheating_pays: bool,
}

pub(crate) fn run(args: &Args, output: Output) -> Result<(), Failure> {
    let file = run_file::read(&args.file, None)?;
    let economics = Economics::of(&file);
    let plan = Plan {
        name: &file.run.name,
        rounds: file.run.rounds,
        workers_min: file.run.workers_min,
        economics: &economics,
        cheating_pays: economics.cheating_pays(&file),
    };
    output.document(&plan, || text(&file, &economics));
    Ok(())
}

#[cfg(feature = "coordinator")]
/// Refuses a run where cheating pays, unless its file says that it may.
pub(crate) fn refuse_if_cheating_pays(file: &RunFile) -> Result<(), Failure> {
    let economics = Economics::of(file);
    if file.verification.cheating_may_pay || !economics.cheating_pays(file) {
        return Ok(());
    }
    let Deterrent { slash, slash_for_hiding, slash_needed, stake_needed, .. } = economics.deterrent;
    let slash = slash.min(slash_for_hiding);
    Err(Failure::new(
        "cheating_pays",
        format!(
            "a fault, or hiding it, takes {slash} of a stake, and a worker that cheats in every round earns more than an honest one \
             unless it takes {slash_needed}"
        ),
        &format!(
            "{}, raise verification.audit_rate_per_mille or lower chain.price_per_work_unit (`manyhands plan` shows \
             what comes of it); verification.cheating_may_pay = true launches it as it is",
            stake_needed.map_or("let faults be found and slashed".to_owned(), |stake| format!(
                "set chain.stake_min to {} or more",
                stake.0
            ))
        ),
    ))
}

fn text(file: &RunFile, economics: &Economics) -> String {
    let Economics { parameters, detection, deterrent, cost, traffic } = economics;
    let mut text = format!(
        "{}: {parameters} parameters, {} rounds, from {} workers on\n",
        file.run.name, file.run.rounds, file.run.workers_min
    );
    let mut section = |title: &str, rows: Vec<[String; 2]>| {
        let rows = rows.into_iter().map(|[name, value]| vec![format!("  {name}"), value]);
        let rows: Vec<Vec<String>> = rows.collect();
        let _ = write!(text, "\n{title}\n{}\n", table(&rows));
    };
    section(
        "A worker with full credibility that cheats in every round is found",
        detected(detection),
    );
    if file.chain.kind == ChainKind::Substrate {
        section("It stands to lose (a worker of mean speed)", deterred(deterrent));
    }
    section("Checks cost, of the computing that goes into training", spent(cost));
    section("One worker's round travels as, in bits per parameter", carried(traffic));
    if file.verification.verifiers_min == 0 {
        text += "\nThe run starts without a verifier: until one is there, nothing is replayed.";
    }
    if economics.cheating_pays(file) {
        let may = file.verification.cheating_may_pay;
        text += "\nCHEATING PAYS: ";
        text += if may { "the file says that it may." } else { "`launch` refuses this file." };
    }
    text
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn row(name: &str, value: String) -> [String; 2] {
    [name.to_owned(), value]
}

fn detected(detection: &Detection) -> Vec<[String; 2]> {
    let Detection { audit_rate, per_round, over_ten_rounds, probation_rounds } = detection;
    vec![
        row(
            "in a round",
            format!("{} (replayed in {})", percent(*per_round), percent(*audit_rate)),
        ),
        row("in ten rounds", percent(*over_ten_rounds)),
        row("as a newcomer", format!("in each of its first {probation_rounds} rounds")),
    ]
}

fn deterred(deterrent: &Deterrent) -> Vec<[String; 2]> {
    let Deterrent {
        reward_per_round,
        slash,
        slash_for_hiding,
        slash_needed,
        stake_needed,
        speed_covered,
        vesting_rounds,
        vesting_rounds_needed,
    } = deterrent;
    vec![
        row("reward of a round", reward_per_round.to_string()),
        row("slash of a fault", slash.to_string()),
        row("slash of showing nothing", slash_for_hiding.to_string()),
        row("slash below which cheating pays", slash_needed.to_string()),
        row(
            "stake_min that takes",
            stake_needed.map_or("no stake helps".to_owned(), |stake| {
                format!("{stake} (chain.stake_min = {})", stake.0)
            }),
        ),
        row(
            "deters workers up to",
            speed_covered
                .map_or("any speed".to_owned(), |it| format!("{it:.1} times the mean speed")),
        ),
        row(
            "vesting",
            vesting_rounds_needed
                .map_or(format!("{vesting_rounds} rounds; nothing is replayed"), |every| {
                    format!("{vesting_rounds} rounds; a replay comes every {every} on average")
                }),
        ),
    ]
}

fn spent(cost: &Cost) -> Vec<[String; 2]> {
    vec![
        row("replays, steady state", percent(cost.replays_in_the_steady_state)),
        row("replays, whole run", percent(cost.replays_of_the_whole_run)),
        row("weighing of updates", percent(cost.weighing)),
    ]
}

fn carried(traffic: &Traffic) -> Vec<[String; 2]> {
    let Traffic { update, codec_check, replays } = traffic;
    vec![
        row("update", format!("{update:.3}")),
        row("codec check", format!("{codec_check:.3}")),
        row("replays, steady state", format!("{replays:.3}")),
    ]
}
