//! Mistral with full attention: a sliding window is refused unless it spans every position.

use super::keys::Keys;
use crate::{Config, Error};

pub fn config(keys: &Keys) -> Result<Config, Error> {
    let config = keys.llama_like()?;
    if keys.get("sliding_window").is_some() && keys.size("sliding_window")? < config.max_positions {
        let window = keys.size("sliding_window")?;
        return Err(keys.error(format!("sliding_window = {window} is not supported (only null)")));
    }
    Ok(config)
}
