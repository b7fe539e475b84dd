//! Flags of sampling, checked, with what the model's own configuration adds.

use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Args;
use decoder::Sampling;
use serde_json::{Map, Value, json};

/// Flags that say how tokens are chosen.
#[derive(Debug, Clone, Default, Args)]
pub struct SamplingArgs {
    /// 0 takes the most likely token each time [default: 0].
    #[arg(long)]
    pub temperature: Option<f64>,
    /// Draw from the smallest set of tokens with this probability.
    #[arg(long)]
    pub top_p: Option<f64>,
    /// Draw from so many of the most likely tokens.
    #[arg(long, value_name = "N")]
    pub top_k: Option<usize>,
    /// Draw from tokens at least so likely, compared with the most likely one.
    #[arg(long)]
    pub min_p: Option<f64>,
    /// Make tokens that stand in the prompt or the answer less likely; 1 does not.
    #[arg(long)]
    pub repetition_penalty: Option<f64>,
    /// End an answer before this text; may be given several times.
    #[arg(long, value_name = "TEXT", action = clap::ArgAction::Append)]
    pub stop: Vec<String>,
    /// Go on to the token limit, past end-of-sequence tokens (to measure speed).
    #[arg(long, conflicts_with = "endpoint")]
    pub ignore_eos: bool,
    /// Seed; each row has its own stream of it.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Take what is not given here from the model's generation_config.json.
    #[arg(long, conflicts_with = "endpoint")]
    pub generation_config: bool,
}

