//! `mixeval`, `compare` and `choices` as commands, on a few questions of our own and a judge with given replies.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use loopback::{Behaviour, Server};
use serde_json::{Value, json};

fn model(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models").join(name).display().to_string()
}

fn eval(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_eval"));
    command.env_remove("OPENAI_API_KEY").current_dir(dir).args(args).output().unwrap()
}

fn done(dir: &Path, args: &[&str]) -> String {
    let output = eval(dir, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(dir: &Path, args: &[&str], says: &str) {
    let output = eval(dir, args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(says), "{args:?}: {said}");
}

fn value(path: PathBuf) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn lines(path: PathBuf) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Five free questions, two of them the same, and four with options, two of them the same.
fn write_data(dir: &Path) {
    let free = |prompt: &str, target: &[&str], benchmark: &str| {
        json!({"problem_type": "free-form", "context": null, "prompt": prompt, "target": target,
               "benchmark_name": benchmark})
    };
    let choice = |prompt: &str, options: &[&str], target: usize| {
        json!({"problem_type": "single-choice", "context": "In a kitchen.", "prompt": prompt, "options": options,
               "target": [target], "benchmark_name": "OwnChoice"})
    };
    let place = dir.join("data/mixeval-hard");
    fs::create_dir_all(&place).unwrap();
    let questions = json!({
        "0": free("free one", &["4"], "GSM8k"),
        "1": free("free two", &["Rome", "Roma"], "OwnTrivia"),
        "2": free("free three", &["blue"], "OwnTrivia"),
        "3": free("free one", &["4"], "GSM8k"),
        "4": free("free four", &["seven"], "OwnTrivia"),
    });
    fs::write(place.join("free-form.json"), questions.to_string()).unwrap();
    let questions = json!({
        "0": choice("choice one", &["salt", "sugar"], 0),
        "1": choice("choice two", &["knife", "fork", "spoon"], 2),
        "2": choice("choice one", &["salt", "sugar"], 0),
        "3": choice("choice three", &["pan", "pot"], 1),
    });
    fs::write(place.join("multiple-choice.json"), questions.to_string()).unwrap();
}

/// A judge that says fixed things, some of them only when it is reminded of the form, one never.
fn judge(dir: &Path) -> Server {
    let script = [
        ("could not be read", "Now in the form: [[0.4]]"),
        ("free one", "Right. [[1.0]]"),
        ("free two", "In part. [[0.3]]"),
        ("free three", "I cannot say it in brackets"),
        ("free four", "Wrong. [[0.0]]"),
        ("choice one", "The first. [[A]]"),
        ("choice two", "It takes [[A]], the knife"),
        ("choice three", "Neither. [[none]]"),
    ];
    let rows = script.map(|(contains, reply)| json!({"contains": contains, "reply": reply}).to_string());
    fs::write(dir.join("script.jsonl"), rows.join("\n")).unwrap();
    Server::start(Behaviour { replies: Some(dir.join("script.jsonl")), ..Behaviour::default() }).unwrap()
}

fn mixeval<'a>(model: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let flags = ["mixeval", "--model", model, "--data", "data", "--out", out, "--max-new-tokens", "6"];
    [&flags[..], more].concat()
}

/// Python, with the reference's arithmetic on these judgements:
/// ```text
/// ff, mp = [1.0, 0.3, 0.4, 1.0, 0.0], [1, 0, 1, 0]
/// overall = round(sum(ff)/5, 3) * 5/9 + round(sum(mp)/4, 3) * 4/9             # 0.5222222222222221
/// trivia = round((0.3 + 0.4 + 0.0)/3, 3) * 3/3                                 # 0.233
/// ```
#[test]
fn a_judges_fixed_judgements_give_the_references_scores_and_are_bought_once() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let (server, tiny) = (judge(dir.path()), model("tiny-qwen2"));
    let url = server.url();
    let flags = mixeval(&tiny, "run", &["--judge-endpoint", &url, "--judge-model", "judge"]);
    let table = done(dir.path(), &flags);
    let scores = value(dir.path().join("run/score.json"));
    let score = |name: &str| scores[name].as_f64().unwrap();
    assert!(
        (score("overall") - 0.522_222).abs() < 1e-5 && (score("OwnTrivia") - 0.233).abs() < 1e-9,
        "{scores}"
    );
    assert!((score("GSM8k") - 1.0).abs() < 1e-9 && (score("OwnChoice") - 0.5).abs() < 1e-9, "{scores}");
    let items = lines(dir.path().join("run/items.jsonl"));
    assert_eq!(items.len(), 9);
    assert_eq!((&items[0]["id"], &items[0]["cluster"]), (&json!("free-form/0"), &items[3]["cluster"]));
    // Reminded of the form once; the answer without an option counts as 0 and is told apart.
    assert_eq!(items[2]["score"], 0.4);
    assert_eq!(items[8]["problem"], "the judge sees no option in the answer");
    assert!(table.contains("overall") && table.contains("judge: 8 replies, 8 of them bought now"), "{table}");
    // Seven distinct questions and one reminder; a second run buys nothing and is the same to the byte.
    assert_eq!(server.total(), 8);
    let before = fs::read(dir.path().join("run/items.jsonl")).unwrap();
    let again = done(dir.path(), &flags);
    assert!(again.contains("8 replies, 0 of them bought now"), "{again}");
    assert_eq!((server.total(), fs::read(dir.path().join("run/items.jsonl")).unwrap()), (8, before));
    assert_eq!(
        fs::read_to_string(dir.path().join("run/report.html")).unwrap().matches("<details>").count(),
        9
    );
}

