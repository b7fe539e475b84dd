//! The real binary with every method, interface and transport.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use loopback::Behaviour;
use serde_json::{Value, json};

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
fn a_judge_that_cannot_be_asked_is_asked_again_and_pairs_are_not_paid_twice() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), (0..3).map(|i| row(i, &format!("question {i}"), &format!("answer {i}"))));
    let (calm, broken) = (calm(), start(Behaviour { fails: true, ..Behaviour::default() }));
    succeeds(&run(dir.path(), &calm.url(), &[]));
    run(dir.path(), &broken.url(), &["--verify", "--retries", "1"]);
    let failed = lines(&dir.path().join("pairs/failed.jsonl"));
    assert!(failed.len() == 3 && failed.iter().all(|row| row["reason"] == "request_failed"), "{failed:?}");
    succeeds(&run(dir.path(), &calm.url(), &["--verify", "--retry-failed"]));
    assert!(pairs(dir.path()).iter().all(|row| row["verified"] == true));
    assert_eq!((calm.count("good"), calm.counts().paid_again()), (3 + 2 * 3, 0));
}

#[test]
fn a_server_that_wants_the_new_name_of_the_limit_gets_it() {
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = start(Behaviour { new_limit: true, latency_ms: 5.0, ..Behaviour::default() });
    for (dir, url) in [(&old, calm().url()), (&new, server.url())] {
        write_input(dir.path());
        // The refusal is not one of the retries.
        let flags = ["--max-tokens", "300", "--max-in-flight", "8", "--retries", "0", "--extra-body"];
        let flags = [&flags[..], &["{\"reasoning\": {\"max_tokens\": 5}}"]].concat();
        succeeds(&run(dir.path(), &url, &flags));
    }
    assert_eq!(revisions(new.path()), revisions(old.path()));
    assert!((1..=8).contains(&server.count("old_limit")), "{} asked in vain", server.count("old_limit"));
    assert_eq!((server.count("good"), server.counts().paid_again()), (ROWS, 0));
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
fn where_all_endpoints_are_down_their_return_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    write_rows(dir.path(), std::iter::once(row(0, "q", "a")));
    let port = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let both = format!("http://127.0.0.1:{}/v1,http://127.0.0.1:{}/v1", port(), port());
    let started = Instant::now();
    let output = command(dir.path(), &both).args(["--retries", "3", "--backoff", "0.3"]).output().unwrap();
    fails(&output, "gave up after 4 attempts");
    // The first failure is answered by the other endpoint at once; from then on none is well.
    assert!(started.elapsed() > Duration::from_millis(400), "{:?}", started.elapsed());
}

#[test]
fn rows_that_wait_for_their_turn_in_a_budget_are_not_late() {
    let dir = tempfile::tempdir().unwrap();
    write_input(dir.path());
    let server = calm();
    let started = Instant::now();
    succeeds(&run(dir.path(), &server.url(), &["--rpm", "1500", "--deadline", "0.5"]));
    // 60 rows at 25 a second, half a second's worth of them at once.
    assert!(started.elapsed() > Duration::from_millis(1500), "{:?}", started.elapsed());
    assert_eq!(pairs(dir.path()).len(), ROWS);
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
    // Replies that cannot be used are bought again only as often as asked for.
    let again = tempfile::tempdir().unwrap();
    write_rows(again.path(), (0..3).map(|i| row(i, "say never_marked", &format!("answer {i}"))));
    let quick = start(Behaviour { batch_ms: 10, ..Behaviour::default() });
    let once = ["--batch-api", "--batch-poll", "0.05", "--form-retries", "1"];
    run(again.path(), &quick.url(), &once);
    assert_eq!(quick.count("good"), 6);
    run(again.path(), &quick.url(), &[&once[..], &["--retry-failed"]].concat());
    assert_eq!(quick.count("good"), 12);
    let (report, usage) = (report(dir.path()), &report(dir.path())["all_usage"]);
    let full = usage["prompt_tokens"].as_f64().unwrap() * 2e-6
        + usage["completion_tokens"].as_f64().unwrap() * 20e-6;
    assert!((report["cost"].as_f64().unwrap() - full / 2.0).abs() < 1e-9, "half the price");
}
