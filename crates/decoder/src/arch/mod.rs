//! Families: each file maps its configuration keys onto [`Config`] and names its weights.

mod keys;
mod llama;
mod mistral;
mod opt;
mod qwen2;
mod qwen3;

use std::path::Path;

use serde_json::Value;

use crate::{Config, Error};
use keys::Keys;

/// Spelling of a family's weight names; the parts of a block stand after `{root}{layers}.{i}.`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    pub root: &'static str,
    pub embed: &'static str,
    pub positions: &'static str,
    pub layers: &'static str,
    pub final_norm: &'static str,
    pub attention_norm: &'static str,
    pub mlp_norm: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub o: &'static str,
    pub q_norm: &'static str,
    pub k_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

/// Names that Llama made common.
pub const LLAMA: Names = Names {
    root: "model.",
    embed: "embed_tokens.weight",
    positions: "",
    layers: "layers",
    final_norm: "norm",
    attention_norm: "input_layernorm",
    mlp_norm: "post_attention_layernorm",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    o: "self_attn.o_proj",
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
};

/// Reads a configuration: `path` is only for error messages.
pub fn parse(path: &Path, json: &Value) -> Result<Config, Error> {
    let keys = Keys::new(path, json)?;
    match keys.text("model_type")? {
        "llama" => llama::config(&keys),
        "mistral" => mistral::config(&keys),
        "opt" => opt::config(&keys),
        "qwen2" => qwen2::config(&keys),
        "qwen3" => qwen3::config(&keys),
        other => Err(keys.error(format!(
            "model_type {other:?} is not supported (llama, mistral, opt, qwen2 and qwen3 are)"
        ))),
    }
}
