//! `report.json` and `report.html`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use chat_client::{Counts, Usage};
use minijinja::{Environment, context, value::Serde};
use pref_data::{Contrast, write_atomic};
use serde::Serialize;
use similar::{ChangeTag, TextDiff};

use crate::args::Method;
use crate::asker::Spent;
use crate::charts::Chart;
use crate::output::{self, Failed, Pair};

/// Pairs shown in the HTML report, evenly spread over the set.
const SHOWN: usize = 200;

/// Failures of one reason shown in the HTML report.
const EXAMPLES: usize = 3;

/// Contents of `report.json`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// How the pairs were made.
    pub method: &'static str,
    /// Pairs made.
    pub pairs: usize,
    /// Answers without a pair.
    pub failed: usize,
    /// Failures by reason.
    pub reasons: BTreeMap<String, usize>,
    /// Pairs that a judge confirmed, of those that it looked at.
    pub verified: Option<[usize; 2]>,
    /// Pairs in which a judge saw no winner and that were kept.
    pub ties: usize,
    /// Replies that had been stored before this run.
    pub from_store: usize,
    /// Replies the server gave in this run.
    pub from_server: usize,
    /// Attempts of this run, those that failed among them.
    pub attempts: u64,
    /// Tokens of the replies behind the pairs.
    pub usage: Usage,
    /// Tokens of all replies, those that gave no pair among them.
    pub all_usage: Usage,
    /// US dollars that all replies cost; `None` where no price is known.
    pub cost: Option<f64>,
    /// US dollars of this run (of all methods).
    pub cost_now: Option<f64>,
    /// Milliseconds a reply took: median, 90th and 99th percentile.
    pub latency_ms: [u64; 3],
    /// Mean contrast of the pairs.
    pub contrast: Contrast,
}

impl Report {
    /// Sums a run up.
    pub fn new(method: Method, pairs: &[Pair], failed: &[Failed], all: Spent, counts: &Counts) -> Self {
        let mut reasons = BTreeMap::new();
        for failure in failed {
            *reasons.entry(failure.reason.clone()).or_default() += 1;
        }
        let mut latencies: Vec<u64> = pairs.iter().map(|pair| pair.spent.latency_ms).collect();
        latencies.sort_unstable();
        let percentile = |p: f64| {
            let at = (p * latencies.len().saturating_sub(1) as f64).round() as usize;
            latencies.get(at).copied().unwrap_or(0)
        };
        let looked_at = pairs.iter().filter(|pair| pair.verified.is_some()).count();
        let verified = pairs.iter().filter(|pair| pair.verified == Some(true)).count();
        let contrasts: Vec<Contrast> = pairs.iter().map(|pair| pair.contrast).collect();
        Self {
            method: method.name(),
            pairs: pairs.len(),
            failed: failed.len(),
            reasons,
            verified: (looked_at > 0).then_some([verified, looked_at]),
            ties: pairs.iter().filter(|pair| pair.tie == Some(true)).count(),
            from_store: all.from_store,
            from_server: all.from_server,
            attempts: counts.attempts,
            usage: output::usage(pairs),
            all_usage: all.usage,
            cost: counts.spent.map(|_| all.cost),
            cost_now: counts.spent,
            latency_ms: [percentile(0.5), percentile(0.9), percentile(0.99)],
            contrast: Contrast::mean(&contrasts),
        }
    }
}

/// One piece of a word diff: 0 for both texts, 1 for the chosen alone, -1 for the rejected alone.
type Piece = (i8, String);