#[test]
fn judgements_that_cannot_be_read_are_counted_and_never_drawn() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    fs::write(dir.path().join("mute.jsonl"), r#"{"contains": "", "reply": "no brackets"}"#).unwrap();
    let mute = Behaviour { replies: Some(dir.path().join("mute.jsonl")), ..Behaviour::default() };
    let (server, tiny) = (Server::start(mute).unwrap(), model("tiny-qwen2"));
    let url = server.url();
    done(dir.path(), &mixeval(&tiny, "run", &["--judge-endpoint", &url, "--judge-model", "judge"]));
    let items = lines(dir.path().join("run/items.jsonl"));
    assert!(
        items.iter().all(|item| item["score"] == 0.0 && item["problem"] == "the judgement could not be read")
    );
    let summary = value(dir.path().join("run/summary.json"));
    assert_eq!(summary["parts"][0]["unread"], 9);
    // Each of seven distinct answers was asked about four times.
    assert_eq!(summary["judge"]["replies"], 28);
}

#[test]
fn rules_read_answers_of_local_base_and_served_models() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let tiny = model("tiny-llama");
    for (out, more) in [("chat", &["--parser", "rule"][..]), ("base", &["--parser", "rule", "--base-model"])]
    {
        done(dir.path(), &mixeval(&tiny, out, more));
        let items = lines(dir.path().join(out).join("items.jsonl"));
        assert_eq!(items.len(), 9);
        assert!(items.iter().all(|item| [0.0, 1.0].contains(&item["score"].as_f64().unwrap())));
    }
    let rows =
        [("free one", "The answer is 4"), ("free two", "It is roma."), ("choice", "B"), ("", "who knows")];
    let script = rows.map(|(contains, reply)| json!({"contains": contains, "reply": reply}).to_string());
    fs::write(dir.path().join("script.jsonl"), script.join("\n")).unwrap();
    let replies = Some(dir.path().join("script.jsonl"));
    let server = Server::start(Behaviour { replies, ..Behaviour::default() }).unwrap();
    let url = server.url();
    let flags = ["mixeval", "--endpoint", &url, "--data", "data", "--out", "served", "--parser", "rule"];
    done(dir.path(), &flags);
    let items = lines(dir.path().join("served/items.jsonl"));
    let scores: Vec<f64> = items.iter().map(|item| item["score"].as_f64().unwrap()).collect();
    assert_eq!(scores, [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
    assert_eq!(server.total(), 7, "each distinct question once");
}

#[test]
fn a_judge_that_fails_gives_no_score_and_what_was_bought_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let (tiny, url) = (model("tiny-qwen2"), judge(dir.path()).url());
    let failing = Server::start(Behaviour { unauthorized: true, ..Behaviour::default() }).unwrap().url();
    let with = |url| mixeval(&tiny, "run", &["--judge-endpoint", url, "--judge-model", "judge"]);
    refused(dir.path(), &with(&failing), "the judge cannot be asked");
    assert!(!dir.path().join("run/score.json").exists() && dir.path().join("run/answers.jsonl").exists());
    done(dir.path(), &with(&url));
    assert!(dir.path().join("run/score.json").exists());
    let none = [&with(&url)[..], &["--judge-max-in-flight", "0"]].concat();
    refused(dir.path(), &none, "0 is not in 1..");
}

