//! Whether checks find cheats and leave the honest alone, and what they cost.

mod codec;
mod detection;
mod page;
mod poison;
mod replays;

use std::path::PathBuf;

use anyhow::Context;
use manyhands_proto::run_file::RunFile;
use manyhands_rules::economics::Economics;
use manyhands_simulation::{Adversary, Simulation};

use super::Report;
use crate::cluster::Text;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// A data set that `manyhands prepare` wrote.
    #[arg(long, default_value = "runs/experiments/text")]
    text: PathBuf,
    /// Where the figures are kept.
    #[arg(long, default_value = "runs/bench/report.json")]
    report: PathBuf,
    /// The run whose costs are told.
    #[arg(long, default_value = "configs/10m.toml")]
    run_file: PathBuf,
    /// Rounds that are cheated in, with a seed each.
    #[arg(long, default_value = "100")]
    cheated: u64,
    /// Honest rounds that are replayed elsewhere, with a seed each.
    #[arg(long, default_value = "1000")]
    honest: u64,
    /// A folder for a page with the distances, and a plot of them.
    #[arg(long)]
    page: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut report = Report::default();
    detection::run(&mut report);
    costs(options, &mut report)?;
    more_tokens(options.cheated, &mut report);
    let text = Text::open(&options.text)?;
    poison::run(&text, &mut report)?;
    let laboratory = replays::laboratory(&text)?;
    codec::forgeries(&laboratory, options.cheated, &mut report)?;
    let mut rows = replays::cheats(&laboratory, options.cheated, &mut report)?;
    let honest = replays::honest(&laboratory, options.honest, &mut report)?;
    detection::honest_workers(&honest, &mut report);
    rows.extend(honest);
    if let Some(folder) = &options.page {
        page::write(&rows, folder)?;
    }
    report.save(&options.report)
}

/// A commitment has to name the tokens of its assignment: no replay is needed.
fn more_tokens(seeds: u64, report: &mut Report) {
    let is_rejected = |seed: &u64| {
        let adversary = Adversary::ClaimsMoreTokens;
        let outcome = Simulation::new(*seed).workers(2).adversary(adversary).rounds(1).run();
        outcome
            .adversaries
            .iter()
            .all(|it| outcome.admitted(*it) == 0 && outcome.earned(*it).0 == 0)
    };
    let rejected = (0..seeds).filter(is_rejected).count() as f64 / seeds as f64;
    report.add("replay.more_tokens_claimed.rejected", rejected, "of rounds, without one", None);
}

fn costs(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let path = &options.run_file;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = RunFile::parse(&text)?;
    codec::cost(&file, report)?;
    let Economics { cost, traffic, .. } = Economics::of(&file);
    let bits = "bits per parameter, worker and round";
    report.add(
        "verification.audit_bits_per_parameter",
        traffic.replays,
        bits,
        Some(traffic.update),
    );
    report.add(
        "verification.codec_bits_per_parameter",
        traffic.codec_check,
        bits,
        Some(traffic.update),
    );
    report.add("verification.weighing_share", cost.weighing, "of training", None);
    Ok(())
}
