//! Llama 1 to 3, SmolLM, TinyLlama and everything else that says `"model_type": "llama"`.

use super::keys::Keys;
use crate::{Config, Error};

pub fn config(keys: &Keys) -> Result<Config, Error> {
    let bias = keys.flag_or("attention_bias", false)?;
    let mlp_bias = keys.flag_or("mlp_bias", false)?;
    let config = keys.llama_like()?;
    keys.full_attention(config.layers.len())?;
    Ok(Config { qkv_bias: bias, out_bias: bias, mlp_bias, ..config })
}
