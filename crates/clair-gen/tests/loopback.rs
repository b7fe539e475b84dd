//! The real binary against a local server that behaves badly.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use loopback::{Behaviour, Fault, Server};
use serde_json::{Value, json};

const ROWS: usize = 60;

fn write_input(dir: &Path) {
    write_rows(dir, (0..ROWS).map(|i| row(i, &format!("question {i}"), &format!("answer {i}"))));
}

fn row(id: impl ToString, prompt: &str, response: &str) -> Value {
    let id = id.to_string();
    json!({"id": format!("r{id}"), "prompt": prompt, "response": response})
}

fn write_rows(dir: &Path, rows: impl Iterator<Item = Value>) {
    let rows: Vec<String> = rows.map(|row| row.to_string()).collect();
    fs::write(dir.join("answers.jsonl"), rows.join("\n")).unwrap();
}

fn start(behaviour: Behaviour) -> Server {
    Server::start(behaviour).unwrap()
}

fn calm() -> Server {
    start(Behaviour::default())
}

fn command(dir: &Path, endpoint: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_clair-gen"));
    command
        .current_dir(dir)
        .env_remove("OPENAI_API_KEY")
        .env_remove("ANTHROPIC_API_KEY")
        .args(["--input", "answers.jsonl", "--out", "pairs", "--endpoint", endpoint, "--model", "teacher"])
        .args(["--backoff", "0.01", "--timeout", "2", "--retries", "30"]);
    command
}

fn run(dir: &Path, endpoint: &str, flags: &[&str]) -> Output {
    command(dir, endpoint).args(flags).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
}

fn fails(output: &Output, part: &str) {
    assert_eq!(output.status.code(), Some(1), "{}", stderr(output));
    assert!(stderr(output).contains(part), "expected {part:?}: {}", stderr(output));
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn pairs(dir: &Path) -> Vec<Value> {
    lines(&dir.join("pairs/pairs.jsonl"))
}

fn report(dir: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(dir.join("pairs/report.json")).unwrap()).unwrap()
}

/// Ids with their chosen and rejected texts, in file order.
fn texts(path: &Path) -> Vec<[String; 3]> {
    let text = |v: &Value| v.as_str().unwrap().to_string();
    let row = |row: &Value| {
        [text(&row["id"]), text(&row["chosen"][1]["content"]), text(&row["rejected"][1]["content"])]
    };
    lines(path).iter().map(row).collect()
}

fn revisions(dir: &Path) -> Vec<[String; 3]> {
    texts(&dir.join("pairs/pairs.jsonl"))
}

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
    assert!(server.total() < 60, "{}", server.total());
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
    assert!(text.contains("0 calls") && text.contains("60 rows have a stored reply"), "{text}");
}

#[test]
fn one_pass_makes_the_sets_of_several_methods() {
    let dir = tempfile::tempdir().unwrap();
    let rows = (0..5).map(|i| {
        let task = if i == 3 { format!("biased {i}") } else { format!("question {i}") };
        json!({"id": i, "prompt": task, "responses": [format!("answer {i}"), format!("an improved answer {i}")]})
    });
    write_rows(dir.path(), rows);
    let server = calm();
    let flags = ["--method", "clair,stronger,judge", "--verify", "--ties", "keep"];
    succeeds(&run(dir.path(), &server.url(), &flags));
    let set = |name: &str| texts(&dir.path().join("pairs").join(name).join("pairs.jsonl"));
    let (clair, stronger, judge) = (set("clair"), set("stronger"), set("judge"));
    assert_eq!(clair[1], ["1", "answer 1, improved", "answer 1"]);
    assert_eq!((stronger[1][2].as_str(), stronger[1][1].contains("much better")), ("answer 1", true));
    assert_eq!(judge[1], ["1", "an improved answer 1", "answer 1"]);
    let rows = lines(&dir.path().join("pairs/judge/pairs.jsonl"));
    let ties: Vec<bool> = rows.iter().map(|row| row["tie"].as_bool().unwrap()).collect();
    assert_eq!(ties, [false, false, false, true, false], "a judge that prefers the first place sees a tie");
    let verified: Vec<Value> = lines(&dir.path().join("pairs/clair/pairs.jsonl"))
        .iter()
        .map(|row| row["verified"].clone())
        .collect();
    assert_eq!(verified, [json!(true), json!(true), json!(true), json!(false), json!(true)]);
    // With scores, and JSON replies.
    let flags = ["--method", "judge", "--judge-by", "score", "--reply-format", "json"];
    succeeds(&run(dir.path(), &server.url(), &flags));
    let rows = pairs(dir.path());
    assert_eq!((&rows[1]["chosen_score"], &rows[1]["rejected_score"]), (&json!(6.0), &json!(5.0)));
}

#[test]
fn given_scores_need_no_server() {
    let dir = tempfile::tempdir().unwrap();
    let scored = |scores: Value| json!({"prompt": "q", "responses": ["a", "b", "c"], "scores": scores});
    write_rows(dir.path(), [scored(json!([1, 3, 2])), scored(json!([2, 2, 2]))].into_iter());
    let output = Command::new(env!("CARGO_BIN_EXE_clair-gen"))
        .current_dir(dir.path())
        .args(["--input", "answers.jsonl", "--out", "pairs", "--method", "judge-offpolicy"])
        .output()
        .unwrap();
    succeeds(&output);
    assert_eq!(revisions(dir.path()), [["0", "b", "a"]]);
    assert_eq!(lines(&dir.path().join("pairs/failed.jsonl"))[0]["reason"], "tie");
}

