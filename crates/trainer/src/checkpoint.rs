//! Checkpoints: a directory that appears whole or not at all, and everything needed to go on from it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn::tensor::{Device, Tensor, TensorData};
use decoder::{Companions, Decoder, SaveDtype};
use fused_ops::Moments;
use pref_data::write_atomic;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::metrics::Window;
use crate::optimizer::Optimizer;
use crate::settings::Settings;

/// Entry of the fingerprint.
pub const TEMPLATE_DATE: &str = "template date";
const STATE: &str = "trainer_state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
/// Hugging Face's own limit.
const MAX_SHARD: usize = 5_000_000_000;

/// Position of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: usize,
    /// Tokens seen, as TRL counts them.
    pub num_tokens: usize,
    /// Metrics since the last log entry.
    pub window: Window,
    /// What must be the same when the run goes on.
    pub fingerprint: HashMap<String, String>,
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
        ("learning-rate", settings.learning_rate.to_string()),
        ("lr-scheduler", format!("{:?}", settings.schedule)),
        ("warmup-steps", settings.warmup_steps.to_string()),
        ("weight-decay", settings.weight_decay.to_string()),
        ("max-grad-norm", settings.max_grad_norm.to_string()),
        ("adam-beta1", settings.adam_beta1.to_string()),
        ("adam-beta2", settings.adam_beta2.to_string()),
        ("adam-epsilon", settings.adam_epsilon.to_string()),
        ("batch", format!("{:?}", settings.bound)),
        ("gradient-accumulation-steps", settings.accumulation.to_string()),
        ("seed", settings.seed.to_string()),
        ("train-sampling-strategy", settings.train_sampling_strategy.clone()),
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

/// Writes the model in Hugging Face layout, in 32-bit floats; the weights first.
pub fn write_model(model: &Decoder, companions: &Companions, dir: &Path) -> Result<()> {
    model.save(dir, SaveDtype::F32, MAX_SHARD)?;
    companions.write(dir, SaveDtype::F32)?;
    Ok(())
}

/// Writes `checkpoint-<step>` and deletes older ones beyond the limit. `resumable` adds optimizer and
/// position.
pub fn write(
    settings: &Settings,
    model: &Decoder,
    companions: &Companions,
    optimizer: &Optimizer,
    state: &State,
    resumable: bool,
) -> Result<PathBuf> {
    let root = &settings.output_dir;
    let target = root.join(format!("checkpoint-{}", state.step));
    let temporary = root.join(format!(".checkpoint-{}.tmp", state.step));
    let context = || format!("{}: cannot write the checkpoint", target.display());
    remove(&temporary).with_context(context)?;
    fs::create_dir_all(&temporary).with_context(context)?;
    write_model(model, companions, &temporary)?;
    if resumable {
        write_optimizer(&temporary.join(OPTIMIZER), model, optimizer)?;
        let text = serde_json::to_string_pretty(state).context("the state serialises")?;
        write_atomic(&temporary.join(STATE), |out| out.write_all(text.as_bytes()))?;
    }
    remove(&target).with_context(context)?;
    fs::rename(&temporary, &target).with_context(context)?;
    if let Some(limit) = settings.save_total_limit {
        let all = list(root)?;
        for (_, old) in all.iter().take(all.len().saturating_sub(limit)) {
            fs::remove_dir_all(old).with_context(|| format!("{}: cannot delete", old.display()))?;
        }
    }
    Ok(target)
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

/// The newest checkpoint that can be resumed from.
pub fn newest(root: &Path) -> Result<Option<PathBuf>> {
    Ok(list(root)?.into_iter().rev().map(|(_, path)| path).find(|path| path.join(STATE).is_file()))
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

/// Reads the optimizer's moments of a checkpoint.
pub fn read_optimizer(dir: &Path, model: &Decoder, device: &Device) -> Result<Optimizer> {
    let path = dir.join(OPTIMIZER);
    let bytes = fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("{}: broken", path.display()))?;
    let mut optimizer = Optimizer::new(model.weights().len());
    for (index, weight) in model.weights().iter().enumerate() {
        let read = |moment: &str| -> Result<Tensor<2>> {
            let name = format!("{moment}.{}", weight.name);
            let view = tensors.tensor(&name).with_context(|| format!("{}: no {name}", path.display()))?;
            let values: Vec<f32> =
                view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            let dims = weight.tensor.dims();
            if values.len() != dims[0] * dims[1] {
                bail!("{}: {name} has {} values, expected {dims:?}", path.display(), values.len());
            }
            Ok(Tensor::from_data(TensorData::new(values, dims), device))
        };
        optimizer.restore(index, Moments { first: read("first")?, second: read("second")? });
    }
    Ok(optimizer)
}

fn write_optimizer(path: &Path, model: &Decoder, optimizer: &Optimizer) -> Result<()> {
    let bytes = |tensor: &Tensor<2>| -> Vec<u8> {
        let values: Vec<f32> = tensor.to_data().try_into_vec_as().expect("moments are floats");
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    };
    let mut data = Vec::new();
    for (name, moments) in optimizer.state(model) {
        let shape = moments.first.dims().to_vec();
        data.push((format!("first.{name}"), shape.clone(), bytes(&moments.first)));
        data.push((format!("second.{name}"), shape, bytes(&moments.second)));
    }
    let views = data
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, path)
        .with_context(|| format!("{}: cannot write", path.display()))
}
