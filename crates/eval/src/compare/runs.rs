//! What a run left, brought to one form.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pref_data::{read_jsonl, row_id};
use serde_json::Value;

use crate::judge::conversation;

/// Kinds of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Of `mixeval` and `choices`.
    Items,
    /// Of `pairs`.
    Pairs,
    /// Of `sample`.
    Answers,
}

impl Shape {
    /// What a score is.
    pub fn score(self) -> &'static str {
        match self {
            Self::Items => "score",
            Self::Pairs => "accuracy",
            Self::Answers => "",
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Items => "scored items",
            Self::Pairs => "held-out pairs",
            Self::Answers => "answers",
        })
    }
}

/// One item of a run.
#[derive(Debug, Clone, Default)]
struct Entry {
    cluster: String,
    group: String,
    score: f64,
    question: String,
    response: String,
}

/// A run.
pub struct Run {
    /// As it was named.
    pub name: String,
    /// What it holds.
    pub shape: Shape,
    order: Vec<String>,
    entries: HashMap<String, Entry>,
}

/// One item of both runs.
#[derive(Debug, Clone)]
pub struct Pair {
    pub id: String,
    pub cluster: String,
    pub group: String,
    /// Of the first and of the second run.
    pub scores: [f64; 2],
    pub question: String,
    pub responses: [String; 2],
}

impl Run {
    /// Reads a directory that `mixeval`, `choices` or `pairs` has written, or a file that `sample` has.
    pub fn read(path: &Path) -> Result<Self> {
        let (items, rows) = (path.join("items.jsonl"), path.join("rows.jsonl"));
        let (file, shape) = match () {
            () if path.is_file() => (path.to_path_buf(), Shape::Answers),
            () if items.exists() => (items, Shape::Items),
            () if rows.exists() => (rows, Shape::Pairs),
            () => bail!(
                "{}: holds no items.jsonl of `eval mixeval` or `eval choices` and no rows.jsonl of `eval pairs`, and is \
                 no file of `eval sample`",
                path.display()
            ),
        };
        let mut run =
            Self { name: path.display().to_string(), shape, order: Vec::new(), entries: HashMap::new() };
        for (number, (line, row)) in read_jsonl(&file)?.into_iter().enumerate() {
            let place = || format!("{}:{line}", file.display());
            let id = row_id(row.get("id"), number);
            let entry = entry(shape, &id, &row).with_context(place)?;
            run.order.push(id.clone());
            if run.entries.insert(id.clone(), entry).is_some() {
                bail!("{}: the id {id:?} stands twice", place());
            }
        }
        if run.order.is_empty() {
            bail!("{}: holds no rows", file.display());
        }
        Ok(run)
    }
}

fn entry(shape: Shape, id: &str, row: &Value) -> Result<Entry> {
    let text =
        |name: &str| row[name].as_str().map(str::to_owned).with_context(|| format!("no text in {name:?}"));
    Ok(match shape {
        Shape::Items => Entry {
            cluster: text("cluster")?,
            group: text("benchmark")?,
            score: row["score"].as_f64().context("no number in \"score\"")?,
            question: text("question")?,
            response: text("response")?,
        },
        Shape::Pairs => {
            let margin = row["rewards"]["margin"].as_f64();
            let side = |name: &str| row["logps"][name].as_f64();
            let apart = margin.or_else(|| Some(side("chosen")? - side("rejected")?));
            let score = f64::from(u8::from(apart.context("no rewards and no log-probabilities")? > 0.0));
            Entry { cluster: id.into(), group: "pairs".into(), score, ..Entry::default() }
        }
        Shape::Answers => Entry {
            cluster: id.into(),
            group: "answers".into(),
            question: conversation(&row["prompt"]),
            response: text("response")?,
            ..Entry::default()
        },
    })
}

/// Errors where two runs were scored in different ways: their difference would be that of the ways.
pub fn check_same_kind(a: &Path, b: &Path) -> Result<()> {
    let summary = |run: &Path| -> Value {
        let text = std::fs::read_to_string(run.join("summary.json")).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    };
    let (first, second) = (summary(a), summary(b));
    for (key, what) in [
        ("parser", "answers were read"),
        ("split", "the set is"),
        ("data", "the questions are"),
        ("context", "the text before the choices is"),
    ] {
        if first[key] != second[key] {
            bail!("{what} {} in {} and {} in {}", first[key], a.display(), second[key], b.display());
        }
    }
    Ok(())
}

/// Items of both runs, which must be the same ones, in the order of the first.
pub fn pairs(a: &Run, b: &Run) -> Result<Vec<Pair>> {
    if let Some(id) = b.order.iter().find(|id| !a.entries.contains_key(*id)) {
        bail!("{} has item {id:?}, which {} does not have: they are not of the same set", b.name, a.name);
    }
    let pair = |id: &String| {
        let first = &a.entries[id];
        let second = b.entries.get(id).with_context(|| {
            format!(
                "{} has item {id:?}, which {} does not have: they are not of the same set",
                a.name, b.name
            )
        })?;
        if first.cluster != second.cluster || first.question != second.question {
            bail!("item {id:?} is another question in {} than in {}", a.name, b.name);
        }
        Ok(Pair {
            id: id.clone(),
            cluster: first.cluster.clone(),
            group: first.group.clone(),
            scores: [first.score, second.score],
            question: first.question.clone(),
            responses: [first.response.clone(), second.response.clone()],
        })
    };
    a.order.iter().map(pair).collect()
}
