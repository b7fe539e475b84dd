//! The command of the paper's README, as printed there, against a Hub on this machine.

#![allow(clippy::unwrap_used)]

#[path = "../../hub/tests/server/mod.rs"]
mod server;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use server::{Faults, Server};

fn fixtures(path: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(path)).unwrap()
}

#[test]
fn the_papers_command_runs_from_the_hub_and_again_without_it() {
    // Models and data sets differ in what is taken of the same files.
    let model = |name: &str| (name.to_string(), fixtures(&format!("models/tiny-opt-hub/{name}")));
    let mut files =
        ["config.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
            .map(model)
            .to_vec();
    files.push(model("pytorch_model.bin"));
    files.push((
        "data/train-00000-of-00001.parquet".into(),
        fixtures("data/clair_mini_parquet/train.parquet"),
    ));
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let server = Server::start(&files, Faults { cut_after: Some(3000), ..Faults::default() }, false);
    let dir = tempfile::tempdir().unwrap();
    let run = |more: &str| -> Output {
        let line = "--loss_type apo_zero --dataset_name ContextualAI/ultrafeedback_clair_32k --model_name_or_path \
                    facebook/opt-125m";
        let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
        command.args(line.split_whitespace()).args(more.split_whitespace()).current_dir(dir.path());
        command.env("HF_ENDPOINT", &server.hub).env("HF_HOME", dir.path().join("hf"));
        command.env("XDG_CACHE_HOME", dir.path().join("cache")).env_remove("HF_HUB_OFFLINE");
        if !more.is_empty() {
            command.env("HF_HUB_OFFLINE", "1");
        }
        command.output().unwrap()
    };
    let output = run("");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("no chat template") && said.contains("trainer_output"), "{said}");
    let info = fs::read_to_string(dir.path().join("trainer_output/run.json")).unwrap();
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!((info["status"].as_str(), info["data"]["rows"].as_u64()), (Some("complete"), Some(64)));
    assert_eq!(info["data"]["simple_chat_template"], true);
    for file in ["model.safetensors", "config.json", "vocab.json", "chat_template.jinja"] {
        assert!(dir.path().join("trainer_output").join(file).exists(), "{file}");
    }
    server.seen.lock().unwrap().clear();
    let output = run("--output_dir again");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(server.seen.lock().unwrap().is_empty(), "everything is in the cache");
    let weights = |run: &str| fs::read(dir.path().join(run).join("model.safetensors")).unwrap();
    assert!(weights("trainer_output") == weights("again"));
}
