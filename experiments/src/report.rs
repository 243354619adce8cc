//! What the results say, as one page with its plots, written from the JSON files alone.

pub(crate) mod plot;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use anyhow::bail;

use crate::experiment::Experiment;
use crate::plan;
use crate::result::{ExperimentResult, Origin};
use crate::statistics::PairedDifference;

/// Results by name; only those of the plan as it stands. Those of a group are of one text and build, as they are compared.
pub(crate) struct Results(BTreeMap<String, ExperimentResult>);

impl Results {
    pub(crate) fn load(plan: &[Experiment], folder: &Path) -> anyhow::Result<Self> {
        let mut all = BTreeMap::new();
        for experiment in plan {
            if let Some(result) = ExperimentResult::load(folder, experiment)? {
                all.insert(experiment.name.clone(), result);
            }
        }
        let results = Self(all);
        for (group, origins) in results.origins() {
            if origins.len() > 1 {
                bail!(
                    "the results of {group} are of {} different texts or builds; their losses cannot be compared",
                    origins.len()
                );
            }
        }
        Ok(results)
    }

    /// What the results of each group follow from beside their experiments.
    fn origins(&self) -> BTreeMap<&str, BTreeSet<&Origin>> {
        let mut origins: BTreeMap<&str, BTreeSet<&Origin>> = BTreeMap::new();
        for (name, result) in &self.0 {
            origins.entry(group_of(name)).or_default().insert(&result.origin);
        }
        origins
    }

    fn get(&self, name: &str) -> Option<&ExperimentResult> {
        self.0.get(name)
    }

    fn loss(&self, name: &str) -> Option<f64> {
        self.get(name).map(|result| result.held_out_loss)
    }

    /// A group's results by their names in it, in the order of the plan.
    fn of_group<'a>(
        &'a self,
        plan: &'a [Experiment],
        group: &str,
    ) -> Vec<(&'a str, &'a ExperimentResult)> {
        let prefix = format!("{group}/");
        let of_group =
            |it: &'a Experiment| Some((it.name.strip_prefix(&prefix)?, self.get(&it.name)?));
        plan.iter().filter_map(of_group).collect()
    }
}

/// What is compared with one another. Checkpoints are where `robust` starts from; of `scale`, two are compared at a time.
fn group_of(name: &str) -> &str {
    match name.split('/').next() {
        Some("checkpoint" | "late_checkpoint") | None => "robust",
        Some("scale") => name.rsplit_once('/').map_or(name, |(pair, _)| pair),
        Some(group) => group,
    }
}

/// Writes `RESULTS.md` and its plots into `out`.
pub(crate) fn write(plan: &[Experiment], results: &Path, out: &Path) -> anyhow::Result<()> {
    let results = Results::load(plan, results)?;
    let mut page = String::from(
        "# Results\n\nWritten by `make experiments-report` from `results/`. Losses are of held-out text, in nats per token.\n",
    );
    writeln!(page, "{} of {} experiments have a result.\n", results.0.len(), plan.len())?;
    builds(&mut page, &results)?;
    compare(&mut page, &results)?;
    robustness(&mut page, &results)?;
    scale(&mut page, &results, plan)?;
    ablations(&mut page, &results, plan)?;
    tuning(&mut page, &results, plan)?;
    std::fs::create_dir_all(out)?;
    std::fs::write(out.join("RESULTS.md"), page)?;
    plot::learning_curves(&results, &out.join("compare.svg"))?;
    plot::taxes(&taxes(&results), &out.join("robustness.svg"))
}

/// What is compared is of one build; another group may have run elsewhere.
fn builds(page: &mut String, results: &Results) -> anyhow::Result<()> {
    let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (group, origins) in results.origins() {
        for origin in origins {
            groups.entry(origin.build()).or_default().push(group);
        }
    }
    let of_build =
        |(build, groups): (&str, Vec<&str>)| format!("{} of build {build}", groups.join(", "));
    let told: Vec<String> = groups.into_iter().map(of_build).collect();
    writeln!(
        page,
        "Numerics, by the digest of what a tiny experiment comes to: {}.\n",
        told.join("; ")
    )?;
    Ok(())
}

fn percent(share: f64) -> String {
    format!("{:+.2} %", share * 100.0)
}

