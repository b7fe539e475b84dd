//! Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::{read_json, read_weight, write_json, write_weights};
use crate::lora::{Lora, LoraSettings, Targets, module};
use crate::weights::{Files, Stored};
use crate::{Decoder, Error};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// Options of PEFT that change what an adapter computes and are not implemented; each must be absent, null,
/// false or empty.
const UNSUPPORTED: [&str; 15] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "lora_ga_config",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// The base model that an adapter's directory names; `None` where the directory is not an adapter's alone.
pub fn adapter_base(dir: &Path) -> Result<Option<String>, Error> {
    let path = dir.join(CONFIG);
    if !path.exists() || dir.join("config.json").exists() {
        return Ok(None);
    }
    match read_json(&path)?["base_model_name_or_path"].as_str() {
        Some(base) => Ok(Some(base.to_string())),
        None => Err(Error::Config { path, reason: "base_model_name_or_path is missing".into() }),
    }
}

impl Lora {
    /// Loads an adapter made by PEFT, or here, for `model`.
    pub fn load(dir: &Path, model: &Decoder) -> Result<Self, Error> {
        let path = dir.join(CONFIG);
        let config = read_json(&path)?;
        let mut lora = Self::empty(model, settings(&path, &config)?);
        let dora = lora.settings().dora;
        let files = Files::single(dir.join(WEIGHTS))?;
        let mut found = files.tensors("")?;
        let wrong = |reason: String| Error::Weights { path: dir.join(WEIGHTS), reason };
        for (index, weight) in model.weights().iter().enumerate() {
            let name = |part: &str| format!("{PREFIX}{}.{part}", module(weight));
            let mut take = |part: &str| found.remove(&name(part));
            let (Some(a), Some(b)) = (take("lora_A.weight"), take("lora_B.weight")) else { continue };
            let magnitude = take("lora_magnitude_vector").or_else(|| take("lora_magnitude_vector.weight"));
            if magnitude.is_some() != dora {
                return Err(wrong(format!(
                    "{} and use_dora contradict each other",
                    name("lora_magnitude_vector")
                )));
            }
            let [out, inner] = weight.tensor.dims();
            let rank = a.shape().first().copied().unwrap_or(0);
            if rank != lora.settings().rank {
                let r = lora.settings().rank;
                return Err(wrong(format!("{} has rank {rank}, {CONFIG} says {r}", name("lora_A.weight"))));
            }
            let read = |part: &str, stored: &Stored, shape: &[usize]| {
                read_weight(&name(part), shape, stored, dir, files.place())
            };
            let parts = [
                (read("lora_A.weight", &a, &[rank, inner])?, [rank, inner]),
                (read("lora_B.weight", &b, &[out, rank])?, [out, rank]),
            ];
            let magnitude = magnitude.map(|m| read("lora_magnitude_vector", &m, &[out])).transpose()?;
            lora.push(index, module(weight).to_string(), parts, magnitude, &model.device());
        }
        if let Some(name) = found.keys().min() {
            return Err(wrong(format!("{name} fits no projection of the model")));
        }
        if lora.weights().is_empty() {
            return Err(wrong("no adapter is in it".into()));
        }
        Ok(lora)
    }
}

impl Decoder {
    /// Writes the model's adapter into `dir` (which must exist), loadable by PEFT. `base` is the name of the
    /// model it belongs to.
    pub fn save_adapter(&self, dir: &Path, base: &str) -> Result<(), Error> {
        let Some(lora) = self.lora() else { return Ok(()) };
        write_weights(&dir.join(WEIGHTS), lora.weights())?;
        let settings = lora.settings();
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": null,
            "inference_mode": true,
            "r": settings.rank,
            "lora_alpha": number(settings.alpha),
            "lora_dropout": settings.dropout,
            "use_rslora": settings.rank_stabilized,
            "use_dora": settings.dora,
            "target_modules": self.target_modules(lora),
            "bias": "none",
            "fan_in_fan_out": self.config().conv1d,
            "init_lora_weights": true,
            "modules_to_save": null,
        });
        write_json(&dir.join(CONFIG), &config)
    }

    /// The last parts of the adapted modules' names, where they mean no other module; else the whole names.
    fn target_modules(&self, lora: &Lora) -> Vec<String> {
        let mut parts: Vec<String> =
            lora.modules().filter_map(|module| module.rsplit('.').next()).map(str::to_string).collect();
        parts.sort_unstable();
        parts.dedup();
        let targets = Targets::Named(parts.clone());
        let meant = targets.choose(self).map_or(0, |indices| indices.len());
        if meant == lora.modules().count() { parts } else { lora.modules().map(str::to_string).collect() }
    }
}

/// Whole numbers without a point: PEFT's `lora_alpha` is an integer.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 { json!(value as i64) } else { json!(value) }
}

fn settings(path: &Path, config: &Value) -> Result<LoraSettings, Error> {
    let wrong = |reason: String| Error::Config { path: path.into(), reason };
    let empty = Map::new();
    let map = config.as_object().unwrap_or(&empty);
    let get = |key: &str| map.get(key).filter(|value| !value.is_null());
    if get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(wrong(format!("peft_type is {}, expected \"LORA\"", config["peft_type"])));
    }
    let unset = |value: &Value| match value {
        Value::Bool(set) => !set,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    if let Some(key) = UNSUPPORTED.iter().find(|key| get(key).is_some_and(|value| !unset(value))) {
        return Err(wrong(format!("{key} = {} is not supported", map[*key])));
    }
    if get("bias").and_then(Value::as_str).is_some_and(|bias| bias != "none") {
        return Err(wrong(format!("bias = {} is not supported (only \"none\")", map["bias"])));
    }
    // These change the base model's weights when PEFT loads the adapter.
    let init = get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
    if ["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|kind| init.starts_with(kind)) {
        return Err(wrong(format!(
            "init_lora_weights = {init:?} changes the base model; convert the adapter with PEFT's \
             path_initial_model_for_weight_conversion first"
        )));
    }
    let number = |key: &str| {
        get(key).and_then(Value::as_f64).ok_or_else(|| wrong(format!("{key} is missing or not a number")))
    };
    let flag = |key: &str| get(key).and_then(Value::as_bool).unwrap_or(false);
    let (rank, alpha) = (number("r")? as usize, number("lora_alpha")?);
    if rank == 0 || !(alpha as f32).is_finite() {
        return Err(wrong(format!("r = {rank} with lora_alpha = {alpha} is not an adapter")));
    }
    Ok(LoraSettings {
        rank,
        alpha,
        rank_stabilized: flag("use_rslora"),
        dora: flag("use_dora"),
        dropout: number("lora_dropout").unwrap_or(0.0),
    })
}
