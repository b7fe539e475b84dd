//! Nothing of anyone is lost: not a stranger's files, not what a run has computed.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// The trainer on tiny-qwen2, in `dir`.
fn command(dir: &Path, flags: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.env("XDG_CACHE_HOME", dir.join("cache")).current_dir(dir);
    command.arg("--model-name-or-path").arg(fixtures().join("models/tiny-qwen2"));
    command.arg("--dataset-name").arg(fixtures().join("data/clair_mini"));
    let line = "--output-dir out --loss-type apo_zero --learning-rate 1e-3 --logging-steps 1 --per-device-train-batch-size 4";
    command.args(line.split_whitespace()).args(flags.split_whitespace());
    command
}

/// Exit code and what was said.
fn run(dir: &Path, flags: &str) -> (i32, String) {
    let output = command(dir, flags).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn done(dir: &Path, flags: &str) -> String {
    let (code, said) = run(dir, flags);
    assert_eq!(code, 0, "{flags}: {said}");
    said
}

fn log(dir: &Path, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("out").join(name)).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.map(|mut row| {
        row.as_object_mut()
            .unwrap()
            .retain(|key, _| key != "eval_runtime" && key != "eval_samples_per_second");
        row
    })
    .collect()
}

fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("out/model.safetensors")).unwrap()
}

#[test]
fn files_of_others_are_never_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let theirs = [
        "runs/other/precious",
        "checkpoint-best/f",
        "model_backup.safetensors",
        "runs/events.out.tfevents.1",
    ];
    for file in theirs {
        fs::create_dir_all(out.join(file).parent().unwrap()).unwrap();
        fs::write(out.join(file), "theirs").unwrap();
    }
    done(dir.path(), "--max-steps 2 --report-to tensorboard");
    done(dir.path(), "--max-steps 2 --overwrite-output-dir");
    assert!(theirs.iter().all(|file| out.join(file).exists()), "{theirs:?}");
    let left = fs::read_dir(out.join("runs")).unwrap().count();
    assert_eq!(left, 2, "the events of the run before are gone");
    fs::create_dir(out.join("checkpoint-100")).unwrap();
    fs::write(out.join("checkpoint-100/model.safetensors"), "theirs").unwrap();
    for flags in ["--max-steps 2", "--max-steps 2 --overwrite-output-dir"] {
        let (code, said) = run(dir.path(), flags);
        assert!(code == 1 && said.contains("checkpoint-100"), "{said}");
    }
    assert!(out.join("checkpoint-100/model.safetensors").exists());
}

#[test]
fn going_on_where_nothing_was_saved_keeps_what_is_beside_the_logs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // A run that was stopped before its first checkpoint, in a directory that holds somebody's adapter.
    let theirs = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "tokenizer.json"];
    fs::create_dir_all(out.join("adapter")).unwrap();
    theirs.iter().for_each(|file| fs::write(out.join(file), "theirs").unwrap());
    fs::write(out.join("run.json"), r#"{"status": "running"}"#).unwrap();
    fs::write(out.join("train_log.jsonl"), "{\"step\": 1, \"loss\": 77.0}\n").unwrap();
    fs::create_dir(out.join(".checkpoint-1.tmp")).unwrap();
    let (code, said) = run(dir.path(), "--max-steps 1 --resume-from-checkpoint auto --learning-rate 1e39");
    assert!(code == 1 && said.contains("is not finite after step 1"), "{said}");
    for file in theirs {
        assert_eq!(fs::read_to_string(out.join(file)).unwrap(), "theirs", "{file}");
    }
    assert!(!out.join(".checkpoint-1.tmp").exists() && log(dir.path(), "train_log.jsonl")[0]["loss"] != 77.0);
}

#[test]
fn checkpoints_that_cannot_be_resumed_from_are_kept_and_told_of() {
    let dir = tempfile::tempdir().unwrap();
    done(dir.path(), "--max-steps 6 --save-steps 2 --save-only-model");
    // As if it had been killed before its end.
    fs::remove_file(dir.path().join("out/model.safetensors")).unwrap();
    fs::remove_file(dir.path().join("out/run.json")).unwrap();
    let (code, said) = run(dir.path(), "--max-steps 6 --save-steps 4 --resume-from-checkpoint auto");
    assert!(code == 1 && said.contains("none of the 3 checkpoints"), "{said}");
    assert!(dir.path().join("out/checkpoint-6").exists());
}

#[test]
fn the_last_step_has_a_checkpoint_and_a_lost_model_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    done(dir.path(), "--max-steps 3");
    let model = weights(dir.path());
    assert!(dir.path().join("out/checkpoint-3").exists());
    fs::remove_file(dir.path().join("out/model.safetensors")).unwrap();
    fs::remove_file(dir.path().join("out/run.json")).unwrap();
    done(dir.path(), "--max-steps 3 --resume-from-checkpoint auto");
    assert!(weights(dir.path()) == model);
}

#[test]
fn a_best_checkpoint_that_is_broken_does_not_lose_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let flags = "--max-steps 12 --eval-strategy steps --eval-steps 4 --save-steps 4 --load-best-model-at-end \
                 --metric-for-best-model rewards/margins --greater-is-better False";
    done(dir.path(), flags);
    for path in ["model.safetensors", "run.json"] {
        fs::remove_file(dir.path().join("out").join(path)).unwrap();
    }
    fs::write(dir.path().join("out/checkpoint-4/model.safetensors"), "junk").unwrap();
    let said = done(dir.path(), &format!("{flags} --resume-from-checkpoint auto"));
    assert!(
        said.contains("WARNING: best checkpoint: step 4") && said.contains("last step are kept"),
        "{said}"
    );
    assert!(weights(dir.path()) == fs::read(dir.path().join("out/checkpoint-12/model.safetensors")).unwrap());
}