fn compare(page: &mut String, results: &Results) -> anyhow::Result<()> {
    if results.0.keys().all(|name| !name.starts_with("compare/")) {
        return Ok(());
    }
    writeln!(page, "## Ours beside other methods\n\n![loss over tokens](compare.svg)\n")?;
    writeln!(
        page,
        "Same tokens, same order of the data for all methods of a seed. The bound: with 95 % confidence \
         (paired, one-sided Student's t) the true difference is below it.\n\n\
         | method | seeds | loss | bits up | bits down | ours against it | 95 % bound |\n\
         |---|---|---|---|---|---|---|"
    )?;
    for (method, _, _) in plan::methods() {
        let pairs: Vec<(&ExperimentResult, Option<f64>)> = plan::SEEDS
            .iter()
            .filter_map(|seed| {
                let result = results.get(&format!("compare/{method}/{seed}"))?;
                Some((result, results.loss(&format!("compare/ours/{seed}"))))
            })
            .collect();
        let Some((first, _)) = pairs.first() else { continue };
        let mean =
            pairs.iter().map(|(result, _)| result.held_out_loss).sum::<f64>() / pairs.len() as f64;
        let shares: Vec<f64> = pairs
            .iter()
            .filter_map(|(other, ours)| Some((*ours)? / other.held_out_loss - 1.0))
            .collect();
        let (difference, bound) = match PairedDifference::of(&shares) {
            Some(it) if method != "ours" => {
                (percent(it.mean), it.upper.map_or("one seed".to_owned(), percent))
            }
            _ => (String::new(), String::new()),
        };
        writeln!(
            page,
            "| {method} | {} | {mean:.4} | {:.4} | {:.4} | {difference} | {bound} |",
            pairs.len(),
            first.bits_up,
            first.bits_down
        )?;
    }
    writeln!(page)?;
    Ok(())
}

fn ablations(page: &mut String, results: &Results, plan: &[Experiment]) -> anyhow::Result<()> {
    let Some(reference) = results.loss("ablate/ours") else { return Ok(()) };
    writeln!(
        page,
        "## One thing changed at a time\n\nOne seed each, the small model.\n\n\
         | | loss | against ours | bits up | bits down |\n|---|---|---|---|---|"
    )?;
    for (name, result) in results.of_group(plan, "ablate") {
        let share = percent(result.held_out_loss / reference - 1.0);
        writeln!(
            page,
            "| {name} | {:.4} | {share} | {:.4} | {:.4} |",
            result.held_out_loss, result.bits_up, result.bits_down
        )?;
    }
    writeln!(page)?;
    Ok(())
}

fn scale(page: &mut String, results: &Results, plan: &[Experiment]) -> anyhow::Result<()> {
    let found = results.of_group(plan, "scale");
    if found.is_empty() {
        return Ok(());
    }
    writeln!(
        page,
        "## How the gap to one process changes\n\nOne seed each, equal tokens for both of a line.\n\n\
         | | parameters | H | rounds | ours | synchronous | gap |\n|---|---|---|---|---|---|---|"
    )?;
    for (name, ours) in found {
        let Some(what) = name.strip_suffix("/ours") else { continue };
        let Some(one) = results.loss(&format!("scale/{what}/synchronous")) else { continue };
        writeln!(
            page,
            "| {what} | {} | {} | {} | {:.4} | {one:.4} | {} |",
            ours.parameters,
            ours.experiment.training.steps_per_round,
            ours.experiment.rounds,
            ours.held_out_loss,
            percent(ours.held_out_loss / one - 1.0)
        )?;
    }
    writeln!(page)?;
    Ok(())
}

/// What each lie costs under each defence, nats: the lie, then for each defence what it costs in the seeds that there are.
type Taxes = Vec<(String, Vec<Option<PairedDifference>>)>;

fn taxes(results: &Results) -> Taxes {
    let lies = plan::lies();
    let tax = |workers: &str, lie: &str, defence: &str| {
        let of_seed = |seed: &u64| {
            let honest = results.loss(&format!("robust/{workers}/none/mean/{seed}"))?;
            Some(results.loss(&format!("robust/{workers}/{lie}/{defence}/{seed}"))? - honest)
        };
        PairedDifference::of(&plan::SEEDS.iter().filter_map(of_seed).collect::<Vec<_>>())
    };
    let mut rows = Vec::new();
    for workers in ["2_of_8", "5_of_20", "1_of_3", "late_2_of_8"] {
        for lie in std::iter::once("none").chain(lies.iter().map(|(name, _)| *name)) {
            let row: Vec<_> =
                plan::defences().iter().map(|(defence, _)| tax(workers, lie, defence)).collect();
            if row.iter().any(Option::is_some) {
                rows.push((format!("{workers} {lie}"), row));
            }
        }
    }
    rows
}

