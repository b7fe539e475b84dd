//! OpenAI's Batch API, in memory.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};

use crate::Shared;
use crate::replies::{completion, said};

#[derive(Debug)]
struct Batch {
    input: String,
    made: Instant,
    is_cancelled: bool,
    output: Option<[String; 2]>,
}

#[derive(Debug, Default)]
struct State {
    files: HashMap<String, String>,
    batches: Vec<Batch>,
    /// Tries of each item.
    tries: HashMap<String, usize>,
}

/// Files and batches.
#[derive(Debug, Default)]
pub struct Batches(Mutex<State>);

/// The status and body for a path of the API; `None` for any other path.
pub fn answer(
    shared: &Shared,
    method: &Method,
    path: &str,
    query: &str,
    body: &Bytes,
) -> Option<(u16, Bytes)> {
    let mut state = shared.batches.0.lock().unwrap_or_else(PoisonError::into_inner);
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let value = match (method.as_str(), parts.as_slice()) {
        ("POST", ["files"]) => state.upload(body)?,
        ("GET", ["files", id, "content"]) => {
            return Some((200, state.files.get(*id)?.clone().into()));
        }
        ("POST", ["batches"]) => {
            let request: Value = serde_json::from_slice(body).ok()?;
            let input = request["input_file_id"].as_str()?.to_string();
            state.batches.push(Batch { input, made: Instant::now(), is_cancelled: false, output: None });
            *shared.counts().kinds.entry("batch".into()).or_default() += 1;
            state.show(state.batches.len() - 1)
        }
        ("GET", ["batches"]) if query.starts_with("limit=") => {
            let all: Vec<Value> = (0..state.batches.len()).map(|i| state.show(i)).collect();
            json!({"data": all})
        }
        ("GET", ["batches", id]) => {
            let index = number(id)?;
            state.work(index, shared);
            state.show(index)
        }
        ("POST", ["batches", id, "cancel"]) => {
            let index = number(id)?;
            state.batches.get_mut(index)?.is_cancelled = true;
            state.show(index)
        }
        _ => return None,
    };
    Some((200, value.to_string().into()))
}

fn number(id: &str) -> Option<usize> {
    id.strip_prefix("batch_")?.parse().ok()
}

impl State {
    /// The part of a form that holds the file: what stands between two boundaries after the headers.
    fn upload(&mut self, body: &Bytes) -> Option<Value> {
        let text = std::str::from_utf8(body).ok()?;
        let boundary = text.split("\r\n").next()?;
        let part = text.split(boundary).find(|part| part.contains("filename="))?;
        let content = part.split_once("\r\n\r\n")?.1.trim_end_matches("\r\n");
        let id = format!("file-{}", self.files.len());
        self.files.insert(id.clone(), content.to_string());
        Some(json!({"id": id, "object": "file", "purpose": "batch"}))
    }

    fn show(&self, index: usize) -> Value {
        let Some(batch) = self.batches.get(index) else { return json!({"status": "failed"}) };
        let status = match (&batch.output, batch.is_cancelled) {
            (Some(_), true) => "cancelled",
            (Some(_), false) => "completed",
            (None, _) => "in_progress",
        };
        json!({
            "id": format!("batch_{index}"), "input_file_id": batch.input, "status": status,
            "output_file_id": batch.output.as_ref().map(|[output, _]| output),
            "error_file_id": batch.output.as_ref().map(|[_, errors]| errors),
        })
    }

    /// Answers the items once the batch's time has come; a cancelled one has answered half of them.
    fn work(&mut self, index: usize, shared: &Shared) {
        let wait = Duration::from_millis(shared.behaviour.batch_ms);
        let Some(batch) = self.batches.get(index) else { return };
        if batch.output.is_some() || batch.made.elapsed() < wait && !batch.is_cancelled {
            return;
        }
        let input = self.files.get(&batch.input).cloned().unwrap_or_default();
        let half = if batch.is_cancelled { input.lines().count() / 2 } else { usize::MAX };
        let (mut output, mut errors) = (String::new(), String::new());
        for (i, line) in input.lines().take(half).enumerate() {
            let Ok(item) = serde_json::from_str::<Value>(line) else { continue };
            let key = item["custom_id"].as_str().unwrap_or_default().to_string();
            let tries = self.tries.entry(key.clone()).or_default();
            *tries += 1;
            let fails = shared.behaviour.batch_faults && i.is_multiple_of(5) && *tries == 1;
            let (status, body) = if fails {
                (500, json!({"error": {"message": "oops"}}))
            } else {
                (200, completion(&said(&item["body"], shared.behaviour.words, &shared.script)))
            };
            let mut counts = shared.counts();
            *counts.kinds.entry(if fails { "batch_error" } else { "good" }.into()).or_default() += 1;
            if !fails {
                *counts.paid.entry(blake3::hash(key.as_bytes()).into()).or_default() += 1;
            }
            let answer =
                json!({"custom_id": key, "response": {"status_code": status, "body": body}, "error": null});
            let file = if fails { &mut errors } else { &mut output };
            writeln!(file, "{answer}").ok();
        }
        let ids = [format!("file-out-{index}"), format!("file-err-{index}")];
        self.files.insert(ids[0].clone(), output);
        self.files.insert(ids[1].clone(), errors);
        self.batches[index].output = Some(ids);
    }
}
