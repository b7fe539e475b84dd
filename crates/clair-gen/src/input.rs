//! Input rows: a prompt and the target model's answers.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Result, bail};
use chat_client::ChatMessage;
use pref_data::{each_jsonl, row_id};
use serde_json::Value;

use crate::args::Method;

/// A task with answers to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The `id` column, or the row's number from 0.
    pub id: String,
    /// The conversation up to the answer.
    pub messages: Vec<ChatMessage>,
    /// The answers: column `response`, or `responses`.
    pub responses: Vec<String>,
    /// Scores of the answers, where the row has them.
    pub scores: Vec<f64>,
}

impl Answer {
    /// The task as text: the last user turn, or the whole conversation when there are several.
    pub fn prompt(&self) -> String {
        match self.messages.as_slice() {
            [only] => only.content.clone(),
            all => all.iter().map(|m| format!("{}: {}", m.role, m.content)).collect::<Vec<_>>().join("\n\n"),
        }
    }

    /// The first answer.
    pub fn response(&self) -> &str {
        self.responses.first().map_or("", String::as_str)
    }
}

/// Reads rows `{"prompt": text or messages, "response": text or "responses": [text …], "scores": [number …] where
/// known, "id": optional}`, and checks that they have what the methods need.
pub fn read(path: &Path, methods: &[Method]) -> Result<Vec<Answer>> {
    let mut seen = HashSet::new();
    let (mut answers, mut failure) = (Vec::new(), None);
    each_jsonl(path, |line, row| {
        if failure.is_some() {
            return;
        }
        let answer = parse(&row, answers.len()).and_then(|answer| check(answer, methods));
        match answer {
            Ok(answer) if seen.insert(answer.id.clone()) => answers.push(answer),
            Ok(answer) => {
                failure = Some(format!("{line}: the id {:?} stands twice; ids must be unique", answer.id));
            }
            Err(reason) => failure = Some(format!("{line}: {reason}")),
        }
    })?;
    match failure {
        Some(reason) => bail!("{}:{reason}", path.display()),
        None if answers.is_empty() => bail!("{}: holds no rows", path.display()),
        None => Ok(answers),
    }
}

fn check(answer: Answer, methods: &[Method]) -> Result<Answer, String> {
    let judges = methods.iter().any(|method| matches!(method, Method::Judge | Method::JudgeOffpolicy));
    if judges && answer.responses.len() < 2 {
        return Err("a judge needs two or more answers: column \"responses\" with a list of texts".into());
    }
    Ok(answer)
}

fn parse(row: &Value, number: usize) -> Result<Answer, String> {
    let columns = || row.as_object().map(|map| map.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    let prompt = &row["prompt"];
    let messages = match prompt {
        Value::String(text) => vec![ChatMessage::user(text)],
        Value::Array(_) => serde_json::from_value(prompt.clone())
            .map_err(|e| format!("column \"prompt\" is no list of messages with role and content: {e}"))?,
        _ => {
            return Err(format!("no column \"prompt\" with text or messages; found columns {:?}", columns()));
        }
    };
    if messages.is_empty() {
        return Err("column \"prompt\" is an empty list".into());
    }
    let responses: Vec<String> = match (&row["response"], &row["responses"]) {
        (Value::String(text), Value::Null) => vec![text.clone()],
        (_, list @ Value::Array(all)) if !all.is_empty() => serde_json::from_value(list.clone())
            .map_err(|_| "column \"responses\" is no list of texts".to_string())?,
        _ => {
            return Err(format!(
                "no column \"response\" with the answer's text; found columns {:?} (make answers with `sample`)",
                columns()
            ));
        }
    };
    let scores: Vec<f64> = match &row["scores"] {
        Value::Null => Vec::new(),
        list => serde_json::from_value(list.clone())
            .map_err(|_| "column \"scores\" is no list of numbers".to_string())?,
    };
    if !scores.is_empty() && scores.len() != responses.len() {
        return Err(format!("{} scores for {} responses", scores.len(), responses.len()));
    }
    let id = row_id(row.get("id"), number);
    Ok(Answer { id, messages, responses, scores })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rows_are_read_and_checked() {
        let row = json!({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2.5]});
        let answer = parse(&row, 7).unwrap();
        assert_eq!((answer.id.as_str(), answer.response(), &answer.scores[..]), ("7", "a", &[1.0, 2.5][..]));
        for (row, part) in [
            (json!({"prompt": "p"}), "no column \"response\""),
            (json!({"prompt": "p", "responses": []}), "no column \"response\""),
            (json!({"prompt": "p", "responses": ["a", 1]}), "no list of texts"),
            (json!({"prompt": "p", "responses": ["a"], "scores": [1, 2]}), "2 scores for 1"),
            (json!({"prompt": [], "response": "a"}), "empty list"),
        ] {
            let error = parse(&row, 0).unwrap_err();
            assert!(error.contains(part), "{row}: {error}");
        }
        let one = parse(&json!({"prompt": "p", "response": "a"}), 0).unwrap();
        assert!(check(one.clone(), &[Method::Judge]).is_err() && check(one, &[Method::Clair]).is_ok());
    }
}
