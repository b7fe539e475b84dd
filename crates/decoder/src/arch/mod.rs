//! Families: each file maps its configuration keys onto [`Config`] and names its weights.

mod gemma;
mod gpt2;
mod granite;
mod keys;
mod llama;
mod mistral;
mod olmo2;
mod opt;
mod phi3;
mod qwen;
mod scaling;
mod smollm3;

use std::path::Path;

use serde_json::Value;

use crate::{Config, Error};
use keys::Keys;

/// Spelling of a family's weight names; the parts of a block stand after `{root}{layers}.{i}.`. A part that
/// a family does not have is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Names {
    pub root: &'static str,
    pub embed: &'static str,
    pub positions: &'static str,
    pub layers: &'static str,
    pub final_norm: &'static str,
    /// Before attention, and on what it returns.
    pub attention_norm: &'static str,
    pub attention_post_norm: &'static str,
    /// Before the feed-forward block, and on what it returns.
    pub mlp_norm: &'static str,
    pub mlp_post_norm: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    /// One projection for queries, keys and values.
    pub qkv: &'static str,
    pub o: &'static str,
    pub q_norm: &'static str,
    pub k_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    /// One projection for gate and up.
    pub gate_up: &'static str,
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
    attention_post_norm: "",
    mlp_norm: "post_attention_layernorm",
    mlp_post_norm: "",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    qkv: "",
    o: "self_attn.o_proj",
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    gate_up: "",
    down: "mlp.down_proj",
};

/// Maps the keys of a family.
type Family = fn(&Keys) -> Result<Config, Error>;

/// The families, by `model_type`.
const FAMILIES: [(&str, Family); 14] = [
    ("gemma", gemma::gemma),
    ("gemma2", gemma::gemma2),
    ("gemma3_text", gemma::gemma3_text),
    ("gpt2", gpt2::config),
    ("granite", granite::config),
    ("llama", llama::config),
    ("mistral", mistral::config),
    ("olmo2", olmo2::config),
    ("opt", opt::config),
    ("phi3", phi3::config),
    ("qwen2", qwen::qwen2),
    ("qwen3", qwen::qwen3),
    ("smollm3", smollm3::config),
    ("gemma3", gemma::gemma3),
];

/// Reads a configuration: `path` is only for error messages.
pub fn parse(path: &Path, json: &Value) -> Result<Config, Error> {
    let keys = Keys::new(path, json)?;
    let model_type = keys.text("model_type")?;
    if let Some((_, family)) = FAMILIES.iter().find(|(name, _)| *name == model_type) {
        return family(&keys);
    }
    let known = FAMILIES.map(|(name, _)| name).join(", ");
    Err(keys.error(format!("model_type {model_type:?} is not supported; these are: {known}")))
}