/// A pair as the page shows it.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    id: &'a str,
    prompt: String,
    rational: &'a str,
    verified: Option<bool>,
    tie: Option<bool>,
    jaccard: f64,
    levenshtein: f64,
    pieces: Vec<Piece>,
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
    let shown: Vec<Shown> = pairs.iter().step_by(pairs.len().div_ceil(SHOWN).max(1)).map(shown).collect();
    let mut examples: BTreeMap<&str, Vec<&Failed>> = BTreeMap::new();
    for failure in failed {
        let of_reason = examples.entry(&failure.reason).or_default();
        if of_reason.len() < EXAMPLES {
            of_reason.push(failure);
        }
    }
    let values = context! {
        report => minijinja::Value::from(Serde(report)),
        charts => minijinja::Value::from(Serde(charts(pairs))),
        pairs => minijinja::Value::from(Serde(shown)),
        examples => minijinja::Value::from(Serde(examples)),
    };
    environment.get_template("report.html")?.render(values).context("the report renders")
}

fn charts(pairs: &[Pair]) -> Vec<Chart> {
    let of = |title: &str, digits: usize, value: &dyn Fn(&Pair) -> Option<f64>| {
        Chart::of(title, pairs.iter().filter_map(value).collect(), digits)
    };
    let latency = |pair: &Pair| (pair.spent.latency_ms > 0).then(|| pair.spent.latency_ms as f64 / 1000.0);
    let all = [
        of("latency of a reply, s", 2, &latency),
        of("tokens of requests, a pair", 0, &|pair| Some(pair.spent.usage.prompt_tokens as f64)),
        of("tokens of replies, a pair", 0, &|pair| Some(pair.spent.usage.completion_tokens as f64)),
        of("word Jaccard similarity", 2, &|pair| Some(pair.contrast.jaccard)),
        of("character edit distance", 0, &|pair| Some(pair.contrast.levenshtein)),
        of("length change, characters", 0, &|pair| Some(pair.contrast.length_change)),
    ];
    all.into_iter().flatten().collect()
}

fn shown(pair: &Pair) -> Shown<'_> {
    Shown {
        id: &pair.answer.id,
        prompt: pair.answer.prompt(),
        rational: &pair.rational,
        verified: pair.verified,
        tie: pair.tie,
        jaccard: pair.contrast.jaccard,
        levenshtein: pair.contrast.levenshtein,
        pieces: diff(&pair.rejected, &pair.chosen),
    }
}

fn diff(rejected: &str, chosen: &str) -> Vec<Piece> {
    let diff = TextDiff::from_words(rejected, chosen);
    let mut pieces: Vec<Piece> = Vec::new();
    for change in diff.iter_all_changes() {
        let side = match change.tag() {
            ChangeTag::Delete => -1,
            ChangeTag::Insert => 1,
            ChangeTag::Equal => 0,
        };
        match pieces.last_mut() {
            Some(last) if last.0 == side => last.1.push_str(change.value()),
            _ => pieces.push((side, change.value().to_string())),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Answer;
    use chat_client::ChatMessage;

    fn pair(id: &str, rejected: &str, chosen: &str) -> Pair {
        let answer = Answer {
            id: id.into(),
            messages: vec![ChatMessage::user("q")],
            responses: vec![rejected.into()],
            scores: Vec::new(),
        };
        Pair::new(answer.into(), chosen.into(), rejected.into(), Spent::default())
    }

    #[test]
    fn the_pieces_of_a_diff_give_both_texts() {
        let pieces = diff("one two three", "one 2 three four");
        let side = |keep: i8| -> String {
            pieces
                .iter()
                .filter(|(side, _)| *side == 0 || *side == keep)
                .map(|(_, text)| text.as_str())
                .collect()
        };
        assert_eq!((side(-1), side(1)), ("one two three".into(), "one 2 three four".into()));
    }

    #[test]
    fn foreign_text_cannot_break_out_of_the_page() {
        let evil = "</script><script>alert(1)</script>";
        let pairs = [pair(evil, "a", evil)];
        let failed =
            [Failed { id: evil.into(), reason: "no_marker".into(), attempts: 1, last_error: evil.into() }];
        let report = Report::new(Method::Clair, &pairs, &failed, Spent::default(), &Counts::default());
        let html = render(&report, &pairs, &failed).unwrap();
        assert!(!html.contains("<script>alert"), "{html}");
        assert_eq!(html.matches("</script>").count(), 2, "the data and the page's own script");
    }
}