#[test]
fn answers_to_other_questions_are_not_kept_and_those_that_are_too_long_count_as_0() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let tiny = model("tiny-opt");
    done(dir.path(), &mixeval(&tiny, "run", &["--parser", "rule"]));
    refused(
        dir.path(),
        &mixeval(&tiny, "run", &["--parser", "rule", "--base-model"]),
        "choose another --out",
    );
    let path = dir.path().join("data/mixeval-hard/free-form.json");
    let long = json!({"0": {"prompt": "word ".repeat(3000), "target": ["x"], "benchmark_name": "Long"}});
    fs::write(path, long.to_string()).unwrap();
    let table = done(dir.path(), &mixeval(&tiny, "long", &["--parser", "rule"]));
    let item = &lines(dir.path().join("long/items.jsonl"))[0];
    assert_eq!(
        (&item["score"], &item["problem"]),
        (&json!(0.0), &json!("the question is longer than the model takes"))
    );
    assert!(table.contains("Long"), "{table}");
    // Scores that were read in different ways are no comparison.
    let summary = dir.path().join("long/summary.json");
    let text = fs::read_to_string(&summary).unwrap();
    fs::create_dir(dir.path().join("other")).unwrap();
    fs::copy(dir.path().join("long/items.jsonl"), dir.path().join("other/items.jsonl")).unwrap();
    fs::write(
        dir.path().join("other/summary.json"),
        text.replace("\"parser\": \"rule\"", "\"parser\": \"gpt\""),
    )
    .unwrap();
    refused(dir.path(), &["compare", "long", "other", "--out", "o"], "answers were read \"rule\" in long");
}

#[test]
fn flags_without_effect_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let tiny = model("tiny-llama");
    let bad = |more: &[&str], says: &str| refused(dir.path(), &mixeval(&tiny, "run", more), says);
    bad(&["--parser", "judge"], "needs --judge-endpoint");
    bad(&["--parser", "rule", "--judge-endpoint", "http://localhost:1", "--judge-model", "m"], "exclude");
    bad(&["--base-model", "--system-prompt", "x"], "no effect with --base-model");
    bad(&["--few-shot", "dir"], "--base-model");
    bad(&["--endpoint", "http://localhost:1", "--dtype", "float32"], "with --endpoint the server decides");
    let nowhere = ["mixeval", "--model", &tiny, "--data", "elsewhere", "--out", "run"];
    refused(dir.path(), &nowhere, "give a release of MixEval's data");
}

