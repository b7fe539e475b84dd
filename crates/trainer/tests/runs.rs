//! Whole runs of the real binary: resuming, refusing, inspecting.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// A short run into `dir/out` with evaluation and checkpoints.
fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.env("XDG_CACHE_HOME", dir.join("cache")).current_dir(dir);
    command.arg("--model-name-or-path").arg(fixtures().join("models/tiny-llama"));
    command.arg("--dataset-name").arg(fixtures().join("data/clair_mini"));
    let line = "--output-dir out --loss-type apo_zero --learning-rate 1e-3 --max-steps 24 --logging-steps 3 \
                --per-device-train-batch-size 3 --gradient-accumulation-steps 2 --eval-strategy steps --eval-steps 6 \
                --save-steps 5";
    command.args(line.split_whitespace());
    command
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Logs without the fields that tell the time.
fn log(dir: &Path, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("out").join(name)).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.map(|mut row| {
        for key in ["eval_runtime", "eval_samples_per_second"] {
            row.as_object_mut().unwrap().remove(key);
        }
        row
    })
    .collect()
}

#[test]
fn a_killed_and_resumed_run_is_bitwise_the_same() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let output = run(&mut command(whole.path()));
    assert!(output.status.success(), "{}", stderr(&output));
    for wait in [120, 180, 240, 300] {
        let mut child = command(killed.path());
        child.args(["--resume-from-checkpoint", "auto"]).stderr(Stdio::null());
        let mut child = child.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = run(command(killed.path()).args(["--resume-from-checkpoint", "auto"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let weights = |dir: &Path| fs::read(dir.join("out/model.safetensors")).unwrap();
    assert!(weights(whole.path()) == weights(killed.path()), "final weights differ");
    for name in ["train_log.jsonl", "eval_log.jsonl"] {
        assert_eq!(log(whole.path(), name), log(killed.path(), name), "{name}");
    }
}

#[test]
fn resuming_with_other_settings_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(&mut command(dir.path())).status.success());
    let output = run(command(dir.path()).args(["--resume-from-checkpoint", "auto", "--beta", "0.2"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("beta was 0.1 and is now 0.2"), "{}", stderr(&output));
}

#[test]
fn an_earlier_run_is_never_overwritten_unasked() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(&mut command(dir.path())).status.success());
    fs::write(dir.path().join("out/notes.txt"), "mine").unwrap();
    let output = run(&mut command(dir.path()));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("--overwrite-output-dir"), "{}", stderr(&output));
    let output = run(command(dir.path()).args(["--overwrite-output-dir", "--max-steps", "2"]));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!dir.path().join("out/checkpoint-20").exists());
    assert!(dir.path().join("out/notes.txt").exists(), "files of others stay");
}

#[test]
fn flags_without_effect_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    for (flags, says) in [
        (&["--bf16", "True"][..], "--bf16"),
        (&["--gradient_checkpointing"], "--gradient-checkpointing"),
        (&["--eval-strategy", "no"], "--eval-steps"),
        (&["--save-strategy", "no"], "--save-steps"),
        (&["--lr-scheduler-type", "constant", "--warmup-steps", "3"], "--warmup-steps"),
        (&["--learning-rate=-1"], "--learning-rate"),
        (&["--per-device-train-batch-size", "0"], "--per-device-train-batch-size"),
        (&["--loss-type", "apo-zero"], "apo_zero"),
        (&["--learning-rat", "1"], "--learning-rate"),
    ] {
        let output = run(command(dir.path()).args(flags));
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{flags:?}: {}", stderr(&output));
    }
    assert!(!dir.path().join("out").exists(), "nothing half-written");
}

#[test]
fn bad_data_and_models_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |flags: &[&str], says: &str| {
        let output = run(command(dir.path()).args(flags));
        assert_eq!(output.status.code(), Some(1), "{flags:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{flags:?}: {}", stderr(&output));
    };
    fails(&["--dataset-name", "nowhere"], "nowhere: no such file");
    fails(&["--model-name-or-path", "nowhere"], "nowhere/tokenizer.json");
    fails(&["--max-length", "5"], "raise it");
    fs::write(dir.path().join("bad.jsonl"), "{\"chosen\": \"a\", \"rejected\": \"b\"}\n{\"chosen\":\n")
        .unwrap();
    fails(&["--dataset-name", "bad.jsonl"], "bad.jsonl:2");
    fs::write(dir.path().join("columns.jsonl"), "{\"question\": \"a\", \"answer\": \"b\"}\n").unwrap();
    fails(&["--dataset-name", "columns.jsonl"], "question");
    fs::write(dir.path().join("empty.jsonl"), "").unwrap();
    fails(&["--dataset-name", "empty.jsonl"], "holds no rows");
    fs::write(dir.path().join("file"), "").unwrap();
    fails(&["--output-dir", "file/out"], "cannot create the output directory");
    assert!(!dir.path().join("out/train_log.jsonl").exists());
}

#[test]
fn inspect_shows_tokens_with_their_mask() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(command(dir.path()).args(["--inspect", "2"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("row ").count(), 2);
    for mask in ["\n- ", "\nboth ", "\nchosen ", "\nrejected "] {
        assert!(text.contains(mask), "no line with {mask:?}");
    }
    assert!(!dir.path().join("out").exists());
}

#[test]
fn nothing_of_an_earlier_run_is_deleted_before_the_new_one_can_start() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(&mut command(dir.path())).status.success());
    let broken = dir.path().join("broken");
    fs::create_dir(&broken).unwrap();
    for file in fs::read_dir(fixtures().join("models/tiny-llama")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), broken.join(file.file_name())).unwrap();
    }
    fs::write(broken.join("model.safetensors"), b"half").unwrap();
    let output = run(command(dir.path()).args(["--overwrite-output-dir", "--model-name-or-path", "broken"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        dir.path().join("out/model.safetensors").exists() && dir.path().join("out/checkpoint-20").exists()
    );
    for model in ["out", "out/checkpoint-20"] {
        let output = run(command(dir.path()).args(["--overwrite-output-dir", "--model-name-or-path", model]));
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("inside the output directory"), "{}", stderr(&output));
    }
}

#[test]
fn the_trained_model_keeps_the_template_it_was_trained_with() {
    let dir = tempfile::tempdir().unwrap();
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    fs::write(dir.path().join("t.jinja"), template).unwrap();
    let output = run(command(dir.path()).args(["--chat-template", "t.jinja", "--max-steps", "1"]));
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(fs::read_to_string(dir.path().join("out/chat_template.jinja")).unwrap(), template);
}
