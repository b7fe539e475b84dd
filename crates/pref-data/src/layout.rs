//! Which columns of a data set hold what, found from its first rows.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::text::{excerpt, split};
use crate::{Extras, Text, row_id};

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
    /// Tools and template variables.
    pub extras: Extras,
}

/// One completion with its label, as KTO takes them.
#[derive(Debug, Clone, PartialEq)]
pub struct Unpaired {
    /// The `id` column, or the row's number from 0.
    pub id: String,
    /// What the completion answers.
    pub prompt: Text,
    /// The completion.
    pub completion: Text,
    /// The completion is desirable.
    pub label: bool,
    /// Tools and template variables.
    pub extras: Extras,
}

/// A row of a data set.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// Chosen and rejected.
    Pair(Record),
    /// A completion and its label.
    Unpaired(Unpaired),
}

/// What the rows of a data set are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `chosen` and `rejected`.
    Pairs,
    /// `completion` and `label`.
    Unpaired,
}

/// The role that a column can have. Every field but the completions may be absent.
pub const ROLES: [&str; 8] =
    ["id", "prompt", "chosen", "rejected", "completion", "label", "tools", "chat_template_kwargs"];

/// Which columns hold what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Pairs, or completions with labels.
    pub kind: Kind,
    /// Column of each role, among the first rows.
    pub columns: BTreeMap<&'static str, String>,
    /// Column that each role is read from: in JSON a column may appear after the first rows.
    names: BTreeMap<&'static str, String>,
    /// The prompt is text and the completions are conversations: it is not used.
    pub prompt_unused: bool,
    /// The completions are conversations.
    pub conversational: bool,
    /// Columns that have no role.
    pub unused: Vec<String>,
}

impl Layout {
    /// Finds the layout from the first rows. `given` says which column has a role, where it is not the one of
    /// the same name; an empty name means that no column has it.
    pub fn detect(rows: &[Value], given: &BTreeMap<String, String>) -> Result<Self, String> {
        let names = column_names(rows);
        let (mut columns, mut read_from) = (BTreeMap::new(), BTreeMap::new());
        for role in ROLES {
            let name = given.get(role).map_or(role, String::as_str);
            if !name.is_empty() {
                read_from.insert(role, name.to_string());
            }
            if names.iter().any(|column| column == name) {
                columns.insert(role, name.to_string());
            } else if !name.is_empty() && given.contains_key(role) {
                return Err(format!("there is no column {name:?} for {role}; found {names:?}"));
            }
        }
        let has = |role: &str| columns.contains_key(role);
        let kind = match (has("chosen") && has("rejected"), has("completion") && has("label")) {
            (true, _) => Kind::Pairs,
            (false, true) if has("prompt") => Kind::Unpaired,
            (false, true) => return Err(format!("unpaired rows need a prompt column; found {names:?}")),
            (false, false) => {
                return Err(format!(
                    "no usable columns; found {names:?}, expected \"chosen\" and \"rejected\" (texts or message lists, \
                     \"prompt\" optional), or \"prompt\", \"completion\" and \"label\"; say which columns they are \
                     with --columns, such as --columns chosen=better rejected=worse"
                ));
            }
        };
        let others: &[&str] =
            if kind == Kind::Pairs { &["completion", "label"] } else { &["chosen", "rejected"] };
        columns.retain(|role, _| !others.contains(role));
        read_from.retain(|role, _| !others.contains(role));
        let is_chat = |role: &str| {
            let values = rows.iter().filter_map(|row| columns.get(role).and_then(|name| row.get(name)));
            values.into_iter().find(|value| !value.is_null()).is_some_and(Value::is_array)
        };
        let conversational = is_chat(if kind == Kind::Pairs { "chosen" } else { "completion" });
        let prompt_unused =
            kind == Kind::Pairs && columns.contains_key("prompt") && conversational != is_chat("prompt");
        let used: Vec<&String> = columns.values().collect();
        let unused = names.into_iter().filter(|name| !used.contains(&name)).collect();
        Ok(Self { kind, columns, names: read_from, prompt_unused, conversational, unused })
    }

    /// The names of the columns that are read.
    pub fn used_columns(&self) -> Vec<&str> {
        self.columns.values().map(String::as_str).collect()
    }