#[test]
fn runs_are_compared_item_by_item() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let (server, tiny) = (judge(dir.path()), model("tiny-qwen2"));
    let url = server.url();
    done(dir.path(), &mixeval(&tiny, "a", &["--judge-endpoint", &url, "--judge-model", "judge"]));
    done(dir.path(), &mixeval(&tiny, "b", &["--judge-endpoint", &url, "--judge-model", "judge"]));
    let text = fs::read_to_string(dir.path().join("b/items.jsonl")).unwrap();
    // B gets two distinct questions right that A got wrong, in part; one of another group.
    let better = text.replace(r#""score":0.3"#, r#""score":0.9"#);
    let better = better.replace(r#""score":0.0,"read":"A""#, r#""score":1.0,"read":"C""#);
    assert_ne!(better, text);
    fs::write(dir.path().join("b/items.jsonl"), better).unwrap();
    let table = done(dir.path(), &["compare", "a", "b", "--out", "both"]);
    let result = value(dir.path().join("both/compare.json"));
    let whole = &result["parts"][0];
    assert_eq!(
        (&whole["items"], &whole["distinct"], &whole["better"], &whole["worse"]),
        (&json!(9), &json!(7), &json!(2), &json!(0))
    );
    assert!((whole["difference"]["mean"].as_f64().unwrap() - 1.6 / 9.0).abs() < 1e-9, "{whole}");
    assert_eq!(whole["p"], 0.5);
    assert_eq!(result["parts"].as_array().unwrap().len(), 4, "the whole and three groups");
    assert!(table.contains("OwnTrivia") && dir.path().join("both/report.html").exists());
    // Other items are no comparison.
    let short = fs::read_to_string(dir.path().join("a/items.jsonl")).unwrap();
    let short: Vec<&str> = short.lines().skip(1).collect();
    fs::write(dir.path().join("a/items.jsonl"), short.join("\n")).unwrap();
    refused(dir.path(), &["compare", "a", "b", "--out", "none"], "not of the same set");
}

#[test]
fn answers_are_compared_by_a_judge_in_both_orders() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, answer: &dyn Fn(usize) -> String| {
        let row = |i: usize| {
            json!({"id": i.to_string(), "prompt": format!("task {i}"), "response": answer(i)}).to_string()
        };
        fs::write(dir.path().join(name), (0..20).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    };
    write("a.jsonl", &|i| format!("plain {i}"));
    write("b.jsonl", &|i| format!("better {i}{}", if i < 5 { "" } else { " by place" }));
    // By place the first wins; otherwise what is better wins, in both orders.
    let rows = [
        ("by place", "The first. [[1]]"),
        ("<answer_1>\nbetter", "This one. [[1]]"),
        ("<answer_2>\nbetter", "The other. [[2]]"),
    ];
    let script = rows.map(|(contains, reply)| json!({"contains": contains, "reply": reply}).to_string());
    fs::write(dir.path().join("script.jsonl"), script.join("\n")).unwrap();
    let replies = Some(dir.path().join("script.jsonl"));
    let server = Server::start(Behaviour { replies, ..Behaviour::default() }).unwrap();
    refused(dir.path(), &["compare", "a.jsonl", "b.jsonl", "--out", "o"], "give --judge-endpoint");
    let url = server.url();
    let table = done(
        dir.path(),
        &["compare", "a.jsonl", "b.jsonl", "--out", "o", "--judge-endpoint", &url, "--judge-model", "judge"],
    );
    let rate = &value(dir.path().join("o/compare.json"))["win_rate"];
    assert_eq!((&rate["pairs"], &rate["by_place"], &rate["unread"]), (&json!(20), &json!(15), &json!(0)));
    assert!((rate["raw"]["mean"].as_f64().unwrap() - (5.0 + 7.5) / 20.0).abs() < 1e-9, "{rate}");
    assert_eq!(server.total(), 40);
    assert!(table.contains("B wins 0.6250"), "{table}");
}

#[test]
fn the_anchor_that_fits_is_told_by_who_writes_better() {
    let dir = tempfile::tempdir().unwrap();
    let data =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/data/clair_mini").display().to_string();
    let tiny = model("tiny-qwen2");
    let flags = [
        "recommend",
        "--dataset",
        &data,
        "--model",
        &tiny,
        "--out",
        "o",
        "--rows",
        "40",
        "--max-new-tokens",
        "4",
    ];
    refused(dir.path(), &flags, "give --judge-endpoint");
    fs::write(dir.path().join("tie.jsonl"), r#"{"contains": "", "reply": "[[tie]]"}"#).unwrap();
    let replies = Some(dir.path().join("tie.jsonl"));
    let server = Server::start(Behaviour { replies, ..Behaviour::default() }).unwrap();
    let url = server.url();
    let judged = [&flags[..], &["--judge-endpoint", &url, "--judge-model", "j"]].concat();
    let said = done(dir.path(), &judged);
    assert!(said.starts_with("no recommendation\nWARNING"), "{said}");
    assert_eq!((server.total(), lines(dir.path().join("o/rows.jsonl")).len()), (80, 40));
    assert!(done(dir.path(), &judged).contains("40 pairs"));
    assert_eq!(server.total(), 80, "nothing is asked twice");
    // By scores of a reward model.
    for (own, want) in [(1.0, "--loss-type apo_zero"), (3.0, "--loss-type apo_down")] {
        let row = |i: usize| json!({"id": i, "own_score": own, "chosen_score": 2.0}).to_string();
        fs::write(dir.path().join("s.jsonl"), (0..50).map(row).collect::<Vec<_>>().join("\n")).unwrap();
        let said = done(dir.path(), &["recommend", "--dataset", &data, "--scores", "s.jsonl", "--out", "s"]);
        assert!(said.starts_with(want), "{said}");
        assert!(fs::read_to_string(dir.path().join("s/report.html")).unwrap().contains(want));
    }
    refused(
        dir.path(),
        &["recommend", "--dataset", &data, "--scores", "s.jsonl", "--out", "s", "--rows", "5"],
        "no effect",
    );
}

/// Log-likelihoods by transformers 5.23 in float32 (`fixtures/make/choices.py`).
#[test]
fn choices_have_the_likelihoods_that_transformers_gives() {
    let dir = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/choices.json");
    let reference = value(path);
    for (name, rows) in reference.as_object().unwrap() {
        let rows = rows.as_array().unwrap();
        let data: Vec<String> = rows.iter().map(ToString::to_string).collect();
        fs::write(dir.path().join("data.jsonl"), data.join("\n")).unwrap();
        let tiny = model(name);
        done(dir.path(), &["choices", "--model", &tiny, "--data", "data.jsonl", "--out", name]);
        let items = lines(dir.path().join(name).join("items.jsonl"));
        let mut hits = [0.0; 2];
        for (item, row) in items.iter().zip(rows) {
            let floats = |value: &Value| -> Vec<f64> {
                value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
            };
            let (got, want) = (floats(&item["loglikelihoods"]), floats(&row["want"]));
            let apart = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(apart < 1e-3, "{name}: {got:?} {want:?}");
            hits = [hits[0] + row["acc"].as_f64().unwrap(), hits[1] + row["acc_norm"].as_f64().unwrap()];
        }
        let summary = value(dir.path().join(name).join("summary.json"));
        let n = rows.len() as f64;
        assert_eq!(
            (&summary["acc"]["mean"], &summary["acc_norm"]["mean"]),
            (&json!(hits[0] / n), &json!(hits[1] / n))
        );
    }
}
