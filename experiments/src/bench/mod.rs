//! Benchmarks: each prints its figures and keeps them in one report, with what they are compared with.

pub(crate) mod gradient;
pub(crate) mod train;
pub(crate) mod verification;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// One figure, and the same of what it is compared with, measured in the same run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Figure {
    value: f64,
    unit: String,
    baseline: Option<f64>,
}

/// All figures of all areas.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    figures: BTreeMap<String, Figure>,
}

impl Report {
    /// Keeps and prints a figure.
    fn add(&mut self, name: &str, value: f64, unit: &str, baseline: Option<f64>) {
        let against = baseline.map_or(String::new(), |it| format!("   (baseline {it:.4})"));
        println!("{name:<52} {value:>10.4} {unit}{against}");
        let figure = Figure { value, unit: unit.to_owned(), baseline };
        self.figures.insert(name.to_owned(), figure);
    }

    /// Adds these figures to those that other areas left in the file.
    pub(crate) fn save(self, path: &Path) -> anyhow::Result<()> {
        let mut all: Self = match std::fs::read_to_string(path) {
            Ok(text) => serde_json::from_str(&text)
                .with_context(|| format!("{} is not a report; remove it", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(error.into()),
        };
        all.figures.extend(self.figures);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path, serde_json::to_string_pretty(&all)? + "\n")?;
        println!("kept in {}", path.display());
        Ok(())
    }
}

/// The median time of several calls, in seconds, the first left out.
fn median_seconds(mut work: impl FnMut()) -> f64 {
    const REPEATS: usize = 7;
    work();
    let seconds = (0..REPEATS).map(|_| {
        let began = Instant::now();
        work();
        began.elapsed().as_secs_f64()
    });
    median(seconds).expect("there are several")
}

/// The (upper) median; none of nothing.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
