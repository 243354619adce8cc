//! The distances of honest rounds and of cheats, as a table and a plot.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use manyhands_proto::message::Distances;
use plotters::prelude::*;

use crate::report::plot::draw;

/// Rounds that were replayed, all of one sort.
pub(super) struct Replayed {
    pub(super) name: String,
    /// Or of a cheat.
    pub(super) is_honest: bool,
    pub(super) distances: Vec<Distances>,
    /// The largest of a round's three distances, each over its threshold.
    pub(super) over_threshold: Vec<f64>,
}

impl Replayed {
    pub(super) fn new(name: &str, is_honest: bool) -> Self {
        let (distances, over_threshold) = (Vec::new(), Vec::new());
        Self { name: name.to_owned(), is_honest, distances, over_threshold }
    }

    pub(super) fn rejected(&self) -> usize {
        self.over_threshold.iter().filter(|over| **over > 1.0).count()
    }

    pub(super) fn nearest(&self) -> f64 {
        self.over_threshold.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub(super) fn farthest(&self) -> f64 {
        self.over_threshold.iter().copied().fold(0.0, f64::max)
    }
}

/// Writes the page and its plot into `folder`.
pub(super) fn write(rows: &[Replayed], folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    plot(rows, &folder.join("distances.svg"))?;
    let path = folder.join("RESULTS.md");
    std::fs::write(&path, table(rows)).with_context(|| format!("cannot write {}", path.display()))
}

fn table(rows: &[Replayed]) -> String {
    let mut page = "# Distances of replays

Written by `make bench-verification`: a small transformer, rounds of thirty steps, one seed each. Smallest and largest relative L2 distance of
Δ, m and v between what was claimed and a replay of what was assigned; the last columns say how far the largest of the three is over its threshold, and how many rounds were rejected.

![distances over thresholds](distances.svg)

| | rounds | Δ | m | v | over threshold | rejected |
|---|---|---|---|---|---|---|
"
    .to_owned();
    for row in rows {
        let range = |of: fn(&Distances) -> f64| {
            let values = || row.distances.iter().map(of);
            let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max));
            format!("{least:.1e} – {most:.1e}")
        };
        let _ = writeln!(
            page,
            "| {}{} | {} | {} | {} | {} | {:.3} – {:.3} | {} |",
            if row.is_honest { "honest, " } else { "" },
            row.name.replace('_', " "),
            row.distances.len(),
            range(|it| it.delta),
            range(|it| it.first_moment),
            range(|it| it.second_moment),
            row.nearest(),
            row.farthest(),
            row.rejected(),
        );
    }
    page
}

/// A line for each sort of rounds, from the nearest to the farthest. Distances are on a logarithmic scale; what is
/// the same to the bit is at its left end.
fn plot(rows: &[Replayed], path: &Path) -> anyhow::Result<()> {
    const LEFT: f64 = -4.0;
    const RIGHT: f64 = 5.0;
    let height = 60 + 22 * rows.len() as u32;
    draw(path, (760, height), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(210)
            .build_cartesian_2d(LEFT..RIGHT, 0.0..rows.len() as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_desc("largest distance over its threshold, power of ten")
            .light_line_style(WHITE)
            .draw()?;
        let threshold = [(0.0, 0.0), (0.0, rows.len() as f64)];
        chart.draw_series([PathElement::new(threshold, BLACK)])?;
        let place = |over: f64| over.max(1e-9).log10().clamp(LEFT, RIGHT);
        for (number, row) in rows.iter().enumerate() {
            let colour = if row.is_honest { RGBColor(31, 119, 180) } else { RGBColor(214, 39, 40) };
            let y = (rows.len() - 1 - number) as f64 + 0.5;
            let (from, to) = (place(row.nearest()), place(row.farthest()));
            chart.draw_series([PathElement::new([(from, y), (to, y)], colour.stroke_width(3))])?;
            let dots = row
                .over_threshold
                .iter()
                .map(|over| Circle::new((place(*over), y), 2, colour.mix(0.4).filled()));
            chart.draw_series(dots)?;
            let label = if row.is_honest { "honest, " } else { "" };
            let top = 12 + (height as i32 - 60) * (2 * number as i32 + 1) / (2 * rows.len() as i32);
            let text = format!("{label}{}", row.name.replace('_', " "));
            area.draw(&Text::new(text, (8, top - 6), ("sans-serif", 13)))?;
        }
        Ok(())
    })
}
