//! The whole loop on bundled data, and the bare commands that are its parts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cargo::{must, root, run};
use crate::report;

const RUNS: &str = "runs/demo";

fn data(name: &str) -> String {
    root().join("datasets/demo").join(name).display().to_string()
}

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(ToString::to_string).collect()
}

/// `demo [--model DIR]`: pairs, training, evaluation, report.
pub fn demo(args: &[String]) -> Result<ExitCode> {
    let model = match args {
        [] => data("model"),
        [flag, model] if flag == "--model" => model.clone(),
        _ => bail!("usage: cargo xtask demo [--model DIR]"),
    };
    run_demo(&model, Path::new(RUNS), &must)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the loop into `out`, each binary by `must`; returns the scores.
pub fn run_demo(model: &str, out: &Path, must: &dyn Fn(&str, &[String]) -> Result<()>) -> Result<Value> {
    let at = |name: &str| out.join(name).display().to_string();
    let started = Instant::now();
    report("1/3 a teacher's recorded replies become preference pairs");
    pairs("", &at("pairs"), must)?;
    pairs("heldout_", &at("heldout"), must)?;
    report(&format!("2/3 {model} is trained on them with apo_zero"));
    must("trainer", &train_args(model, &at("pairs"), &at("model")))?;
    report("3/3 the trained model is measured on pairs it has not seen");
    let (trained, heldout, eval) = (at("model"), at("heldout"), at("eval"));
    must(
        "eval",
        &strings(&[
            "pairs",
            "--model",
            &trained,
            "--reference",
            model,
            "--dataset",
            &heldout,
            "--out",
            &eval,
        ]),
    )?;
    let text = fs::read_to_string(out.join("eval/score.json")).context("eval wrote no score.json")?;
    let score: Value = serde_json::from_str(&text)?;
    report(&verdict(&score));
    report(&format!(
        "pairs with their differences: {}\nheld-out metrics: {}\nthe whole loop took {:.0} s",
        at("pairs/report.html"),
        at("eval/report.html"),
        started.elapsed().as_secs_f64()
    ));
    Ok(score)
}

/// What the demo must show on pairs that the model has not seen: accuracy beyond chance (before training all
/// rewards are 0 and no pair is ranked), a margin whose 95 % interval is above 0, and winners that did not
/// become less likely.
pub fn shows_improvement(score: &Value) -> Option<[bool; 3]> {
    let metric = |name: &str| score["metrics"].as_array()?.iter().find(|metric| metric["name"] == name);
    let accuracy = metric("rewards/accuracies")?["model"]["mean"].as_f64()?;
    let margin = metric("rewards/margins")?["model"]["low"].as_f64()?;
    let winners = metric("logps/chosen")?;
    let rose = winners["model"]["mean"].as_f64()? >= winners["reference"].as_f64()?;
    Some([accuracy > 0.5, margin > 0.0, rose])
}

fn verdict(score: &Value) -> String {
    let Some([accuracy, margin, winners]) = shows_improvement(score) else {
        return "score.json lacks a metric".into();
    };
    let word = |yes: bool| if yes { "rose" } else { "DID NOT RISE" };
    format!(
        "held-out reward accuracy {} beyond chance, the margin {} above 0; the winners' log-likelihood {}",
        word(accuracy),
        word(margin),
        if winners { "did not fall" } else { "FELL" }
    )
}

fn pairs(prefix: &str, out: &str, must: &dyn Fn(&str, &[String]) -> Result<()>) -> Result<()> {
    let (input, replay) = (data(&format!("{prefix}answers.jsonl")), data(&format!("{prefix}replies.jsonl")));
    must("clair-gen", &strings(&["--input", &input, "--replay", &replay, "--out", out]))
}

fn train_args(model: &str, pairs: &str, out: &str) -> Vec<String> {
    // A demo model of 0.7 M parameters needs a higher learning rate than a real one.
    let rate = if model == data("model") { "2e-4" } else { "5e-6" };
    strings(&[
        "--model-name-or-path",
        model,
        "--dataset-name",
        pairs,
        "--output-dir",
        out,
        "--overwrite-output-dir",
        "--loss-type",
        "apo_zero",
        "--learning-rate",
        rate,
        "--num-train-epochs",
        "5",
        "--per-device-train-batch-size",
        "8",
        "--logging-steps",
        "5",
        "--save-strategy",
        "no",
    ])
}

/// `generate-clair` without flags.
pub fn generate() -> Result<ExitCode> {
    report(&format!(
        "no flags: the bundled answers and recorded replies become {RUNS}/pairs and {RUNS}/heldout"
    ));
    report("with your own: cargo xtask generate-clair --input F --out DIR --endpoint URL --model NAME");
    pairs("", &format!("{RUNS}/pairs"), &must)?;
    pairs("heldout_", &format!("{RUNS}/heldout"), &must)?;
    Ok(ExitCode::SUCCESS)
}

/// True when nothing but the backend is given.
pub fn is_bare(args: &[String]) -> bool {
    match args {
        [] => true,
        [flag, _] => flag == "--backend",
        [flag] => flag.starts_with("--backend="),
        _ => false,
    }
}

/// `train` without flags, or with `--backend` alone.
pub fn train(args: &[String]) -> Result<ExitCode> {
    let pairs = format!("{RUNS}/pairs");
    if !Path::new(&pairs).join("pairs.jsonl").exists() {
        bail!(
            "{pairs} does not exist; run `cargo xtask generate-clair` first, or give your own --dataset-name"
        );
    }
    report(&format!("no flags: the bundled model is trained on {pairs} into {RUNS}/model"));
    report(
        "with your own: cargo xtask train --model-name-or-path M --dataset-name D --loss-type apo_zero --output-dir DIR",
    );
    let all = [train_args(&data("model"), &pairs, &format!("{RUNS}/model")), args.to_vec()].concat();
    run("trainer", &all)
}

/// `eval` without flags: the newest run on its held-out pairs.
pub fn evaluate() -> Result<ExitCode> {
    let newest = newest_run(Path::new("runs")).context(
        "no finished run under runs/; run `cargo xtask train` first, or use `cargo xtask eval pairs --help`",
    )?;
    let info: Value = serde_json::from_str(&fs::read_to_string(newest.join("run.json"))?)?;
    let settings = &info["settings"];
    let reference = settings["reference"].as_str().or_else(|| settings["model"].as_str());
    let reference = reference.context("run.json names no model")?;
    let beside = newest.parent().map(|dir| dir.join("heldout")).filter(|dir| dir.is_dir());
    let dataset = match (beside, settings["data"]["datasets"][0][0].as_str()) {
        (Some(heldout), _) => heldout.display().to_string(),
        (None, Some(dataset)) if Path::new(dataset).join("test.jsonl").exists() => dataset.to_string(),
        _ => bail!("{}: its data set has no held-out rows; use eval pairs --dataset D", newest.display()),
    };
    let out = newest.parent().unwrap_or(&newest).join("eval").display().to_string();
    let model = newest.display().to_string();
    report(&format!("no flags: {model} against {reference} on {dataset}, report into {out}"));
    let args = ["pairs", "--model", &model, "--reference", reference, "--dataset", &dataset, "--out", &out];
    run("eval", &strings(&args))
}

fn newest_run(dir: &Path) -> Option<PathBuf> {
    let mut best: Option<(SystemTime, PathBuf)> = None;
    let mut waiting = vec![dir.to_path_buf()];
    while let Some(dir) = waiting.pop() {
        let finished = dir.join("config.json").exists();
        if let Ok(time) = fs::metadata(dir.join("run.json")).and_then(|meta| meta.modified())
            && finished
            && best.as_ref().is_none_or(|(newest, _)| time > *newest)
        {
            best = Some((time, dir.clone()));
        }
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        waiting.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    best.map(|(_, path)| path)
}

/// `demo-model`: random weights and a tokenizer, then supervised training on the bundled answers.
pub fn make_model(args: &[String]) -> Result<ExitCode> {
    let out = match args {
        [] => data("model"),
        [flag, out] if flag == "--out" => out.clone(),
        _ => bail!("usage: cargo xtask demo-model [--out DIR]"),
    };
    let (init, trained) = (format!("{RUNS}/model-init"), format!("{RUNS}/model-sft"));
    let (config, corpus) = (data("model-config.json"), data("sft.jsonl"));
    must("new-model", &strings(&["--config", &config, "--corpus", &corpus, "--out", &init]))?;
    must(
        "trainer",
        &strings(&[
            "--model-name-or-path",
            &init,
            "--dataset-name",
            &corpus,
            "--output-dir",
            &trained,
            "--overwrite-output-dir",
            "--loss-type",
            "sft",
            "--learning-rate",
            "3e-3",
            "--lr-scheduler-type",
            "cosine",
            "--warmup-steps",
            "0.1",
            "--num-train-epochs",
            "20",
            "--per-device-train-batch-size",
            "8",
            "--save-strategy",
            "no",
        ]),
    )?;
    fs::create_dir_all(&out)?;
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        let bytes = fs::read(Path::new(&trained).join(name)).with_context(|| format!("{trained}/{name}"))?;
        fs::write(Path::new(&out).join(name), bytes).with_context(|| format!("{out}/{name}"))?;
    }
    report(&format!("wrote {out}"));
    Ok(ExitCode::SUCCESS)
}
