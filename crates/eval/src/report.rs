//! The table on stdout and the HTML report.

use std::path::Path;

use anyhow::{Context, Result};
use minijinja::{Environment, value::Serde};
use pref_data::write_atomic;
use serde::Serialize;
use serde_json::Value;

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
    let kind = if score.unpaired { "completions" } else { "pairs" };
    lines.push(format!("{} {kind} of {} ({})", score.pairs, score.dataset, score.split));
    lines.join("\n")
}

/// Pages of reports.
#[derive(Debug, Clone, Copy)]
pub enum Page {
    /// Of `choices`.
    Choices,
    /// Of `compare`.
    Compare,
    /// Of `data`.
    Data,
    /// Of `mixeval`.
    Mixeval,
    /// Of `pairs`.
    Pairs,
    /// Of `recommend`.
    Recommend,
    /// Of `run`.
    Run,
}

/// Writes a result as JSON for people and programs.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    Ok(write_atomic(path, |out| out.write_all(text.as_bytes()))?)
}

/// Writes a self-contained page.
pub fn write_page(path: &Path, page: Page, values: &Value) -> Result<()> {
    let mut environment = Environment::new();
    // Pictures are made by this program and have no foreign text but the names of lines.
    environment.add_filter("picture", minijinja::Value::from_safe_string);
    for (name, source) in [
        ("page.html", include_str!("templates/page.html.j2")),
        ("sets.html", include_str!("templates/sets.html.j2")),
    ] {
        environment.add_template(name, source).context("the template parses")?;
    }
    let source = match page {
        Page::Choices => include_str!("templates/choices.html.j2"),
        Page::Compare => include_str!("templates/compare.html.j2"),
        Page::Data => include_str!("templates/data.html.j2"),
        Page::Mixeval => include_str!("templates/mixeval.html.j2"),
        Page::Pairs => include_str!("templates/pairs.html.j2"),
        Page::Recommend => include_str!("templates/recommend.html.j2"),
        Page::Run => include_str!("templates/run.html.j2"),
    };
    environment.add_template("report.html", source).context("the template parses")?;
    let values = minijinja::Value::from(Serde(values));
    let html = environment.get_template("report.html")?.render(values).context("the report renders")?;
    Ok(write_atomic(path, |out| out.write_all(html.as_bytes()))?)
}