impl SamplingArgs {
    /// The same with what a model's directory says of what is not given.
    pub fn with_defaults_of(&self, dir: &Path) -> Result<Self> {
        if !self.generation_config {
            return Ok(self.clone());
        }
        let path = dir.join("generation_config.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("{}: --generation-config needs it", path.display()))?;
        let config: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let asks_to_draw = config["do_sample"] == Value::Bool(true);
        let number = |given: Option<f64>, name: &str| given.or(config[name].as_f64());
        let temperature = match (self.temperature, asks_to_draw) {
            (Some(temperature), _) => temperature,
            (None, true) => config["temperature"].as_f64().unwrap_or(1.0),
            (None, false) => 0.0,
        };
        let draws = temperature > 0.0;
        let drawn = |given: Option<f64>, name: &str| if draws { number(given, name) } else { given };
        // 0 is "all" there, and what transformers takes where nothing is said.
        let top_k = match config["top_k"].as_u64() {
            Some(0) => None,
            Some(k) => Some(k as usize),
            None => Some(50),
        };
        let all = Self {
            temperature: Some(temperature),
            top_p: drawn(self.top_p, "top_p"),
            top_k: self.top_k.or(top_k.filter(|_| draws)),
            min_p: drawn(self.min_p, "min_p"),
            repetition_penalty: number(self.repetition_penalty, "repetition_penalty"),
            ..self.clone()
        };
        all.check_ranges().with_context(|| path.display().to_string())?;
        self.check_effects(all.is_greedy())?;
        Ok(all)
    }

    /// Errors in these flags.
    pub fn check(&self) -> Result<()> {
        self.check_ranges()?;
        // With the model's own settings it is not known yet.
        if self.generation_config { Ok(()) } else { self.check_effects(self.is_greedy()) }
    }

    /// Values without sense.
    pub fn check_ranges(&self) -> Result<()> {
        let within = |value: Option<f64>, name: &str, ok: &dyn Fn(f64) -> bool, range: &str| match value {
            Some(value) if !(value.is_finite() && ok(value)) => bail!("--{name} must be {range}"),
            _ => Ok(()),
        };
        within(self.temperature, "temperature", &|t| t >= 0.0, "0 or more")?;
        within(self.top_p, "top-p", &|p| p > 0.0 && p <= 1.0, "above 0 and at most 1")?;
        within(self.min_p, "min-p", &|p| (0.0..1.0).contains(&p), "0 or more and below 1")?;
        within(self.repetition_penalty, "repetition-penalty", &|p| p > 0.0, "above 0")?;
        if self.top_k == Some(0) {
            bail!("--top-k must be at least 1");
        }
        if self.stop.iter().any(String::is_empty) {
            bail!("--stop must not be empty");
        }
        Ok(())
    }

    /// Flags that do nothing where the most likely token is taken.
    fn check_effects(&self, is_greedy: bool) -> Result<()> {
        let drawn = [
            ("top-p", self.top_p.is_some()),
            ("top-k", self.top_k.is_some()),
            ("min-p", self.min_p.is_some()),
            ("seed", self.seed.is_some()),
        ];
        if let Some((name, _)) = drawn.iter().find(|(_, given)| *given && is_greedy) {
            bail!("--{name} has no effect without --temperature above 0");
        }
        Ok(())
    }

    /// The most likely token is taken each time.
    pub fn is_greedy(&self) -> bool {
        self.temperature.unwrap_or(0.0) == 0.0
    }

    /// For a local model.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(0.0) as f32,
            top_k: self.top_k.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0) as f32,
            min_p: self.min_p.unwrap_or(0.0) as f32,
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0) as f32,
        }
    }

    /// Fields of a request to a server beside temperature, nucleus and seed.
    pub fn fields(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        let mut add = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                fields.insert(name.into(), value);
            }
        };
        add("top_k", self.top_k.map(Value::from));
        add("min_p", self.min_p.map(Value::from));
        add("repetition_penalty", self.repetition_penalty.map(Value::from));
        add("stop", (!self.stop.is_empty()).then(|| json!(self.stop)));
        fields
    }

    /// As recorded beside answers.
    pub fn record(&self) -> Value {
        json!({
            "temperature": self.temperature.unwrap_or(0.0), "top_p": self.top_p, "top_k": self.top_k,
            "min_p": self.min_p, "repetition_penalty": self.repetition_penalty, "stop": self.stop,
            "seed": self.seed, "ignore_eos": self.ignore_eos,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(config: &str, given: SamplingArgs) -> SamplingArgs {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("generation_config.json"), config).unwrap();
        SamplingArgs { generation_config: true, ..given }.with_defaults_of(dir.path()).unwrap()
    }

    #[test]
    fn the_models_own_settings_fill_what_is_not_given() {
        let config = r#"{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}"#;
        let all = of(config, SamplingArgs { top_k: Some(5), ..SamplingArgs::default() });
        assert_eq!((all.temperature, all.top_p, all.top_k), (Some(0.7), Some(0.8), Some(5)));
        assert_eq!((all.min_p, all.repetition_penalty), (None, Some(1.05)));
        // Without `do_sample` transformers takes the most likely token.
        let greedy = of(r#"{"temperature": 0.7, "top_p": 0.8}"#, SamplingArgs::default());
        assert!(greedy.is_greedy() && greedy.top_p.is_none());
        let plain = of(r#"{"do_sample": true}"#, SamplingArgs::default());
        assert_eq!((plain.temperature, plain.top_k), (Some(1.0), Some(50)));
        // What is given decides whether tokens are drawn; 0 is no limit.
        let drawn = SamplingArgs { temperature: Some(0.5), seed: Some(1), ..SamplingArgs::default() };
        let drawn = of(r#"{"top_p": 0.8, "top_k": 0}"#, drawn);
        assert_eq!((drawn.top_p, drawn.top_k), (Some(0.8), None));
        let greedy = SamplingArgs { temperature: Some(0.0), ..SamplingArgs::default() };
        assert_eq!(of(config, greedy).top_p, None);
    }

    #[test]
    fn flags_without_effect_or_sense_are_errors() {
        let said = |args: SamplingArgs| args.check().unwrap_err().to_string();
        assert!(
            said(SamplingArgs { top_k: Some(3), ..SamplingArgs::default() })
                .contains("--top-k has no effect")
        );
        let drawn = || SamplingArgs { temperature: Some(1.0), ..SamplingArgs::default() };
        assert!(said(SamplingArgs { top_p: Some(1.5), ..drawn() }).contains("--top-p"));
        assert!(said(SamplingArgs { min_p: Some(1.0), ..drawn() }).contains("--min-p"));
        assert!(
            said(SamplingArgs { repetition_penalty: Some(0.0), ..drawn() }).contains("--repetition-penalty")
        );
        assert!(SamplingArgs { repetition_penalty: Some(1.2), ..SamplingArgs::default() }.check().is_ok());
    }
}
