//! Every family against transformers: next-token log-probabilities, last logits, and the bytes of a
//! saved checkpoint. `reference.json` holds what transformers 5.23 computed (see fixtures/README.md).

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use backend::under_test;
use decoder::{Batch, Companions, Decoder, SaveDtype};
use serde_json::Value;

const MODELS: [&str; 7] =
    ["tiny-qwen2", "tiny-llama", "tiny-qwen3", "tiny-mistral", "tiny-opt", "tiny-opt-nochat", "tiny-gemma2"];

fn fixture(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models").join(model)
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().filter_map(Value::as_f64).map(|v| v as f32).collect()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn log_probs_and_logits_are_those_of_transformers() {
    for name in MODELS {
        let dir = fixture(name);
        let model = Decoder::load(&dir, &under_test().device).unwrap();
        let reference: Value =
            serde_json::from_str(&fs::read_to_string(dir.join("reference.json")).unwrap()).unwrap();
        for i in 0..2 {
            let last = reference["last_position"][i].as_u64().unwrap() as usize;
            let ids: Vec<u32> = reference["input_ids"][i].as_array().unwrap()[..=last]
                .iter()
                .map(|id| id.as_u64().unwrap() as u32)
                .collect();
            let batch = Batch::of_sequence(&ids);
            let got = model.score_to_host(&batch).logps;
            let want = floats(&reference["next_token_logprobs"][i]);
            let error = worst(&got, &want);
            assert!(error < 2e-5 * noise(), "{name}, sequence {i}: log-probs differ by {error:e}");
            let hidden = model.forward(&batch);
            let logits = model.logits(hidden, &[last as u32]);
            let logits: Vec<f32> = logits.into_data().try_into_vec().unwrap();
            let error = worst(&logits, &floats(&reference["last_logits"][i]));
            assert!(error < 1e-4 * noise(), "{name}, sequence {i}: last logits differ by {error:e}");
        }
    }
}

#[test]
fn both_styles_of_configuration_load_the_same_model() {
    for name in MODELS {
        let old = decoder::Config::from_file(&fixture(name).join("config.json")).unwrap();
        let new = decoder::Config::from_file(&fixture(name).join("config.v5.json")).unwrap();
        assert_eq!(old, new, "{name}");
    }
}

#[test]
fn a_saved_model_is_bitwise_the_loaded_one() {
    for name in MODELS {
        let model = Decoder::load(&fixture(name), &under_test().device).unwrap();
        let before = fs::read(fixture(name).join("model.safetensors")).unwrap();
        for max_shard in [usize::MAX, 200_000] {
            let dir = tempfile::tempdir().unwrap();
            Companions::read(&fixture(name)).unwrap().write(dir.path(), SaveDtype::AsLoaded).unwrap();
            model.save(dir.path(), SaveDtype::AsLoaded, max_shard).unwrap();
            let again = Decoder::load(dir.path(), &under_test().device).unwrap();
            for (a, b) in model.weights().iter().zip(again.weights()) {
                assert_eq!(a.name, b.name);
                assert_eq!(a.tensor.to_data(), b.tensor.to_data(), "{name}: {}", a.name);
            }
            if max_shard == usize::MAX {
                let after = fs::read(dir.path().join("model.safetensors")).unwrap();
                assert_eq!(before.len(), after.len(), "{name}: same tensors, same size");
            } else {
                assert!(dir.path().join("model.safetensors.index.json").exists());
            }
        }
    }
}

#[test]
fn half_precision_checkpoints_round_trip() {
    let model = Decoder::load(&fixture("tiny-qwen2"), &under_test().device).unwrap();
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [&first, &second] {
        Companions::read(&fixture("tiny-qwen2")).unwrap().write(dir.path(), SaveDtype::Bf16).unwrap();
    }
    model.save(first.path(), SaveDtype::Bf16, usize::MAX).unwrap();
    let rounded = Decoder::load(first.path(), &under_test().device).unwrap();
    rounded.save(second.path(), SaveDtype::AsLoaded, usize::MAX).unwrap();
    let read = |dir: &tempfile::TempDir| fs::read(dir.path().join("model.safetensors")).unwrap();
    assert_eq!(read(&first), read(&second));
}

#[test]
fn bad_directories_are_refused_by_name() {
    let source = fixture("tiny-llama");
    let dir = tempfile::tempdir().unwrap();
    let load = || Decoder::load(dir.path(), &under_test().device).unwrap_err().to_string();
    assert!(load().contains("config.json"));
    let config = fs::read_to_string(source.join("config.json")).unwrap();
    let write = |text: String| fs::write(dir.path().join("config.json"), text).unwrap();
    write(config.replace("\"llama\"", "\"mamba\""));
    assert!(load().contains("\"mamba\" is not supported"), "{}", load());
    write(config.replace("\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"ntk\"}"));
    assert!(load().contains("\"ntk\""), "{}", load());
    write(config.replace("\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"linear\"}"));
    assert!(load().contains("factor"), "{}", load());
    write(config.replace("\"silu\"", "\"gelu\""));
    assert!(load().contains("hidden_act"), "{}", load());
    write(config.clone());
    assert!(load().contains("model.safetensors"), "{}", load());
    let weights = fs::read(source.join("model.safetensors")).unwrap();
    fs::write(dir.path().join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    assert!(load().contains("not a whole safetensors file"), "{}", load());
    fs::write(dir.path().join("model.safetensors"), &weights).unwrap();
    write(config.replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2"));
    assert!(load().contains("unexpected weights"), "{}", load());
    write(config.replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4"));
    assert!(load().contains("missing weights"), "{}", load());
    write(config.replace("\"intermediate_size\": 128", "\"intermediate_size\": 64"));
    assert!(load().contains("has shape"), "{}", load());
}

#[test]
fn pytorchs_own_files_load_too() {
    let whole = Decoder::load(&fixture("tiny-opt"), &under_test().device).unwrap();
    let half = Decoder::load(&fixture("tiny-opt-hub"), &under_test().device).unwrap();
    for (whole, half) in whole.weights().iter().zip(half.weights()) {
        assert_eq!((&whole.name, &whole.shape), (&half.name, &half.shape));
        let [whole, half]: [Vec<f32>; 2] =
            [whole, half].map(|weight| weight.tensor.to_data().try_into_vec().unwrap());
        let rounded: Vec<f32> = whole.iter().map(|&v| half::f16::from_f32(v).to_f32()).collect();
        assert_eq!(rounded, half);
    }
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixture("tiny-opt-hub").join("config.json"), dir.path().join("config.json")).unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), b"cposix\nsystem\n(S'true'\ntR.").unwrap();
    let error = Decoder::load(dir.path(), &under_test().device).unwrap_err().to_string();
    assert!(error.contains("pytorch_model.bin"), "{error}");
}

/// Factor of the tolerances for the backend under test.
fn noise() -> f32 {
    under_test().backend.tolerance().models as f32
}
