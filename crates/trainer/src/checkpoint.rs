//! Checkpoints: a directory that appears whole or not at all, with checksums, and everything needed to go on
//! from it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn::tensor::{Tensor, TensorData};
use decoder::{Companions, Decoder, SaveDtype};
use pref_data::write_atomic;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::checksums;
use crate::metrics::Window;
use crate::optimizer::{Optimizer, Rule};
use crate::references::References;
use crate::settings::Settings;

/// Entry of the fingerprint.
pub const TEMPLATE_DATE: &str = "template date";
const STATE: &str = "trainer_state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const REFERENCE: &str = "reference";
/// Hugging Face's own limit.
const MAX_SHARD: usize = 5_000_000_000;

/// Position of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Optimizer steps done.
    pub step: usize,
    /// Tokens seen, as TRL counts them.
    pub num_tokens: usize,
    /// Metrics since the last log entry.
    pub window: Window,
    /// The best evaluation so far.
    pub best: Option<BestSoFar>,
    /// The best value of the metric at any evaluation.
    pub best_seen: Option<f64>,
    /// Interrupted where an evaluation was due.
    pub evaluation_due: bool,
    /// Evaluations since one that was better.
    pub stale: usize,
    /// Training has stopped early.
    pub stopped: bool,
    /// What must be the same when the run goes on.
    pub fingerprint: HashMap<String, String>,
}

/// The best evaluation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BestSoFar {
    /// Value of the metric.
    pub value: f64,
    /// Step of the evaluation.
    pub step: usize,
}

/// What a resumed run must have in common with the one that wrote the checkpoint.
pub fn fingerprint(
    settings: &Settings,
    total_steps: usize,
    model_hash: &str,
    data_hash: &str,
) -> HashMap<String, String> {
    let entries = [
        ("loss", settings.loss.names()),
        ("beta", settings.loss.beta.to_string()),
        ("label-smoothing", settings.loss.label_smoothing.to_string()),
        (
            "f-divergence",
            format!("{:?} {}", settings.loss.f_divergence_type, settings.loss.f_alpha_divergence_coef),
        ),
        ("discopop-tau", settings.loss.discopop_tau.to_string()),
        ("ld-alpha", format!("{:?}", settings.loss.ld_alpha)),
        ("use-weighting", settings.loss.use_weighting.to_string()),
        ("label weights", format!("{} {}", settings.loss.desirable_weight, settings.loss.undesirable_weight)),
        ("sync-ref-model", format!("{:?}", settings.sync_reference)),
        ("adapter", format!("{:?}", settings.peft.as_ref().map(|peft| (peft.new_adapter(), peft.targets())))),
        ("best checkpoint", format!("{:?}", settings.best)),
        ("learning-rate", settings.learning_rate.to_string()),
        ("lr-scheduler", format!("{:?}", settings.schedule)),
        ("warmup-steps", settings.warmup_steps.to_string()),
        ("weight-decay", settings.weight_decay.to_string()),
        ("max-grad-norm", settings.max_grad_norm.to_string()),
        ("optim", format!("{:?}", settings.optim)),
        ("batch", format!("{:?}", settings.bound)),
        ("gradient-accumulation-steps", settings.accumulation.to_string()),
        ("seed", settings.seed.to_string()),
        ("train-sampling-strategy", settings.train_sampling_strategy.clone()),
        ("backend", settings.backend.name().to_string()),
        ("dtype", settings.precision.key()),
        ("number of steps", total_steps.to_string()),
        ("reference model", model_hash.to_string()),
        ("training data", data_hash.to_string()),
    ];
    entries.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

/// The day that chat templates were told in the run that wrote a checkpoint, if they asked.
pub fn template_date(dir: &Path) -> Option<jiff::civil::Date> {
    let text = fs::read_to_string(dir.join(STATE)).ok()?;
    let state: State = serde_json::from_str(&text).ok()?;
    state.fingerprint.get(TEMPLATE_DATE)?.parse().ok()
}

/// Writes what was trained, in 32-bit floats, the weights first: the whole model in Hugging Face layout, or the
/// adapter in PEFT's with the tokenizer.
pub fn write_model(settings: &Settings, model: &Decoder, companions: &Companions, dir: &Path) -> Result<()> {
    if model.lora().is_some() {
        model.save_adapter(dir, &settings.model)?;
        companions.write_tokenizer(dir)?;
    } else {
        model.save(dir, SaveDtype::F32, MAX_SHARD)?;
        companions.write(dir, SaveDtype::F32)?;
    }
    Ok(())
}

/// A run that a checkpoint is made of.
pub struct Snapshot<'a> {
    pub settings: &'a Settings,
    pub model: &'a Decoder,
    pub companions: &'a Companions,
    pub optimizer: &'a Optimizer,
    pub references: &'a References,
    pub state: &'a State,
}

