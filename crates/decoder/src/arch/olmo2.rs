//! OLMo 2: Llama with norms on what attention and feed-forward return instead of on what they get, and with
//! queries and keys normalised over all heads.

use super::keys::Keys;
use super::{LLAMA, Names};
use crate::{Config, Error, QkNorm};

const NAMES: Names = Names {
    attention_norm: "",
    attention_post_norm: "post_attention_layernorm",
    mlp_norm: "",
    mlp_post_norm: "post_feedforward_layernorm",
    ..LLAMA
};

pub fn config(keys: &Keys) -> Result<Config, Error> {
    let bias = keys.flag_or("attention_bias", false)?;
    let config = keys.llama_like()?;
    keys.full_attention(config.layers.len())?;
    let eps = keys.number_or("rms_norm_eps", 1e-5)?;
    Ok(Config { qk_norm: Some(QkNorm::Whole), qkv_bias: bias, out_bias: bias, eps, names: NAMES, ..config })
}
