//! The table on stdout and the HTML report.

use anyhow::{Context, Result};
use minijinja::{Environment, context, value::Serde};
use serde::Serialize;
use serde_json::Value;

use crate::pairs::Score;

/// Bars of the histogram.
const BINS: usize = 24;

/// The metrics as aligned text.
pub fn table(score: &Score) -> String {
    let number = |value: f64| format!("{value:.4}");
    let mut lines = vec![format!("{:26} {:>12} {:>12}   95 % interval", "", "reference", "model")];
    for metric in &score.metrics {
        let reference = metric.reference.map_or_else(|| "-".into(), number);
        let interval = format!("[{:.4}, {:.4}]", metric.model.low, metric.model.high);
        lines.push(format!(
            "{:26} {reference:>12} {:>12}   {interval}",
            metric.name,
            number(metric.model.mean)
        ));
    }
    lines.push(format!("{} pairs of {}", score.pairs, score.dataset.display()));
    lines.join("\n")
}

#[derive(Debug, Serialize)]
struct Bar {
    x: f64,
    y: f64,
    height: f64,
    from: f64,
    to: f64,
    count: usize,
    right: bool,
}

/// A self-contained page.
pub fn html(score: &Score, rows: &[Value]) -> Result<String> {
    let mut environment = Environment::new();
    environment
        .add_template("report.html", include_str!("templates/pairs.html.j2"))
        .context("the template parses")?;
    let margins: Vec<f64> = rows.iter().filter_map(|row| row["rewards"]["margin"].as_f64()).collect();
    let values = context! {
        score => minijinja::Value::from(Serde(score)),
        rows => minijinja::Value::from(Serde(rows)),
        bars => minijinja::Value::from(Serde(histogram(&margins))),
    };
    environment.get_template("report.html")?.render(values).context("the report renders")
}

/// Bars of a 600 × 120 picture.
fn histogram(values: &[f64]) -> Vec<Bar> {
    let low = values.iter().copied().fold(0.0, f64::min);
    let high = values.iter().copied().fold(0.0, f64::max);
    if values.is_empty() || high - low <= 0.0 {
        return Vec::new();
    }
    let width = (high - low) / BINS as f64;
    let mut counts = [0_usize; BINS];
    for value in values {
        counts[(((value - low) / width) as usize).min(BINS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1).max(1);
    let bar = |(i, count): (usize, usize)| {
        let from = low + width * i as f64;
        let height = 120.0 * count as f64 / most as f64;
        Bar {
            x: 600.0 / BINS as f64 * i as f64,
            y: 120.0 - height,
            height,
            from,
            to: from + width,
            count,
            right: from + width / 2.0 > 0.0,
        }
    };
    counts.into_iter().enumerate().map(bar).collect()
}