#[test]
fn an_interrupted_run_goes_on_as_if_nothing_had_been() {
    let (whole, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let flags = "--max-steps 60 --eval-strategy steps --eval-steps 1 --save-steps 50";
    let started = Instant::now();
    done(whole.path(), flags);
    let time = started.elapsed();
    let mut interrupted = 0;
    for part in [0.4, 0.6, 0.5] {
        let flags = format!("{flags} --resume-from-checkpoint auto");
        let mut child = command(stopped.path(), &flags).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(time.mul_f64(part).max(Duration::from_millis(50)));
        // SIGTERM, which schedulers send, is as good as Ctrl-C.
        let signal = if part > 0.5 { "-TERM" } else { "-INT" };
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        interrupted += usize::from(child.wait().unwrap().code() == Some(130));
    }
    assert!(interrupted > 0, "at least one run was stopped before its end");
    done(stopped.path(), &format!("{flags} --resume-from-checkpoint auto"));
    assert_eq!(log(whole.path(), "eval_log.jsonl"), log(stopped.path(), "eval_log.jsonl"));
    assert_eq!(log(whole.path(), "train_log.jsonl"), log(stopped.path(), "train_log.jsonl"));
    assert!(weights(whole.path()) == weights(stopped.path()));
}

#[test]
fn an_overwritten_run_leaves_no_template_and_no_source_behind() {
    let dir = tempfile::tempdir().unwrap();
    done(dir.path(), "--max-steps 1 --chat-template simple --use-peft");
    assert!(dir.path().join("out/chat_template.jinja").exists());
    let (code, said) =
        run(dir.path(), "--max-steps 1 --adapter-path out/checkpoint-1 --overwrite-output-dir");
    assert!(code == 1 && said.contains("checkpoint-1, which the run starts from"), "{said}");
    assert!(dir.path().join("out/checkpoint-1/adapter_model.safetensors").exists());
    done(dir.path(), "--max-steps 1 --overwrite-output-dir");
    assert!(!dir.path().join("out/chat_template.jinja").exists());
    assert!(!dir.path().join("out/adapter_model.safetensors").exists());
}

#[test]
fn weights_that_are_no_numbers_are_never_saved() {
    let dir = tempfile::tempdir().unwrap();
    let (code, said) = run(dir.path(), "--max-steps 1 --learning-rate 1e39");
    assert!(code == 1 && said.contains("is not finite after step 1"), "{said}");
    assert!(!dir.path().join("out/model.safetensors").exists());
    assert!(!dir.path().join("out/checkpoint-1").exists());
}

#[test]
fn reference_values_of_another_adapter_are_never_taken_from_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    done(dir.path(), "--max-steps 4 --use-peft");
    fs::rename(dir.path().join("out"), dir.path().join("reference")).unwrap();
    let first = |more: &str| {
        let flags = "--max-steps 1 --use-peft --ref-adapter-path reference --overwrite-output-dir";
        done(dir.path(), &format!("{flags} {more}"));
        log(dir.path(), "train_log.jsonl")[0]["rewards/margins"].as_f64().unwrap()
    };
    let before = first("");
    let config = dir.path().join("reference/adapter_config.json");
    let text = fs::read_to_string(&config).unwrap().replace("\"lora_alpha\": 32", "\"lora_alpha\": 320");
    fs::write(&config, text).unwrap();
    let (after, live) = (first(""), first("--precompute-ref-log-probs False"));
    assert!((before - after).abs() > 1e-2 && (after - live).abs() < 1e-5, "{before} {after} {live}");
}

#[test]
fn broken_adapters_and_models_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixtures().join("adapters/tiny-qwen2-lora-init");
    let adapter = dir.path().join("adapter");
    fs::create_dir(&adapter).unwrap();
    fs::copy(source.join("adapter_model.safetensors"), adapter.join("adapter_model.safetensors")).unwrap();
    let config: Value =
        serde_json::from_str(&fs::read_to_string(source.join("adapter_config.json")).unwrap()).unwrap();
    for (key, value, says) in [
        ("init_lora_weights", Value::from("pissa_niter_4"), "init_lora_weights"),
        ("r", Value::from(0), "r = 0"),
        ("r", Value::from(9), "has rank 8"),
        ("bias", Value::from("all"), "bias"),
        ("modules_to_save", Value::from(vec!["lm_head"]), "modules_to_save"),
        ("peft_type", Value::from("IA3"), "peft_type"),
        ("use_dora", Value::from(true), "use_dora"),
    ] {
        let mut config = config.clone();
        config[key] = value;
        fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();
        let (code, said) = run(dir.path(), "--max-steps 1 --adapter-path adapter");
        assert!(code == 1 && said.contains(says), "{key}: {said}");
    }
    let (code, said) = run(dir.path(), "--max-steps 1 --use-peft --lora-r 1000000000000");
    assert!(code == 2 && said.contains("--lora-r"), "{said}");
}

#[test]
fn inspect_shows_tokens_with_their_mask() {
    let dir = tempfile::tempdir().unwrap();
    let output = command(dir.path(), "--inspect 2").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("row ").count(), 2);
    for mask in ["\n- ", "\nboth ", "\nchosen ", "\nrejected "] {
        assert!(text.contains(mask), "no line with {mask:?}");
    }
    assert!(!dir.path().join("out").exists());
}
