//! Figures as bars, in SVG: what is delivered, and how late.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::{
    prelude::{
        BLACK, Color as _, DrawingArea, IntoDrawingArea as _, RGBColor, Rectangle, SVGBackend, Text, WHITE,
    },
    style::TextStyle,
    style::{IntoFont as _, IntoTextStyle as _},
};

use crate::{
    figures::{DELIVERED, Figure, Figures, Unit},
    report,
};

const WIDTH: u32 = 800;
const ROW: i32 = 22;
const TOP: i32 = 44;
/// Where bars start, and how long the longest is.
const LEFT: i32 = 220;
const LONGEST: f64 = 400.0;

struct Bar {
    label: String,
    value: f64,
    /// Its length as a part of the longest.
    part: f64,
    text: String,
    color: RGBColor,
}

/// A plot for each case that has something to show.
pub fn write(folder: &Path, figures: &Figures) -> Result<()> {
    for case in ["saturation", "fanout", "streams", "rules"] {
        let delivered = figures.figures.iter().filter(|f| f.case == case && f.metric == DELIVERED);
        let bars: Vec<_> = delivered.map(|figure| Bar::of(figure, "")).collect();
        draw(
            &folder.join(format!("{case}.svg")),
            &format!("{case}: datagrams delivered a second"),
            bars,
            false,
        )?;
    }
    let latency =
        figures.figures.iter().filter(|f| f.case == "latency" && f.metric.unit == Unit::Microseconds);
    let bars: Vec<_> = latency.map(|figure| Bar::of(figure, figure.metric.name)).collect();
    draw(&folder.join("latency.svg"), "latency, on a logarithmic scale", bars, true)
}

impl Bar {
    fn of(figure: &Figure, what: &str) -> Self {
        let Figure { variant, system, median, metric, .. } = figure;
        Self {
            label: format!("{variant}  {system}  {what}").trim_end().to_owned(),
            value: *median,
            part: 0.0,
            text: report::number(*median, metric.unit),
            color: color(system),
        }
    }
}

/// Each system keeps its colour over all plots.
fn color(system: &str) -> RGBColor {
    match system {
        "redirect" => RGBColor(0x08, 0x30, 0x6b),
        "af-xdp" => RGBColor(0x1f, 0x77, 0xb4),
        "af-packet" => RGBColor(0x6b, 0xae, 0xd6),
        "socat" => RGBColor(0xd6, 0x60, 0x4d),
        "kernel routing" => RGBColor(0x4d, 0xaf, 0x4a),
        _ => RGBColor(0x99, 0x99, 0x99),
    }
}

fn draw(path: &Path, title: &str, mut bars: Vec<Bar>, logarithmic: bool) -> Result<()> {
    if bars.is_empty() {
        return Ok(());
    }
    let scaled = |value: f64| if logarithmic { value.max(1.0).ln() } else { value };
    let longest = bars.iter().map(|bar| scaled(bar.value)).fold(f64::MIN_POSITIVE, f64::max);
    for bar in &mut bars {
        bar.part = scaled(bar.value) / longest;
    }
    let height = TOP + ROW * i32::try_from(bars.len())? + ROW;
    let area = SVGBackend::new(path, (WIDTH, height.unsigned_abs())).into_drawing_area();
    draw_on(&area, title, &bars).map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn draw_on(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    bars: &[Bar],
) -> Result<(), Box<dyn std::error::Error>> {
    let font = |size: i32| -> TextStyle<'static> { ("sans-serif", size).into_font().into_text_style(area) };
    area.fill(&WHITE)?;
    area.draw(&Text::new(title, (12, 12), font(18)))?;
    for (row, bar) in (0..).zip(bars) {
        let top = TOP + row * ROW;
        let right = LEFT + (LONGEST * bar.part) as i32;
        area.draw(&Text::new(bar.label.as_str(), (12, top + 3), font(13)))?;
        area.draw(&Rectangle::new([(LEFT, top), (right, top + ROW - 5)], bar.color.filled()))?;
        area.draw(&Text::new(bar.text.as_str(), (right + 8, top + 3), font(13).color(&BLACK)))?;
    }
    area.present()?;
    Ok(())
}
