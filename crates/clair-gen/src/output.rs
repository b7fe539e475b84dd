//! The output directory.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use chat_client::{ChatMessage, Reply, Usage};
use pref_data::{Card, Contrast, write_atomic, write_jsonl, write_parquet_pairs};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::Method;
use crate::asker::Spent;
use crate::input::Answer;

/// A finished pair.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The row it was made of.
    pub answer: Arc<Answer>,
    /// The better text.
    pub chosen: String,
    /// The worse text.
    pub rejected: String,
    /// Why it was made so.
    pub rational: String,
    /// Why the model stopped.
    pub finish_reason: String,
    /// How much the texts differ.
    pub contrast: Contrast,
    /// Whether a judge prefers the chosen text in both orders, where one was asked.
    pub verified: Option<bool>,
    /// Whether a judge saw no winner, where one was asked.
    pub tie: Option<bool>,
    /// Scores, or wins, of the chosen and the rejected text, where there are any.
    pub scores: Option<[f64; 2]>,
    /// What its requests took.
    pub spent: Spent,
}

/// A row without a pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failed {
    /// The row's id.
    pub id: String,
    /// Short reason.
    pub reason: String,
    /// Requests made for the last question.
    pub attempts: u32,
    /// What the last of them gave.
    pub last_error: String,
}

impl Pair {
    /// Two texts for a row.
    pub fn new(answer: Arc<Answer>, chosen: String, rejected: String, spent: Spent) -> Self {
        Self {
            contrast: Contrast::of(&rejected, &chosen),
            answer,
            chosen,
            rejected,
            rational: String::new(),
            finish_reason: String::new(),
            verified: None,
            tie: None,
            scores: None,
            spent,
        }
    }

    /// With why the model stopped.
    #[must_use]
    pub fn finished(self, reply: &Reply) -> Self {
        Self { finish_reason: reply.finish_reason().into(), ..self }
    }

    /// The row with the columns of the published CLAIR set, and ours after them.
    pub fn row(&self) -> Row<'_> {
        let with = |content: &'_ str| {
            let answer = ChatMessage { role: "assistant".into(), content: content.into() };
            self.answer.messages.iter().cloned().chain([answer]).collect()
        };
        Row {
            id: &self.answer.id,
            prompt: self.answer.prompt(),
            chosen: with(&self.chosen),
            rejected: with(&self.rejected),
            rational: &self.rational,
            finish_reason: &self.finish_reason,
            usage: self.spent.usage,
            jaccard: self.contrast.jaccard,
            levenshtein: self.contrast.levenshtein,
            length_change: self.contrast.length_change,
            verified: self.verified,
            tie: self.tie,
            chosen_score: self.scores.map(|scores| scores[0]),
            rejected_score: self.scores.map(|scores| scores[1]),
        }
    }
}

/// A pair as it is written.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct Row<'a> {
    pub id: &'a str,
    pub prompt: String,
    pub chosen: Vec<ChatMessage>,
    pub rejected: Vec<ChatMessage>,
    pub rational: &'a str,
    pub finish_reason: &'a str,
    pub usage: Usage,
    pub jaccard: f64,
    pub levenshtein: f64,
    pub length_change: f64,
    pub verified: Option<bool>,
    pub tie: Option<bool>,
    pub chosen_score: Option<f64>,
    pub rejected_score: Option<f64>,
}

/// Writes pairs and failures, in the order of the input, then the manifest. Its presence means that the
/// directory is complete.
pub fn write(dir: &Path, method: Method, pairs: &[Pair], failed: &[Failed], about: &Value) -> Result<()> {
    // Side by side: each waits for the disk.
    std::thread::scope(|scope| {
        let lines = scope.spawn(|| write_jsonl(&dir.join("pairs.jsonl"), pairs.iter().map(Pair::row)));
        write_parquet_pairs(&dir.join("pairs.parquet"), pairs.iter().map(Pair::row))?;
        lines.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    write_jsonl(&dir.join("failed.jsonl"), failed)?;
    let card = card(method, pairs.len(), failed.len(), about);
    write_atomic(&dir.join("README.md"), |out| out.write_all(card.as_bytes()))?;
    let hash = |name: &str| -> Result<String> { Ok(pref_data::hash_file(&dir.join(name))?) };
    let manifest = json!({
        "pairs": pairs.len(),
        "failed": failed.len(),
        "about": about,
        "blake3": {
            "pairs.jsonl": hash("pairs.jsonl")?,
            "pairs.parquet": hash("pairs.parquet")?,
            "failed.jsonl": hash("failed.jsonl")?,
            "README.md": hash("README.md")?,
        },
    });
    let text = serde_json::to_string_pretty(&manifest)?;
    Ok(write_atomic(&dir.join("manifest.json"), |out| out.write_all(text.as_bytes()))?)
}

/// What a set of each method is, for its card.
fn about(method: Method) -> &'static str {
    match method {
        Method::Clair => {
            "Each row holds an answer of the target model (`rejected`) and a minimal revision of it by a stronger \
             model (`chosen`), made with CLAIR (contrastive learning from AI revisions, arXiv 2408.06266). Before \
             publishing, add the licence of the prompts and check the terms of the revising model."
        }
        Method::Stronger => {
            "Each row holds an answer of the target model (`rejected`) and one of a stronger model (`chosen`; the \
             method \"stronger preferred\" of arXiv 2408.06266). Before publishing, add the licence of the prompts \
             and check the terms of the stronger model."
        }
        Method::Judge | Method::JudgeOffpolicy => {
            "Each row holds two answers to a prompt, of which a judge finds one better (`chosen`; the methods \
             \"on-policy judge\" and \"off-policy judge\" of arXiv 2408.06266). Before publishing, add the licence of \
             the prompts and check the terms of the models."
        }
    }
}

/// The data card: the directory can be pushed to the Hub as it is.
fn card(method: Method, pairs: usize, failed: usize, settings: &Value) -> String {
    let known = ["method", "model", "judge_model", "temperature", "top_p", "max_tokens", "seed", "tool"];
    let setting = |name: &&'static str| match &settings[*name] {
        Value::Null => None,
        Value::String(text) => Some((*name, text.clone())),
        other => Some((*name, other.to_string())),
    };
    let mut facts = vec![("pairs", pairs.to_string()), ("answers without a pair", failed.to_string())];
    facts.extend(known.iter().filter_map(setting));
    let card = Card {
        title: "Preference pairs from revisions",
        about: about(method),
        splits: &[("train", "pairs.parquet")],
        rows: pairs,
        tags: &["preference", "clair", "dpo", "apo"],
        columns: &[
            ("id", "id of the input row"),
            ("prompt", "the task as text"),
            ("chosen", "messages: the conversation with the better answer"),
            ("rejected", "messages: the conversation with the worse answer"),
            ("rational", "the model's reasoning"),
            ("finish_reason", "why the model stopped"),
            ("usage", "tokens of all requests for the row"),
            ("jaccard", "Jaccard similarity of the two texts' words"),
            ("levenshtein", "character edit distance of the two texts"),
            ("length_change", "characters of chosen minus those of rejected"),
            ("verified", "whether a judge prefers chosen in both orders, where asked"),
            ("tie", "whether a judge saw no winner, where asked"),
            ("chosen_score", "score or wins of chosen, where a judge gave any"),
            ("rejected_score", "score or wins of rejected, where a judge gave any"),
        ],
        facts: &facts,
    };
    card.text()
}

/// The sum over rows.
pub fn usage(pairs: &[Pair]) -> Usage {
    let mut usage = Usage::default();
    pairs.iter().for_each(|pair| usage += pair.spent.usage);
    usage
}
