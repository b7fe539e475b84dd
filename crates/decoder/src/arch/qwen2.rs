//! Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

use super::keys::Keys;
use crate::{Config, Error};

pub fn config(keys: &Keys) -> Result<Config, Error> {
    keys.only("use_sliding_window", &false.into())?;
    Ok(Config { qkv_bias: true, ..keys.llama_like()? })
}
