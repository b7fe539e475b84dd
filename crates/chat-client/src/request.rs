//! Requests with their key.

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

impl ChatMessage {
    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".into(), content: content.into() }
    }
}

/// How a model that reasons before it answers is asked to.
#[derive(Debug, Clone, PartialEq)]
pub enum Reasoning {
    /// `reasoning_effort` of OpenAI-compatible servers.
    Effort(String),
    /// Tokens for thinking (Anthropic's `thinking.budget_tokens`).
    Budget(u32),
}

/// A chat completion request.
#[derive(Debug, Clone, Default, PartialEq)]
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
    /// Reasoning models: how much. `max_tokens` is then sent as `max_completion_tokens`.
    pub reasoning: Option<Reasoning>,
    /// JSON schema that the reply must follow, with its name.
    pub schema: Option<(String, Value)>,
    /// Further fields of the body.
    pub extra: Map<String, Value>,
    /// Which of several samples of the same request this is. Not sent, but part of the key.
    pub sample: u32,
}

impl ChatRequest {
    /// The JSON body in OpenAI's form.
    pub fn body(&self) -> Value {
        let mut body = serde_json::to_value(self.plain()).expect("a request serialises");
        if let Some(fields) = body.as_object_mut() {
            fields.extend(self.extra.clone());
        }
        body
    }

    /// [`ChatRequest::body`] as text.
    pub(crate) fn text(&self) -> String {
        if !self.extra.is_empty() {
            return self.body().to_string();
        }
        // What nearly every request is, without a tree of values in between.
        serde_json::to_string(&self.plain()).expect("a request serialises")
    }

    /// All fields but the further ones.
    fn plain(&self) -> Plain<'_> {
        let (limit, max_tokens) = match self.reasoning {
            Some(_) => (self.max_tokens, None),
            None => (None, self.max_tokens),
        };
        Plain {
            model: &self.model,
            messages: &self.messages,
            temperature: self.temperature,
            top_p: self.top_p,
            max_completion_tokens: limit,
            max_tokens,
            seed: self.seed.map(|seed| seed.wrapping_add(u64::from(self.sample))),
            reasoning_effort: self.effort(),
            response_format: self.response_format(),
        }
    }

    fn effort(&self) -> Option<Value> {
        match self.reasoning.as_ref()? {
            Reasoning::Effort(effort) => Some(effort.clone().into()),
            Reasoning::Budget(_) => None,
        }
    }

    fn response_format(&self) -> Option<Value> {
        let (name, schema) = self.schema.as_ref()?;
        Some(json!({
            "type": "json_schema",
            "json_schema": {"name": name, "strict": true, "schema": schema},
        }))
    }

    /// Key of the whole request: equal keys mean equal bodies and the same sample.
    pub fn key(&self) -> String {
        self.key_of(&self.text())
    }

    /// The same where the body is there as text.
    pub(crate) fn key_of(&self, body: &str) -> String {
        let budget = match self.reasoning {
            Some(Reasoning::Budget(tokens)) => Some(tokens),
            _ => None,
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"[").update(body.as_bytes()).update(format!(",{}", self.sample).as_bytes());
        if let Some(tokens) = budget {
            hasher.update(format!(",{tokens}").as_bytes());
        }
        hasher.update(b"]").finalize().to_hex()[..32].to_string()
    }
}

/// The fields of a body in their order.
#[derive(Serialize)]
struct Plain<'a> {
    model: &'a str,
    messages: &'a [ChatMessage],
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_effort: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_format: Option<Value>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> ChatRequest {
        ChatRequest {
            model: "m".into(),
            messages: vec![ChatMessage::user("Hi")],
            temperature: Some(0.7),
            max_tokens: Some(64),
            ..ChatRequest::default()
        }
    }

    #[test]
    fn every_part_of_a_request_is_in_its_key() {
        let base = request();
        let mut others = vec![base.clone(); 10];
        others[0].model = "n".into();
        others[1].temperature = Some(0.8);
        others[2].top_p = Some(0.9);
        others[3].max_tokens = None;
        others[4].seed = Some(1);
        others[5].sample = 1;
        others[6].reasoning = Some(Reasoning::Effort("low".into()));
        others[7].reasoning = Some(Reasoning::Budget(2048));
        others[8].schema = Some(("s".into(), json!({"type": "object"})));
        others[9].extra.insert("top_k".into(), 5.into());
        assert_eq!(base.key(), request().key());
        // Keys of earlier runs stay what they are.
        for request in &others {
            let tree = request.body().to_string();
            assert_eq!(request.text(), tree);
        }
        let mut keys: Vec<String> = others.iter().map(ChatRequest::key).collect();
        keys.push(base.key());
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 11);
    }

    #[test]
    fn reasoning_models_get_their_own_fields() {
        let mut request = request();
        request.reasoning = Some(Reasoning::Effort("high".into()));
        let body = request.body();
        assert_eq!((&body["reasoning_effort"], &body["max_completion_tokens"]), (&json!("high"), &json!(64)));
        assert!(body.get("max_tokens").is_none());
    }
}
