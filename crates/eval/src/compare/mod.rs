//! `eval compare`: two runs on the same items, item by item; or two sets of answers, by a judge.

mod regression;
mod runs;
mod statistics;
mod winrate;

use std::fs;

use anyhow::{Context, Result, bail};
use pref_data::write_jsonl;
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::CompareArgs;
use crate::bootstrap::{Estimate, clustered};
use crate::judge::{Judge, Took};
use crate::report::{Page, write_json, write_page};
use runs::{Pair, Run, Shape};
use statistics::sign_test;
use winrate::WinRate;
pub use winrate::{Said, preferences};

/// A comparison, `compare.json`.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// First run.
    pub a: String,
    /// Second run: differences are its scores minus those of the first.
    pub b: String,
    /// What a score is.
    pub score: String,
    /// The whole and every group, where items have scores.
    pub parts: Vec<Difference>,
    /// By a judge, where there is one.
    pub win_rate: Option<WinRate>,
    /// What judging took.
    pub judge: Option<Took>,
    /// Of this tool.
    pub version: String,
}

/// One line of the comparison.
#[derive(Debug, Serialize)]
pub struct Difference {
    /// Group, or `overall`.
    pub name: String,
    /// Items.
    pub items: usize,
    /// Distinct ones.
    pub distinct: usize,
    /// Mean score of the first run.
    pub a: f64,
    /// Mean score of the second run.
    pub b: f64,
    /// Second minus first, item by item; its interval resamples distinct items.
    pub difference: Estimate,
    /// Distinct items on which the second run is better, and worse.
    pub better: usize,
    /// Distinct items on which it is worse.
    pub worse: usize,
    /// Two-sided exact sign test of these two counts.
    pub p: f64,
}

