//! The plots of the page, as SVG.

use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;

use super::{Results, Taxes};
use crate::plan;

const SIZE: (u32, u32) = (720, 400);
const COLOURS: [RGBColor; 5] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
];

/// Held-out loss over tokens, of the first seed.
pub(super) fn learning_curves(results: &Results, path: &Path) -> anyhow::Result<()> {
    let curves: Vec<(&str, Vec<(f64, f64)>)> = plan::methods()
        .iter()
        .filter_map(|(method, _, _)| {
            let result = results.get(&format!("compare/{method}/{}", plan::SEEDS[0]))?;
            let point = |it: &crate::result::Point| (it.tokens as f64 / 1e6, it.held_out_loss);
            Some((*method, result.points.iter().map(point).collect()))
        })
        .collect();
    let points = || curves.iter().flat_map(|(_, points)| points);
    let Some(right) = points().map(|it| it.0).reduce(f64::max) else { return Ok(()) };
    let top = points().map(|it| it.1).fold(0.0, f64::max);
    let bottom = points().map(|it| it.1).fold(top, f64::min);
    draw(path, SIZE, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(48)
            .build_cartesian_2d(0.0..right, bottom - 0.1..top)?;
        chart
            .configure_mesh()
            .x_desc("million tokens, all workers")
            .y_desc("held-out loss, nats per token")
            .light_line_style(WHITE)
            .draw()?;
        for ((name, points), colour) in curves.iter().zip(COLOURS) {
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
                .label(*name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                });
        }
        chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
        Ok(())
    })
}

/// What each defence loses to each lie. A bar that leaves the picture is longer.
pub(super) fn taxes(rows: &Taxes, path: &Path) -> anyhow::Result<()> {
    const RIGHT: f64 = 0.5;
    if rows.is_empty() {
        return Ok(());
    }
    let height = 60 + 26 * rows.len() as u32;
    draw(path, (SIZE.0, height), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(190)
            .build_cartesian_2d(-0.02..RIGHT, 0.0..rows.len() as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_desc("nats per token")
            .light_line_style(WHITE)
            .draw()?;
        let defences = plan::defences();
        let wide = 0.8 / defences.len() as f64;
        for (column, ((name, _), colour)) in defences.iter().zip(COLOURS).enumerate() {
            let bars = rows.iter().enumerate().filter_map(|(row, (_, taxes))| {
                let bottom = (rows.len() - 1 - row) as f64 + 0.1 + column as f64 * wide;
                let tax = taxes[column]?.mean.clamp(-0.02, RIGHT);
                Some(Rectangle::new([(0.0, bottom), (tax, bottom + wide)], colour.filled()))
            });
            chart.draw_series(bars)?.label(*name).legend(move |(x, y)| {
                Rectangle::new([(x, y - 4), (x + 18, y + 4)], colour.filled())
            });
        }
        for (row, (name, _)) in rows.iter().enumerate() {
            let y = 12 + (height as i32 - 60) * (2 * row as i32 + 1) / (2 * rows.len() as i32);
            area.draw(&Text::new(name.clone(), (8, y - 6), ("sans-serif", 13)))?;
        }
        chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
        Ok(())
    })
}

pub(crate) type Drawing<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

pub(crate) fn draw(
    path: &Path,
    size: (u32, u32),
    content: impl Fn(&Drawing<'_>) -> Result<(), Box<dyn std::error::Error>>,
) -> anyhow::Result<()> {
    let area = SVGBackend::new(path, size).into_drawing_area();
    let draw = || {
        area.fill(&WHITE)?;
        content(&area)?;
        area.present()?;
        Ok(())
    };
    draw().map_err(|error: Box<dyn std::error::Error>| anyhow!("{}: {error}", path.display()))
}
