//! Granite 3: Llama with four multipliers.

use fused_ops::Logits;

use super::keys::Keys;
use crate::{Config, Error};

pub fn config(keys: &Keys) -> Result<Config, Error> {
    let bias = keys.flag_or("attention_bias", false)?;
    let mlp_bias = keys.flag_or("mlp_bias", false)?;
    let config = keys.llama_like()?;
    keys.full_attention(config.layers.len())?;
    Ok(Config {
        qkv_bias: bias,
        out_bias: bias,
        mlp_bias,
        embedding_scale: keys.number_or("embedding_multiplier", 1.0)?,
        residual_scale: keys.number_or("residual_multiplier", 1.0)?,
        attention_scale: keys.number_or("attention_multiplier", 1.0)?,
        logits: Logits { scale: keys.positive_or("logits_scaling", 1.0)?.recip(), softcap: None },
        ..config
    })
}
