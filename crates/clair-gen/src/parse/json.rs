//! Replies by a JSON schema (`response_format`).

use serde_json::{Value, json};

use super::{Reason, Revision};

/// Schema of a revision.
pub fn revision_schema() -> (String, Value) {
    schema("revision", &[("reasoning", json!({"type": "string"})), ("revision", json!({"type": "string"}))])
}

/// Schema of a comparison.
pub fn verdict_schema() -> (String, Value) {
    let verdict = json!({"type": "string", "enum": ["A", "B", "tie"]});
    schema("verdict", &[("reasoning", json!({"type": "string"})), ("verdict", verdict)])
}

/// Schema of a score.
pub fn score_schema() -> (String, Value) {
    schema("score", &[("reasoning", json!({"type": "string"})), ("score", json!({"type": "number"}))])
}

fn schema(name: &str, fields: &[(&str, Value)]) -> (String, Value) {
    let properties: serde_json::Map<_, _> =
        fields.iter().map(|(name, kind)| ((*name).to_string(), kind.clone())).collect();
    let required: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    let schema = json!({
        "type": "object", "properties": properties, "required": required, "additionalProperties": false,
    });
    (name.to_string(), schema)
}

/// The object in a reply, bare or in a code block.
pub fn object(content: &str) -> Result<Value, Reason> {
    let text = content.trim();
    let inner = text.strip_prefix("```").and_then(|rest| rest.strip_suffix("```"));
    let inner = inner.map_or(text, |inner| inner.strip_prefix("json").unwrap_or(inner));
    let value: Value = serde_json::from_str(inner.trim()).map_err(|_| Reason::NotJson)?;
    if value.is_object() { Ok(value) } else { Err(Reason::NotJson) }
}

/// A revision.
pub fn revision(content: &str) -> Result<Revision, Reason> {
    let object = object(content)?;
    let text = |name: &str| object[name].as_str().map(|text| text.trim().to_string());
    let body = text("revision").ok_or(Reason::NotJson)?;
    if body.is_empty() {
        return Err(Reason::EmptyRevision);
    }
    Ok(Revision { reasoning: text("reasoning").unwrap_or_default(), text: body })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn objects_are_read_bare_and_in_code_blocks() {
        let want = Revision { reasoning: "r".into(), text: "a\nb".into() };
        let bare = r#"{"reasoning": "r", "revision": "a\nb"}"#;
        assert_eq!(revision(bare), Ok(want.clone()));
        assert_eq!(revision(&format!("```json\n{bare}\n```")), Ok(want));
        assert_eq!(revision("{\"reasoning\": \"r\"}"), Err(Reason::NotJson));
        assert_eq!(revision("{\"revision\": \" \"}"), Err(Reason::EmptyRevision));
        assert_eq!([revision("[1]"), revision("hello")], [Err(Reason::NotJson), Err(Reason::NotJson)]);
    }

    proptest! {
        #[test]
        fn every_text_round_trips(text in "\\PC{1,100}") {
            prop_assume!(!text.trim().is_empty());
            let reply = json!({"reasoning": "", "revision": text}).to_string();
            prop_assert_eq!(revision(&reply).unwrap().text, text.trim());
        }
    }
}
