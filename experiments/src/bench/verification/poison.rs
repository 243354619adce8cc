//! What somebody can do who stays inside the tolerance of replays, and so is never found.

use manyhands_model::Device;
use manyhands_simulation::forgery::Forgery;

use super::super::Report;
use crate::cluster::{Cluster, Text};
use crate::experiment::{Liars, Lie};
use crate::job::HELD_OUT_SEQUENCES;
use crate::plan;

/// A quarter of the workers move every update against the others' mean, as far as the widest threshold of each precision
/// lets pass.
const POISONERS: u32 = 2;
const TOLERANCES: [(&str, f32); 2] = [("f32", 1e-3), ("bf16", 2e-2)];

pub(super) fn run(text: &Text, report: &mut Report) -> anyhow::Result<()> {
    let (honest, flagged) = fifty_rounds(text, None)?;
    let unit = "of honest worker-rounds are worth a closer look";
    report.add("signals.honest_flagged", flagged, unit, None);
    for (precision, distance) in TOLERANCES {
        let (poisoned, _) = fifty_rounds(text, Some(distance))?;
        let name = format!("poison.inside_the_{precision}_tolerance.held_out_loss");
        let unit = "nats after 50 rounds, 2 of 8 poison, against none";
        report.add(&name, poisoned, unit, Some(honest));
    }
    Ok(())
}

/// The held-out loss at the end, and the share of worker-rounds that were flagged.
fn fifty_rounds(text: &Text, distance: Option<f32>) -> anyhow::Result<(f64, f64)> {
    eprintln!("50 rounds with poison inside a tolerance of {}", distance.unwrap_or_default());
    let mut experiment = plan::of_poison();
    experiment.liars = distance.map(|distance| {
        let forgery = Forgery::WithinTolerance { distance };
        Liars { count: POISONERS, lie: Lie::Forged(forgery) }
    });
    let mut cluster = Cluster::new(&experiment, text, Device::Cpu, None)?;
    let mut flagged = 0;
    for _ in 0..experiment.rounds {
        flagged += cluster.step()?.flagged;
    }
    let share = f64::from(flagged) / f64::from(experiment.rounds * experiment.workers);
    Ok((cluster.held_out_loss(HELD_OUT_SEQUENCES)?, share))
}
