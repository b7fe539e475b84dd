//! Phi-3 and Phi-4: Llama with one projection for queries, keys and values and one for gate and up.

use super::keys::Keys;
use super::{LLAMA, Names};
use crate::rope::RopeKind;
use crate::{Config, Error, Positions};

const NAMES: Names = Names { qkv: "self_attn.qkv_proj", gate_up: "mlp.gate_up_proj", ..LLAMA };

pub fn config(keys: &Keys) -> Result<Config, Error> {
    let config = keys.llama_like()?;
    if let Positions::Rotary(ropes) = &config.positions
        && !ropes.iter().all(|rope| matches!(rope.kind, RopeKind::Default | RopeKind::LongRope { .. }))
    {
        return Err(keys.error("rotary scaling other than longrope is not supported for phi3".into()));
    }
    let window = keys.optional_size("sliding_window", None)?;
    let sliding = keys.sliding(config.layers.len(), |_| window.is_some())?;
    Ok(Config { layers: keys.layers(&sliding, window)?, names: NAMES, ..config })
}
