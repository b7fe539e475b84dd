//! The real binary against a local server that behaves badly.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use common::*;
use loopback::{Behaviour, Fault};
use serde_json::Value;

#[test]
fn faults_do_not_change_the_result() {
    let (quiet_dir, bad_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let rows = |dir: &Path| {
        write_rows(dir, (0..200).map(|i| row(i, &format!("question {i}"), &format!("answer {i}"))));
    };
    rows(quiet_dir.path());
    rows(bad_dir.path());
    succeeds(&run(quiet_dir.path(), &calm().url(), &[]));
    let faulty = start(Behaviour { faults: 0.3, latency_ms: 2.0, ..Behaviour::default() });
    // Form faults come one after the other here, more often than from a real model.
    succeeds(&run(bad_dir.path(), &faulty.url(), &["--form-retries", "20"]));
    assert_eq!(revisions(quiet_dir.path()), revisions(bad_dir.path()));
    assert_eq!(revisions(quiet_dir.path()).len(), 200);
    for fault in Fault::ALL {
        assert!(faulty.count(fault.name()) > 0, "the server never answered with {}", fault.name());
    }
    // What was paid for is used: one good reply a row, and no row asked again after it.
    assert_eq!((faulty.count("good"), faulty.counts().paid_again()), (200, 0));
    assert_eq!(report(bad_dir.path())["pairs"], 200);
    for file in ["pairs.parquet", "manifest.json", "report.html"] {
        assert!(bad_dir.path().join("pairs").join(file).exists(), "{file}");
    }
}

#[test]
fn a_second_run_asks_nothing() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let server = calm();
    succeeds(&run(dir.path(), &server.url(), &[]));
    let (asked, first) = (server.total(), fs::read(dir.path().join("pairs/pairs.jsonl")).unwrap());
    succeeds(&run(dir.path(), &server.url(), &[]));
    assert_eq!(server.total(), asked);
    assert_eq!(fs::read(dir.path().join("pairs/pairs.jsonl")).unwrap(), first);
    // Another temperature is another request.
    succeeds(&run(dir.path(), &server.url(), &["--temperature", "0.5"]));
    assert_eq!(server.total(), 2 * asked);
    fails(&run(dir.path(), &server.url(), &["--resume", "never"]), "stored replies");
}

#[test]
fn killed_ten_times_nothing_is_lost_doubled_or_paid_twice() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let server = start(Behaviour { latency_ms: 30.0, ..Behaviour::default() });
    let slow = ["--max-in-flight", "8"];
    for kill in 0..10 {
        let mut child: Child =
            command(dir.path(), &server.url()).args(slow).stderr(Stdio::null()).spawn().unwrap();
        // Different moments of start-up, of the requests and of writing.
        std::thread::sleep(Duration::from_millis(20 + 23 * kill));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let stored: HashMap<String, usize> = stored_keys(dir.path());
    assert!(!stored.is_empty() && stored.values().all(|&times| times == 1), "{} stored", stored.len());
    // Calls that were in flight when the client was killed reach the server's end a little later.
    std::thread::sleep(Duration::from_millis(100));
    let before = server.total();
    succeeds(&run(dir.path(), &server.url(), &slow));
    assert_eq!(server.total() - before, ROWS - stored.len(), "only what was not stored is asked for");
    assert!(server.counts().paid_again() <= 10 * 8, "at most what was in flight is paid again");
    let ids: Vec<String> = revisions(dir.path()).into_iter().map(|[id, ..]| id).collect();
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
    let server = start(Behaviour { unauthorized: true, ..Behaviour::default() });
    let output = command(dir.path(), &server.url()).env("OPENAI_API_KEY", "sk-secret-123").output().unwrap();
    fails(&output, "401");
    assert!(stderr(&output).contains("key") && !stderr(&output).contains("sk-secret-123"));
    assert!(!dir.path().join("pairs/pairs.jsonl").exists(), "nothing half-written");
    // Nobody listens on this port: it was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nobody = format!("http://127.0.0.1:{port}/v1");
    fails(&run(dir.path(), &nobody, &["--retries", "2"]), "is the server running");
    fails(&run(dir.path(), "localhost:8000", &[]), "expected something like");
    for (text, reason) in [
        ("{\"prompt\": \"a\"}\n", "response"),
        ("{\"prompt\": \"a\", \"response\": \"b\"}\nnonsense\n", "answers.jsonl:2"),
        ("", "holds no rows"),
    ] {
        fs::write(dir.path().join("answers.jsonl"), text).unwrap();
        fails(&run(dir.path(), &server.url(), &[]), reason);
    }
}

