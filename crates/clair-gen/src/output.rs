//! The output directory.

use std::path::Path;

use anyhow::Result;
use chat_client::Usage;
use pref_data::{Card, write_atomic, write_jsonl, write_parquet_pairs};
use serde::Serialize;
use serde_json::{Value, json};

use crate::input::Answer;
use crate::parse::Revision;

/// A finished pair.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The answer that was revised.
    pub answer: Answer,
    /// The revision.
    pub revision: Revision,
    /// Why the teacher stopped.
    pub finish_reason: String,
    /// Tokens of the request.
    pub usage: Usage,
    /// Milliseconds of the request; 0 for recorded replies.
    pub latency_ms: u64,
}

/// An answer without a pair.
#[derive(Debug, Clone, Serialize)]
pub struct Failed {
    /// The answer's id.
    pub id: String,
    /// Short reason.
    pub reason: String,
    /// Requests made for it.
    pub attempts: u32,
    /// What the last of them gave.
    pub last_error: String,
}

impl Pair {
    /// The row with the columns of the published CLAIR set.
    pub fn row(&self) -> Value {
        let with = |content: &str| {
            let mut messages = json!(self.answer.messages);
            if let Some(list) = messages.as_array_mut() {
                list.push(json!({"role": "assistant", "content": content}));
            }
            messages
        };
        json!({
            "id": self.answer.id,
            "prompt": self.answer.prompt(),
            "chosen": with(&self.revision.text),
            "rejected": with(&self.answer.response),
            "rational": self.revision.reasoning,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
        })
    }
}

/// Writes pairs and failures, in the order of the input, then the manifest. Its presence means that the
/// directory is complete.
pub fn write(dir: &Path, pairs: &[Pair], failed: &[Failed], about: &Value) -> Result<()> {
    let rows: Vec<Value> = pairs.iter().map(Pair::row).collect();
    write_jsonl(&dir.join("pairs.jsonl"), &rows)?;
    write_parquet_pairs(&dir.join("pairs.parquet"), &rows)?;
    let failures: Vec<Value> = failed.iter().map(|f| json!(f)).collect();
    write_jsonl(&dir.join("failed.jsonl"), &failures)?;
    let card = card(rows.len(), failures.len(), about);
    write_atomic(&dir.join("README.md"), |out| out.write_all(card.as_bytes()))?;
    let hash = |name: &str| -> Result<String> { Ok(pref_data::hash_file(&dir.join(name))?) };
    let manifest = json!({
        "pairs": rows.len(),
        "failed": failures.len(),
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

/// The data card: the directory can be pushed to the Hub as it is.
fn card(pairs: usize, failed: usize, about: &Value) -> String {
    let known = ["method", "model", "temperature", "top_p", "max_tokens", "seed", "tool"];
    let setting = |name: &&'static str| match &about[*name] {
        Value::Null => None,
        Value::String(text) => Some((*name, text.clone())),
        other => Some((*name, other.to_string())),
    };
    let mut facts = vec![("pairs", pairs.to_string()), ("answers without a pair", failed.to_string())];
    facts.extend(known.iter().filter_map(setting));
    let card = Card {
        title: "Preference pairs from revisions",
        about: "Each row holds an answer of the target model (`rejected`) and a minimal revision of it by a stronger \
                model (`chosen`), made with CLAIR (contrastive learning from AI revisions, arXiv 2408.06266). Before \
                publishing, add the licence of the prompts and check the terms of the revising model.",
        splits: &[("train", "pairs.parquet")],
        rows: pairs,
        tags: &["preference", "clair", "dpo", "apo"],
        columns: &[
            ("id", "id of the input row"),
            ("prompt", "the task as text"),
            ("chosen", "messages: the conversation with the revised answer"),
            ("rejected", "messages: the conversation with the original answer"),
            ("rational", "the reviser's reasoning"),
            ("finish_reason", "why the reviser stopped"),
            ("usage", "tokens of the request"),
        ],
        facts: &facts,
    };
    card.text()
}
