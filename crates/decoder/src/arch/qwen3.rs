//! Qwen3: Llama with queries and keys normalised per head.

use super::keys::Keys;
use crate::{Config, Error};

pub fn config(keys: &Keys) -> Result<Config, Error> {
    keys.only("use_sliding_window", &false.into())?;
    let bias = keys.flag_or("attention_bias", false)?;
    Ok(Config { qk_norm: true, qkv_bias: bias, out_bias: bias, ..keys.llama_like()? })
}
