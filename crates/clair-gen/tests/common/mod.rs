//! What the tests of the binary share.

#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use loopback::{Behaviour, Server};
use serde_json::{Value, json};

pub const ROWS: usize = 60;

pub fn write_input(dir: &Path) {
    write_rows(dir, (0..ROWS).map(|i| row(i, &format!("question {i}"), &format!("answer {i}"))));
}

pub fn row(id: impl ToString, prompt: &str, response: &str) -> Value {
    let id = id.to_string();
    json!({"id": format!("r{id}"), "prompt": prompt, "response": response})
}

pub fn write_rows(dir: &Path, rows: impl Iterator<Item = Value>) {
    let rows: Vec<String> = rows.map(|row| row.to_string()).collect();
    fs::write(dir.join("answers.jsonl"), rows.join("\n")).unwrap();
}

pub fn start(behaviour: Behaviour) -> Server {
    Server::start(behaviour).unwrap()
}

pub fn calm() -> Server {
    start(Behaviour::default())
}

pub fn command(dir: &Path, endpoint: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_clair-gen"));
    command
        .current_dir(dir)
        .env_remove("OPENAI_API_KEY")
        .env_remove("ANTHROPIC_API_KEY")
        .args(["--input", "answers.jsonl", "--out", "pairs", "--endpoint", endpoint, "--model", "teacher"])
        .args(["--backoff", "0.01", "--timeout", "2", "--retries", "30"]);
    command
}

pub fn run(dir: &Path, endpoint: &str, flags: &[&str]) -> Output {
    command(dir, endpoint).args(flags).output().unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
}

pub fn fails(output: &Output, part: &str) {
    assert_eq!(output.status.code(), Some(1), "{}", stderr(output));
    assert!(stderr(output).contains(part), "expected {part:?}: {}", stderr(output));
}

pub fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn pairs(dir: &Path) -> Vec<Value> {
    lines(&dir.join("pairs/pairs.jsonl"))
}

pub fn report(dir: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(dir.join("pairs/report.json")).unwrap()).unwrap()
}

/// Ids with their chosen and rejected texts, in file order.
pub fn texts(path: &Path) -> Vec<[String; 3]> {
    let text = |v: &Value| v.as_str().unwrap().to_string();
    let row = |row: &Value| {
        [text(&row["id"]), text(&row["chosen"][1]["content"]), text(&row["rejected"][1]["content"])]
    };
    lines(path).iter().map(row).collect()
}

pub fn revisions(dir: &Path) -> Vec<[String; 3]> {
    texts(&dir.join("pairs/pairs.jsonl"))
}
