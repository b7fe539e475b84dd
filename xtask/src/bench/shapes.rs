//! Models and data made on the spot: a real model's shape with random weights, and pairs of a given length.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Names that `--shape` takes.
pub const NAMES: &str = "smollm2-135m, qwen2.5-0.5b, llama-3-8b";

/// Layers, hidden and inner features, query and key heads, vocabulary, one table for both ends.
type Shape = (usize, usize, usize, usize, usize, usize, bool);

fn shape(name: &str) -> Result<Shape> {
    Ok(match name {
        "smollm2-135m" => (30, 576, 1536, 9, 3, 49_152, true),
        "qwen2.5-0.5b" => (24, 896, 4864, 14, 2, 151_936, true),
        "llama-3-8b" => (32, 4096, 14_336, 32, 8, 128_256, false),
        other => bail!("--shape {other}: expected one of {NAMES}"),
    })
}

/// Makes the model with `new-model`, if it is not there; returns its directory.
pub fn model(name: &str, vocab: Option<usize>, new_model: &Path, dir: &Path) -> Result<PathBuf> {
    let (layers, hidden, inner, heads, kv, vocabulary, tied) = shape(name)?;
    let vocab = vocab.unwrap_or(vocabulary);
    let out = dir.join(format!("{name}-{vocab}"));
    if out.join("model.safetensors").exists() || out.join("model.safetensors.index.json").exists() {
        return Ok(out);
    }
    fs::create_dir_all(dir)?;
    let config = dir.join(format!("{name}-{vocab}.json"));
    let text = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": {hidden},
            "intermediate_size": {inner}, "num_hidden_layers": {layers}, "num_attention_heads": {heads},
            "num_key_value_heads": {kv}, "vocab_size": {vocab}, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": {tied},
            "attention_bias": false, "mlp_bias": false, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}}"#
    );
    fs::write(&config, text)?;
    let corpus = dir.join("words.jsonl");
    fs::write(&corpus, format!("{{\"text\": \"{}\"}}\n", words(20_000, 0)))?;
    let status = Command::new(new_model)
        .arg("--config")
        .arg(&config)
        .arg("--corpus")
        .arg(&corpus)
        .arg("--out")
        .arg(&out)
        .status();
    if !status.context("cannot run new-model")?.success() {
        bail!("new-model failed");
    }
    Ok(out)
}

/// Words that are one token each.
fn words(count: usize, seed: usize) -> String {
    let mut text = String::new();
    for i in 0..count {
        let word = (i * 7919 + seed * 104_729 + i * i % 1009) % 97;
        write!(text, " w{word}").ok();
    }
    text
}

/// Pairs whose sequences have about `tokens` tokens: a quarter is the prompt, completions differ from their start.
pub fn pairs(rows: usize, tokens: usize, dir: &Path) -> Result<PathBuf> {
    // A directory, which is what both sides take.
    let out = dir.join(format!("pairs-{rows}-{tokens}"));
    fs::create_dir_all(&out)?;
    let (prompt, completion) = (tokens / 4, tokens - tokens / 4);
    let mut text = String::new();
    for row in 0..rows {
        let [prompt, chosen, rejected] =
            [(prompt, 3 * row), (completion, 3 * row + 1), (completion, 3 * row + 2)]
                .map(|(n, seed)| words(n, seed));
        writeln!(text, r#"{{"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}}"#)?;
    }
    fs::write(out.join("train.jsonl"), text)?;
    Ok(out)
}
