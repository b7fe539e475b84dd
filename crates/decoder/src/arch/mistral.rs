//! Mistral: Llama with every block in a sliding window, where there is one.

use super::keys::Keys;
use crate::{Config, Error};

/// What transformers takes where the key is missing; the first Mistral had it.
const WINDOW: usize = 4096;

pub fn config(keys: &Keys) -> Result<Config, Error> {
    let config = keys.llama_like()?;
    let window = keys.optional_size("sliding_window", Some(WINDOW))?;
    let sliding = keys.sliding(config.layers.len(), |_| window.is_some())?;
    Ok(Config { layers: keys.layers(&sliding, window)?, ..config })
}
