//! The real binary on tiny models.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn eval(dir: &Path, command: &str, args: &[&str]) -> Output {
    let mut eval = Command::new(env!("CARGO_BIN_EXE_eval"));
    eval.current_dir(dir).arg(command).arg("--model").arg(fixtures().join("models/tiny-qwen2"));
    eval.args(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn write_prompts(dir: &Path, name: &str, texts: &[&str]) {
    let rows: Vec<String> = texts.iter().map(|text| json!({"prompt": text}).to_string()).collect();
    fs::write(dir.join(name), rows.join("\n")).unwrap();
}

fn rows(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn sampling_resumes_and_keeps_the_order_of_the_prompts() {
    let dir = tempfile::tempdir().unwrap();
    write_prompts(dir.path(), "p.jsonl", &["one", "two", "three", "four"]);
    let flags = ["--prompts", "p.jsonl", "--out", "a.jsonl", "--max-new-tokens", "12"];
    assert!(eval(dir.path(), "sample", &flags).status.success());
    let path = dir.path().join("a.jsonl");
    let whole = fs::read(&path).unwrap();
    // Two answers, one of them torn: what is missing is made again, and the result is the same.
    let lines: Vec<&[u8]> = whole.split_inclusive(|&b| b == b'\n').collect();
    fs::write(&path, [lines[2], &lines[0][..lines[0].len() / 2]].concat()).unwrap();
    let output = eval(dir.path(), "sample", &flags);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(fs::read(&path).unwrap(), whole);
    let answers = rows(&path);
    assert_eq!(
        answers.iter().map(|row| row["id"].as_str().unwrap()).collect::<Vec<_>>(),
        ["0", "1", "2", "3"]
    );
    assert!(answers.iter().all(|row| row["completion_tokens"].as_u64().unwrap() <= 12));
}

#[test]
fn answers_do_not_depend_on_what_runs_together() {
    let dir = tempfile::tempdir().unwrap();
    write_prompts(
        dir.path(),
        "p.jsonl",
        &["one", "two words", "three", "four is longer than the others", "five"],
    );
    let sample = |out: &str, more: &[&str]| {
        let flags = [&["--prompts", "p.jsonl", "--out", out, "--max-new-tokens", "20"], more].concat();
        let output = eval(dir.path(), "sample", &flags);
        assert!(output.status.success(), "{}", stderr(&output));
        fs::read(dir.path().join(out)).unwrap()
    };
    assert_eq!(sample("alone", &["--batch-tokens", "1"]), sample("together", &["--batch-tokens", "4096"]));
    let drawn = |out, seed, batch| {
        sample(out, &["--temperature", "1", "--top-p", "0.9", "--seed", seed, "--batch-tokens", batch])
    };
    assert_eq!(drawn("t1", "1", "1"), drawn("t2", "1", "4096"));
    assert_ne!(drawn("t3", "2", "4096"), drawn("t4", "3", "4096"));
}

#[test]
fn several_answers_to_a_prompt_are_one_row_and_are_made_once() {
    let dir = tempfile::tempdir().unwrap();
    write_prompts(dir.path(), "p.jsonl", &["one", "two"]);
    let flags = ["--prompts", "p.jsonl", "--out", "a.jsonl", "--max-new-tokens", "8", "--samples", "3"];
    let output = eval(dir.path(), "sample", &flags);
    assert!(!output.status.success() && stderr(&output).contains("--temperature"), "{}", stderr(&output));
    let drawn = [&flags[..], &["--temperature", "1", "--seed", "5"]].concat();
    assert!(eval(dir.path(), "sample", &drawn).status.success());
    let path = dir.path().join("a.jsonl");
    let (whole, answers) = (fs::read(&path).unwrap(), rows(&path));
    assert_eq!((answers.len(), &answers[1]["id"], &answers[1]["prompt"]), (2, &json!("1"), &json!("two")));
    let responses = answers[0]["responses"].as_array().unwrap();
    assert_eq!(responses.len(), 3);
    assert!(responses[0] != responses[1] || responses[1] != responses[2], "{responses:?}");
    assert!(answers[0].get("response").is_none() && answers[0]["completion_tokens"][2].is_u64());
    assert!(eval(dir.path(), "sample", &drawn).status.success());
    assert_eq!(fs::read(&path).unwrap(), whole);
}

#[test]
fn answers_to_other_prompts_or_settings_are_never_mixed() {
    let dir = tempfile::tempdir().unwrap();
    write_prompts(dir.path(), "p.jsonl", &["one", "two"]);
    write_prompts(dir.path(), "q.jsonl", &["three", "four"]);
    let sample = |prompts, new| {
        eval(dir.path(), "sample", &["--prompts", prompts, "--out", "a.jsonl", "--max-new-tokens", new])
    };
    assert!(sample("p.jsonl", "4").status.success());
    let before = fs::read(dir.path().join("a.jsonl")).unwrap();
    for output in [sample("q.jsonl", "4"), sample("p.jsonl", "5")] {
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("choose another --out"), "{}", stderr(&output));
    }
    assert_eq!(fs::read(dir.path().join("a.jsonl")).unwrap(), before);
    let output = sample("p.jsonl", "18446744073709551615");
    assert!(stderr(&output).contains("positions"), "{}", stderr(&output));
}

#[test]
fn a_model_against_itself_has_no_rewards() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (fixtures().join("models/tiny-qwen2"), fixtures().join("data/clair_mini"));
    let flags = ["--reference", model.to_str().unwrap(), "--dataset", data.to_str().unwrap(), "--out", "out"];
    let output = eval(dir.path(), "pairs", &flags);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = fs::read_to_string(dir.path().join("out/score.json")).unwrap();
    let score: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(score["pairs"], 16, "the test rows of a directory");
    for metric in score["metrics"].as_array().unwrap() {
        if metric["name"].as_str().unwrap().starts_with("rewards/") {
            assert_eq!(metric["model"]["mean"], 0.0, "{metric}");
        }
    }
    assert_eq!(rows(&dir.path().join("out/rows.jsonl")).len(), 16);
    assert!(fs::read_to_string(dir.path().join("out/report.html")).unwrap().contains("margins</td>"));
    assert!(String::from_utf8_lossy(&output.stdout).contains("logps/chosen"));
}

