//! Training runs against `trl dpo` itself: the commands of the fixtures are run here as they stand,
//! `trl dpo` replaced by this binary, and every logged number is compared.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use backend::{Backend, under_test};
use serde_json::Value;
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn trainer(args: &[&str], cache: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.args(args).env("XDG_CACHE_HOME", cache).current_dir(fixtures().join("..")).output().unwrap()
}

/// Runs a fixture's command; returns its description and the output directory.
fn run(name: &str, more: &[&str]) -> (Value, TempDir) {
    let path = fixtures().join(format!("trajectories/{name}.json"));
    let expected: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let command = expected["command"].as_str().unwrap();
    let command = command.strip_prefix("trl dpo ").or_else(|| command.strip_prefix("trl kto ")).unwrap();
    let mut args: Vec<&str> = command.split_whitespace().collect();
    let at = args.iter().position(|&arg| arg == "--output_dir").unwrap();
    args[at + 1] = out.to_str().unwrap();
    args.extend(more);
    let output = trainer(&args, dir.path());
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    (expected, dir)
}

fn log(dir: &TempDir, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(dir.path().join("out").join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Factor of the tolerances for the backend under test.
fn of_backend() -> f64 {
    under_test().backend.tolerance().training
}

/// Largest difference allowed for a metric.
fn tolerance(metric: &str, want: f64) -> Option<f64> {
    let metric = metric.strip_prefix("eval_").unwrap_or(metric);
    match metric {
        // Losses of 50 (ipo, sppo_hard) carry the rounding of 50.
        "loss" => Some(2e-5 * want.abs().max(1.0)),
        "rewards/chosen" | "rewards/rejected" | "rewards/margins" => Some(3e-4),
        "logps/chosen" | "logps/rejected" | "kl" => Some(5e-3),
        "grad_norm" => Some(5e-4 * want.abs()),
        "entropy" | "logits/chosen" | "logits/rejected" => Some(1e-4),
        // The peer computes the mean of ones and zeros in f32.
        "rewards/accuracies" | "mean_token_accuracy" => Some(1e-7),
        "num_tokens" | "step" | "epoch" => Some(0.0),
        "learning_rate" => Some(1e-12),
        "runtime" | "samples_per_second" | "steps_per_second" => None,
        other => panic!("unknown metric {other}"),
    }
}

fn compare(name: &str, got: &[Value], want: &Value, noise: f64) {
    let want = want.as_array().unwrap();
    assert_eq!(got.len(), want.len(), "{name}: number of entries");
    for (got, want) in got.iter().zip(want) {
        for (metric, value) in want.as_object().unwrap() {
            let value = value.as_f64().unwrap();
            // Before DoRA's first step rewards are rounding (its magnitudes are divided by norms): their signs are too.
            if name.ends_with("dora") && metric == "rewards/accuracies" && want["step"] == 1 {
                continue;
            }
            let Some(tolerance) = tolerance(metric, value).map(|t| t * noise * of_backend()) else {
                continue;
            };
            let ours = got[metric].as_f64().unwrap_or_else(|| panic!("{name}: {metric} is not logged"));
            assert!(
                (ours - value).abs() <= tolerance,
                "{name}, step {}: {metric} is {ours}, the peer has {value} (tolerance {tolerance:e})",
                want["step"]
            );
        }
    }
}

fn check(name: &str) -> TempDir {
    check_within(name, 1.0, &[])
}

fn check_within(name: &str, noise: f64, more: &[&str]) -> TempDir {
    let (expected, dir) = run(name, more);
    compare(name, &log(&dir, "train_log.jsonl"), &expected["train_log"], noise);
    compare(name, &log(&dir, "eval_log.jsonl"), &expected["eval_log"], noise);
    dir
}

fn final_weights(dir: &TempDir, name: &str) {
    let read = |path: PathBuf| fs::read(path).unwrap();
    let files =
        ["model.safetensors", "adapter_model.safetensors"].map(|file| dir.path().join("out").join(file));
    let ours = read(files.into_iter().find(|path| path.exists()).unwrap());
    let theirs = read(fixtures().join(format!("trajectories/{name}.final.safetensors")));
    let ours = safetensors::SafeTensors::deserialize(&ours).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&theirs).unwrap();
    let floats = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    for (tensor, want) in theirs.tensors() {
        let got = ours.tensor(&tensor).unwrap();
        assert_eq!(got.shape(), want.shape());
        let worst = floats(got.data())
            .iter()
            .zip(floats(want.data()))
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(f64::from(worst) < 1e-4 * of_backend(), "{name}: {tensor} differs by {worst:e}");
    }
    assert_eq!(ours.len(), theirs.len());
}

#[test]
fn apo_zero_on_every_family() {
    for name in
        ["tiny-llama-apo_zero", "tiny-qwen3-apo_zero", "tiny-mistral-apo_zero", "tiny-gemma2-apo_zero"]
    {
        check(name);
    }
    let dir = check("tiny-qwen2-apo_zero");
    final_weights(&dir, "tiny-qwen2-apo_zero");
    // The true gradient of OPT's key biases is 0, and AdamW turns the rounding noise there into full
    // steps: TRL against itself with another attention kernel differs by up to 5e-4 in loss, 1.6e-3 in
    // margins and 2e-2 in log-probabilities over these 12 steps, far beyond what is asked of us here.
    // Flex and LibTorch happen to round there much as the peer does; other devices are as far from it as it is from
    // itself.
    let alike = matches!(under_test().backend, Backend::Flex | Backend::Tch);
    check_within("tiny-opt-apo_zero-nodropout", if alike { 4.0 } else { 20.0 }, &[]);
}

#[test]
fn other_losses() {
    let dir = check("tiny-qwen2-apo_down");
    final_weights(&dir, "tiny-qwen2-apo_down");
    check("tiny-qwen2-sigmoid");
    check("tiny-qwen2-sft");
    for loss in [
        "aot",
        "aot_unpaired",
        "apo_zero+sft",
        "bco_pair",
        "exo_pair",
        "hinge",
        "ipo",
        "nca_pair",
        "robust",
        "sigmoid_norm",
    ] {
        check(&format!("tiny-qwen2-{loss}"));
    }
    // Its temperature of 0.05 makes the loss 20 times as steep in the margins as any other: TRL against itself with
    // another attention kernel differs by 1.9e-5 in loss and 4.7e-5 in margins, ours by 3.0e-5 and 6.8e-5.
    check_within("tiny-qwen2-discopop", 2.0, &[]);
    // Squares of log-ratios: TRL against itself differs by 2.8e-5 of the loss, ours by 7.3e-5.
    check_within("tiny-qwen2-sppo_hard", 4.0, &[]);
}

#[test]
fn accumulation_truncation_and_schedules() {
    check("tiny-qwen2-apo_zero-ga4");
    check("tiny-qwen2-apo_zero-maxlen48");
    check("tiny-qwen2-apo_zero-cosine-warmup-wd");
    check("tiny-qwen2-apo_zero-noclip");
    check("tiny-qwen2-apo_zero-precompute");
}

#[test]
fn kto_on_single_completions() {
    let dir = check("tiny-qwen2-kto-kto");
    final_weights(&dir, "tiny-qwen2-kto-kto");
    for name in ["kto-weights", "kto-pairs", "apo-zero-unpaired"] {
        check(&format!("tiny-qwen2-{name}"));
    }
}

#[test]
fn weights_of_tokens_and_pairs_divergences_and_a_moving_reference() {
    for name in [
        "keep-end",
        "ld-alpha",
        "ld-alpha-ga2",
        "ld-alpha-sft",
        "wpo",
        "wpo-mixed",
        "forward-kl",
        "js",
        "alpha",
        "sync-ref",
    ] {
        check(&format!("tiny-qwen2-{name}"));
    }
}

#[test]
fn other_optimizers() {
    for name in ["adafactor", "rmsprop", "sgd"] {
        check(&format!("tiny-qwen2-{name}"));
    }
}

#[test]
fn low_rank_adapters() {
    let init = ["--adapter-path", "fixtures/adapters/tiny-qwen2-lora-init"];
    let dir = check_within("tiny-qwen2-apo_zero-lora", 1.0, &init);
    final_weights(&dir, "tiny-qwen2-apo_zero-lora");
    check_within("tiny-qwen2-apo_zero-lora-ga4", 1.0, &init);
    check_within("tiny-qwen2-apo_zero-lora-lr0", 1.0, &init);
    for name in ["lora-all", "dora"] {
        let (name, init) =
            (format!("tiny-qwen2-{name}"), format!("fixtures/adapters/tiny-qwen2-{name}-init"));
        let dir = check_within(&name, 1.0, &["--adapter-path", &init]);
        final_weights(&dir, &name);
    }
}

#[test]
fn a_live_reference_gives_the_same_numbers() {
    let live = ["--precompute-ref-log-probs", "False"];
    check_within("tiny-qwen2-apo_zero-ga4", 1.0, &live);
    check_within("tiny-qwen2-kto-kto", 1.0, &live);
    let adapter = ["--adapter-path", "fixtures/adapters/tiny-qwen2-lora-init", live[0], live[1]];
    check_within("tiny-qwen2-apo_zero-lora", 1.0, &adapter);
}
