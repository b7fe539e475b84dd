//! Sums of the rows' numbers, as a table and as an HTML page with pictures.

use std::collections::HashSet;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::{Value, json};

use super::Report;
use super::measure::{Measured, Numbers};
use crate::histogram::{Bar, histogram};

/// One preference set.
#[derive(Debug, Serialize)]
pub struct SetReport {
    name: String,
    layout: String,
    splits: Vec<SplitRows>,
    rows: usize,
    skipped: usize,
    /// Unpaired rows with a desirable completion.
    desirable: Option<usize>,
    duplicates: Duplicates,
    leakage: Vec<Leak>,
    lengths: Vec<Distribution>,
    /// Absent for completions with labels.
    contrast: Option<ContrastReport>,
    length_bias: Option<LengthBias>,
}

#[derive(Debug, Serialize)]
struct SplitRows {
    split: String,
    rows: usize,
}

#[derive(Debug, Serialize)]
struct Duplicates {
    /// Rows whose prompt stands in an earlier row too (upper and lower case and white space aside).
    prompts: usize,
    /// Rows that stand in an earlier row too.
    rows: usize,
    /// Pairs whose completions are the same.
    identical_pairs: usize,
}

/// Rows of a split whose prompt stands in another split too.
#[derive(Debug, Serialize)]
struct Leak {
    split: String,
    of: String,
    prompts: usize,
}

/// A quantity over the rows.
#[derive(Debug, Serialize)]
struct Distribution {
    name: String,
    mean: f64,
    min: f64,
    p5: f64,
    median: f64,
    p95: f64,
    max: f64,
    #[serde(skip)]
    bars: Vec<Bar>,
    /// The last bar holds everything from here on.
    #[serde(skip)]
    clipped: Option<f64>,
}

/// How much the completions of a pair differ.
#[derive(Debug, Serialize)]
struct ContrastReport {
    jaccard: Distribution,
    levenshtein: Distribution,
    /// Share of the shorter completion that both start with.
    unchanged_start: Distribution,
    /// Pairs whose completions start with the same characters for at least a tenth of the shorter one.
    share_with_common_start: f64,
}

/// Whether length alone tells the winner.
#[derive(Debug, Serialize)]
struct LengthBias {
    /// Share of pairs whose chosen completion has more characters (equal ones count half): 0.5 is no bias.
    longer_is_chosen: f64,
    /// Characters of chosen minus rejected completions.
    length_change: Distribution,
}

impl SetReport {
    /// Sums up the splits of a set.
    pub fn new(name: &str, splits: &[Measured]) -> Result<Self> {
        let rows: Vec<&Numbers> = splits.iter().flat_map(|split| &split.rows).collect();
        let Some(first) = splits.first() else { bail!("{name}: has no splits") };
        let unpaired = rows.iter().all(|row| row.label.is_some());
        if !unpaired && rows.iter().any(|row| row.label.is_some()) {
            bail!("{name}: some splits hold pairs and some completions with labels; choose with --split");
        }
        let over = |what: &str, f: &dyn Fn(&Numbers) -> f64| {
            Distribution::new(what, rows.iter().map(|row| f(row)).collect())
        };
        let of_label = |what: &str, i: usize, label: bool, chars: bool| {
            let rows = rows.iter().filter(|row| row.label.is_none_or(|of_row| of_row == label));
            let value = |row: &&Numbers| f64::from(if chars { row.chars[i] } else { row.tokens[i] });
            Distribution::new(what, rows.map(value).collect())
        };
        let lengths = vec![
            over("prompt", &|row| f64::from(row.tokens[0])),
            of_label("chosen", 1, true, false),
            of_label("rejected", 2, false, false),
            of_label("chosen, characters", 1, true, true),
            of_label("rejected, characters", 2, false, true),
        ];
        let share =
            |row: &Numbers| f64::from(row.common_start) / f64::from(row.chars[1].min(row.chars[2]).max(1));
        let contrast = (!unpaired).then(|| ContrastReport {
            jaccard: over("token Jaccard similarity", &|row| row.jaccard),
            levenshtein: over("character Levenshtein distance", &|row| f64::from(row.levenshtein)),
            unchanged_start: over("unchanged start, share", &share),
            share_with_common_start: mean(rows.iter().map(|row| f64::from(u8::from(share(row) >= 0.1)))),
        });
        let length_bias = (!unpaired).then(|| LengthBias {
            longer_is_chosen: mean(rows.iter().map(|row| match row.chars[1].cmp(&row.chars[2]) {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            })),
            length_change: over("length change, characters", &|row| {
                f64::from(row.chars[1]) - f64::from(row.chars[2])
            }),
        });
        Ok(Self {
            name: name.into(),
            layout: first.layout.clone(),
            splits: splits.iter().map(|s| SplitRows { split: s.split.clone(), rows: s.rows.len() }).collect(),
            rows: rows.len(),
            skipped: splits.iter().map(|split| split.skipped).sum(),
            desirable: unpaired.then(|| rows.iter().filter(|row| row.label == Some(true)).count()),
            duplicates: duplicates(splits, unpaired),
            leakage: leakage(splits),
            lengths,
            contrast,
            length_bias,
        })
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len().max(1) as f64;
    values.sum::<f64>() / n
}

/// Repeats within each split. Unpaired rows repeat their prompts by nature: only whole rows count.
fn duplicates(splits: &[Measured], unpaired: bool) -> Duplicates {
    let repeats = |key: &dyn Fn(&Numbers) -> [u8; 16]| -> usize {
        let of_split = |split: &Measured| {
            let mut seen = HashSet::new();
            split.rows.iter().filter(|row| !seen.insert(key(row))).count()
        };
        splits.iter().map(of_split).sum()
    };
    let rows = splits.iter().flat_map(|split| &split.rows);
    Duplicates {
        prompts: if unpaired { 0 } else { repeats(&|row| row.prompt) },
        rows: repeats(&|row| row.row),
        identical_pairs: rows.filter(|row| row.identical && row.label.is_none()).count(),
    }
}

/// For every two splits, the rows of the later whose prompt the earlier has.
fn leakage(splits: &[Measured]) -> Vec<Leak> {
    let prompts: Vec<HashSet<[u8; 16]>> =
        splits.iter().map(|split| split.rows.iter().map(|row| row.prompt).collect()).collect();
    let mut leaks = Vec::new();
    for (i, split) in splits.iter().enumerate() {
        for (of, earlier) in splits.iter().zip(&prompts).take(i) {
            let prompts = split.rows.iter().filter(|row| earlier.contains(&row.prompt)).count();
            leaks.push(Leak { split: split.split.clone(), of: of.split.clone(), prompts });
        }
    }
    leaks
}

impl Distribution {
    fn new(name: &str, mut values: Vec<f64>) -> Self {
        let mean = mean(values.iter().copied());
        values.sort_unstable_by(f64::total_cmp);
        let at = |p: f64| {
            let place = (p * values.len().saturating_sub(1) as f64).round() as usize;
            values.get(place).copied().unwrap_or(0.0)
        };
        let [min, p5, median, p95, p99, max] = [0.0, 0.05, 0.5, 0.95, 0.99, 1.0].map(at);
        // A few giants would leave one bar on the left.
        let clipped = (max > 1.5 * p99).then_some(p99);
        let shown: Vec<f64> =
            values.iter().map(|value| clipped.map_or(*value, |most| value.min(most))).collect();
        Self { name: name.into(), mean, min, p5, median, p95, max, bars: histogram(&shown), clipped }
    }

