//! Every family and option against transformers: `fixtures/families` (see fixtures/make/families.py).

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use backend::under_test;
use decoder::{Batch, Config, Decoder, SaveDtype};
use serde_json::Value;

fn models() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/families");
    let mut all: Vec<PathBuf> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    assert!(all.len() >= 18, "the fixtures are there");
    all.into_iter().map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), path)).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn log_probs_logits_and_gradients_are_those_of_transformers() {
    for (name, dir) in models() {
        let model = Decoder::load(&dir, &under_test().device).unwrap();
        let text = fs::read_to_string(dir.join("reference.json")).unwrap();
        let reference: Value = serde_json::from_str(&text).unwrap();
        for i in 0..2 {
            let ids = floats(&reference["input_ids"][i]);
            let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
            let batch = Batch::of_sequence(&ids);
            let error =
                worst(&model.score_to_host(&batch).logps, &floats(&reference["next_token_logprobs"][i]));
            assert!(error < 2e-5 * noise(), "{name}, sequence {i}: log-probs differ by {error:e}");
            let logits = model.logits(model.forward(&batch), &[ids.len() as u32 - 1]);
            let logits: Vec<f32> = logits.into_data().try_into_vec().unwrap();
            let error = worst(&logits, &floats(&reference["last_logits"][i]));
            assert!(error < 1e-4 * noise(), "{name}, sequence {i}: last logits differ by {error:e}");
            let tracked = model.clone().tracked();
            let mut gradients = tracked.score(&batch).logps.sum().backward();
            for weight in tracked.weights() {
                let gradient = weight.tensor.grad_remove(&mut gradients).unwrap();
                let norm = gradient.square().sum().into_scalar::<f32>().sqrt();
                let want = reference["gradient_norms"][i][&weight.name].as_f64().unwrap() as f32;
                let error = (norm - want).abs() / want.max(1.0);
                assert!(error < 2e-5 * noise(), "{name}: gradient of {} is {norm}, not {want}", weight.name);
            }
        }
    }
}

#[test]
fn both_spellings_are_the_same_model() {
    for (name, dir) in models() {
        let old = Config::from_file(&dir.join("config.json")).unwrap();
        let new = Config::from_file(&dir.join("config.v5.json")).unwrap();
        assert_eq!(old, new, "{name}");
    }
}

#[test]
fn a_saved_model_is_bitwise_the_loaded_one() {
    for (name, dir) in models() {
        let model = Decoder::load(&dir, &under_test().device).unwrap();
        let out = tempfile::tempdir().unwrap();
        model.save(out.path(), SaveDtype::AsLoaded, usize::MAX).unwrap();
        let bytes = |path: PathBuf| fs::read(path).unwrap();
        let (before, after) =
            (bytes(dir.join("model.safetensors")), bytes(out.path().join("model.safetensors")));
        let read = |bytes: &[u8]| -> Vec<(String, Vec<u8>)> {
            let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
            let mut all: Vec<_> =
                tensors.tensors().into_iter().map(|(n, t)| (n, t.data().to_vec())).collect();
            all.sort();
            all
        };
        assert_eq!(read(&before), read(&after), "{name}");
    }
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let cases = [
        ("gpt2", "scale_attn_by_inverse_layer_idx", "true"),
        ("gpt2", "activation_function", "\"swish\""),
        ("gemma3", "use_bidirectional_attention", "true"),
        ("mistral-window", "hidden_act", "\"gelu\""),
        ("qwen2-window", "layer_types", "[\"full_attention\", \"chunked_attention\", \"full_attention\"]"),
        ("smollm3", "no_rope_layers", "[1]"),
        ("phi3", "rope_scaling", "{\"type\": \"linear\", \"factor\": 2.0}"),
        ("llama-llama3", "model_type", "\"gemma3\""),
        ("llama-llama3", "num_hidden_layers", "0"),
    ];
    for (model, key, value) in cases {
        let dir = models().into_iter().find(|(name, _)| name == model).unwrap().1;
        let mut config: Value =
            serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
        config[key] = serde_json::from_str(value).unwrap();
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("config.json");
        fs::write(&path, config.to_string()).unwrap();
        let said = Config::from_file(&path).unwrap_err().to_string();
        let named = if key == "rope_scaling" { "rotary scaling" } else { key };
        assert!(said.contains(named) || said.contains(value), "{model} with {key} = {value}: {said}");
    }
}

#[test]
fn recomputed_blocks_have_the_same_gradients() {
    for (name, dir) in models() {
        let model = Decoder::load(&dir, &under_test().device).unwrap().tracked();
        // Some tokens come more than once.
        let batch = Batch::of_sequence(&(0..60).map(|i| 3 + i * i % 41).collect::<Vec<u32>>());
        let plain = model.gradients(model.score(&batch).logps.sum(), None);
        for blocks in [1, model.config().layers.len()] {
            let (out, kept) = model.score_recomputing(&batch, blocks);
            let again = model.gradients(out.logps.sum(), Some(kept));
            for ((a, b), weight) in plain.iter().zip(again).zip(model.weights()) {
                let (a, b) = (a.clone().unwrap().into_data(), b.unwrap().into_data());
                assert!(a == b, "{name}: {}", weight.name);
            }
        }
    }
}

/// Factor of the tolerances for the backend under test.
fn noise() -> f32 {
    under_test().backend.tolerance().models as f32
}
