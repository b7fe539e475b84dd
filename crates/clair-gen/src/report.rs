//! `report.json` and `report.html`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use chat_client::Usage;
use minijinja::{Environment, context, value::Serde};
use pref_data::{Contrast, write_atomic};
use serde::Serialize;
use similar::{ChangeTag, TextDiff};

use crate::output::{Failed, Pair};

/// Pairs whose contrast is measured, evenly spread.
const MEASURED: usize = 20_000;

/// Pairs shown in the HTML report.
const SHOWN: usize = 50;

/// Contents of `report.json`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Pairs made.
    pub pairs: usize,
    /// Answers without a pair.
    pub failed: usize,
    /// Failures by reason.
    pub reasons: BTreeMap<String, usize>,
    /// Replies that had been stored before this run.
    pub from_store: usize,
    /// Replies the server gave in this run.
    pub from_server: usize,
    /// Tokens of the replies behind the pairs.
    pub usage: Usage,
    /// Milliseconds a reply took: median, 90th and 99th percentile.
    pub latency_ms: [u64; 3],
    /// Mean contrast of the pairs measured.
    pub contrast: Contrast,
    /// Pairs measured for it: all, or 20,000 or fewer evenly spread ones.
    pub contrast_pairs: usize,
}

/// One piece of a word diff.
#[derive(Debug, Serialize)]
struct Piece {
    kind: &'static str,
    text: String,
}

/// Sums a run up.
pub fn summarize(pairs: &[Pair], failed: &[Failed], from_store: usize, from_server: usize) -> Report {
    let mut reasons = BTreeMap::new();
    for failure in failed {
        *reasons.entry(failure.reason.clone()).or_default() += 1;
    }
    let mut latencies: Vec<u64> = pairs.iter().map(|pair| pair.latency_ms).collect();
    latencies.sort_unstable();
    let percentile = |p: f64| {
        let at = (p * latencies.len().saturating_sub(1) as f64).round() as usize;
        latencies.get(at).copied().unwrap_or(0)
    };
    let mut usage = Usage::default();
    for pair in pairs {
        usage.prompt_tokens += pair.usage.prompt_tokens;
        usage.completion_tokens += pair.usage.completion_tokens;
        usage.total_tokens += pair.usage.total_tokens;
    }
    let measured = pairs.iter().step_by(pairs.len().div_ceil(MEASURED).max(1));
    let contrasts: Vec<Contrast> =
        measured.map(|pair| Contrast::of(&pair.answer.response, &pair.revision.text)).collect();
    Report {
        pairs: pairs.len(),
        failed: failed.len(),
        reasons,
        from_store,
        from_server,
        usage,
        latency_ms: [percentile(0.5), percentile(0.9), percentile(0.99)],
        contrast: Contrast::mean(&contrasts),
        contrast_pairs: contrasts.len(),
    }
}

/// Writes both reports.
pub fn write(dir: &Path, report: &Report, pairs: &[Pair], failed: &[Failed]) -> Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    write_atomic(&dir.join("report.json"), |out| out.write_all(text.as_bytes()))?;
    let html = render(report, pairs, failed)?;
    Ok(write_atomic(&dir.join("report.html"), |out| out.write_all(html.as_bytes()))?)
}

fn render(report: &Report, pairs: &[Pair], failed: &[Failed]) -> Result<String> {
    let mut environment = Environment::new();
    environment
        .add_template("report.html", include_str!("prompts/report.html.j2"))
        .context("the report's template parses")?;
    let shown: Vec<_> = pairs
        .iter()
        .take(SHOWN)
        .map(|pair| {
            context! {
                id => pair.answer.id.clone(),
                prompt => pair.answer.prompt(),
                rational => pair.revision.reasoning.clone(),
                pieces => minijinja::Value::from(Serde(diff(&pair.answer.response, &pair.revision.text))),
            }
        })
        .collect();
    let failures: Vec<&Failed> = failed.iter().take(SHOWN).collect();
    let values = context! {
        report => minijinja::Value::from(Serde(report)),
        pairs => shown,
        failures => minijinja::Value::from(Serde(failures)),
    };
    environment.get_template("report.html")?.render(values).context("the report renders")
}

fn diff(answer: &str, revision: &str) -> Vec<Piece> {
    let diff = TextDiff::from_words(answer, revision);
    let mut pieces: Vec<Piece> = Vec::new();
    for change in diff.iter_all_changes() {
        let kind = match change.tag() {
            ChangeTag::Delete => "del",
            ChangeTag::Insert => "ins",
            ChangeTag::Equal => "same",
        };
        match pieces.last_mut() {
            Some(last) if last.kind == kind => last.text.push_str(change.value()),
            _ => pieces.push(Piece { kind, text: change.value().to_string() }),
        }
    }
    pieces
}