#[test]
fn gates_and_verification_leave_pairs_out() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(
        dir.path(),
        [row(0, "q", "a"), row(1, "q", "one two three four five six"), row(2, "biased", "a b c d e f")]
            .into_iter(),
    );
    let server = calm();
    let flags = ["--min-jaccard", "0.5", "--verify", "--drop-unverified", "--judge-model", "judge"];
    succeeds(&run(dir.path(), &server.url(), &flags));
    assert_eq!(revisions(dir.path()).len(), 1);
    let failed: Vec<Value> =
        lines(&dir.path().join("pairs/failed.jsonl")).iter().map(|f| f["reason"].clone()).collect();
    assert_eq!(failed, [json!("min_jaccard"), json!("unverified")]);
}

#[test]
fn every_interface_gives_the_same_pairs() {
    let server = calm();
    let refuses = start(Behaviour { no_schema: true, ..Behaviour::default() });
    let url = server.url();
    let mut all = Vec::new();
    for (endpoint, flags) in [
        (url.clone(), &[][..]),
        (
            format!("{url}/messages"),
            &["--prompt-style", "system", "--max-tokens", "5000", "--reasoning-budget", "1024"],
        ),
        (url.clone(), &["--stream", "always"]),
        (url.clone(), &["--reply-format", "auto"]),
        (
            refuses.url(),
            &["--reply-format", "auto", "--reasoning-effort", "low", "--extra-body", "{\"top_k\": 5}"],
        ),
        (url.clone(), &["--batch-api", "--batch-poll", "0.05"]),
        (format!("{url}=3,{}", refuses.url()), &[]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_input(dir.path());
        succeeds(&run(dir.path(), &endpoint, flags));
        all.push(revisions(dir.path()));
    }
    assert!(all.iter().all(|one| *one == all[0]) && all[0].len() == ROWS);
    assert!(refuses.count("good") > ROWS, "the second endpoint had its share");
}

#[test]
fn an_endpoint_that_fails_is_replaced_by_the_others() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let good = calm();
    let refused = start(Behaviour { unauthorized: true, ..Behaviour::default() });
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoints = format!("http://127.0.0.1:{port}/v1,{},{}", refused.url(), good.url());
    succeeds(&run(dir.path(), &endpoints, &[]));
    assert_eq!((good.count("good"), pairs(dir.path()).len()), (ROWS, ROWS));
    // Many calls are refused at the same time by the one of two; and one that only fails is left for a while.
    let two = tempfile::tempdir().unwrap();
    write_input(two.path());
    succeeds(&run(two.path(), &format!("{},{}", refused.url(), good.url()), &[]));
    let fails_all = start(Behaviour { fails: true, ..Behaviour::default() });
    let slow = start(Behaviour { latency_ms: 5.0, ..Behaviour::default() });
    let three = tempfile::tempdir().unwrap();
    write_input(three.path());
    let flags = ["--retries", "8", "--max-in-flight", "4"];
    succeeds(&run(three.path(), &format!("{},{}", fails_all.url(), slow.url()), &flags));
    assert_eq!(slow.count("good"), ROWS);
    assert!(fails_all.total() < ROWS, "{}", fails_all.total());
}

#[test]
fn long_requests_that_are_cut_off_are_streamed() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), (0..8).map(|i| row(i, "q", &format!("answer {i}"))));
    let server = start(Behaviour { latency_ms: 1600.0, cut_after_ms: 1500, ..Behaviour::default() });
    succeeds(&run(dir.path(), &server.url(), &["--timeout", "3", "--backoff", "0.01"]));
    assert!(server.count("cut_long") > 0 && server.count("good") == 8, "{:?}", server.counts().kinds);
    let never = tempfile::tempdir().unwrap();
    write_rows(never.path(), std::iter::once(row(0, "q", "a")));
    let flags = ["--timeout", "3", "--stream", "never", "--retries", "0"];
    let all_cut = start(Behaviour { latency_ms: 4000.0, cut_after_ms: 100, ..Behaviour::default() });
    assert!(!run(never.path(), &all_cut.url(), &flags).status.success());
}

#[test]
fn a_batch_goes_on_in_another_process_and_only_failed_items_are_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let server = start(Behaviour { batch_ms: 3000, batch_faults: true, ..Behaviour::default() });
    let flags = ["--batch-api", "--batch-poll", "0.1", "--price-input", "2", "--price-output", "20"];
    let mut child = command(dir.path(), &server.url()).args(flags).stderr(Stdio::null()).spawn().unwrap();
    let state = dir.path().join("pairs/replies/batches.json");
    while !fs::read_to_string(&state).is_ok_and(|text| text.contains("batch_0")) {
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    succeeds(&run(dir.path(), &server.url(), &flags));
    assert_eq!(revisions(dir.path()).len(), ROWS);
    let counts = server.counts();
    assert_eq!((counts.kinds["good"], counts.kinds["batch_error"], counts.paid_again()), (ROWS, ROWS / 5, 0));
    assert_eq!(counts.kinds["batch"], 2, "the first batch was not sent again, its failed items were");
    let (report, usage) = (report(dir.path()), &report(dir.path())["all_usage"]);
    let full = usage["prompt_tokens"].as_f64().unwrap() * 2e-6
        + usage["completion_tokens"].as_f64().unwrap() * 20e-6;
    assert!((report["cost"].as_f64().unwrap() - full / 2.0).abs() < 1e-9, "half the price");
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
