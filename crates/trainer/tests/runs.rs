//! Whole runs of the real binary: resuming, refusing, inspecting.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

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

/// Pseudo-random numbers in [0, 1), the same in each run of the tests.
fn random() -> impl FnMut() -> f64 {
    let mut state = 7_u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Checkpoints of a run, and whether it has written its model.
fn written(dir: &Path) -> (Vec<String>, bool) {
    let names = fs::read_dir(dir.join("out")).into_iter().flatten();
    let names = names.filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let (checkpoints, others): (Vec<_>, Vec<_>) = names.partition(|name| name.starts_with("checkpoint-"));
    (checkpoints, others.iter().any(|name| name.ends_with("model.safetensors")))
}

/// Runs once undisturbed, and once killed `kills` times and resumed, at random or as soon as there is another
/// checkpoint; both must end the same to the bit: final weights, both logs.
fn survives_kills(flags: &[&str], kills: usize) {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let started = Instant::now();
    let output = run(command(whole.path()).args(flags));
    assert!(output.status.success(), "{}", stderr(&output));
    let time = started.elapsed();
    let (mut random, mut middle) = (random(), 0);
    for attempt in 0..kills {
        let mut child = command(killed.path());
        child.args(flags).args(["--resume-from-checkpoint", "auto"]).stderr(Stdio::null());
        let (before, mut child) = (written(killed.path()).0, child.spawn().unwrap());
        if attempt % 4 == 0 {
            while written(killed.path()).0 == before && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
        } else {
            std::thread::sleep(time.mul_f64(random() * 0.7));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let (checkpoints, complete) = written(killed.path());
        middle += usize::from(!checkpoints.is_empty() && !complete);
    }
    assert!(middle > 0, "no kill came between the first checkpoint and the end");
    let output = run(command(killed.path()).args(flags).args(["--resume-from-checkpoint", "auto"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let model = |dir: &Path| {
        let files = ["model.safetensors", "adapter_model.safetensors"].map(|file| dir.join("out").join(file));
        fs::read(files.iter().find(|path| path.exists()).unwrap()).unwrap()
    };
    assert!(model(whole.path()) == model(killed.path()), "final weights differ");
    for name in ["train_log.jsonl", "eval_log.jsonl"] {
        assert_eq!(log(whole.path(), name), log(killed.path(), name), "{name}");
    }
}

#[test]
fn a_run_killed_twenty_times_is_bitwise_the_same() {
    survives_kills(&["--max-steps", "40"], 20);
}

#[test]
fn adapters_kto_and_moving_references_survive_kills_too() {
    let adapter = "--use-peft --lora-r 4 --lora-dropout 0.2 --disable-dropout False --optim adafactor";
    survives_kills(&adapter.split(' ').collect::<Vec<_>>(), 4);
    let kto = "--loss-type kto --optim lion --save-total-limit 1";
    survives_kills(&kto.split(' ').collect::<Vec<_>>(), 4);
    let moving = "--sync-ref-model --ref-model-sync-steps 4 --save-steps 5";
    survives_kills(&moving.split(' ').collect::<Vec<_>>(), 4);
    if backend::under_test().backend.has_bfloat16() {
        survives_kills(&["--dtype", "bfloat16", "--gradient-checkpointing"], 4);
    }
}

#[test]
fn a_broken_checkpoint_is_named_and_the_one_before_is_used() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(&mut command(dir.path())).status.success());
    let weights = || fs::read(dir.path().join("out/model.safetensors")).unwrap();
    let (whole, logs) = (weights(), log(dir.path(), "train_log.jsonl"));
    for (file, keep) in
        [("optimizer.safetensors", 0.5), ("trainer_state.json", 0.0), ("model.safetensors", 1.0)]
    {
        let path = dir.path().join("out/checkpoint-24").join(file);
        let mut bytes = fs::read(&path).unwrap();
        bytes.truncate((bytes.len() as f64 * keep) as usize);
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
        fs::write(&path, bytes).unwrap();
        let output = run(command(dir.path()).args(["--resume-from-checkpoint", "auto"]));
        assert!(output.status.success(), "{}", stderr(&output));
        let said = stderr(&output);
        assert!(
            said.contains(file) && said.contains("broken") && said.contains("checkpoint-20 (step 20)"),
            "{said}"
        );
        assert!(weights() == whole && log(dir.path(), "train_log.jsonl") == logs);
    }
    // Asked for by name it is an error.
    let path = dir.path().join("out/checkpoint-15/model.safetensors");
    fs::write(&path, "nothing").unwrap();
    let output = run(command(dir.path()).args(["--resume-from-checkpoint", "out/checkpoint-15"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("checkpoint-15/model.safetensors: broken"), "{}", stderr(&output));
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
        (&["--eval-strategy", "no"][..], "--eval-steps"),
        (&["--save-strategy", "no"], "--save-steps"),
        (&["--lr-scheduler-type", "constant", "--warmup-steps", "3"], "--warmup-steps"),
        (&["--learning-rate=-1"], "--learning-rate"),
        (&["--per-device-train-batch-size", "0"], "--per-device-train-batch-size"),
        (&["--loss-type", "apo-zero"], "apo_zero"),
        (&["--learning-rat", "1"], "--learning-rate"),
        (&["--label-smoothing", "0.1"], "--label-smoothing has no effect"),
        (&["--loss-type", "exo_pair"], "needs --label-smoothing"),
        (&["--loss-type", "robust", "--label-smoothing", "0.6"], "below 0.5"),
        (&["--loss-weights", "1", "2"], "as many as there are losses"),
        (&["--f-divergence-type", "forward_kl"], "--f-divergence-type"),
        (&["--loss-type", "sigmoid", "--f-alpha-divergence-coef", "0.3"], "--f-alpha-divergence-coef"),
        (&["--discopop-tau", "0.1"], "--discopop-tau"),
        (&["--max-batch-tokens", "100"], "--per-device-train-batch-size"),
        (&["--dataset-name", "other=0.5"], "all data sets a weight"),
        (&["--dataset-shuffle-seed", "1"], "--dataset-shuffle-seed"),
        (&["--test-split-size", "1.5"], "--test-split-size"),
        (&["--columns", "good=chosen"], "no role"),
        (&["--max-steps", "12", "--num-train-epochs", "1"], "--num-train-epochs has no effect"),
        (&["--max-steps", "0"], "--max-steps 0"),
        (&["--inspect", "0"], "--inspect 0"),
        (&["--optim", "sgd", "--adam-beta1", "0.8"], "--adam-beta1"),
        (&["--optim", "adafactor", "--adam-beta2", "0.8"], "--adam-beta2"),
        (&["--optim", "lion", "--adam-epsilon", "1e-6"], "--adam-epsilon"),
        (&["--eval-strategy", "no", "--per-device-eval-batch-size", "2"], "--eval-steps"),
        (&["--save-strategy", "epoch", "--eval-strategy", "epoch"], "--eval-steps has no effect"),
        (&["--loss-type", "kto", "--train-sampling-strategy", "random"], "--train-sampling-strategy"),
        (&["--loss-type", "kto", "--per-device-train-batch-size", "1"], "--per-device-train-batch-size"),
        (&["--loss-type", "kto", "sft"], "--loss-type: kto"),
        (&["--loss-type", "kto", "--loss-weights", "2"], "--loss-weights has no effect"),
        (&["--loss-type", "kto", "--truncation-mode", "keep_end"], "--truncation-mode"),
        (&["--loss-type", "kto", "--ld-alpha", "0.5"], "--ld-alpha"),
        (&["--loss-type", "kto", "--use-weighting"], "--use-weighting"),
        (&["--loss-type", "aot", "--use-weighting"], "--use-weighting"),
        (&["--desirable-weight", "2"], "--desirable-weight"),
        (&["--undesirable-weight", "2"], "--undesirable-weight"),
        (&["--ref-model-sync-steps", "4"], "--ref-model-sync-steps"),
        (&["--ref-model-mixup-alpha", "0.4"], "--ref-model-mixup-alpha"),
        (&["--sync-ref-model", "--precompute-ref-log-probs", "True"], "--precompute-ref-log-probs"),
        (&["--sync-ref-model", "--use-peft"], "--sync-ref-model"),
        (&["--precompute-ref-log-probs", "False", "--ref-cache-dir", "x"], "--ref-cache-dir"),
        (&["--use-peft", "--ref-model-name-or-path", "x"], "--ref-model-name-or-path"),
        (&["--lora-r", "4"], "--lora-r has no effect"),
        (&["--lora-alpha", "4"], "--lora-alpha has no effect"),
        (&["--lora-dropout", "0.1"], "--lora-dropout has no effect"),
        (&["--lora-target-modules", "all-linear"], "--lora-target-modules has no effect"),
        (&["--use-rslora"], "--use-rslora has no effect"),
        (&["--use-dora"], "--use-dora has no effect"),
        (&["--merge"], "--merge has no effect"),
        (&["--ref-adapter-path", "x"], "--ref-adapter-path has no effect"),
        (&["--use-peft", "--lora-dropout", "0.1"], "--disable-dropout False"),
        (&["--disable-dropout", "False"], "--disable-dropout False has no effect"),
        (&["--load-best-model-at-end", "--save-steps", "7"], "--save-steps"),
        (&["--load-best-model-at-end", "--save-strategy", "epoch"], "--save-strategy"),
        (&["--metric-for-best-model", "loss"], "--metric-for-best-model"),
        (&["--greater-is-better"], "--greater-is-better"),
        (&["--early-stopping-threshold", "0.1"], "--early-stopping-threshold"),
        (&["--report-to", "none", "tensorboard"], "--report-to"),
        (&["--dtype", "float16"], "--dtype"),
        (&["--backend", "gpu"], "--backend"),
        (&["--overwrite-output-dir", "--resume-from-checkpoint", "auto"], "--resume-from-checkpoint"),
        (&["--chat-template", "nowhere.jinja"], "nowhere.jinja"),
    ] {
        let output = run(command(dir.path()).args(flags));
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{flags:?}: {}", stderr(&output));
    }
    let both = run(command(dir.path()).args(["--dtype", "bfloat16", "--bf16", "False"]));
    assert_eq!(both.status.code(), Some(2));
    assert!(stderr(&both).contains("--bf16"), "{}", stderr(&both));
    // What only the data can tell.
    let output = run(command(dir.path()).args(["--sync-ref-model"]));
    assert!(stderr(&output).contains("--ref-model-sync-steps is 512"), "{}", stderr(&output));
    assert!(!dir.path().join("out/run.json").exists(), "nothing half-written");
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
    fails(&["--model-name-or-path", "nowhere"], "nowhere: no such directory");
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

/// A short run on data of the test's own, into `dir/out`; returns `run.json` and what was said.
fn short(dir: &Path, flags: &[&str]) -> (Value, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.env("XDG_CACHE_HOME", dir.join("cache")).env("HF_HUB_OFFLINE", "1").current_dir(dir);
    command
        .args("--output-dir out --overwrite-output-dir --loss-type apo_zero --save-strategy no".split(' '));
    let output = run(command.args(flags));
    assert!(output.status.success(), "{flags:?}: {}", stderr(&output));
    let info = fs::read_to_string(dir.join("out/run.json")).unwrap();
    (serde_json::from_str(&info).unwrap(), stderr(&output))
}

#[test]
fn data_sets_are_mixed_cut_and_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixtures().join("models/tiny-qwen2");
    let data = |name: &str| fixtures().join("data").join(name).to_str().unwrap().to_string();
    let (a, b) = (data("clair_mini"), data("clair_mini_standard"));
    let model = ["--model-name-or-path", model.to_str().unwrap(), "--max-steps", "1"];
    let rows = |flags: &[&str]| {
        let (info, said) = short(dir.path(), &[&model, flags].concat());
        (info["data"]["rows"].as_u64().unwrap(), said)
    };
    assert_eq!(rows(&["--dataset-name", &a, &b]).0, 128);
    let weighted = [format!("{a}=3"), format!("{b}=1")];
    // w = (3/4, 1/4), N = 64 / (3/4): 64 rows and 21
    assert_eq!(rows(&["--dataset-name", &weighted[0], "--dataset-name", &weighted[1]]).0, 85);
    let (all, said) =
        rows(&["--dataset-name", &a, "--max-train-samples", "10", "--dataset-shuffle-seed", "3"]);
    assert_eq!(all, 10);
    assert!(said.contains("first row, chosen") && said.contains("tokens from the cache"), "{said}");
    let held = ["--dataset-name", &a, "--eval-strategy", "epoch", "--test-split-size", "0.25"];
    assert_eq!(rows(&held).0, 48);
    let test = &log(dir.path(), "eval_log.jsonl");
    assert_eq!(test.len(), 1);
}

#[test]
fn a_token_budget_bounds_the_micro_batches_and_resumes_bitwise() {
    let (whole, halves) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let budget = |dir: &Path, more: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
        command.env("XDG_CACHE_HOME", dir.join("cache")).current_dir(dir);
        command.arg("--model-name-or-path").arg(fixtures().join("models/tiny-llama"));
        command.arg("--dataset-name").arg(fixtures().join("data/clair_mini"));
        let line = "--output-dir out --loss-type apo_zero --learning-rate 1e-3 --logging-steps 1 --save-steps 7 \
                    --train-sampling-strategy group_by_length --max-batch-tokens 700 --gradient-accumulation-steps 2 \
                    --num-train-epochs 2";
        let output = run(command.args(line.split_whitespace()).args(more.split_whitespace()));
        assert!(output.status.success(), "{}", stderr(&output));
    };
    budget(whole.path(), "");
    budget(halves.path(), "");
    // As if it had been killed after step 7.
    let out = halves.path().join("out");
    for file in ["model.safetensors", "run.json"] {
        fs::remove_file(out.join(file)).unwrap();
    }
    for checkpoint in fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path()) {
        let name = checkpoint.file_name().unwrap().to_str().unwrap().to_string();
        if name.starts_with("checkpoint-") && name != "checkpoint-7" {
            fs::remove_dir_all(checkpoint).unwrap();
        }
    }
    budget(halves.path(), "--resume-from-checkpoint auto");
    let weights = |dir: &Path| fs::read(dir.join("out/model.safetensors")).unwrap();
    assert!(weights(whole.path()) == weights(halves.path()), "final weights differ");
    assert_eq!(log(whole.path(), "train_log.jsonl"), log(halves.path(), "train_log.jsonl"));
}

#[test]
fn a_model_without_chat_template_takes_simple_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixtures().join("models/tiny-opt-nochat");
    let data = fixtures().join("data/clair_mini");
    let paths = ["--model-name-or-path", model.to_str().unwrap(), "--dataset-name", data.to_str().unwrap()];
    let (info, said) = short(dir.path(), &[&paths, ["--max-steps", "1"].as_slice()].concat());
    assert!(said.contains("WARNING: the model has no chat template"), "{said}");
    // 'simple' does not end an answer.
    assert!(said.contains("end-of-sequence"), "{said}");
    assert_eq!(info["data"]["simple_chat_template"], true);
    let chatml = [&paths, ["--max-steps", "1", "--chat-template", "chatml"].as_slice()].concat();
    let (info, _) = short(dir.path(), &chatml);
    assert_eq!(info["data"]["simple_chat_template"], false);
    let written = fs::read_to_string(dir.path().join("out/chat_template.jinja")).unwrap();
    assert!(written.contains("<|im_start|>"));
}

#[test]
fn a_recipe_runs_and_its_unknown_keys_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixtures().join("models/tiny-llama");
    let data = fixtures().join("data/clair_mini");
    let recipe = format!(
        "model_name_or_path: {}\ndataset_name: {}\nloss_type: apo_zero\nbeta: 0.05\nlearning_rate: 1.0e-06\n\
         lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1\nwarmup_ratio: 0.1\n\
         max_grad_norm: 0.2\nmax_length: 24576\nnum_train_epochs: 1\nper_device_train_batch_size: 4\n\
         gradient_accumulation_steps: 8\nlogging_steps: 1\nbf16: false\nsave_strategy: \"no\"\nseed: 42\n",
        model.display(),
        data.display()
    );
    let path = dir.path().join("recipe.yaml");
    fs::write(&path, &recipe).unwrap();
    let (info, said) = short(dir.path(), &["--config", "recipe.yaml", "--beta", "0.1"]);
    assert!(said.contains("notice: warmup_ratio"), "{said}");
    assert_eq!(info["settings"]["beta"], 0.1);
    assert_eq!(info["settings"]["max_grad_norm"], 0.2);
    assert_eq!(info["total_steps"], 2);
    let entries = log(dir.path(), "train_log.jsonl");
    // Two steps, one of warm-up: the first has rate 0, the second the peak.
    assert_eq!([&entries[0]["learning_rate"], &entries[1]["learning_rate"]], [0.0, 1e-6]);
    fs::write(&path, recipe + "push_to_hub: true\n").unwrap();
    let output = run(Command::new(env!("CARGO_BIN_EXE_trainer")).args(["--config", path.to_str().unwrap()]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("push_to_hub"), "{}", stderr(&output));
}

#[test]
fn a_run_that_diverges_stops_and_names_the_rows() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(command(dir.path()).args(["--learning-rate", "1e38", "--max-grad-norm", "0"]));
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("became") && said.contains("on the rows with ids"), "{said}");
    let info = fs::read_to_string(dir.path().join("out/run.json")).unwrap();
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["status"], "failed");
    assert!(!dir.path().join("out/model.safetensors").exists());
}
