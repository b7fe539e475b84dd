//! One report of every kind, made on tiny models with data of our own and a local server as judge.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use crate::bench::process::{Loopback, build_loopback};
use crate::cargo::{must, root};

/// Makes the reports in `dir`; returns their pages.
pub fn pages(dir: &Path) -> Result<Vec<PathBuf>> {
    let fixture = |name: &str| root().join("fixtures").join(name).display().to_string();
    let (base, pairs) = (fixture("models/tiny-qwen2"), fixture("data/clair_mini"));
    let at = |name: &str| dir.join(name).display().to_string();
    let run = at("run");
    let (_server, judge) = judge(dir)?;
    let train = "--save-strategy steps --save-steps 6 --eval-strategy steps --eval-steps 6 --eval-samples 3 \
                 --eval-sample-tokens 24 --logging-steps 1 --max-steps 12 --learning-rate 1e-3 --output-dir";
    call("trainer", &format!("--model-name-or-path {base} --dataset-name {pairs} {train} {run}"))?;
    let made = [
        ("run", format!("run {run}")),
        ("pairs", format!("pairs --model {run} --reference {base} --dataset {pairs} --checkpoints")),
        ("data", format!("data --dataset {pairs} --against {}", fixture("data/clair_mini_kto"))),
        ("choices", format!("choices --model {base} --data {}", choices(dir)?)),
        ("mixeval", mixeval(&base, &at(""))?),
        ("mixeval-after", mixeval(&run, &at(""))?),
        ("compare", format!("compare {} {}", at("mixeval"), at("mixeval-after"))),
        (
            "compare-answers",
            format!("compare {} {} {judge}", sample(dir, &base, "a")?, sample(dir, &run, "b")?),
        ),
        (
            "recommend",
            format!("recommend --dataset {pairs} --model {base} --rows 40 --max-new-tokens 16 {judge}"),
        ),
    ];
    let mut pages = Vec::new();
    for (name, command) in made {
        let out = if name == "run" { String::new() } else { format!(" --out {}", at(name)) };
        call("eval", &format!("{command}{out}"))?;
        pages.push(dir.join(name).join("report.html"));
    }
    Ok(pages)
}

fn call(binary: &str, args: &str) -> Result<()> {
    must(binary, &args.split_whitespace().map(String::from).collect::<Vec<_>>())
}

/// A judge that says the same each time, and the flags for it.
fn judge(dir: &Path) -> Result<(Loopback, String)> {
    build_loopback()?;
    let script = dir.join("judge.jsonl");
    fs::write(&script, json!({"contains": "", "reply": "The second says more. [[2]]"}).to_string())?;
    let server = Loopback::start(&["--replies", &script.display().to_string()])?;
    let flags = format!("--judge-endpoint {} --judge-model judge", server.url);
    Ok((server, flags))
}

fn choices(dir: &Path) -> Result<String> {
    let row = |i: usize| json!({"question": format!("What comes after {i}?"), "choices": [format!("{}", i + 1), "blue"], "answer": i % 2});
    write_rows(&dir.join("choices.jsonl"), (0..12).map(row))
}

/// Answers of a model to a few prompts.
fn sample(dir: &Path, model: &str, name: &str) -> Result<String> {
    let prompts = write_rows(
        &dir.join("prompts.jsonl"),
        (0..8).map(|i| json!({"prompt": format!("Tell me of {i} things.")})),
    )?;
    let out = dir.join(format!("{name}.jsonl")).display().to_string();
    call("eval", &format!("sample --model {model} --prompts {prompts} --out {out} --max-new-tokens 24"))?;
    Ok(out)
}

fn write_rows(path: &Path, rows: impl Iterator<Item = Value>) -> Result<String> {
    let rows: Vec<String> = rows.map(|row| row.to_string()).collect();
    fs::write(path, rows.join("\n"))?;
    Ok(path.display().to_string())
}

/// The command for a few questions in MixEval's layout.
fn mixeval(model: &str, dir: &str) -> Result<String> {
    let data = Path::new(dir).join("questions");
    let place = data.join("mixeval-hard");
    fs::create_dir_all(&place)?;
    let free = |i: usize| json!({"problem_type": "free-form", "context": null, "prompt": format!("How much is {i} and one?"), "target": [(i + 1).to_string()], "benchmark_name": "Sums"});
    let choice = |i: usize| json!({"problem_type": "single-choice", "context": null, "prompt": format!("Which is number {i}?"), "options": ["first", "second"], "target": [i % 2], "benchmark_name": if i < 3 { "Order" } else { "Place" }});
    let all = |of: &dyn Fn(usize) -> Value| {
        (0..6).map(|i| (i.to_string(), of(i))).collect::<serde_json::Map<_, _>>()
    };
    fs::write(place.join("free-form.json"), Value::from(all(&free)).to_string())?;
    fs::write(place.join("multiple-choice.json"), Value::from(all(&choice)).to_string())?;
    Ok(format!("mixeval --model {model} --data {} --parser rule --max-new-tokens 8", data.display()))
}
