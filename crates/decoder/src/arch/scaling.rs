//! Rotary settings of a configuration: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5.

use serde_json::{Map, Value};

use super::keys::Keys;
use crate::Error;
use crate::rope::{Rope, RopeKind, yarn_ramp};

type Object = Map<String, Value>;

impl Keys<'_> {
    /// The rotary embedding of heads of `head` features; `theta` where the file names no base.
    pub fn rope(&self, head: usize, max_positions: usize, theta: f64) -> Result<Rope, Error> {
        let empty = Object::new();
        let settings = self.object("rope_parameters")?.or(self.object("rope_scaling")?).unwrap_or(&empty);
        if settings.values().any(Value::is_object) {
            return Err(
                self.error("rope_parameters by kind of layer are not supported for this model".into())
            );
        }
        self.rope_from(settings, head, max_positions, theta)
    }

    pub fn object(&self, key: &str) -> Result<Option<&Object>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.error(format!("{key} is {other}, expected an object"))),
        }
    }

    /// The same from one object of settings.
    pub fn rope_from(
        &self,
        settings: &Object,
        head: usize,
        max_positions: usize,
        default_theta: f64,
    ) -> Result<Rope, Error> {
        let own = |key: &str| settings.get(key).filter(|value| !value.is_null());
        let number = |key: &str| own(key).and_then(Value::as_f64);
        let either = |key: &str| number(key).or_else(|| self.get(key).and_then(Value::as_f64));
        let needed = |key: &str| {
            number(key).ok_or_else(|| self.error(format!("the rotary scaling lacks the number {key}")))
        };
        let theta = either("rope_theta").unwrap_or(default_theta);
        let dim = (head as f64 * either("partial_rotary_factor").unwrap_or(1.0)) as usize;
        if dim < 2 || !dim.is_multiple_of(2) || dim > head || theta <= 1.0 {
            return Err(self.error(format!(
                "a rotary embedding of {dim} of {head} features with base {theta} is not possible"
            )));
        }
        if number("factor").is_some_and(|factor| !(factor.is_finite() && factor > 0.0)) {
            return Err(self.error(format!("the rotary scaling has the factor {}", settings["factor"])));
        }
        let original = either("original_max_position_embeddings").unwrap_or(max_positions as f64);
        let given = own("rope_type").or(own("type")).and_then(Value::as_str);
        let is_scaling = settings.contains_key("factor");
        let mut attention_factor = 1.0;
        let kind = match given {
            None if is_scaling => return Err(self.error("rotary scaling without a type".into())),
            None | Some("default") => RopeKind::Default,
            Some("linear") => RopeKind::Linear { factor: needed("factor")? },
            Some("dynamic") => RopeKind::Dynamic { factor: needed("factor")?, positions: max_positions },
            Some("llama3") => RopeKind::Llama3 {
                factor: needed("factor")?,
                low: needed("low_freq_factor")?,
                high: needed("high_freq_factor")?,
                original,
            },
            Some("yarn") => {
                let factor = number("factor").unwrap_or(max_positions as f64 / original);
                attention_factor = number("attention_factor").unwrap_or_else(|| {
                    match (number("mscale"), number("mscale_all_dim")) {
                        (Some(a), Some(b)) if a != 0.0 && b != 0.0 => {
                            yarn_scale(factor, a) / yarn_scale(factor, b)
                        }
                        _ => yarn_scale(factor, 1.0),
                    }
                });
                let nonzero = |key: &str, default| number(key).filter(|&n| n != 0.0).unwrap_or(default);
                let truncate = own("truncate").and_then(Value::as_bool).unwrap_or(true);
                let (fast, slow) = (nonzero("beta_fast", 32.0), nonzero("beta_slow", 1.0));
                RopeKind::Yarn { factor, ramp: yarn_ramp(fast, slow, dim, theta, original, truncate) }
            }
            Some("longrope" | "su") => {
                let factor = number("factor").unwrap_or(max_positions as f64 / original);
                attention_factor = number("attention_factor").unwrap_or_else(|| {
                    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
                });
                let list = |key: &str| self.divisors(settings, key, dim / 2);
                RopeKind::LongRope {
                    short: list("short_factor")?,
                    long: list("long_factor")?,
                    original: original as usize,
                }
            }
            Some(other) => {
                return Err(self.error(format!("rotary scaling of type {other:?} is not supported")));
            }
        };
        Ok(Rope { kind, theta, dim, attention_factor: attention_factor as f32 })
    }

    fn divisors(&self, settings: &Object, key: &str, n: usize) -> Result<Vec<f32>, Error> {
        let list = settings.get(key).and_then(Value::as_array);
        let numbers: Option<Vec<f32>> =
            list.and_then(|list| list.iter().map(|value| value.as_f64().map(|v| v as f32)).collect());
        numbers
            .filter(|numbers| numbers.len() == n)
            .ok_or_else(|| self.error(format!("the rotary scaling needs {key}, a list of {n} numbers")))
    }
}

/// YaRN's factor of cosines and sines (`get_mscale`).
fn yarn_scale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
