//! SmolLM3: Llama with some blocks that know no positions (NoPE).

use serde_json::Value;

use super::keys::Keys;
use crate::{Config, Error, Layer};

pub fn config(keys: &Keys) -> Result<Config, Error> {
    let bias = keys.flag_or("attention_bias", false)?;
    let mlp_bias = keys.flag_or("mlp_bias", false)?;
    keys.only("hidden_act", &"silu".into())?;
    let config = keys.llama_shape(|dim, positions| Ok(vec![keys.rope(dim, positions, 2_000_000.0)?]))?;
    let n = config.layers.len();
    let rotated = rotated(keys, n)?;
    let window = if keys.flag_or("use_sliding_window", false)? {
        keys.optional_size("sliding_window", None)?
    } else {
        None
    };
    let sliding = keys.sliding(n, |layer| window.is_some() && !rotated[layer])?;
    let layers = keys.layers(&sliding, window)?.into_iter().zip(&rotated);
    let layers = layers.map(|(layer, &rotated)| Layer { rope: rotated.then_some(0), ..layer }).collect();
    Ok(Config {
        layers,
        tied: keys.flag_or("tie_word_embeddings", true)?,
        qkv_bias: bias,
        out_bias: bias,
        mlp_bias,
        ..config
    })
}

/// `no_rope_layers` has a 1 for each block that is rotated.
fn rotated(keys: &Keys, n: usize) -> Result<Vec<bool>, Error> {
    let Some(list) = keys.get("no_rope_layers") else {
        let interval = keys.size_or("no_rope_layer_interval", Some(4))?;
        return Ok((0..n).map(|layer| !(layer + 1).is_multiple_of(interval)).collect());
    };
    let flags: Option<Vec<bool>> =
        list.as_array().map(|list| list.iter().filter_map(Value::as_u64).map(|flag| flag != 0).collect());
    flags
        .filter(|flags| flags.len() >= n)
        .ok_or_else(|| keys.error(format!("no_rope_layers is {list}, expected {n} numbers, 0 or 1")))
}
