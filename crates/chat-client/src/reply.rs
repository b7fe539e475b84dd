//! Replies: the raw text as it came, and what is read of it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Token counts of a reply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the request.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Tokens of the reply, those of its reasoning among them.
    #[serde(default)]
    pub completion_tokens: u64,
    /// Both.
    #[serde(default)]
    pub total_tokens: u64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.total_tokens += other.total_tokens;
    }
}

/// A completion of an OpenAI-compatible server, or a message of Anthropic's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    raw: String,
    content: String,
    reasoning: String,
    finish_reason: String,
    refusal: Option<String>,
    usage: Usage,
}

#[derive(Deserialize)]
struct Completion {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Value,
}

#[derive(Deserialize)]
struct Choice {
    message: Option<Message>,
    finish_reason: Option<String>,
}

/// Servers send more than the interface says, and twice: nothing here may make a paid reply unreadable.
#[derive(Deserialize)]
struct Message {
    /// Text, or parts with text.
    #[serde(default)]
    content: Value,
    #[serde(default)]
    reasoning_content: Value,
    #[serde(default)]
    reasoning: Value,
    #[serde(default)]
    refusal: Value,
}

/// Anthropic's form.
#[derive(Deserialize)]
struct Blocks {
    content: Vec<Block>,
    stop_reason: Option<String>,
    #[serde(default)]
    usage: Value,
}

#[derive(Deserialize)]
struct Block {
    text: Option<String>,
    thinking: Option<String>,
}

/// A count; 0 where it is missing, null or no number.
fn count(usage: &Value, name: &str) -> u64 {
    let value = &usage[name];
    value.as_u64().unwrap_or_else(|| value.as_f64().unwrap_or(0.0).max(0.0) as u64)
}

impl Reply {
    /// Accepts a body that is a chat completion or a message.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        let raw = std::str::from_utf8(body).map_err(|_| "reply is not UTF-8".to_string())?;
        let parsed: Completion =
            serde_json::from_str(raw).or_else(|error| match serde_json::from_str::<Blocks>(raw) {
                Ok(_) => Ok(Completion { choices: Vec::new(), usage: Value::Null }),
                Err(_) => Err(format!("reply is not a chat completion: {error}")),
            })?;
        // A raw line break stands between values only: the text stays the same JSON on one line.
        let raw = raw.trim().replace(['\n', '\r'], " ");
        let Some(Choice { message: Some(message), finish_reason }) = parsed.choices.into_iter().next() else {
            let Ok(blocks) = serde_json::from_str::<Blocks>(&raw) else {
                return Err("reply is no chat completion: no choices[0].message".into());
            };
            return Ok(blocks.reply(raw));
        };
        let (thought, content) = apart(text_of(message.content));
        let told = [text_of(message.reasoning_content), text_of(message.reasoning), thought];
        Ok(Self {
            raw,
            content,
            reasoning: told.into_iter().find(|text| !text.is_empty()).unwrap_or_default(),
            finish_reason: plain(&finish_reason.unwrap_or_default()),
            refusal: Some(text_of(message.refusal)).filter(|text| !text.is_empty()),
            usage: Usage {
                prompt_tokens: count(&parsed.usage, "prompt_tokens"),
                completion_tokens: count(&parsed.usage, "completion_tokens"),
                total_tokens: count(&parsed.usage, "total_tokens"),
            },
        })
    }

    /// The body as it came, on one line.
    pub fn raw(&self) -> &str {
        &self.raw
    }

    /// Text of the answer; empty where the server sent none.
    pub fn content(&self) -> &str {
        &self.content
    }

    /// What a reasoning model thought before it answered, where the server tells.
    pub fn reasoning(&self) -> &str {
        &self.reasoning
    }

    /// Why the model stopped, in OpenAI's words: `stop`, `length`, `content_filter`.
    pub fn finish_reason(&self) -> &str {
        &self.finish_reason
    }

    /// The model declined to answer.
    pub fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// Token counts; zeros where the server sent none.
    pub fn usage(&self) -> Usage {
        self.usage
    }
}

impl Blocks {
    fn reply(self, raw: String) -> Reply {
        let input = ["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"];
        let prompt_tokens = input.iter().map(|name| count(&self.usage, name)).sum();
        let completion_tokens = count(&self.usage, "output_tokens");
        let all =
            |part: fn(&Block) -> Option<&String>| self.content.iter().filter_map(part).cloned().collect();
        Reply {
            content: all(|block| block.text.as_ref()),
            reasoning: all(|block| block.thinking.as_ref()),
            finish_reason: plain(&self.stop_reason.clone().unwrap_or_default()),
            refusal: None,
            usage: Usage {
                prompt_tokens,
                completion_tokens,
                total_tokens: prompt_tokens + completion_tokens,
            },
            raw,
        }
    }
}

