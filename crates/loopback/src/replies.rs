//! What the model says: it depends on the request alone.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

/// A reply's parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Said {
    pub text: String,
    pub finish: &'static str,
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
}

/// A reply that is given beforehand.
#[derive(Debug, Clone, Deserialize)]
pub struct Line {
    contains: String,
    reply: String,
}

/// Reads a file of such lines.
pub fn script(path: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| path.display().to_string())).collect()
}

/// The reply to a request's body.
pub fn said(request: &Value, words: usize, script: &[Line]) -> Said {
    let messages = request["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let all: Vec<&str> = messages.iter().filter_map(|message| message["content"].as_str()).collect();
    let content = all.join("\n\n");
    let part = |name: &str| {
        let (open, close) = (format!("<{name}>\n"), format!("\n</{name}>"));
        let rest = content.split(&open).nth(1)?;
        Some(rest.split(&close).next().unwrap_or_default().to_string())
    };
    let task = part("task").unwrap_or_default();
    let is_json = !request["response_format"].is_null();
    let scripted = script.iter().find(|line| content.contains(&line.contains));
    let (text, finish) = if let Some(line) = scripted {
        (line.reply.clone(), "stop")
    } else if let (Some(a), Some(b)) = (part("answer_a"), part("answer_b")) {
        let worth = |text: &str| text.matches("improved").count();
        let verdict = match worth(&a).cmp(&worth(&b)) {
            std::cmp::Ordering::Greater => "A",
            std::cmp::Ordering::Less => "B",
            std::cmp::Ordering::Equal => "tie",
        };
        // A judge that always prefers what it sees first.
        let verdict = if task.starts_with("biased") { "A" } else { verdict };
        (form(is_json, &[("verdict", verdict.into())]), "stop")
    } else if content.contains("<score>") || content.contains("\"score\"") {
        let score = 5 + part("answer").unwrap_or_default().matches("improved").count();
        (form(is_json, &[("score", score.into())]), "stop")
    } else if let Some(answer) = part("answer") {
        revised(&task, &answer, words, is_json)
    } else if is_json {
        (json!({"ok": true}).to_string(), "stop")
    } else {
        (format!("A much better answer to this: {content}{}", filler(words)), "stop")
    };
    let tokens = |text: &str| text.len().div_ceil(4);
    let limit = ["max_tokens", "max_completion_tokens"].into_iter().find_map(|name| request[name].as_u64());
    // What is too long takes all that it may.
    let completion_tokens = match (finish, limit) {
        ("length", Some(limit)) => limit as usize,
        _ => tokens(&text),
    };
    Said { prompt_tokens: tokens(&content), completion_tokens, text, finish }
}

/// Parts by a schema or between markers.
fn form(is_json: bool, parts: &[(&str, Value)]) -> String {
    let all = [("reasoning", Value::from("as asked"))].into_iter().chain(parts.iter().cloned());
    if is_json {
        let map: serde_json::Map<String, Value> = all.map(|(name, value)| (name.into(), value)).collect();
        return Value::from(map).to_string();
    }
    let plain = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let parts: Vec<String> =
        all.map(|(name, value)| format!("<{name}>\n{}\n</{name}>\n", plain(value))).collect();
    parts.concat()
}

fn revised(task: &str, answer: &str, words: usize, is_json: bool) -> (String, &'static str) {
    let text = format!("{answer}, improved{}", filler(words));
    match task.strip_prefix("say ") {
        Some("length") => (form(is_json, &[("revision", text.into())]), "length"),
        Some("filtered") => (String::new(), "content_filter"),
        Some("unchanged") => (form(is_json, &[("revision", answer.into())]), "stop"),
        Some("alludes") => {
            (form(is_json, &[("revision", format!("In the corrected version: {text}").into())]), "stop")
        }
        Some("refused") => ("I'm sorry, but I can't help with that.".into(), "stop"),
        Some("never_marked") => ("no".into(), "stop"),
        _ => (form(is_json, &[("revision", text.into())]), "stop"),
    }
}

fn filler(words: usize) -> String {
    let words: Vec<String> = (0..words).map(|i| format!(" word{}", i % 10)).collect();
    words.concat()
}

/// OpenAI's form.
pub fn completion(said: &Said) -> Value {
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "loopback",
        "choices": [{
            "index": 0, "finish_reason": said.finish, "message": {"role": "assistant", "content": said.text},
        }],
        "usage": usage(said),
    })
}

fn usage(said: &Said) -> Value {
    json!({
        "prompt_tokens": said.prompt_tokens, "completion_tokens": said.completion_tokens,
        "total_tokens": said.prompt_tokens + said.completion_tokens,
    })
}

/// The same in pieces.
pub fn events(said: &Said) -> String {
    let event = |value: Value| format!("data: {value}\n\n");
    let chars: Vec<char> = said.text.chars().collect();
    let pieces = chars.chunks(16).map(|piece| piece.iter().collect::<String>());
    let mut text: String =
        pieces.map(|piece| event(json!({"choices": [{"index": 0, "delta": {"content": piece}}]}))).collect();
    text += &event(json!({"choices": [{"index": 0, "delta": {}, "finish_reason": said.finish}]}));
    text += &event(json!({"choices": [], "usage": usage(said)}));
    text + "data: [DONE]\n\n"
}

/// Anthropic's form.
pub fn message(said: &Said) -> Value {
    let stop = if said.finish == "length" { "max_tokens" } else { "end_turn" };
    json!({
        "id": "msg_1", "type": "message", "role": "assistant", "model": "loopback",
        "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": said.text}],
        "stop_reason": stop,
        "usage": {"input_tokens": said.prompt_tokens, "output_tokens": said.completion_tokens},
    })
}
