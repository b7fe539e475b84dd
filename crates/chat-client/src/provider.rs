//! What differs between the servers' interfaces: address, headers, body.

use reqwest::RequestBuilder;
use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value, json};

use crate::Error;
use crate::request::{ChatRequest, Reasoning};

/// Version of Anthropic's interface.
const ANTHROPIC_VERSION: &str = "2023-06-01";

/// Most tokens of a reply where none are given: Anthropic's interface demands a number.
const MAX_TOKENS: u32 = 4096;

/// An interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// `/v1/chat/completions`, as OpenAI, vLLM, SGLang, llama.cpp, Ollama, Together, Groq, OpenRouter and others have it.
    OpenAi,
    /// Anthropic's `/v1/messages`.
    Anthropic,
}

impl Provider {
    /// The one that an address speaks.
    pub fn of(endpoint: &str) -> Self {
        let host = reqwest::Url::parse(endpoint).ok().and_then(|url| url.host_str().map(str::to_owned));
        let own = host.is_some_and(|host| host == "anthropic.com" || host.ends_with(".anthropic.com"));
        if own || endpoint.trim_end_matches('/').ends_with("/messages") {
            Self::Anthropic
        } else {
            Self::OpenAi
        }
    }

    /// The whole address for a base address.
    pub fn url(self, endpoint: &str) -> Result<String, Error> {
        let trimmed = base(endpoint)?;
        let path = match self {
            Self::OpenAi => "/chat/completions",
            Self::Anthropic => "/messages",
        };
        Ok(if trimmed.ends_with(path) { trimmed } else { format!("{trimmed}{path}") })
    }

    /// Puts the key where this interface wants it.
    pub(crate) fn authorize(self, request: RequestBuilder, key: Option<&SecretString>) -> RequestBuilder {
        let request = match self {
            Self::OpenAi => request,
            Self::Anthropic => request.header("anthropic-version", ANTHROPIC_VERSION),
        };
        match (self, key) {
            (_, None) => request,
            (Self::OpenAi, Some(key)) => request.bearer_auth(key.expose_secret()),
            (Self::Anthropic, Some(key)) => {
                // A key that no header can hold is sent by nobody: the server then says that it is missing.
                let mut value =
                    HeaderValue::from_str(key.expose_secret()).unwrap_or(HeaderValue::from_static(""));
                value.set_sensitive(true);
                request.header("x-api-key", value)
            }
        }
    }

    /// The body to send.
    pub fn body(self, request: &ChatRequest, stream: bool) -> Value {
        let mut body = match self {
            Self::OpenAi => request.body(),
            Self::Anthropic => messages_body(request),
        };
        if stream {
            body["stream"] = true.into();
            if self == Self::OpenAi {
                body["stream_options"] = json!({"include_usage": true});
            }
        }
        body
    }
}

fn messages_body(request: &ChatRequest) -> Value {
    let mut body = Map::new();
    body.insert("model".into(), request.model.clone().into());
    let limit = request.max_tokens.unwrap_or(MAX_TOKENS);
    body.insert("max_tokens".into(), limit.into());
    let (system, others): (Vec<_>, Vec<_>) = request.messages.iter().partition(|m| m.role == "system");
    let system: Vec<&str> = system.iter().map(|m| m.content.as_str()).collect();
    if !system.is_empty() {
        body.insert("system".into(), system.join("\n\n").into());
    }
    body.insert("messages".into(), json!(others));
    for (name, value) in [("temperature", request.temperature), ("top_p", request.top_p)] {
        if let Some(value) = value {
            body.insert(name.into(), value.into());
        }
    }
    if let Some(Reasoning::Budget(tokens)) = request.reasoning {
        body.insert("thinking".into(), json!({"type": "enabled", "budget_tokens": tokens}));
    }
    body.extend(request.extra.clone());
    body.into()
}

/// A base address that can be used, without a slash at its end.
pub(crate) fn base(endpoint: &str) -> Result<String, Error> {
    let bad = |reason: &str| Error::Endpoint { url: endpoint.into(), reason: reason.into() };
    let url = reqwest::Url::parse(endpoint).map_err(|e| bad(&e.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(bad("is neither http nor https"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("must not hold a user or password; use the key's environment variable"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("must not hold a query or fragment"));
    }
    Ok(endpoint.trim_end_matches('/').to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::ChatMessage;

    #[test]
    fn a_base_url_is_completed() {
        let url = |endpoint: &str| Provider::of(endpoint).url(endpoint).unwrap();
        assert_eq!(url("http://localhost:8000/v1/"), "http://localhost:8000/v1/chat/completions");
        assert_eq!(url("https://h/v1/chat/completions"), "https://h/v1/chat/completions");
        assert_eq!(url("https://api.anthropic.com/v1"), "https://api.anthropic.com/v1/messages");
        assert_eq!(url("http://h:1/v1/messages"), "http://h:1/v1/messages");
        assert_eq!(url("https://notanthropic.com/v1"), "https://notanthropic.com/v1/chat/completions");
        for bad in ["localhost:8000", "ftp://x/v1", "", "https://user:secret@h/v1", "https://h/v1?key=1"] {
            assert!(Provider::of(bad).url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn anthropic_takes_the_system_text_apart_and_wants_a_limit() {
        let request = ChatRequest {
            model: "m".into(),
            messages: vec![ChatMessage::system("be brief"), ChatMessage::user("Hi")],
            reasoning: Some(Reasoning::Budget(1024)),
            seed: Some(1),
            ..ChatRequest::default()
        };
        let want = json!({
            "model": "m", "max_tokens": MAX_TOKENS, "system": "be brief",
            "messages": [{"role": "user", "content": "Hi"}],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        });
        assert_eq!(Provider::Anthropic.body(&request, false), want);
        assert_eq!(Provider::OpenAi.body(&request, true)["stream_options"], json!({"include_usage": true}));
    }
}
