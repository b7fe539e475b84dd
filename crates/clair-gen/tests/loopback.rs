//! The real binary against a loopback server that behaves badly.

#![allow(clippy::unwrap_used)]

mod server;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use server::{Faults, Server};

const ROWS: usize = 60;

fn write_input(dir: &Path) {
    let rows: Vec<String> = (0..ROWS)
        .map(|i| json!({"id": format!("r{i}"), "prompt": format!("question {i}"), "response": format!("answer {i}")}).to_string())
        .collect();
    fs::write(dir.join("answers.jsonl"), rows.join("\n")).unwrap();
}

fn command(dir: &Path, endpoint: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_clair-gen"));
    command
        .current_dir(dir)
        .env_remove("OPENAI_API_KEY")
        .args(["--input", "answers.jsonl", "--out", "pairs", "--endpoint", endpoint, "--model", "teacher"])
        .args(["--backoff", "0.01", "--timeout", "2", "--max-in-flight", "8", "--retries", "30"]);
    command
}

fn run(dir: &Path, endpoint: &str) -> Output {
    command(dir, endpoint).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn pairs(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("pairs/pairs.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Ids with their revisions, in file order.
fn revisions(dir: &Path) -> Vec<(String, String)> {
    let text = |v: &Value| v.as_str().unwrap().to_string();
    pairs(dir).iter().map(|row| (text(&row["id"]), text(&row["chosen"][1]["content"]))).collect()
}

#[test]
fn faults_do_not_change_the_result() {
    let (calm, bad) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_input(calm.path());
    write_input(bad.path());
    let quiet = Server::start(Faults::none());
    let output = run(calm.path(), &quiet.url());
    assert!(output.status.success(), "{}", stderr(&output));
    let faulty = Server::start(Faults::all());
    // A quarter of the replies that come keep to no form: more attempts than usual.
    let output = command(bad.path(), &faulty.url()).args(["--form-retries", "20"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(revisions(calm.path()), revisions(bad.path()));
    assert_eq!(revisions(calm.path()).len(), ROWS);
    for kind in ["rate", "error", "cut", "truncated", "html", "no_marker", "stall"] {
        assert!(faulty.count(kind) > 0, "the server never answered with {kind}");
    }
    // What was paid for is used: one good reply a row, and no row asked again after it.
    assert_eq!(faulty.count("good"), ROWS);
    let report: Value =
        serde_json::from_str(&fs::read_to_string(bad.path().join("pairs/report.json")).unwrap()).unwrap();
    assert_eq!(report["pairs"], ROWS);
    assert!(
        bad.path().join("pairs/pairs.parquet").exists() && bad.path().join("pairs/manifest.json").exists()
    );
}

#[test]
fn a_second_run_asks_nothing() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let server = Server::start(Faults::none());
    assert!(run(dir.path(), &server.url()).status.success());
    let (asked, first) = (server.total(), fs::read(dir.path().join("pairs/pairs.jsonl")).unwrap());
    assert!(run(dir.path(), &server.url()).status.success());
    assert_eq!(server.total(), asked);
    assert_eq!(fs::read(dir.path().join("pairs/pairs.jsonl")).unwrap(), first);
    // Another temperature is another request.
    let output = command(dir.path(), &server.url()).args(["--temperature", "0.5"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(server.total(), 2 * asked);
    let output = command(dir.path(), &server.url()).args(["--resume", "never"]).output().unwrap();
    assert!(!output.status.success() && stderr(&output).contains("stored replies"), "{}", stderr(&output));
}

#[test]
fn killed_ten_times_nothing_is_lost_doubled_or_paid_twice() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let server = Server::start(Faults { delay_ms: 30, ..Faults::none() });
    for kill in 0..10 {
        let mut child: Child = command(dir.path(), &server.url()).stderr(Stdio::null()).spawn().unwrap();
        // Different moments of start-up, of the requests and of writing.
        std::thread::sleep(Duration::from_millis(20 + 23 * kill));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let stored: HashMap<String, usize> = stored_keys(dir.path());
    assert!(!stored.is_empty() && stored.values().all(|&times| times == 1), "{} stored", stored.len());
    let before = server.total();
    let output = run(dir.path(), &server.url());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(server.total() - before, ROWS - stored.len(), "only what was not stored is asked for");
    let ids: Vec<String> = revisions(dir.path()).into_iter().map(|(id, _)| id).collect();
    let want: Vec<String> = (0..ROWS).map(|i| format!("r{i}")).collect();
    assert_eq!(ids, want);
}

fn stored_keys(dir: &Path) -> HashMap<String, usize> {
    let mut keys = HashMap::new();
    let text = fs::read_to_string(dir.join("pairs/replies/replies.jsonl")).unwrap_or_default();
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let row: Value = serde_json::from_str(line).unwrap();
        *keys.entry(row["key"].as_str().unwrap().to_string()).or_default() += 1;
    }
    keys
}

#[test]
fn bad_set_ups_end_in_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let server = Server::start(Faults { unauthorized: true, ..Faults::none() });
    let output = command(dir.path(), &server.url()).env("OPENAI_API_KEY", "sk-secret-123").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("401") && stderr(&output).contains("key"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("sk-secret-123"));
    assert!(!dir.path().join("pairs/pairs.jsonl").exists(), "nothing half-written");
    // Nobody listens on this port: it was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut unreachable = command(dir.path(), &format!("http://127.0.0.1:{port}/v1"));
    let output = unreachable.args(["--retries", "2"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is the server running"), "{}", stderr(&output));
    let output = run(dir.path(), "localhost:8000");
    assert!(stderr(&output).contains("expected something like"), "{}", stderr(&output));
    for (file, text, reason) in [
        ("answers.jsonl", "{\"prompt\": \"a\"}\n", "response"),
        ("answers.jsonl", "{\"prompt\": \"a\", \"response\": \"b\"}\nnonsense\n", "answers.jsonl:2"),
        ("answers.jsonl", "", "holds no rows"),
    ] {
        fs::write(dir.path().join(file), text).unwrap();
        let output = run(dir.path(), &server.url());
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(reason), "{}", stderr(&output));
    }
}

#[test]
fn rows_that_cannot_be_used_are_listed_with_their_reason() {
    let dir = tempfile::tempdir().unwrap();
    let rows = ["length", "unchanged", "filtered", "never_marked", "good"];
    let rows: Vec<String> = rows
        .iter()
        .map(|kind| json!({"id": kind, "prompt": format!("say {kind}"), "response": "same"}).to_string())
        .collect();
    fs::write(dir.path().join("answers.jsonl"), rows.join("\n")).unwrap();
    let server = Server::start(Faults::none());
    let output = run(dir.path(), &server.url());
    assert!(output.status.success(), "{}", stderr(&output));
    let text = fs::read_to_string(dir.path().join("pairs/failed.jsonl")).unwrap();
    let failed: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let reasons: Vec<(&str, &str, u64)> = failed
        .iter()
        .map(|f| (f["id"].as_str().unwrap(), f["reason"].as_str().unwrap(), f["attempts"].as_u64().unwrap()))
        .collect();
    let want = [
        ("length", "length", 1),
        ("unchanged", "unchanged", 1),
        ("filtered", "filtered", 1),
        ("never_marked", "no_marker", 5),
    ];
    assert_eq!(reasons, want);
    assert_eq!(pairs(dir.path()).len(), 1);
}
