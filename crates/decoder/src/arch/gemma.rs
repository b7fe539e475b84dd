//! Gemma 1 to 3 (text): norms that store `w - 1`, scaled embeddings, GELU gates; from 2 on norms on both sides,
//! caps and sliding windows; in 3 normalised queries and keys and a second rotary base for the windows.

use fused_ops::{Activation, Logits};
use serde_json::Map;

use super::keys::Keys;
use super::{LLAMA, Names};
use crate::rope::Rope;
use crate::{Config, Error, Layer, Mlp, Norm, QkNorm};

const BOTH_SIDES: Names = Names {
    attention_post_norm: "post_attention_layernorm",
    mlp_norm: "pre_feedforward_layernorm",
    mlp_post_norm: "post_feedforward_layernorm",
    ..LLAMA
};

pub fn gemma(keys: &Keys) -> Result<Config, Error> {
    let config = common(keys, |dim, positions| Ok(vec![keys.rope(dim, positions, 10_000.0)?]))?;
    keys.full_attention(config.layers.len())?;
    Ok(config)
}

pub fn gemma2(keys: &Keys) -> Result<Config, Error> {
    let config = common(keys, |dim, positions| Ok(vec![keys.rope(dim, positions, 10_000.0)?]))?;
    let config = with_caps(keys, config)?;
    let window = keys.optional_size("sliding_window", Some(4096))?;
    let sliding = keys.sliding(config.layers.len(), |layer| layer.is_multiple_of(2))?;
    let layers = keys.layers(&sliding, window)?;
    Ok(Config { layers, names: BOTH_SIDES, ..config })
}

pub fn gemma3_text(keys: &Keys) -> Result<Config, Error> {
    let config = with_caps(keys, common(keys, |dim, positions| gemma3_ropes(keys, dim, positions))?)?;
    let window = keys.optional_size("sliding_window", Some(4096))?;
    let pattern = keys.size_or("sliding_window_pattern", Some(6))?;
    let sliding = keys.sliding(config.layers.len(), |layer| !(layer + 1).is_multiple_of(pattern))?;
    let layers = keys.layers(&sliding, window)?;
    let layers = layers
        .into_iter()
        .zip(sliding)
        .map(|(layer, local)| Layer { rope: Some(usize::from(local)), ..layer });
    Ok(Config { layers: layers.collect(), qk_norm: Some(QkNorm::PerHead), names: BOTH_SIDES, ..config })
}

/// The multimodal model.
pub fn gemma3(keys: &Keys) -> Result<Config, Error> {
    Err(keys.error(
        "model_type \"gemma3\" is the model with images; its text part alone (gemma3_text) is supported"
            .into(),
    ))
}

/// That of the full blocks and that of the windows.
fn gemma3_ropes(keys: &Keys, dim: usize, positions: usize) -> Result<Vec<Rope>, Error> {
    let (global, local) = (1_000_000.0, f64::from(keys.number_or("rope_local_base_freq", 10_000.0)?));
    let mut plain = Map::new();
    plain.insert("rope_theta".into(), local.into());
    let Some(by_kind) = keys.object("rope_parameters")? else {
        // Scaling is of the full blocks alone.
        return Ok(vec![keys.rope(dim, positions, global)?, keys.rope_from(&plain, dim, positions, local)?]);
    };
    let of = |kind: &str, theta: f64| {
        let mut settings =
            by_kind.get(kind).and_then(serde_json::Value::as_object).cloned().unwrap_or_default();
        settings.entry("rope_theta").or_insert(theta.into());
        keys.rope_from(&settings, dim, positions, theta)
    };
    Ok(vec![of("full_attention", global)?, of("sliding_attention", local)?])
}

fn common(
    keys: &Keys,
    ropes: impl FnOnce(usize, usize) -> Result<Vec<Rope>, Error>,
) -> Result<Config, Error> {
    let activation = if keys.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    // The first releases say "gelu" and mean the same, as transformers has it.
    let legacy = activation == "hidden_act" && keys.text_or(activation, "")? == "gelu";
    if !legacy {
        keys.only(activation, &"gelu_pytorch_tanh".into())?;
    }
    keys.only("use_bidirectional_attention", &false.into())?;
    let bias = keys.flag_or("attention_bias", false)?;
    let config = keys.llama_shape(ropes)?;
    Ok(Config {
        norm: Norm::RmsPlusOne,
        mlp: Mlp::Gated(Activation::GeluTanh),
        embedding_scale: (config.hidden as f32).sqrt(),
        qkv_bias: bias,
        out_bias: bias,
        tied: keys.flag_or("tie_word_embeddings", true)?,
        ..config
    })
}

fn with_caps(keys: &Keys, config: Config) -> Result<Config, Error> {
    let scalar = keys.positive_or("query_pre_attn_scalar", 256.0)?;
    // Gemma 2 caps unless told not to; Gemma 3 does not unless told to.
    let default = |cap: f32| (config.model_type == "gemma2").then_some(cap);
    let cap = |key: &str, value: f32| {
        if keys.map.contains_key(key) { keys.optional_number(key) } else { Ok(default(value)) }
    };
    Ok(Config {
        attention_scale: scalar.sqrt().recip(),
        attention_softcap: cap("attn_logit_softcapping", 50.0)?,
        logits: Logits { scale: 1.0, softcap: cap("final_logit_softcapping", 30.0)? },
        ..config
    })
}
