//! The best evaluation: which it is, when to stop waiting for a better one, and going back to it.

use anyhow::{Result, anyhow};
use decoder::Decoder;
use serde_json::{Map, Value};

use crate::checkpoint::{BestSoFar, State};
use crate::checksums;
use crate::policy;
use crate::settings::Settings;

/// What follows from an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    GoOn,
    /// It has not become better for too long.
    Stop,
}

/// Compares an evaluation with the best so far (transformers' `EarlyStoppingCallback` and
/// `metric_for_best_model`). Where the best checkpoint is to be loaded only evaluations with a checkpoint
/// (`saved`) count as the best.
pub fn judge(
    settings: &Settings,
    state: &mut State,
    entry: &Map<String, Value>,
    saved: bool,
) -> Result<Verdict> {
    let Some(best) = &settings.best else { return Ok(Verdict::GoOn) };
    let value = entry.get(&best.metric).and_then(Value::as_f64).ok_or_else(|| {
        let known: Vec<&str> =
            entry.keys().map(String::as_str).filter(|key| key.starts_with("eval_")).collect();
        anyhow!(
            "--metric-for-best-model: there is no {}; the evaluation has {}",
            best.metric,
            known.join(", ")
        )
    })?;
    let gain = |old: f64| if best.greater { value - old } else { old - value };
    let counts = state.best_seen.is_none_or(|old| gain(old) > best.threshold);
    state.stale = if counts { 0 } else { state.stale + 1 };
    if state.best_seen.is_none_or(|old| gain(old) > 0.0) {
        state.best_seen = Some(value);
    }
    let stop = best.patience.is_some_and(|patience| state.stale >= patience);
    let saved = saved || (stop && settings.saves_at_end());
    if state.best.is_none_or(|old| gain(old.value) > 0.0) && (saved || !best.load) {
        state.best = Some(BestSoFar { value, step: state.step });
    }
    Ok(if stop { Verdict::Stop } else { Verdict::GoOn })
}

/// Puts the weights of the best checkpoint into the model, unless it holds them already; tells what was done.
/// A checkpoint that is not whole is told of, and the last weights are kept.
pub fn load(settings: &Settings, state: &State, model: &mut Decoder) -> Option<String> {
    let best = settings.best.as_ref().filter(|best| best.load)?;
    let found = state.best?;
    let text = format!("best checkpoint: step {} with {} {:.6}", found.step, best.metric, found.value);
    if found.step == state.step {
        return Some(text);
    }
    let dir = settings.output_dir.join(format!("checkpoint-{}", found.step));
    let read = || {
        checksums::verify(&dir)?;
        policy::restored(model.frozen(), &dir)
    };
    match read() {
        Ok(loaded) => {
            *model = loaded;
            Some(text)
        }
        Err(error) => {
            Some(format!("WARNING: {text}, but {error:#}; the weights of the last step are kept instead"))
        }
    }
}