#[test]
fn options_without_effect_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let server = calm();
    for (flags, part) in [
        (&["--judge-model", "x"][..], "--judge-model has no effect"),
        (&["--ties", "keep"], "--ties has no effect"),
        (&["--judge-by", "score"], "--judge-by has no effect"),
        (&["--method", "judge"], "two or more answers"),
        (&["--method", "clair,clair"], "names a method twice"),
        (&["--reasoning-budget", "100"], "--reasoning-budget has no effect"),
        (&["--max-cost", "1"], "--price-input"),
        (&["--min-jaccard", "0.9", "--max-jaccard", "0.1"], "no pair could pass"),
        (&["--max-failure-rate", "2"], "a share from 0 to 1"),
        (&["--extra-body", "[1]"], "no JSON object"),
        (&["--extra-body", "{\"model\": 1}"], "option of its own"),
        (&["--prompt-style", "system", "--prompt-file", "answers.jsonl"], "=== input ==="),
        (&["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (&["--api-key-env", "A,B"], "one for each"),
        (&["--rpm", "0"], "above 0"),
    ] {
        fails(&run(dir.path(), &server.url(), flags), part);
    }
    let anthropic = server.url() + "/messages";
    for (flags, part) in [
        (&["--seed", "1"][..], "--seed has no effect"),
        (&["--reply-format", "json"], "not offered"),
        (&["--reasoning-effort", "low"], "--reasoning-budget"),
        (&["--batch-api"], "OpenAI's interface alone"),
        (&["--reasoning-budget", "5000"], "leaves no tokens"),
    ] {
        fails(&run(dir.path(), &anthropic, flags), part);
    }
    assert_eq!(server.total(), 0, "nothing was asked");
}

#[test]
fn rows_that_cannot_be_used_are_listed_with_their_reason() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = ["length", "unchanged", "filtered", "never_marked", "alludes", "refused", "good"];
    write_rows(dir.path(), kinds.iter().map(|kind| row(kind, &format!("say {kind}"), "same")));
    let server = calm();
    let reasons = || -> Vec<(String, String, u64)> {
        let text = |value: &Value| value.as_str().unwrap().to_string();
        let failed = lines(&dir.path().join("pairs/failed.jsonl"));
        failed.iter().map(|f| (text(&f["id"]), text(&f["reason"]), f["attempts"].as_u64().unwrap())).collect()
    };
    let want = |attempts: u64| -> Vec<(String, String, u64)> {
        let row = |id: &str, reason: &str, attempts: u64| (format!("r{id}"), reason.to_string(), attempts);
        vec![
            row("length", "length", attempts.div_ceil(5)),
            row("unchanged", "unchanged", attempts.div_ceil(5)),
            row("filtered", "filtered", attempts.div_ceil(5)),
            row("never_marked", "no_marker", attempts),
            row("alludes", "alludes", attempts),
            row("refused", "refused", attempts.div_ceil(5)),
        ]
    };
    succeeds(&run(dir.path(), &server.url(), &[]));
    assert_eq!(reasons(), want(5));
    assert_eq!(pairs(dir.path()).len(), 1);
    // The reply that was cut off was asked for once more, with more tokens.
    assert_eq!(server.total(), 2 + 1 + 1 + 5 + 5 + 1 + 1);
    succeeds(&run(dir.path(), &server.url(), &["--retry-failed"]));
    assert_eq!(reasons(), want(10));
    // What was bought then is there without the flag too.
    let asked = server.total();
    succeeds(&run(dir.path(), &server.url(), &[]));
    assert_eq!((reasons(), server.total()), (want(10), asked));
}

#[test]
fn a_run_whose_rows_fail_ends_early() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), (0..500).map(|i| row(i, "say never_marked", &format!("answer {i}"))));
    let server = start(Behaviour { latency_ms: 5.0, ..Behaviour::default() });
    let flags = ["--max-in-flight", "4", "--form-retries", "0"];
    fails(&run(dir.path(), &server.url(), &flags), "--max-failure-rate 0.5 allows; the last one: no_marker");
    // Twenty failures are enough; how many calls go out before the disk has them depends on the disk.
    assert!(server.total() < 200, "{} of 500", server.total());
}

#[test]
fn money_is_not_spent_beyond_the_limit_and_a_higher_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let server = start(Behaviour { latency_ms: 2.0, ..Behaviour::default() });
    let prices = ["--price-input", "1", "--price-output", "10", "--max-tokens", "100"];
    let with = |most: &'static str| [&prices[..], &["--max-cost", most]].concat();
    // A call of this input costs about 0.0008 dollars.
    fails(&run(dir.path(), &server.url(), &with("0.01")), "--max-cost would be passed");
    let first = server.total();
    assert!((5..40).contains(&first), "{first}");
    succeeds(&run(dir.path(), &server.url(), &with("10")));
    assert_eq!((server.total(), server.counts().paid_again()), (ROWS, 0));
    let cost = report(dir.path())["cost"].as_f64().unwrap();
    assert!((0.01..0.1).contains(&cost), "{cost}");
    let output = run(dir.path(), &server.url(), &[&prices[..], &["--dry-run"]].concat());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("0 calls") && text.contains("60 replies are stored"), "{text}");
}

#[test]
fn the_key_is_in_nothing_that_a_run_leaves() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    fs::write(dir.path().join("key"), "sk-secret-123\n").unwrap();
    let server = start(Behaviour { faults: 0.2, ..Behaviour::default() });
    let output = command(dir.path(), &server.url())
        .args(["--api-key-file", "key", "--form-retries", "20"])
        .env("RUST_LOG", "trace")
        .output()
        .unwrap();
    succeeds(&output);
    assert!(!stderr(&output).contains("sk-secret-123"), "in the log");
    let mut files = vec![dir.path().join("pairs")];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            seen += 1;
            let bytes = fs::read(&path).unwrap();
            assert!(!bytes.windows(13).any(|part| part == b"sk-secret-123"), "{}", path.display());
        }
    }
    assert!(seen >= 8, "{seen} files");
}