#[test]
fn scores_are_the_peers() {
    // Step 1 of the trajectory tiny-qwen2-apo_zero: mean logps of the first four training pairs.
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixtures().join("data/clair_mini/train.jsonl")).unwrap();
    let four: Vec<&str> = text.lines().take(4).collect();
    fs::write(dir.path().join("four.jsonl"), four.join("\n")).unwrap();
    let narrow = backend::under_test().backend.is_on_host();
    for (dtype, allowed) in [("float32", 5e-3), ("bfloat16", 1.0)].into_iter().take(1 + usize::from(narrow)) {
        let output =
            eval(dir.path(), "pairs", &["--dataset", "four.jsonl", "--out", dtype, "--dtype", dtype]);
        assert!(output.status.success(), "{}", stderr(&output));
        let rows = rows(&dir.path().join(dtype).join("rows.jsonl"));
        let mean =
            |side: &str| rows.iter().map(|row| row["logps"][side].as_f64().unwrap()).sum::<f64>() / 4.0;
        assert!((mean("chosen") + 548.309_448).abs() < allowed, "{dtype}: {}", mean("chosen"));
        assert!((mean("rejected") + 479.735_962).abs() < allowed, "{dtype}: {}", mean("rejected"));
    }
}

/// A model of the fixtures with the weights that TRL's run ended with.
fn trained(dir: &Path, run: &str) -> PathBuf {
    let model = dir.join(run);
    fs::create_dir(&model).unwrap();
    for file in fs::read_dir(fixtures().join("models/tiny-qwen2")).unwrap() {
        let path = file.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let weights = fixtures().join(format!("trajectories/tiny-qwen2-{run}.final.safetensors"));
    fs::copy(weights, model.join("model.safetensors")).unwrap();
    model
}

/// What TRL's evaluation at the end of its run says of the same weights and rows.
#[test]
fn metrics_of_pairs_and_of_labelled_completions_are_trls_evaluation() {
    let dir = tempfile::tempdir().unwrap();
    for (run, data, is_paired) in [
        ("apo_zero", "clair_mini_noprompt", true),
        ("apo_down", "clair_mini_noprompt", true),
        ("kto-kto", "clair_mini_kto", false),
    ] {
        let (model, out) = (trained(dir.path(), run), dir.path().join(format!("{run}-out")));
        let data = fixtures().join("data").join(data);
        let output = Command::new(env!("CARGO_BIN_EXE_eval"))
            .args(["pairs", "--max-length", "1024", "--model"])
            .arg(&model)
            .arg("--reference")
            .arg(fixtures().join("models/tiny-qwen2"))
            .arg("--dataset")
            .arg(data)
            .arg("--out")
            .arg(&out)
            .output()
            .unwrap();
        assert!(output.status.success(), "{run}: {}", stderr(&output));
        let text = fs::read_to_string(out.join("score.json")).unwrap();
        let score: Value = serde_json::from_str(&text).unwrap();
        let text =
            fs::read_to_string(fixtures().join(format!("trajectories/tiny-qwen2-{run}.json"))).unwrap();
        let log: Value = serde_json::from_str(&text).unwrap();
        let rows = rows(&out.join("rows.jsonl"));
        let ours = |name: &str| {
            let all = score["metrics"].as_array().unwrap();
            let metric = all.iter().find(|metric| metric["name"] == name).unwrap();
            if is_paired { metric["model"]["mean"].as_f64().unwrap() } else { mean_of_batches(&rows, name) }
        };
        let paired = ["rewards/margins", "rewards/accuracies"];
        let names = ["rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"];
        for name in names.iter().chain(if is_paired { &paired[..] } else { &[] }) {
            let want = log["eval_log"][0][format!("eval_{name}")].as_f64().unwrap();
            let allowed = if name.starts_with("logps") { 5e-2 } else { 1e-3 };
            assert!((ours(name) - want).abs() < allowed, "{run}, {name}: {} {want}", ours(name));
        }
    }
}

/// TRL's KTO trainer takes means over batches of four rows, which hold different numbers of each label.
fn mean_of_batches(rows: &[Value], name: &str) -> f64 {
    let label = name.ends_with("/chosen");
    let column = if name.starts_with("rewards") { "reward" } else { "logps" };
    let batch = |rows: &[Value]| {
        let values: Vec<f64> = rows
            .iter()
            .filter(|row| row["label"] == label)
            .map(|row| row[column].as_f64().unwrap())
            .collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let means: Vec<f64> = rows.chunks(4).filter_map(batch).collect();
    means.iter().sum::<f64>() / means.len() as f64
}

#[test]
fn checkpoints_of_a_run_show_how_it_went() {
    let dir = tempfile::tempdir().unwrap();
    let run = trained(dir.path(), "apo_zero");
    let base = fixtures().join("models/tiny-qwen2");
    for (step, from) in [(4, &base), (12, &run)] {
        let checkpoint = run.join(format!("checkpoint-{step}"));
        fs::create_dir(&checkpoint).unwrap();
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
            fs::copy(from.join(file), checkpoint.join(file)).unwrap();
        }
    }
    fs::write(run.join("train_log.jsonl"), "{\"step\": 1, \"loss\": 1.0}\n{\"step\": 2, \"loss\": 0.5}\n")
        .unwrap();
    let data = fixtures().join("data/clair_mini");
    let pairs = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_eval"));
        command.arg("pairs").arg("--model").arg(&run).arg("--dataset").arg(&data);
        command.arg("--out").arg(dir.path().join("out")).args(more).output().unwrap()
    };
    assert!(stderr(&pairs(&["--checkpoints"])).contains("it needs --reference"));
    let output = pairs(&["--checkpoints", "--reference", base.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = fs::read_to_string(dir.path().join("out/score.json")).unwrap();
    let score: Value = serde_json::from_str(&text).unwrap();
    let points = score["trajectory"].as_array().unwrap();
    let steps: Vec<u64> = points.iter().map(|point| point["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 4, 12]);
    assert_eq!((&points[0]["accuracy"], &points[1]["rewards_chosen"]), (&json!(0.0), &json!(0.0)));
    assert_eq!(points[2]["rewards_chosen"], score["metrics"][2]["model"]["mean"]);
    let moved = &score["movement"];
    assert!(moved["winner_up"].as_f64().unwrap() > 0.9, "APO-zero raises winners: {moved}");
    let page = fs::read_to_string(dir.path().join("out/report.html")).unwrap();
    assert!(page.matches("<svg").count() >= 5 && page.contains("held-out log-likelihood"));
}

#[test]
fn a_run_has_a_page_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    fs::create_dir(&run).unwrap();
    let page = || {
        let output = Command::new(env!("CARGO_BIN_EXE_eval")).arg("run").arg(&run).output().unwrap();
        (stderr(&output), fs::read_to_string(run.join("report.html")).unwrap_or_default())
    };
    assert!(page().0.contains("no directory that `train` has written"), "{}", page().0);
    let data = fixtures().join("data/clair_mini");
    let info = |dataset: &Path| {
        json!({
            "status": "complete", "version": "0.1.0", "commit": "abc", "device": "flex (CPU)", "dtype": "float32",
            "steps_done": 2, "total_steps": 2, "computed_tokens": 600, "train_seconds": 3.0, "peak_memory_bytes": 2e9,
            "data": {"rows": 4, "dropped": 0, "truncated": 0},
            "settings": {"model": "base", "loss_type": ["apo_zero"], "beta": 0.1, "learning_rate": 1e-5, "schedule": {"cosine": {}}, "lr_scheduler_type": "cosine",
                "data": {"datasets": [[dataset, null]], "train_split": "train", "columns": {}, "skip_invalid_rows": false}},
        })
    };
    fs::write(run.join("run.json"), info(&data).to_string()).unwrap();
    fs::write(run.join("train_log.jsonl"), "{\"step\": 1, \"loss\": 1.0}\n{\"step\": 2, \"loss\": 0.25}\n")
        .unwrap();
    let log = |step, logps| json!({"step": step, "eval_loss": 1.0, "eval_logps/chosen": logps, "eval_logps/rejected": -9.0});
    fs::write(run.join("eval_log.jsonl"), format!("{}\n{}\n", log(1, -12.5), log(2, -8.5))).unwrap();
    let sample = |step, text| json!({"id": "a", "step": step, "prompt": "Why?", "response": text});
    fs::write(run.join("samples.jsonl"), format!("{}\n{}\n", sample(0, "old words"), sample(2, "<b>new")))
        .unwrap();
    let (told, html) = page();
    for part in [
        "evaluation: log-likelihood",
        "200 packed tokens a second",
        "old words",
        "&lt;b&gt;new",
        "0.25",
        "-8.5",
    ] {
        assert!(html.contains(part), "{part} is missing: {told}");
    }
    assert!(html.contains("token Jaccard similarity") && html.matches("<svg").count() >= 10, "{told}");
    // Data that is not here any more costs only its own part.
    fs::write(run.join("run.json"), info(Path::new("/nowhere/pairs.jsonl")).to_string()).unwrap();
    let (told, html) = page();
    assert!(told.contains("cannot be read here") && html.contains("cannot be read here"), "{told}");
    assert!(html.contains("old words") && !html.contains("token Jaccard"));
}

fn eval_data(dir: &Path, args: &[&str]) -> Output {
    let mut eval = Command::new(env!("CARGO_BIN_EXE_eval"));
    eval.current_dir(dir).arg("data").args(args).output().unwrap()
}

#[test]
fn a_preference_set_is_described_beside_another() {
    let dir = tempfile::tempdir().unwrap();
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let pair = |id: &str, prompt: &str, chosen: &str, rejected: &str| {
        json!({"id": id, "chosen": [turn("user", prompt), turn("assistant", chosen)],
               "rejected": [turn("user", prompt), turn("assistant", rejected)]})
        .to_string()
    };
    let train = [
        pair("a", "Why is the sky blue?", "Rayleigh scattering of light.", "Rayleigh scatters light."),
        pair("b", "why  is the SKY blue?", "Because it is.", "Because it is so."),
        pair("c", "Name a colour.", "Red.", "Red."),
    ];
    let test = [pair("d", "Name a colour.", "Blue, as the sky.", "Blue")];
    fs::create_dir(dir.path().join("set")).unwrap();
    fs::write(dir.path().join("set/train.jsonl"), train.join("\n")).unwrap();
    fs::write(dir.path().join("set/test.jsonl"), test.join("\n")).unwrap();
    let other = fixtures().join("data/clair_mini_kto");
    let output =
        eval_data(dir.path(), &["--dataset", "set", "--against", other.to_str().unwrap(), "--out", "report"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value =
        serde_json::from_str(&fs::read_to_string(dir.path().join("report/report.json")).unwrap()).unwrap();
    let set = &report["sets"][0];
    assert_eq!(set["rows"], 4);
    assert_eq!(set["duplicates"], json!({"prompts": 1, "rows": 0, "identical_pairs": 1}));
    assert_eq!(set["leakage"], json!([{"split": "test", "of": "train", "prompts": 1}]));
    // "ing of" to "s", " so", nothing, ", as the sky.".
    assert_eq!(set["contrast"]["levenshtein"]["mean"], (6.0 + 3.0 + 0.0 + 13.0) / 4.0);
    assert_eq!(set["length_bias"]["longer_is_chosen"], (1.0 + 0.0 + 0.5 + 1.0) / 4.0);
    assert_eq!(report["sets"][1]["desirable"], 80);
    let page = fs::read_to_string(dir.path().join("report/report.html")).unwrap();
    assert!(page.matches("<svg").count() >= 10 && page.contains("character Levenshtein distance"));
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("prompts of test that stand in train: 1"), "{table}");
    // In tokens instead of words.
    let model = fixtures().join("models/tiny-qwen2");
    let in_tokens = ["--dataset", "set", "--model", model.to_str().unwrap(), "--out", "tokens"];
    assert!(eval_data(dir.path(), &in_tokens).status.success());
}

#[test]
fn unusable_data_says_what_was_expected() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |args: &[&str], says: &str| {
        let output = eval_data(dir.path(), &[args, &["--out", "report"]].concat());
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
    };
    fs::write(dir.path().join("a.jsonl"), "{\"question\": \"q\", \"good\": \"a\", \"bad\": \"b\"}\n")
        .unwrap();
    fails(&["--dataset", "a.jsonl"], "--columns chosen=better");
    fails(&["--dataset", "a.jsonl", "--columns", "chosen=nothing"], "no column \"nothing\"");
    fails(&["--dataset", "nowhere"], "no such file");
    fails(
        &["--dataset", "a.jsonl", "--columns", "chosen=good", "rejected=bad", "--split", "dev"],
        "no split \"dev\"",
    );
    fs::write(
        dir.path().join("b.jsonl"),
        "{\"chosen\": \"a\", \"rejected\": \"b\"}\n{\"chosen\": null, \"rejected\": \"b\"}\n",
    )
    .unwrap();
    fails(&["--dataset", "b.jsonl"], "b.jsonl:2");
    let output = eval_data(dir.path(), &["--dataset", "b.jsonl", "--skip-invalid-rows", "--out", "report"]);
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains("left out (unusable): 1")
    );
}

/// The adapter of the fixtures names its base model relative to the repository.
#[test]
fn an_adapter_is_its_base_model_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = fixtures().join("..");
    let run = |model: &Path, out: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_eval"));
        command
            .current_dir(&root)
            .args(["pairs", "--dataset", "fixtures/data/clair_mini"])
            .arg("--model")
            .arg(model);
        command.env("XDG_CACHE_HOME", dir.path()).arg("--out").arg(dir.path().join(out)).output().unwrap()
    };
    // Its B is zero: it changes nothing.
    let (base, adapter) =
        (fixtures().join("models/tiny-qwen2"), fixtures().join("adapters/tiny-qwen2-lora-init"));
    for (model, out) in [(&base, "base"), (&adapter, "adapter")] {
        let output = run(model, out);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert_eq!(rows(&dir.path().join("base/rows.jsonl")), rows(&dir.path().join("adapter/rows.jsonl")));
    let lost = dir.path().join("lost");
    fs::create_dir(&lost).unwrap();
    fs::write(lost.join("adapter_config.json"), "{\"base_model_name_or_path\": \"no/such/dir/there\"}")
        .unwrap();
    let said = stderr(&run(&lost, "none"));
    assert!(said.contains("the adapter's base model \"no/such/dir/there\""), "{said}");
}
