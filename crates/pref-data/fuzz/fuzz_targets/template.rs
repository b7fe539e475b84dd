//! Chat templates are foreign code: any text renders, or fails with an error, in bounded time and memory.
#![no_main]

use jiff::civil::DateTime;
use libfuzzer_sys::fuzz_target;
use pref_data::{ChatTemplate, Extras, Message};
use serde_json::{Map, json};

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::new(source, Map::new(), DateTime::MIN) else { return };
    let message = |value: serde_json::Value| -> Message { value.as_object().cloned().unwrap_or_default() };
    let messages = [
        message(json!({"role": "system", "content": "s"})),
        message(json!({"role": "user", "content": "é\n", "tool_calls": [{"a": 1.5}]})),
    ];
    let extras = Extras { tools: Some(json!([{"name": "f"}])), ..Extras::default() };
    let _ = template.render(&messages, &extras, true);
});
