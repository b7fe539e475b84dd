//! Input rows: a prompt and the target model's answer.

use std::path::Path;

use anyhow::{Context, Result, bail};
use chat_client::ChatMessage;
use pref_data::{read_jsonl, row_id};
use serde_json::Value;

/// One answer to revise.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The `id` column, or the row's number from 0.
    pub id: String,
    /// The conversation up to the answer.
    pub messages: Vec<ChatMessage>,
    /// The answer.
    pub response: String,
}

impl Answer {
    /// The task as text: the last user turn, or the whole conversation when there are several.
    pub fn prompt(&self) -> String {
        match self.messages.as_slice() {
            [only] => only.content.clone(),
            all => all.iter().map(|m| format!("{}: {}", m.role, m.content)).collect::<Vec<_>>().join("\n\n"),
        }
    }
}

/// Reads rows `{"prompt": text or messages, "response": text, "id": optional}`.
pub fn read(path: &Path) -> Result<Vec<Answer>> {
    let rows = read_jsonl(path)?;
    if rows.is_empty() {
        bail!("{}: holds no rows", path.display());
    }
    let mut seen = std::collections::HashSet::new();
    let answers = rows.into_iter().enumerate().map(|(number, (line, row))| {
        let answer = parse(&row, number)
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("{}:{line}", path.display()))?;
        if !seen.insert(answer.id.clone()) {
            bail!("{}:{line}: the id {:?} stands twice; ids must be unique", path.display(), answer.id);
        }
        Ok(answer)
    });
    answers.collect()
}

fn parse(row: &Value, number: usize) -> Result<Answer, String> {
    let columns = || row.as_object().map(|map| map.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    let prompt = &row["prompt"];
    let messages = match prompt {
        Value::String(text) => vec![ChatMessage { role: "user".into(), content: text.clone() }],
        Value::Array(_) => serde_json::from_value(prompt.clone())
            .map_err(|e| format!("column \"prompt\" is no list of messages with role and content: {e}"))?,
        _ => {
            return Err(format!("no column \"prompt\" with text or messages; found columns {:?}", columns()));
        }
    };
    if messages.is_empty() {
        return Err("column \"prompt\" is an empty list".into());
    }
    let response = row["response"].as_str().ok_or_else(|| {
        format!(
            "no column \"response\" with the answer's text; found columns {:?} (make answers with `sample`)",
            columns()
        )
    })?;
    let id = row_id(row.get("id"), number);
    Ok(Answer { id, messages, response: response.into() })
}
