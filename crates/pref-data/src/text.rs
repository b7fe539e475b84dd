//! Text and conversations, and the start that two of them share.

use serde_json::{Map, Value};

/// A chat message; keys besides `role` and `content` are kept for the template.
pub type Message = Map<String, Value>;

/// Text, or a conversation.
#[derive(Debug, Clone, PartialEq)]
pub enum Text {
    /// A string.
    Plain(String),
    /// A list of messages.
    Chat(Vec<Message>),
}

impl Text {
    /// Reads a string or a list of messages.
    pub(crate) fn parse(value: Value, column: &str) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(Self::Plain(text)),
            Value::Array(items) => items
                .into_iter()
                .map(|item| match item {
                    Value::Object(message) if message.get("role").is_some_and(Value::is_string) => Ok(message),
                    Value::Object(message) if message.contains_key("from") => Err(format!(
                        "column {column:?}: messages have \"from\" and \"value\"; rename them to \"role\" and \
                         \"content\""
                    )),
                    other => Err(format!(
                        "column {column:?}: a message must be an object with a role, found {}",
                        excerpt(&other)
                    )),
                })
                .collect::<Result<_, _>>()
                .map(Self::Chat),
            other => {
                Err(format!("column {column:?} is {}, expected text or a list of messages", excerpt(&other)))
            }
        }
    }

    pub(crate) fn is_chat(&self) -> bool {
        matches!(self, Self::Chat(_))
    }

    /// The text of the last message, or the text itself: what a person reads as the answer.
    pub fn last_content(&self) -> &str {
        match self {
            Self::Plain(text) => text,
            Self::Chat(messages) => {
                messages.last().and_then(|m| m.get("content")).and_then(Value::as_str).unwrap_or("")
            }
        }
    }
}

/// Id of a row: its `id` column as text, or its place from 0.
pub fn row_id(id: Option<&Value>, number: usize) -> String {
    match id {
        None | Some(Value::Null) => number.to_string(),
        Some(Value::String(id)) => id.clone(),
        Some(other) => other.to_string(),
    }
}

/// Splits off the common start (`trl.data_utils.extract_prompt`): whole messages, or characters with a
/// space before the first difference left to the completions.
pub(crate) fn split(chosen: Text, rejected: Text) -> Result<(Text, Text, Text), String> {
    match (chosen, rejected) {
        (Text::Chat(mut chosen), Text::Chat(mut rejected)) => {
            let shared = common(&chosen, &rejected)?;
            let completion = chosen.split_off(shared);
            let other = rejected.split_off(shared);
            Ok((Text::Chat(chosen), Text::Chat(completion), Text::Chat(other)))
        }
        (Text::Plain(chosen), Text::Plain(rejected)) => {
            let (a, b): (Vec<char>, Vec<char>) = (chosen.chars().collect(), rejected.chars().collect());
            let mut shared = common(&a, &b)?;
            let differs = a.get(shared) != b.get(shared);
            if differs && shared > 0 && a[shared - 1] == ' ' {
                shared -= 1;
            }
            let text = |part: &[char]| Text::Plain(part.iter().collect());
            Ok((text(&a[..shared]), text(&a[shared..]), text(&b[shared..])))
        }
        _ => Err("\"chosen\" and \"rejected\" must both be text or both message lists".into()),
    }
}

/// Length of the common start, at most one less than the shorter: each side keeps something.
fn common<T: PartialEq>(a: &[T], b: &[T]) -> Result<usize, String> {
    let shorter = a.len().min(b.len());
    if shorter == 0 {
        return Err("\"chosen\" or \"rejected\" is empty".into());
    }
    Ok(a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(shorter - 1))
}

/// A value in an error message.
pub(crate) fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