    /// Reads one row; `number` is its place from 0.
    ///
    /// The prompt is the `prompt` column where it is of the same kind as the completions; otherwise it
    /// is the common start of `chosen` and `rejected` (`trl.data_utils.maybe_extract_prompt`).
    pub fn parse(&self, row: Value, number: usize) -> Result<Row, String> {
        let Value::Object(mut row) = row else {
            return Err(format!("expected an object, found {}", excerpt(&row)));
        };
        let mut take = |role: &str| {
            self.names.get(role).and_then(|name| row.swap_remove(name)).filter(|value| !value.is_null())
        };
        let id = row_id(take("id").as_ref(), number);
        let extras = extras(take("tools"), take("chat_template_kwargs"))?;
        let prompt = take("prompt").map(|value| Text::parse(value, "prompt")).transpose()?;
        let mut completion = |role: &str| match take(role) {
            Some(value) => Text::parse(value, role),
            None => Err(format!("column {role:?} is null or missing")),
        };
        if self.kind == Kind::Unpaired {
            let completion = completion("completion")?;
            let prompt = prompt.ok_or("column \"prompt\" is null or missing")?;
            if prompt.is_chat() != completion.is_chat() {
                return Err("\"prompt\" and \"completion\" must both be text or both message lists".into());
            }
            let label = label(take("label").as_ref())?;
            return Ok(Row::Unpaired(Unpaired { id, prompt, completion, label, extras }));
        }
        let (chosen, rejected) = (completion("chosen")?, completion("rejected")?);
        if chosen.is_chat() != rejected.is_chat() {
            return Err("\"chosen\" and \"rejected\" must both be text or both message lists".into());
        }
        let (prompt, chosen, rejected) = match prompt {
            Some(prompt) if prompt.is_chat() == chosen.is_chat() => (prompt, chosen, rejected),
            _ => split(chosen, rejected)?,
        };
        if matches!(&prompt, Text::Chat(messages) if messages.is_empty()) {
            return Err("\"chosen\" and \"rejected\" share no first message: there is no prompt".into());
        }
        Ok(Row::Pair(Record { id, prompt, chosen, rejected, extras }))
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let column = |role: &str| self.columns.get(role).map_or("", String::as_str);
        let what = if self.conversational { "conversations" } else { "texts" };
        match self.kind {
            Kind::Pairs => {
                write!(f, "pairs of {what} in {:?} and {:?}, ", column("chosen"), column("rejected"))?;
                match self.columns.get("prompt") {
                    Some(name) if self.prompt_unused => {
                        write!(f, "prompt from their common start ({name:?} is text and not used)")?;
                    }
                    Some(name) => write!(f, "prompt in {name:?}")?,
                    None => write!(f, "prompt from their common start")?,
                }
            }
            Kind::Unpaired => write!(
                f,
                "{what} in {:?} with labels in {:?}, prompt in {:?}",
                column("completion"),
                column("label"),
                column("prompt")
            )?,
        }
        for role in ["id", "tools", "chat_template_kwargs"] {
            if let Some(name) = self.columns.get(role) {
                write!(f, ", {role} in {name:?}")?;
            }
        }
        if !self.unused.is_empty() {
            write!(f, "; not used: {}", self.unused.join(", "))?;
        }
        Ok(())
    }
}

