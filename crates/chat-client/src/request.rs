//! Requests with their key, and typed access to raw replies.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text.
    pub content: String,
}

/// A chat completion request.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// Model name.
    pub model: String,
    /// The conversation.
    pub messages: Vec<ChatMessage>,
    /// Sampling temperature; the server's default where `None`.
    pub temperature: Option<f64>,
    /// Nucleus; the server's default where `None`.
    pub top_p: Option<f64>,
    /// Most tokens of the reply; the server's default where `None`.
    pub max_tokens: Option<u32>,
    /// Seed; not sent where `None`.
    pub seed: Option<u64>,
    /// Which of several samples of the same request this is. Not sent, but part of the key.
    pub sample: u32,
}

impl ChatRequest {
    /// The JSON body.
    pub fn body(&self) -> Value {
        let mut body = Map::new();
        body.insert("model".into(), self.model.clone().into());
        body.insert("messages".into(), json!(self.messages));
        let options = [
            ("temperature", self.temperature.map(Value::from)),
            ("top_p", self.top_p.map(Value::from)),
            ("max_tokens", self.max_tokens.map(Value::from)),
            ("seed", self.seed.map(|seed| Value::from(seed.wrapping_add(u64::from(self.sample))))),
        ];
        body.extend(options.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))));
        body.into()
    }

    /// Key of the whole request: equal keys mean equal bodies and the same sample.
    pub fn key(&self) -> String {
        let identity = json!([self.body(), self.sample]);
        blake3::hash(identity.to_string().as_bytes()).to_hex()[..32].to_string()
    }
}

/// Token counts of a reply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the request.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Tokens of the reply.
    #[serde(default)]
    pub completion_tokens: u64,
    /// Both.
    #[serde(default)]
    pub total_tokens: u64,
}

/// A raw chat completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply(pub Value);

impl Reply {
    /// Accepts a reply body that is a chat completion.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(body).map_err(|e| format!("reply is not JSON: {e}"))?;
        let message = &value["choices"][0]["message"];
        if message.is_object() {
            Ok(Self(value))
        } else {
            Err("reply is no chat completion: no choices[0].message".into())
        }
    }

    /// Text of the first choice; empty where the server sent none.
    pub fn content(&self) -> &str {
        self.0["choices"][0]["message"]["content"].as_str().unwrap_or("")
    }

    /// Why the model stopped.
    pub fn finish_reason(&self) -> &str {
        self.0["choices"][0]["finish_reason"].as_str().unwrap_or("")
    }

    /// The model declined to answer.
    pub fn refusal(&self) -> Option<&str> {
        self.0["choices"][0]["message"]["refusal"].as_str()
    }

    /// Token counts; zeros where the server sent none.
    pub fn usage(&self) -> Usage {
        serde_json::from_value(self.0["usage"].clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> ChatRequest {
        let messages = vec![ChatMessage { role: "user".into(), content: "Hi".into() }];
        ChatRequest {
            model: "m".into(),
            messages,
            temperature: Some(0.7),
            top_p: None,
            max_tokens: Some(64),
            seed: None,
            sample: 0,
        }
    }

    #[test]
    fn every_part_of_a_request_is_in_its_key() {
        let base = request();
        let mut others = vec![base.clone(); 6];
        others[0].model = "n".into();
        others[1].temperature = Some(0.8);
        others[2].top_p = Some(0.9);
        others[3].max_tokens = None;
        others[4].seed = Some(1);
        others[5].sample = 1;
        assert_eq!(base.key(), request().key());
        for other in others {
            assert_ne!(base.key(), other.key(), "{other:?}");
        }
    }
}
