//! Typed access to a `config.json`, in the style of transformers 4 and of 5.

use std::path::Path;

use fused_ops::Heads;
use serde_json::{Map, Value};

use crate::{Config, Error, Mlp, Norm, Positions};

use super::LLAMA;

/// The keys of one configuration file.
pub struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
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

    pub fn size(&self, key: &str) -> Result<usize, Error> {
        self.size_or(key, None)
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

    /// Base of the rotary angles; errors for any kind of scaling.
    pub fn rope_theta(&self) -> Result<f32, Error> {
        let parameters = self.get("rope_parameters").and_then(Value::as_object);
        for scaling in [parameters, self.get("rope_scaling").and_then(Value::as_object)].into_iter().flatten()
        {
            let is_scaling = scaling.contains_key("factor");
            let kind = scaling.get("rope_type").or(scaling.get("type")).and_then(Value::as_str);
            if kind.is_some_and(|kind| kind != "default") {
                let kind = kind.unwrap_or_default();
                return Err(self.error(format!("rotary scaling of type {kind:?} is not supported")));
            }
            if kind.is_none() && is_scaling {
                return Err(self.error("rotary scaling without a type is not supported".into()));
            }
            let partial = scaling.get("partial_rotary_factor").and_then(Value::as_f64);
            if partial.is_some_and(|factor| factor != 1.0) {
                return Err(self.error("partial_rotary_factor other than 1 is not supported".into()));
            }
        }
        match parameters.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64) {
            Some(theta) => Ok(theta as f32),
            None => self.number_or("rope_theta", 10_000.0),
        }
    }

    /// Errors when any layer attends to less than everything before it.
    pub fn full_attention(&self) -> Result<(), Error> {
        let sliding = |value: &Value| value.as_str().is_some_and(|kind| kind != "full_attention");
        if self.get("layer_types").and_then(Value::as_array).is_some_and(|types| types.iter().any(sliding)) {
            return Err(self.error("layer_types with other than full_attention are not supported".into()));
        }
        Ok(())
    }

    /// What Llama-like families have in common; biases, norms of queries and keys off.
    pub fn llama_like(&self) -> Result<Config, Error> {
        self.only("hidden_act", &"silu".into())?;
        self.full_attention()?;
        let hidden = self.size("hidden_size")?;
        let query = self.size("num_attention_heads")?;
        let kv = self.size_or("num_key_value_heads", Some(query))?;
        let dim = self.size_or("head_dim", Some(hidden / query))?;
        if !query.is_multiple_of(kv) || !dim.is_multiple_of(2) {
            return Err(
                self.error(format!("{query} heads of {dim} features over {kv} key heads do not divide"))
            );
        }
        Ok(Config {
            model_type: self.text("model_type")?.into(),
            vocab: self.size("vocab_size")?,
            hidden,
            layers: self.size("num_hidden_layers")?,
            heads: Heads { query, kv, dim },
            intermediate: self.size("intermediate_size")?,
            norm: Norm::Rms,
            eps: self.number_or("rms_norm_eps", 1e-6)?,
            positions: Positions::Rotary { theta: self.rope_theta()? },
            mlp: Mlp::SwiGlu,
            qkv_bias: false,
            out_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied: self.flag_or("tie_word_embeddings", false)?,
            max_positions: self.size_or("max_position_embeddings", Some(2048))?,
            names: LLAMA,
        })
    }
}
