//! One preference pair as users have it, in any of the layouts TRL accepts.

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

/// A preference pair with its prompt made explicit.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The `id` column, or the row's number from 0.
    pub id: String,
    /// What both completions answer.
    pub prompt: Text,
    /// The preferred completion.
    pub chosen: Text,
    /// The other one.
    pub rejected: Text,
}

impl Text {
    /// Reads a string or a list of messages.
    fn parse(value: &Value, column: &str) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(Self::Plain(text.clone())),
            Value::Array(items) => items
                .iter()
                .map(|item| match item.as_object() {
                    Some(message) if message.get("role").is_some_and(Value::is_string) => Ok(message.clone()),
                    _ => Err(format!(
                        "column {column:?}: a message must be an object with a role, found {item}"
                    )),
                })
                .collect::<Result<_, _>>()
                .map(Self::Chat),
            other => Err(format!("column {column:?} is {other}, expected text or a list of messages")),
        }
    }

    fn is_chat(&self) -> bool {
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

impl Record {
    /// Reads one row of a data set; `number` is its place from 0.
    ///
    /// The prompt is the `prompt` column where it is of the same kind as the completions; otherwise it
    /// is the common start of `chosen` and `rejected` (`trl.data_utils.maybe_extract_prompt`).
    pub fn parse(row: &Value, number: usize) -> Result<Self, String> {
        let row = row.as_object().ok_or_else(|| format!("expected an object, found {row}"))?;
        let column = |name: &str| row.get(name).filter(|value| !value.is_null());
        let (Some(chosen), Some(rejected)) = (column("chosen"), column("rejected")) else {
            let columns: Vec<&str> = row.keys().map(String::as_str).collect();
            return Err(format!(
                "no usable \"chosen\" and \"rejected\" columns; found {columns:?}, expected chosen and rejected \
                 (text or message lists) and optionally prompt"
            ));
        };
        let (chosen, rejected) = (Text::parse(chosen, "chosen")?, Text::parse(rejected, "rejected")?);
        if chosen.is_chat() != rejected.is_chat() {
            return Err("\"chosen\" and \"rejected\" must both be text or both message lists".into());
        }
        let id = row_id(row.get("id"), number);
        let prompt = column("prompt").map(|value| Text::parse(value, "prompt")).transpose()?;
        match prompt {
            Some(prompt) if prompt.is_chat() == chosen.is_chat() => Ok(Self { id, prompt, chosen, rejected }),
            _ => {
                let (prompt, chosen, rejected) = split(chosen, rejected)?;
                Ok(Self { id, prompt, chosen, rejected })
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
fn split(chosen: Text, rejected: Text) -> Result<(Text, Text, Text), String> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_prompt_is_the_common_start_of_texts() {
        let row = json!({"chosen": "The sky is blue.", "rejected": "The sky is green."});
        let record = Record::parse(&row, 3).unwrap();
        assert_eq!(record.id, "3");
        assert_eq!(record.prompt, Text::Plain("The sky is".into()));
        assert_eq!(record.chosen, Text::Plain(" blue.".into()));
        assert_eq!(record.rejected, Text::Plain(" green.".into()));
    }

    #[test]
    fn a_text_prompt_beside_conversations_is_ignored() {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let row = json!({"id": "x", "prompt": "Q", "chosen": [turn("user", "Q"), turn("assistant", "A")],
                         "rejected": [turn("user", "Q"), turn("assistant", "B")]});
        let record = Record::parse(&row, 0).unwrap();
        let Text::Chat(prompt) = &record.prompt else { panic!() };
        assert_eq!(prompt.len(), 1);
        assert_eq!(record.chosen.last_content(), "A");
    }

    #[test]
    fn unusable_rows_say_what_they_have() {
        let reason = |row: Value| Record::parse(&row, 0).unwrap_err();
        assert!(reason(json!({"question": "x"})).contains("question"));
        assert!(reason(json!({"chosen": "x", "rejected": null})).contains("rejected"));
        assert!(reason(json!({"chosen": "x", "rejected": [{"role": "user"}]})).contains("both"));
        assert!(reason(json!({"chosen": [], "rejected": []})).contains("empty"));
        assert!(reason(json!({"chosen": ["a"], "rejected": ["b"]})).contains("role"));
        assert!(reason(json!([1])).contains("expected an object"));
    }
}
