//! Qwen2 and Qwen2.5: Llama with biases on queries, keys and values. Qwen3: queries and keys normalised per
//! head. Both may put their later blocks in a sliding window.

use super::keys::Keys;
use crate::{Config, Error, Layer, QkNorm};

pub fn qwen2(keys: &Keys) -> Result<Config, Error> {
    let config = keys.llama_like()?;
    Ok(Config { qkv_bias: true, layers: layers(keys, config.layers.len())?, ..config })
}

pub fn qwen3(keys: &Keys) -> Result<Config, Error> {
    let bias = keys.flag_or("attention_bias", false)?;
    let config = keys.llama_like()?;
    let layers = layers(keys, config.layers.len())?;
    Ok(Config { qk_norm: Some(QkNorm::PerHead), qkv_bias: bias, out_bias: bias, layers, ..config })
}

fn layers(keys: &Keys, n: usize) -> Result<Vec<Layer>, Error> {
    let window = if keys.flag_or("use_sliding_window", false)? {
        keys.optional_size("sliding_window", Some(4096))?
    } else {
        None
    };
    // Zero is a valid number of full layers.
    let full = keys.get("max_window_layers").and_then(serde_json::Value::as_u64).unwrap_or(28) as usize;
    let sliding = keys.sliding(n, |layer| window.is_some() && layer >= full)?;
    keys.layers(&sliding, window)
}