fn robustness(page: &mut String, results: &Results) -> anyhow::Result<()> {
    let rows = taxes(results);
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(
        page,
        "## Liars that nobody checks\n\n![what lies cost](robustness.svg)\n\n\
         223,552 parameters, all from one warm checkpoint, audits off; `late`: the last rounds of a run, with α from \
         2.5 to 3. The gate weighs with sixteen held-out sequences, others in each round, and none that losses are \
         measured with. What a lie costs: held-out loss above that of honest workers merged by the plain mean, in nats; \
         where there are three seeds, their mean and the bound that the true cost is below with 95 % confidence.\n"
    )?;
    let names: Vec<&str> = plan::defences().iter().map(|(name, _)| *name).collect();
    writeln!(page, "| | {} |\n|---|{}", names.join(" | "), "---|".repeat(names.len()))?;
    for (name, row) in rows {
        let cells: Vec<String> =
            row.iter().map(|it| it.map_or(String::new(), |it| it.to_string())).collect();
        writeln!(page, "| {name} | {} |", cells.join(" | "))?;
    }
    writeln!(page)?;
    Ok(())
}

fn tuning(page: &mut String, results: &Results, plan: &[Experiment]) -> anyhow::Result<()> {
    let found = results.of_group(plan, "tune");
    if found.is_empty() {
        return Ok(());
    }
    writeln!(
        page,
        "## Tuning\n\nOne seed, the small model, half the rounds; what was compared is in bold.\n\n| | loss |\n|---|---|"
    )?;
    for (name, result) in found {
        let Experiment { method, training, .. } = &result.experiment;
        let is_compared = plan::methods().iter().any(|(_, compared, rate)| {
            compared == method && *rate == training.learning_rate && training.gradient_clip == 1.0
        });
        let bold = if is_compared { "**" } else { "" };
        writeln!(page, "| {bold}{name}{bold} | {:.4} |", result.held_out_loss)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A result with this loss, in `folder`.
    fn keep(folder: &Path, plan: &[Experiment], name: &str, held_out_loss: f64) {
        let experiment = plan.iter().find(|it| it.name == name).expect("it is in the plan").clone();
        let point = crate::result::Point {
            rounds: 1,
            tokens: 1_000_000,
            train_loss: held_out_loss,
            held_out_loss,
            bits_up: 0.1,
            bits_down: 0.4,
        };
        let result = ExperimentResult {
            experiment,
            origin: serde_json::from_str(r#"{"text":"a","build":"b"}"#).expect("an origin"),
            parameters: 1,
            held_out_loss,
            bits_up: 0.1,
            bits_down: 0.4,
            seconds: 1.0,
            points: vec![point],
        };
        result.save(folder).expect("it is kept");
    }

    #[test]
    fn a_page_tells_differences_and_taxes_of_what_is_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let (results, out) = (folder.path().join("results"), folder.path().join("out"));
        let plan = plan::all();
        for (seed, (ours, dense)) in [(2, (2.02, 2.0)), (3, (2.04, 2.0)), (4, (2.03, 2.0))] {
            keep(&results, &plan, &format!("compare/ours/{seed}"), ours);
            keep(&results, &plan, &format!("compare/dense_diloco/{seed}"), dense);
        }
        keep(&results, &plan, "robust/2_of_8/none/mean/2", 2.0);
        keep(&results, &plan, "robust/2_of_8/zero/default/2", 2.125);
        write(&plan, &results, &out).expect("it is written");
        let page = std::fs::read_to_string(out.join("RESULTS.md")).expect("a page");
        // Shares of 1, 2 and 1.5 %: a standard error of .2887 %, times 2.92.
        assert!(
            page.contains("| dense_diloco | 3 | 2.0000 | 0.1000 | 0.4000 | +1.50 % | +2.34 % |")
        );
        assert!(page.contains("| 2_of_8 zero |  | +0.1250 |"), "{page}");
        for plot in ["compare.svg", "robustness.svg"] {
            let plot = std::fs::read_to_string(out.join(plot)).expect("a plot");
            assert!(plot.contains("<svg"));
        }
    }

    #[test]
    fn without_results_there_is_a_page_without_plots() {
        let folder = tempfile::tempdir().expect("a folder");
        write(&plan::all(), &folder.path().join("results"), folder.path()).expect("it is written");
        let page = std::fs::read_to_string(folder.path().join("RESULTS.md")).expect("a page");
        assert!(page.contains("0 of ") && !page.contains("svg"), "{page}");
    }
}