/// Runs the command; returns the table for stdout, or nothing where it was interrupted.
pub fn run(args: &CompareArgs) -> Result<Option<String>> {
    let [a, b] = [&args.run_a, &args.run_b].map(|path| Run::read(path));
    let (a, b) = (a?, b?);
    if a.shape != b.shape {
        bail!("{} holds {}, {} holds {}: they cannot be compared", a.name, a.shape, b.name, b.shape);
    }
    runs::check_same_kind(&args.run_a, &args.run_b)?;
    let pairs = runs::pairs(&a, &b)?;
    let judge = Judge::open(&args.judge, &args.out.join("judge"))?;
    let shape = a.shape;
    if judge.is_none() && shape == Shape::Answers {
        bail!("answers without scores are compared by a judge: give --judge-endpoint and --judge-model");
    }
    if judge.is_some() && shape == Shape::Pairs {
        bail!("a judge has nothing to read in the results of `eval pairs`; leave --judge-endpoint out");
    }
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let mut comparison = Comparison {
        a: a.name.clone(),
        b: b.name.clone(),
        score: shape.score().into(),
        parts: if shape == Shape::Answers { Vec::new() } else { differences(&pairs) },
        win_rate: None,
        judge: None,
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let mut verdicts = Vec::new();
    if let Some(judge) = &judge {
        let Some((rate, rows, took)) = winrate::ask(judge, &pairs)? else { return Ok(None) };
        (comparison.win_rate, comparison.judge, verdicts) = (Some(rate), Some(took), rows);
    }
    write(args, &comparison, &pairs, &verdicts)?;
    Ok(Some(table(&comparison)))
}

fn differences(pairs: &[Pair]) -> Vec<Difference> {
    let mut groups: Vec<&str> = pairs.iter().map(|pair| pair.group.as_str()).collect();
    groups.sort_unstable();
    groups.dedup();
    let all: Vec<&Pair> = pairs.iter().collect();
    let mut parts: Vec<Option<Difference>> = vec![difference("overall", &all)];
    if groups.len() > 1 {
        parts.extend(groups.into_iter().map(|group| {
            let of: Vec<&Pair> = pairs.iter().filter(|pair| pair.group == group).collect();
            difference(group, &of)
        }));
    }
    parts.into_iter().flatten().collect()
}

fn difference(name: &str, pairs: &[&Pair]) -> Option<Difference> {
    let apart: Vec<f64> = pairs.iter().map(|pair| pair.scores[1] - pair.scores[0]).collect();
    let clusters: Vec<&str> = pairs.iter().map(|pair| pair.cluster.as_str()).collect();
    let mean = |i: usize| pairs.iter().map(|pair| pair.scores[i]).sum::<f64>() / pairs.len() as f64;
    let mut sums = std::collections::BTreeMap::<&str, f64>::new();
    for (cluster, apart) in clusters.iter().zip(&apart) {
        *sums.entry(cluster).or_default() += apart;
    }
    let count = |keep: &dyn Fn(f64) -> bool| sums.values().filter(|&&sum| keep(sum)).count();
    let (better, worse) = (count(&|sum| sum > 0.0), count(&|sum| sum < 0.0));
    Some(Difference {
        name: name.into(),
        items: pairs.len(),
        distinct: sums.len(),
        a: mean(0),
        b: mean(1),
        difference: clustered(&apart, &clusters)?,
        better,
        worse,
        p: sign_test(better, worse),
    })
}

fn write(args: &CompareArgs, comparison: &Comparison, pairs: &[Pair], verdicts: &[Value]) -> Result<()> {
    write_json(&args.out.join("compare.json"), comparison)?;
    let rows: Vec<Value> = pairs
        .iter()
        .enumerate()
        .map(|(i, pair)| {
            let mut row = json!({"id": pair.id, "group": pair.group, "scores": pair.scores});
            if let Some(verdict) = verdicts.get(i) {
                row["judge"] = verdict.clone();
            }
            row
        })
        .collect();
    write_jsonl(&args.out.join("items.jsonl"), &rows)?;
    let page = json!({"comparison": comparison, "pairs": shown(pairs, verdicts)});
    write_page(&args.out.join("report.html"), Page::Compare, &page)
}

/// The items whose scores are furthest apart, for reading.
fn shown(pairs: &[Pair], verdicts: &[Value]) -> Vec<Value> {
    const MOST: usize = 200;
    let mut order: Vec<usize> = (0..pairs.len()).filter(|&i| !pairs[i].question.is_empty()).collect();
    let mut seen = std::collections::HashSet::new();
    order.retain(|&i| seen.insert(pairs[i].cluster.as_str()));
    let apart = |i: usize| match verdicts.get(i).and_then(|verdict| verdict["wins"].as_f64()) {
        Some(wins) => (wins - 0.5).abs(),
        None => (pairs[i].scores[1] - pairs[i].scores[0]).abs(),
    };
    order.sort_by(|&i, &j| apart(j).total_cmp(&apart(i)));
    let row = |i: usize| {
        let pair = &pairs[i];
        json!({
            "id": pair.id, "group": pair.group, "scores": pair.scores, "question": pair.question,
            "responses": pair.responses, "judge": verdicts.get(i),
        })
    };
    order.into_iter().take(MOST).map(row).collect()
}

fn table(comparison: &Comparison) -> String {
    let mut lines = vec![format!("A: {}", comparison.a), format!("B: {}", comparison.b)];
    if !comparison.parts.is_empty() {
        let header = format!(
            "{:18} {:>6} {:>9} {:>8} {:>8} {:>8}   95 % interval      better worse       p",
            comparison.score, "items", "distinct", "A", "B", "B - A"
        );
        lines.push(header);
    }
    for part in &comparison.parts {
        lines.push(format!(
            "{:18} {:>6} {:>9} {:>8.4} {:>8.4} {:>+8.4}   [{:+.4}, {:+.4}] {:>6} {:>5} {:>7.3}",
            part.name,
            part.items,
            part.distinct,
            part.a,
            part.b,
            part.difference.mean,
            part.difference.low,
            part.difference.high,
            part.better,
            part.worse,
            part.p
        ));
    }
    if let Some(rate) = &comparison.win_rate {
        lines.push(rate.text());
    }
    lines.join("\n")
}
