//! The output directory.

use std::path::Path;

use anyhow::Result;
use chat_client::Usage;
use pref_data::{write_atomic, write_jsonl, write_parquet_pairs};
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
    let hash = |name: &str| -> Result<String> { Ok(pref_data::hash_file(&dir.join(name))?) };
    let manifest = json!({
        "pairs": rows.len(),
        "failed": failures.len(),
        "about": about,
        "blake3": {
            "pairs.jsonl": hash("pairs.jsonl")?,
            "pairs.parquet": hash("pairs.parquet")?,
            "failed.jsonl": hash("failed.jsonl")?,
        },
    });
    let text = serde_json::to_string_pretty(&manifest)?;
    Ok(write_atomic(&dir.join("manifest.json"), |out| out.write_all(text.as_bytes()))?)
}
