//! Renders the cases of a file with chat templates and counts how many equal what transformers made of
//! them. `fixtures/make/chat_templates.py` writes the file; `cargo xtask check templates` runs both.

#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use pref_data::{ChatTemplate, Error, Extras, Message, read_jsonl};
use serde_json::{Map, Value};

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        println!("usage: templates CASES.jsonl");
        return ExitCode::from(2);
    };
    match compare(Path::new(&path)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(path: &Path) -> Result<bool, Error> {
    let rows = read_jsonl(path)?;
    let now = rows.first().and_then(|(_, row)| row["now"].as_str()?.parse().ok()).unwrap_or_default();
    let (mut all, mut equal) = (0, 0);
    let mut differences: BTreeMap<String, (usize, String)> = BTreeMap::new();
    for (_, row) in &rows {
        let special = row["special"].as_object().cloned().unwrap_or_default();
        let template = ChatTemplate::new(row["source"].as_str().unwrap_or_default(), special, now);
        for case in row["cases"].as_array().into_iter().flatten() {
            all += 1;
            let text = match &template {
                Ok(template) => render(template, case),
                Err(error) => Err(error.to_string()),
            };
            match (&text, case["expected"].as_str()) {
                (Ok(text), Some(expected)) if text == expected => equal += 1,
                (Err(_), None) => equal += 1,
                _ => {
                    let name = row["name"].as_str().unwrap_or_default().to_string();
                    let entry = differences.entry(name).or_insert_with(|| (0, describe(case, &text)));
                    entry.0 += 1;
                }
            }
        }
    }
    println!("{} templates, {equal} of {all} renderings equal", rows.len());
    for (name, (count, first)) in &differences {
        println!("{name}: {count} differ, the first:\n{first}");
    }
    Ok(differences.is_empty())
}

fn render(template: &ChatTemplate, case: &Value) -> Result<String, String> {
    let message = |value: &Value| value.as_object().cloned().unwrap_or_default();
    let messages: Vec<Message> = case["messages"].as_array().into_iter().flatten().map(message).collect();
    let kwargs: Map<String, Value> = case["kwargs"].as_object().cloned().unwrap_or_default();
    let extras = Extras { tools: Some(case["tools"].clone()).filter(|tools| !tools.is_null()), kwargs };
    let generation = case["add_generation_prompt"].as_bool().unwrap_or(false);
    template.render(&messages, &extras, generation).map_err(|error| error.to_string())
}

fn describe(case: &Value, text: &Result<String, String>) -> String {
    let (expected, got) = (case["expected"].as_str(), text.as_deref());
    let (Some(expected), Ok(got)) = (expected, got) else {
        return format!("  case {case}\n  got {text:?}");
    };
    let same = expected.bytes().zip(got.bytes()).take_while(|(a, b)| a == b).count();
    let from = (0..=same.saturating_sub(60)).rev().find(|&i| expected.is_char_boundary(i)).unwrap_or(0);
    let part = |text: &str| text[from.min(text.len())..].chars().take(160).collect::<String>();
    format!("  expected …{:?}\n  got      …{:?}\n  messages {}", part(expected), part(got), case["messages"])
}
