//! `check greedy`: a real model's completions, token for token, against transformers.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::backends::Build;
use crate::cargo::{build_with, root};
use crate::report;

/// Two implementations in 32 bits differ by less than this in a logit: beyond it their tokens must be equal.
const NOISE: f64 = 1e-3;

pub fn run(args: &[String]) -> Result<ExitCode> {
    let (mut model, mut prompts, mut venv, mut new) = (None, None, None, 200_usize);
    for pair in args.chunks(2) {
        let [flag, value] = pair else { bail!("{}: needs a value", pair[0]) };
        match flag.as_str() {
            "--model" => model = Some(PathBuf::from(value)),
            "--prompts" => prompts = Some(PathBuf::from(value)),
            "--transformers" => venv = Some(PathBuf::from(value)),
            "--new-tokens" => new = value.parse().context("--new-tokens: expected a count")?,
            other => bail!("unknown flag {other}"),
        }
    }
    let model = model.context("give --model DIR")?;
    let prompts = prompts.context("give --prompts FILE: rows with `prompt`")?;
    let venv = venv.context("give --transformers VENV")?;
    let binary = build_with("eval", &Build::of(&["flex"])?)?;
    let dir = env::temp_dir().join(format!("check-greedy-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let ids = dir.join("ids.jsonl");
    python(&venv, &["tokens".into(), model.clone(), prompts.clone(), ids.clone()])?;
    let theirs = python(&venv, &["greedy".into(), model.clone(), ids, new.to_string().into()])?;
    let theirs: Value = serde_json::from_str(theirs.lines().last().context("no result")?)?;
    let mut same = true;
    for (name, batch) in [("alone", "1"), ("together", "65536")] {
        let ours = ours(&binary, [&model, &prompts], new, batch, &dir)?;
        same &= compare(name, &ours, &theirs)?;
    }
    fs::remove_dir_all(&dir).ok();
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn python(venv: &Path, args: &[PathBuf]) -> Result<String> {
    let script = root().join("xtask/src/bench/sample_peers.py");
    let mut command = Command::new(venv.join("bin/python"));
    let output =
        command.arg(script).args(args).env("HF_HUB_OFFLINE", "1").output().context("cannot run python")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The token ids of our answers, in the order of the prompts.
fn ours(
    binary: &Path,
    [model, prompts]: [&Path; 2],
    new: usize,
    batch: &str,
    dir: &Path,
) -> Result<Vec<Value>> {
    let out = dir.join(format!("ours-{batch}.jsonl"));
    let mut command = Command::new(binary);
    command.arg("sample").arg("--model").arg(model).arg("--prompts").arg(prompts).arg("--out").arg(&out);
    command.args(["--max-new-tokens", &new.to_string(), "--batch-tokens", batch]);
    command.args(["--ignore-eos", "--token-ids", "--backend", "flex", "--dtype", "float32"]);
    if !command.status().context("cannot run eval")?.success() {
        bail!("eval sample failed");
    }
    let text = fs::read_to_string(out)?;
    text.lines().map(|line| Ok(serde_json::from_str::<Value>(line)?["token_ids"].clone())).collect()
}

fn compare(name: &str, ours: &[Value], theirs: &Value) -> Result<bool> {
    let rows = theirs["rows"].as_array().context("no rows")?;
    if rows.len() != ours.len() {
        bail!("{} answers and {} of transformers", ours.len(), rows.len());
    }
    let mut equal = 0;
    let mut same = true;
    for (i, (ours, theirs_row)) in ours.iter().zip(rows).enumerate() {
        let tokens = |row: &Value| row.as_array().cloned().unwrap_or_default();
        let (a, b) = (tokens(ours), tokens(theirs_row));
        match a.iter().zip(&b).position(|(a, b)| a != b) {
            None if a.len() == b.len() => equal += 1,
            at => {
                let at = at.unwrap_or(a.len().min(b.len()));
                let gap = theirs["gaps"][i][at].as_f64().unwrap_or(f64::INFINITY);
                same &= gap < NOISE;
                report(&format!(
                    "{name}: row {i} differs from token {at}, where the best logit leads by {gap:.1e}"
                ));
            }
        }
    }
    report(&format!("{name}: {equal} of {} rows are equal token for token", rows.len()));
    Ok(same)
}