/// Columns of the first rows, in order of appearance.
fn column_names(rows: &[Value]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in rows.iter().filter_map(Value::as_object).flat_map(Map::keys) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

/// `tools` as a list or as JSON text, and the template variables.
fn extras(tools: Option<Value>, kwargs: Option<Value>) -> Result<Extras, String> {
    let tools = match tools {
        Some(Value::String(text)) => Some(
            serde_json::from_str(&text).map_err(|e| format!("column \"tools\" is text but not JSON: {e}"))?,
        ),
        other => other,
    };
    let mut kwargs = match kwargs {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => {
            return Err(format!(
                "column \"chat_template_kwargs\" is {}, expected an object",
                excerpt(&other)
            ));
        }
    };
    // Tools among the variables win, as keyword arguments do in TRL.
    let tools = kwargs.shift_remove("tools").or(tools).filter(|tools| !tools.is_null());
    if let Some(name) =
        ["add_generation_prompt", "tokenize", "return_dict"].iter().find(|n| kwargs.contains_key(**n))
    {
        return Err(format!("\"chat_template_kwargs\" sets {name:?}, which is not the data's to set"));
    }
    Ok(Extras { tools, kwargs })
}

fn label(value: Option<&Value>) -> Result<bool, String> {
    match value {
        Some(Value::Bool(label)) => Ok(*label),
        Some(Value::Number(n)) if n.as_f64() == Some(1.0) => Ok(true),
        Some(Value::Number(n)) if n.as_f64() == Some(0.0) => Ok(false),
        Some(Value::String(text)) if matches!(text.as_str(), "true" | "True" | "1") => Ok(true),
        Some(Value::String(text)) if matches!(text.as_str(), "false" | "False" | "0") => Ok(false),
        None => Err("column \"label\" is null or missing".into()),
        Some(other) => Err(format!("column \"label\" is {}, expected true or false", excerpt(other))),
    }
}

/// Pairs as completions with labels, in the order in which TRL unpairs a thousand rows: all chosen ones,
/// then all rejected ones (`trl.data_utils.unpair_preference_dataset`).
pub fn unpair(rows: Vec<Record>) -> Vec<Unpaired> {
    let one = |row: &Record, label: bool| Unpaired {
        id: format!("{}:{}", row.id, if label { "chosen" } else { "rejected" }),
        prompt: row.prompt.clone(),
        completion: if label { row.chosen.clone() } else { row.rejected.clone() },
        label,
        extras: row.extras.clone(),
    };
    let chosen = rows.iter().map(|row| one(row, true));
    chosen.chain(rows.iter().map(|row| one(row, false))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(row: Value) -> Result<Row, String> {
        Layout::detect(std::slice::from_ref(&row), &BTreeMap::new())?.parse(row, 3)
    }

    fn pair(row: Value) -> Record {
        match read(row).unwrap() {
            Row::Pair(record) => record,
            Row::Unpaired(_) => panic!("expected a pair"),
        }
    }

    fn turn(role: &str, content: &str) -> Value {
        json!({"role": role, "content": content})
    }

    #[test]
    fn the_prompt_is_the_common_start_of_texts() {
        let record = pair(json!({"chosen": "The sky is blue.", "rejected": "The sky is green."}));
        assert_eq!(record.id, "3");
        assert_eq!(record.prompt, Text::Plain("The sky is".into()));
        assert_eq!(record.chosen, Text::Plain(" blue.".into()));
        assert_eq!(record.rejected, Text::Plain(" green.".into()));
    }

    #[test]
    fn a_text_prompt_beside_conversations_is_ignored() {
        let record =
            pair(json!({"id": "x", "prompt": "Q", "chosen": [turn("user", "Q"), turn("assistant", "A")],
                         "rejected": [turn("user", "Q"), turn("assistant", "B")]}));
        let Text::Chat(prompt) = &record.prompt else { panic!() };
        assert_eq!(prompt.len(), 1);
        assert_eq!(record.chosen.last_content(), "A");
    }

    #[test]
    fn unusable_rows_say_what_they_have() {
        let reason = |row: Value| read(row).unwrap_err();
        assert!(reason(json!({"question": "x"})).contains("question"));
        assert!(reason(json!({"chosen": "x", "rejected": null})).contains("rejected"));
        assert!(reason(json!({"chosen": "x", "rejected": [{"role": "user"}]})).contains("both"));
        assert!(reason(json!({"chosen": [], "rejected": []})).contains("empty"));
        assert!(reason(json!({"chosen": ["a"], "rejected": ["b"]})).contains("role"));
        assert!(reason(json!({"chosen": [{"from": "human"}], "rejected": []})).contains("rename"));
        assert!(reason(json!([1])).contains("no usable columns"));
        assert!(reason(json!({"completion": "x", "label": true})).contains("prompt"));
        assert!(reason(json!({"prompt": "q", "completion": "x", "label": 2})).contains("label"));
    }

    #[test]
    fn columns_of_other_names_can_be_given() {
        let row = json!({"question": "q", "better": "a", "worse": "b", "score": 1});
        let given = [("prompt", "question"), ("chosen", "better"), ("rejected", "worse")];
        let given = given.map(|(role, name)| (role.to_string(), name.to_string())).into();
        let layout = Layout::detect(std::slice::from_ref(&row), &given).unwrap();
        assert_eq!(
            layout.to_string(),
            "pairs of texts in \"better\" and \"worse\", prompt in \"question\"; not used: score"
        );
        let Row::Pair(record) = layout.parse(row, 0).unwrap() else { panic!() };
        assert_eq!(record.prompt, Text::Plain("q".into()));
        let wrong = [("chosen".to_string(), "nothing".to_string())].into();
        assert!(Layout::detect(&[json!({"a": 1})], &wrong).unwrap_err().contains("nothing"));
    }

    #[test]
    fn columns_may_appear_after_the_first_rows() {
        let layout =
            Layout::detect(&[json!({"chosen": "a b", "rejected": "a c"})], &BTreeMap::new()).unwrap();
        let late = json!({"id": "x", "prompt": "P", "chosen": "a b", "rejected": "a c"});
        let Row::Pair(record) = layout.parse(late, 70).unwrap() else { panic!() };
        assert_eq!((record.id.as_str(), record.prompt), ("x", Text::Plain("P".into())));
        let disjoint = json!({"chosen": [turn("user", "a")], "rejected": [turn("user", "b")]});
        assert!(read(disjoint).unwrap_err().contains("share no first message"));
    }

    #[test]
    fn tools_may_be_json_text_and_nulls_are_nothing() {
        let chat = |text: &str| json!([turn("user", "Q"), turn("assistant", text)]);
        let row = json!({"chosen": chat("a"), "rejected": chat("b"), "prompt": null, "tools": "[{\"name\": \"f\"}]",
                         "chat_template_kwargs": null});
        let record = pair(row);
        assert_eq!(record.extras.tools, Some(json!([{"name": "f"}])));
        assert!(record.extras.kwargs.is_empty());
        let row = json!({"chosen": "a", "rejected": "b", "chat_template_kwargs": {"tokenize": false}});
        assert!(read(row).unwrap_err().contains("tokenize"));
    }

    #[test]
    fn pairs_unpair_in_trls_order() {
        let rows = [("p", "a", "b"), ("q", "c", "d")];
        let rows = rows.map(|(p, c, r)| pair(json!({"id": p, "prompt": p, "chosen": c, "rejected": r})));
        let all = unpair(rows.to_vec());
        let ids: Vec<&str> = all.iter().map(|row| row.id.as_str()).collect();
        assert_eq!(ids, ["p:chosen", "q:chosen", "p:rejected", "q:rejected"]);
        assert!(all[1].label && !all[2].label);
        assert_eq!(all[2].completion, Text::Plain("b".into()));
    }
}
