//! The model that is trained, and the one it is compared with.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use burn::tensor::Device;
use decoder::{Companions, Decoder, Lora};

use crate::checkpoint;
use crate::peft_args::PeftSettings;
use crate::settings::Settings;

/// The reference model, and a hash that stands for it.
pub struct Reference {
    pub model: Decoder,
    pub hash: String,
}

impl Reference {
    /// The model in `dir`, or else the initial one, with the adapter of `--ref-adapter-path` where given.
    pub fn load(
        settings: &Settings,
        dir: Option<&Path>,
        model_dir: &Path,
        base: &Decoder,
        device: &Device,
    ) -> Result<Self> {
        let mut hash = decoder::model_hash(dir.unwrap_or(model_dir))?;
        // Only values of the same arithmetic agree with the policy to the bit.
        let (backend, precision) = (settings.backend.name(), settings.precision.key());
        hash = format!("{hash} {backend} {precision} {}", fused_ops::ARITHMETIC);
        let mut model = match dir {
            Some(dir) => Decoder::load(dir, device)?.computing_in(base.compute()),
            None => base.clone(),
        };
        if let Some(path) = settings.peft.as_ref().and_then(|peft| peft.ref_adapter_path.as_deref()) {
            let lora = Lora::load(path, &model)?;
            model = model.with_lora(Some(lora));
            hash.push_str(&decoder::model_hash(path)?);
        }
        Ok(Self { model, hash })
    }
}

/// The policy at the start of the run: all weights of `base`, or `base` with an adapter.
pub fn policy(settings: &Settings, base: Decoder, resume: Option<&Path>) -> Result<Decoder> {
    let Some(peft) = &settings.peft else {
        return match resume {
            Some(dir) => restored(base, dir),
            None => Ok(base),
        };
    };
    let mut lora = match (resume, &peft.adapter_path) {
        (Some(dir), _) => Lora::load(dir, &base)?,
        (None, Some(dir)) => loaded(peft, dir, &base)?,
        (None, None) => Lora::new(&base, peft.new_adapter(), &peft.targets(), settings.seed)
            .map_err(|reason| anyhow!("--lora-target-modules: {reason}"))?,
    };
    lora.set_dropout(peft.lora_dropout);
    Ok(base.with_lora(Some(lora)))
}

fn loaded(peft: &PeftSettings, dir: &Path, base: &Decoder) -> Result<Lora> {
    let lora = Lora::load(dir, base).with_context(|| format!("--adapter-path {}", dir.display()))?;
    peft.check_loaded(&lora).map_err(|reason| anyhow!(reason))?;
    Ok(lora)
}

/// A model with the weights of a checkpoint: its adapter's, or all of them.
pub fn restored(model: Decoder, dir: &Path) -> Result<Decoder> {
    if model.lora().is_none() {
        return Ok(Decoder::load(dir, &model.device())?.computing_in(model.compute()));
    }
    let lora = Lora::load(dir, &model)?;
    Ok(model.with_lora(Some(lora)))
}

/// Everything that the output directory is to hold of the model.
pub fn write_final(settings: &Settings, model: &Decoder, companions: &Companions) -> Result<()> {
    let dir = &settings.output_dir;
    if !settings.peft.as_ref().is_some_and(|peft| peft.merge) {
        return checkpoint::write_model(settings, model, companions, dir);
    }
    let adapter = dir.join("adapter");
    std::fs::create_dir_all(&adapter).with_context(|| format!("{}: cannot create", adapter.display()))?;
    checkpoint::write_model(settings, model, companions, &adapter)?;
    checkpoint::write_model(settings, &model.clone().merged(), companions, dir)
}

/// Errors where a model directory is only an adapter.
pub fn check_not_adapter(dir: &Path) -> Result<()> {
    if dir.join("adapter_config.json").exists() && !dir.join("config.json").exists() {
        bail!(
            "{}: holds an adapter, not a model; give its base model as --model-name-or-path and this as \
             --adapter-path",
            dir.display()
        );
    }
    Ok(())
}