impl Snapshot<'_> {
    /// Writes `checkpoint-<step>` and deletes older ones beyond the limit. `resumable` adds optimizer and
    /// position.
    pub fn write(&self, resumable: bool) -> Result<PathBuf> {
        let root = &self.settings.output_dir;
        let target = root.join(format!("checkpoint-{}", self.state.step));
        let temporary = root.join(format!(".checkpoint-{}.tmp", self.state.step));
        let context = || format!("{}: cannot write the checkpoint", target.display());
        remove(&temporary).with_context(context)?;
        fs::create_dir_all(&temporary).with_context(context)?;
        let written = self.fill(&temporary, resumable).with_context(context);
        if written.is_err() {
            // On a full disk the half of a checkpoint is in the way of everything else.
            remove(&temporary).ok();
        }
        written?;
        if target.exists() && !checksums::are_in(&target) {
            bail!("{}: is not a checkpoint of this program, or a broken one; move it away", target.display());
        }
        remove(&target).with_context(context)?;
        fs::rename(&temporary, &target).with_context(context)?;
        self.rotate()?;
        Ok(target)
    }

    fn fill(&self, dir: &Path, resumable: bool) -> Result<()> {
        write_model(self.settings, self.model, self.companions, dir)?;
        if resumable {
            let rule = self.settings.optim;
            write_optimizer(&dir.join(OPTIMIZER), self.optimizer.state(self.model, rule))?;
            if self.settings.sync_reference.is_some() {
                self.references.save(&dir.join(REFERENCE))?;
            }
            let text = serde_json::to_string_pretty(self.state).context("the state serialises")?;
            write_atomic(&dir.join(STATE), |out| out.write_all(text.as_bytes()))?;
        }
        checksums::write(dir)
    }

    /// Deletes the oldest checkpoints beyond the limit, but not the best.
    fn rotate(&self) -> Result<()> {
        let Some(limit) = self.settings.save_total_limit else { return Ok(()) };
        let keeps_best = self.settings.best.as_ref().is_some_and(|best| best.load);
        let best = self.state.best.filter(|_| keeps_best).map(|best| best.step);
        let mut all = list(&self.settings.output_dir)?;
        // No other directory is ever deleted.
        all.retain(|(_, path)| checksums::are_in(path));
        // Those beyond this step are of a run that went on from there and was given up.
        all.sort_by_key(|(step, _)| (*step <= self.state.step, *step));
        let excess = all.len().saturating_sub(limit);
        let old = all.iter().filter(|(step, _)| Some(*step) != best && *step != self.state.step);
        for (_, old) in old.take(excess) {
            fs::remove_dir_all(old).with_context(|| format!("{}: cannot delete", old.display()))?;
        }
        Ok(())
    }
}

fn remove(dir: &Path) -> std::io::Result<()> {
    if dir.exists() { fs::remove_dir_all(dir) } else { Ok(()) }
}

/// Checkpoints of an output directory, oldest first.
pub fn list(root: &Path) -> Result<Vec<(usize, PathBuf)>> {
    if !root.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(root).with_context(|| format!("{}: cannot list", root.display()))?;
    let mut found: Vec<(usize, PathBuf)> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let step = path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
            Some((step, path))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// The newest whole checkpoint that can be resumed from; those that are not whole are told of and passed over.
pub fn newest(root: &Path, say: &dyn Fn(&str)) -> Result<Option<PathBuf>> {
    for (_, path) in list(root)?.into_iter().rev() {
        match checksums::verify(&path) {
            Err(error) => say(&format!("WARNING: {error:#}; trying the checkpoint before")),
            Ok(()) if path.join(STATE).is_file() => return Ok(Some(path)),
            Ok(()) => {}
        }
    }
    Ok(None)
}

/// Reads the position of a checkpoint and checks that it belongs to this run.
pub fn read_state(dir: &Path, fingerprint: &HashMap<String, String>) -> Result<State> {
    let path = dir.join(STATE);
    let text = fs::read_to_string(&path).with_context(|| {
        format!("{}: cannot read; is this a checkpoint made without --save-only-model?", path.display())
    })?;
    let state: State =
        serde_json::from_str(&text).with_context(|| format!("{}: malformed", path.display()))?;
    let mut names: Vec<&String> = fingerprint.keys().collect();
    names.sort();
    for name in names {
        if state.fingerprint.get(name) != fingerprint.get(name) {
            let was = state.fingerprint.get(name).map_or("unknown", String::as_str);
            bail!(
                "{}: cannot go on from it: {name} was {was} and is now {}",
                dir.display(),
                fingerprint[name]
            );
        }
    }
    Ok(state)
}

/// Reads what the optimizer kept.
pub fn read_optimizer(dir: &Path, model: &Decoder, rule: Rule) -> Result<Optimizer> {
    let path = dir.join(OPTIMIZER);
    let bytes = fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("{}: broken", path.display()))?;
    let device = model.device();
    Optimizer::restore(model, rule, |name| {
        let view = tensors.tensor(name).with_context(|| format!("{}: no {name}", path.display()))?;
        let values: Vec<f32> =
            view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        let dims: [usize; 2] =
            view.shape().try_into().with_context(|| format!("{}: {name} is no matrix", path.display()))?;
        Ok(Tensor::from_data(TensorData::new(values, dims), &device))
    })
}

/// The moved reference of a checkpoint, for [`Decoder::load`] in place of the initial one.
pub fn reference_dir(dir: &Path) -> PathBuf {
    dir.join(REFERENCE)
}

fn write_optimizer<'a>(path: &Path, state: impl Iterator<Item = (String, &'a Tensor<2>)>) -> Result<()> {
    let bytes = |tensor: &Tensor<2>| -> Vec<u8> {
        let values: Vec<f32> = tensor.to_data().try_into_vec_as().expect("an optimizer keeps floats");
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    };
    let data: Vec<(String, Vec<usize>, Vec<u8>)> =
        state.map(|(name, tensor)| (name, tensor.dims().to_vec(), bytes(tensor))).collect();
    let views = data
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, path)
        .with_context(|| format!("{}: cannot write", path.display()))?;
    let file = fs::File::open(path).with_context(|| format!("{}: cannot open", path.display()))?;
    file.sync_all().with_context(|| format!("{}: cannot write", path.display()))
}
