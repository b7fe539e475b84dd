//! Replies that come in pieces (server-sent events), put together to the form that comes whole.

use serde_json::{Map, Value, json};

/// Collects the events of one reply.
#[derive(Debug, Default)]
pub struct Collected {
    line: Vec<u8>,
    content: String,
    reasoning: String,
    refusal: String,
    finish: Option<Value>,
    usage: Map<String, Value>,
    is_anthropic: bool,
    ended: bool,
    events: usize,
}

impl Collected {
    /// Takes the next bytes. An error is what the server reported in the stream.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), String> {
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                self.take(&line)?;
            } else {
                self.line.push(byte);
            }
        }
        Ok(())
    }

    fn take(&mut self, line: &[u8]) -> Result<(), String> {
        let Some(data) = line.strip_prefix(b"data:") else { return Ok(()) };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            self.ended = true;
            return Ok(());
        }
        let event: Value = serde_json::from_slice(data).map_err(|e| format!("an event is not JSON: {e}"))?;
        if !event["error"].is_null() {
            let text: String = event["error"].to_string().chars().take(300).collect();
            return Err(format!("the stream ended with an error: {text}"));
        }
        self.events += 1;
        match event["type"].as_str() {
            Some(kind) => self.anthropic(kind, &event),
            None => self.openai(&event),
        }
        Ok(())
    }

    fn openai(&mut self, event: &Value) {
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        add(&mut self.content, &delta["content"]);
        let names = ["reasoning_content", "reasoning"];
        if let Some(name) = names.into_iter().find(|name| delta[*name].is_string()) {
            add(&mut self.reasoning, &delta[name]);
        }
        add(&mut self.refusal, &delta["refusal"]);
        if !choice["finish_reason"].is_null() {
            self.finish = Some(choice["finish_reason"].clone());
        }
        self.count(&event["usage"]);
    }

    fn anthropic(&mut self, kind: &str, event: &Value) {
        self.is_anthropic = true;
        match kind {
            "message_start" => self.count(&event["message"]["usage"]),
            "content_block_delta" => {
                add(&mut self.content, &event["delta"]["text"]);
                add(&mut self.reasoning, &event["delta"]["thinking"]);
            }
            "message_delta" => {
                self.finish = Some(event["delta"]["stop_reason"].clone());
                self.count(&event["usage"]);
            }
            "message_stop" => self.ended = true,
            _ => {}
        }
    }

    fn count(&mut self, usage: &Value) {
        self.usage.extend(usage.as_object().cloned().unwrap_or_default());
    }

    /// The reply as it would have come whole. An error where the stream broke off before its end.
    pub fn finish(mut self) -> Result<String, String> {
        let line = std::mem::take(&mut self.line);
        self.take(&line)?;
        if !self.ended && self.finish.is_none() {
            return Err(format!("the stream broke off after {} events", self.events));
        }
        let usage = Value::from(self.usage);
        let whole = if self.is_anthropic {
            let thought = json!({"type": "thinking", "thinking": self.reasoning});
            let text = json!({"type": "text", "text": self.content});
            json!({"type": "message", "content": [thought, text], "stop_reason": self.finish, "usage": usage})
        } else {
            let refusal = (!self.refusal.is_empty()).then_some(self.refusal);
            let message = json!({
                "role": "assistant", "content": self.content, "reasoning_content": self.reasoning, "refusal": refusal,
            });
            json!({"choices": [{"index": 0, "message": message, "finish_reason": self.finish}], "usage": usage})
        };
        Ok(whole.to_string())
    }
}

fn add(text: &mut String, piece: &Value) {
    text.push_str(piece.as_str().unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reply;

    fn collect(text: &str, by: usize) -> Result<Reply, String> {
        let mut all = Collected::default();
        for piece in text.as_bytes().chunks(by) {
            all.push(piece)?;
        }
        Reply::parse(all.finish()?.as_bytes())
    }

    const OPENAI: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"hm\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"Grü\"}}]}\r\n\r\n\
        : keep-alive\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"ße\"},\"finish_reason\":\"stop\"}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":2,\"completion_tokens\":3,\"total_tokens\":5}}\n\ndata: [DONE]\n\n";

    #[test]
    fn pieces_of_any_size_make_the_same_reply() {
        for by in [1, 2, 7, 10_000] {
            let reply = collect(OPENAI, by).unwrap();
            assert_eq!((reply.content(), reply.reasoning(), reply.finish_reason()), ("Grüße", "hm", "stop"));
            assert_eq!(reply.usage().total_tokens, 5);
        }
    }

    #[test]
    fn anthropic_events_are_put_together() {
        let text = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":9}}}\n\n\
            data: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"thinking_delta\",\"thinking\":\"so\"}}\n\n\
            data: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"Hi\"}}\n\n\
            data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":4}}\n\n\
            data: {\"type\":\"message_stop\"}\n\n";
        let reply = collect(text, 5).unwrap();
        assert_eq!((reply.content(), reply.reasoning(), reply.finish_reason()), ("Hi", "so", "stop"));
        assert_eq!(reply.usage().total_tokens, 13);
    }

    #[test]
    fn a_stream_that_breaks_off_or_fails_is_no_reply() {
        let cut =
            OPENAI.split_once(",\"finish_reason").map(|(start, _)| format!("{start}}}]}}\n\n")).unwrap();
        assert!(collect(&cut, 9).unwrap_err().contains("broke off"));
        assert!(
            collect("data: {\"error\":{\"message\":\"overloaded\"}}\n\n", 9)
                .unwrap_err()
                .contains("overloaded")
        );
    }
}