/// What a model has thought, and said: some servers leave `<think> … </think>` in the text. The opening tag may be in the
/// prompt; one that is never closed has said nothing.
fn apart(content: String) -> (String, String) {
    let start = content.trim_start();
    let (is_open, inner) = match start.strip_prefix("<think>") {
        Some(inner) => (true, inner),
        None => (false, start),
    };
    match inner.split_once("</think>") {
        Some((thought, said)) if is_open || !thought.contains("<think>") => {
            (thought.into(), said.trim_start().into())
        }
        None if is_open => (inner.into(), String::new()),
        _ => (String::new(), content),
    }
}

/// The reasons of all servers in OpenAI's words.
fn plain(reason: &str) -> String {
    let lower = reason.to_ascii_lowercase();
    let plain = match lower.as_str() {
        "end_turn" | "stop_sequence" | "eos" | "eos_token" => "stop",
        "max_tokens" | "model_context_window_exceeded" => "length",
        "refusal" | "safety" => "content_filter",
        other => other,
    };
    plain.into()
}

/// A text, or the texts of its parts.
fn text_of(value: Value) -> String {
    match value {
        Value::String(text) => text,
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_are_read() {
        let body = r#"{"choices": [{"message": {"role": "assistant", "content": "Hi\nyou", "reasoning_content": "why"},
            "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}"#;
        let reply = Reply::parse(body.as_bytes()).unwrap();
        assert_eq!((reply.content(), reply.reasoning(), reply.finish_reason()), ("Hi\nyou", "why", "stop"));
        assert_eq!(reply.usage().total_tokens, 7);
        assert!(!reply.raw().contains('\n'));
        assert_eq!(Reply::parse(reply.raw().as_bytes()).unwrap(), reply);
    }

    #[test]
    fn messages_of_anthropic_are_read() {
        let body = r#"{"type": "message", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"},
            {"type": "text", "text": "Hi"}], "stop_reason": "max_tokens",
            "usage": {"input_tokens": 5, "cache_read_input_tokens": 2, "output_tokens": 4}}"#;
        let reply = Reply::parse(body.as_bytes()).unwrap();
        assert_eq!((reply.content(), reply.reasoning(), reply.finish_reason()), ("Hi", "hm", "length"));
        assert_eq!(reply.usage(), Usage { prompt_tokens: 7, completion_tokens: 4, total_tokens: 11 });
    }

    #[test]
    fn what_servers_send_beside_the_interface_does_not_cost_a_reply() {
        let body = r#"{"choices": [{"message": {"content": "Hi", "reasoning": "a", "reasoning_content": "b", "refusal": null},
            "finish_reason": "MAX_TOKENS"}], "usage": {"prompt_tokens": 12.0, "completion_tokens": null}}"#;
        let reply = Reply::parse(body.as_bytes()).unwrap();
        assert_eq!((reply.content(), reply.reasoning(), reply.finish_reason()), ("Hi", "b", "length"));
        assert_eq!(reply.usage(), Usage { prompt_tokens: 12, ..Usage::default() });
        let none = r#"{"content": [{"type": "text", "text": "Hi"}], "usage": {"input_tokens": null}}"#;
        assert_eq!(Reply::parse(none.as_bytes()).unwrap().usage(), Usage::default());
    }

    #[test]
    fn thoughts_in_the_text_are_kept_apart() {
        let apart = |text: &str| apart(text.to_string());
        let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
        assert_eq!(apart("<think>hm</think>\n\nParis"), pair("hm", "Paris"));
        assert_eq!(apart("hm</think>Paris"), pair("hm", "Paris"));
        assert_eq!(apart("<think>hm"), pair("hm", ""));
        assert_eq!(apart("Use <think> and </think>."), pair("", "Use <think> and </think>."));
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in
            ["", "null", "{}", "<html>", r#"{"choices": []}"#, r#"{"choices": [{}]}"#, r#"{"error": "x"}"#]
        {
            assert!(Reply::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        let parts =
            r#"{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}]}}]}"#;
        assert_eq!(Reply::parse(parts.as_bytes()).unwrap().content(), "ab");
        let none = r#"{"choices": [{"message": {"content": null, "refusal": "no"}}]}"#;
        assert_eq!(Reply::parse(none.as_bytes()).unwrap().refusal(), Some("no"));
    }
}
