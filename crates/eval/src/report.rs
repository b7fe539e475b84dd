//! The table on stdout and the HTML report.

use std::path::Path;

use anyhow::{Context, Result};
use minijinja::{Environment, context, value::Serde};
use pref_data::write_atomic;
use serde_json::Value;

use crate::histogram::histogram;
use crate::pairs::Score;

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
    lines.push(format!("{} pairs of {} ({})", score.pairs, score.dataset, score.split));
    lines.join("\n")
}

/// Pages of reports.
#[derive(Debug, Clone, Copy)]
pub enum Page {
    /// Of `choices`.
    Choices,
    /// Of `compare`.
    Compare,
    /// Of `mixeval`.
    Mixeval,
}

/// Writes a self-contained page.
pub fn write_page(path: &Path, page: Page, values: &Value) -> Result<()> {
    let mut environment = Environment::new();
    environment
        .add_template("page.html", include_str!("templates/page.html.j2"))
        .context("the template parses")?;
    let source = match page {
        Page::Choices => include_str!("templates/choices.html.j2"),
        Page::Compare => include_str!("templates/compare.html.j2"),
        Page::Mixeval => include_str!("templates/mixeval.html.j2"),
    };
    environment.add_template("report.html", source).context("the template parses")?;
    let values = minijinja::Value::from(Serde(values));
    let html = environment.get_template("report.html")?.render(values).context("the report renders")?;
    Ok(write_atomic(path, |out| out.write_all(html.as_bytes()))?)
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
