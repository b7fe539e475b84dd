//! Typed access to a `config.json`, in the style of transformers 4 and of 5.

use std::path::Path;

use fused_ops::{Activation, Heads, Logits};
use serde_json::{Map, Value};

use crate::rope::Rope;
use crate::{Config, Error, Layer, Mlp, Norm, Positions};

use super::LLAMA;

/// The keys of one configuration file.
pub struct Keys<'a> {
    path: &'a Path,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    pub fn new(path: &'a Path, json: &'a Value) -> Result<Self, Error> {
        let map = json.as_object();
        let missing = || Error::Config { path: path.into(), reason: "not a JSON object".into() };
        Ok(Self { path, map: map.ok_or_else(missing)? })
    }

    pub fn error(&self, reason: String) -> Error {
        Error::Config { path: self.path.into(), reason }
    }

    /// The value of `key`, with null as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        self.get(key)
            .map(|value| read(value).ok_or_else(|| self.error(format!("{key} is {value}, expected {what}"))))
            .transpose()
    }

    pub fn text(&self, key: &str) -> Result<&'a str, Error> {
        self.typed(key, "a string", Value::as_str)?
            .ok_or_else(|| self.error(format!("the key {key} is missing")))
    }

    pub fn text_or(&self, key: &str, default: &'a str) -> Result<&'a str, Error> {
        Ok(self.typed(key, "a string", Value::as_str)?.unwrap_or(default))
    }

    pub fn size(&self, key: &str) -> Result<usize, Error> {
        self.size_or(key, None)
    }

    /// Number of blocks; a wrong one must not become a million names.
    pub fn layer_count(&self, key: &str) -> Result<usize, Error> {
        let layers = self.size(key)?;
        if layers > 4096 { Err(self.error(format!("{key} is {layers}, more than 4096"))) } else { Ok(layers) }
    }

    pub fn size_or(&self, key: &str, default: Option<usize>) -> Result<usize, Error> {
        // Nothing real is larger; a wrong number must not become an allocation.
        let read = |value: &Value| value.as_u64().map(|n| n as usize).filter(|n| (1..=1 << 24).contains(n));
        self.typed(key, "a positive whole number of reasonable size", read)?
            .or(default)
            .ok_or_else(|| self.error(format!("the key {key} is missing")))
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f32, Error> {
        Ok(self.typed(key, "a number", Value::as_f64)?.unwrap_or(default) as f32)
    }

    /// A number above 0.
    pub fn positive_or(&self, key: &str, default: f64) -> Result<f32, Error> {
        let number = self.number_or(key, default)?;
        if number > 0.0 && number.is_finite() {
            Ok(number)
        } else {
            Err(self.error(format!("{key} is {number}, expected a number above 0")))
        }
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool, Error> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// Errors unless the key is absent or `wanted`.
    pub fn only(&self, key: &str, wanted: &Value) -> Result<(), Error> {
        match self.get(key) {
            Some(value) if value != wanted => {
                Err(self.error(format!("{key} = {value} is not supported (only {wanted})")))
            }
            _ => Ok(()),
        }
    }

    /// A size that may be null; `default` where the key is missing.
    pub fn optional_size(&self, key: &str, default: Option<usize>) -> Result<Option<usize>, Error> {
        match self.map.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.size(key).map(Some),
        }
    }

    /// A number that may be null or missing.
    pub fn optional_number(&self, key: &str) -> Result<Option<f32>, Error> {
        Ok(self.typed(key, "a number", Value::as_f64)?.map(|number| number as f32))
    }

    /// Which layers attend in a window: the entries of `layer_types`, or else `default` by layer.
    pub fn sliding(&self, layers: usize, default: impl Fn(usize) -> bool) -> Result<Vec<bool>, Error> {
        let Some(types) = self.get("layer_types") else { return Ok((0..layers).map(default).collect()) };
        let types = types.as_array().filter(|types| types.len() == layers);
        let types =
            types.ok_or_else(|| self.error(format!("layer_types is not a list of {layers} kinds")))?;
        types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(false),
                Some("sliding_attention") => Ok(true),
                _ => Err(self.error(format!(
                    "layer_types has {kind}; full_attention and sliding_attention are supported"
                ))),
            })
            .collect()
    }

    /// Blocks with the first rotary embedding, those marked in a window.
    pub fn layers(&self, sliding: &[bool], window: Option<usize>) -> Result<Vec<Layer>, Error> {
        if window.is_none() && sliding.contains(&true) {
            return Err(self.error("sliding_attention layers, but no sliding_window".into()));
        }
        Ok(sliding.iter().map(|&s| Layer { window: window.filter(|_| s), rope: Some(0) }).collect())
    }

    /// What Llama-like families have in common: full attention in every block, no biases, no norms of queries
    /// and keys.
    pub fn llama_like(&self) -> Result<Config, Error> {
        self.only("hidden_act", &"silu".into())?;
        self.llama_shape(|dim, positions| Ok(vec![self.rope(dim, positions, 10_000.0)?]))
    }

    /// The same with an activation that the caller has looked at, and its rotary embeddings, given the features
    /// of a head and the number of positions.
    pub fn llama_shape(
        &self,
        ropes: impl FnOnce(usize, usize) -> Result<Vec<Rope>, Error>,
    ) -> Result<Config, Error> {
        let hidden = self.size("hidden_size")?;
        let query = self.size("num_attention_heads")?;
        let kv = self.size_or("num_key_value_heads", Some(query))?;
        let dim = self.size_or("head_dim", Some(hidden / query))?;
        if !query.is_multiple_of(kv) || !dim.is_multiple_of(2) {
            return Err(
                self.error(format!("{query} heads of {dim} features over {kv} key heads do not divide"))
            );
        }
        let max_positions = self.size_or("max_position_embeddings", Some(2048))?;
        let layers = self.layer_count("num_hidden_layers")?;
        Ok(Config {
            model_type: self.text("model_type")?.into(),
            vocab: self.size("vocab_size")?,
            hidden,
            layers: vec![Layer { window: None, rope: Some(0) }; layers],
            heads: Heads { query, kv, dim },
            intermediate: self.size("intermediate_size")?,
            norm: Norm::Rms,
            eps: self.positive_or("rms_norm_eps", 1e-6)?,
            positions: Positions::Rotary(ropes(dim, max_positions)?),
            mlp: Mlp::Gated(Activation::Silu),
            qkv_bias: false,
            out_bias: false,
            mlp_bias: false,
            qk_norm: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            attention_scale: (dim as f32).sqrt().recip(),
            attention_softcap: None,
            logits: Logits::default(),
            tied: self.flag_or("tie_word_embeddings", false)?,
            conv1d: false,
            max_positions,
            names: LLAMA,
        })
    }

    /// Errors unless every block attends to everything before it.
    pub fn full_attention(&self, layers: usize) -> Result<(), Error> {
        if self.sliding(layers, |_| false)?.contains(&true) {
            return Err(self.error("layer_types other than full_attention are not supported here".into()));
        }
        Ok(())
    }
}
