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
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    message: Option<Message>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    /// Text, or parts with text.
    #[serde(default)]
    content: Value,
    #[serde(alias = "reasoning")]
    reasoning_content: Option<Value>,
    refusal: Option<String>,
}

/// Anthropic's form.
#[derive(Deserialize)]
struct Blocks {
    content: Vec<Block>,
    stop_reason: Option<String>,
    #[serde(default)]
    usage: BlockUsage,
}

#[derive(Deserialize)]
struct Block {
    text: Option<String>,
    thinking: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct BlockUsage {
    #[serde(rename = "input_tokens")]
    input: u64,
    #[serde(rename = "output_tokens")]
    output: u64,
    #[serde(rename = "cache_creation_input_tokens")]
    cached: Option<u64>,
    #[serde(rename = "cache_read_input_tokens")]
    from_cache: Option<u64>,
}

impl Reply {
    /// Accepts a body that is a chat completion or a message.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        let raw = std::str::from_utf8(body).map_err(|_| "reply is not UTF-8".to_string())?;
        let parsed: Completion =
            serde_json::from_str(raw).or_else(|error| match serde_json::from_str::<Blocks>(raw) {
                Ok(_) => Ok(Completion { choices: Vec::new(), usage: None }),
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
        Ok(Self {
            raw,
            content: text_of(message.content),
            reasoning: message.reasoning_content.map(text_of).unwrap_or_default(),
            finish_reason: finish_reason.unwrap_or_default(),
            refusal: message.refusal.filter(|text| !text.is_empty()),
            usage: parsed.usage.unwrap_or_default(),
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
        let finish = match self.stop_reason.as_deref().unwrap_or_default() {
            "end_turn" | "stop_sequence" => "stop",
            "max_tokens" | "model_context_window_exceeded" => "length",
            "refusal" => "content_filter",
            other => other,
        };
        let usage = &self.usage;
        let prompt_tokens = usage.input + usage.cached.unwrap_or(0) + usage.from_cache.unwrap_or(0);
        let completion_tokens = usage.output;
        let all =
            |part: fn(&Block) -> Option<&String>| self.content.iter().filter_map(part).cloned().collect();
        Reply {
            content: all(|block| block.text.as_ref()),
            reasoning: all(|block| block.thinking.as_ref()),
            finish_reason: finish.into(),
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