    /// Values of the table's columns.
    fn cells(&self) -> [f64; 6] {
        [self.mean, self.min, self.p5, self.median, self.p95, self.max]
    }
}

impl SetReport {
    fn distributions(&self) -> Vec<&Distribution> {
        let contrast = self.contrast.iter().flat_map(|c| [&c.jaccard, &c.levenshtein, &c.unchanged_start]);
        let bias = self.length_bias.iter().map(|bias| &bias.length_change);
        self.lengths.iter().chain(contrast).chain(bias).collect()
    }

    /// Facts that are one number.
    fn facts(&self) -> Vec<(String, String)> {
        let mut facts = Vec::new();
        let mut add = |name: &str, value: String| facts.push((name.to_string(), value));
        let splits = self.splits.iter().map(|split| format!("{} {}", split.split, split.rows));
        add("rows", format!("{} ({})", self.rows, splits.collect::<Vec<_>>().join(", ")));
        add("columns", self.layout.clone());
        if self.skipped > 0 {
            add("left out (unusable)", self.skipped.to_string());
        }
        if let Some(desirable) = self.desirable {
            add("desirable", format!("{desirable} of {}", self.rows));
        } else {
            add("duplicate prompts", self.duplicates.prompts.to_string());
            add("pairs with identical completions", self.duplicates.identical_pairs.to_string());
        }
        add("duplicate rows", self.duplicates.rows.to_string());
        for leak in &self.leakage {
            add(&format!("prompts of {} that stand in {}", leak.split, leak.of), leak.prompts.to_string());
        }
        if let Some(contrast) = &self.contrast {
            let share = format!("{:.1} %", 100.0 * contrast.share_with_common_start);
            add("pairs that start the same for a tenth or more", share);
        }
        if let Some(bias) = &self.length_bias {
            add("the longer completion is the chosen one", format!("{:.1} %", 100.0 * bias.longer_is_chosen));
        }
        facts
    }
}

/// The report as aligned text.
pub fn table(report: &Report) -> String {
    let mut lines = Vec::new();
    for set in &report.sets {
        lines.push(set.name.clone());
        lines.extend(set.facts().into_iter().map(|(name, value)| format!("  {name}: {value}")));
        lines.push(format!(
            "  {:32} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            format!("lengths in {}", report.unit),
            "mean",
            "min",
            "5 %",
            "median",
            "95 %",
            "max"
        ));
        for distribution in set.distributions() {
            let cells = distribution.cells().map(|value| {
                if distribution.max.abs() <= 1.0 {
                    format!(" {value:>9.3}")
                } else {
                    format!(" {value:>9.1}")
                }
            });
            lines.push(format!("  {:32}{}", distribution.name, cells.concat()));
        }
    }
    lines.join("\n")
}

/// A distribution and its bars.
#[derive(Serialize)]
struct Picture<'a> {
    distribution: &'a Distribution,
    bars: &'a [Bar],
    clipped: Option<f64>,
}

/// What the page shows of the sets.
pub fn page(unit: &str, sets: &[SetReport]) -> Value {
    let set = |set: &SetReport| {
        let pictures: Vec<Picture> = set
            .distributions()
            .into_iter()
            .map(|d| Picture { distribution: d, bars: &d.bars, clipped: d.clipped })
            .collect();
        json!({"name": set.name, "facts": set.facts(), "pictures": pictures})
    };
    json!({"unit": unit, "sets": sets.iter().map(set).collect::<Vec<_>>()})
}
