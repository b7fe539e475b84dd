//! Models by name: a whole one, or an adapter on its base.

use std::path::PathBuf;

use anyhow::{Context, Result};
use burn::tensor::Device;
use decoder::{Decoder, Lora, adapter_base};
use hub::{Hub, announce};

/// A model to evaluate.
pub struct Model {
    /// Directory of the tokenizer, and name for people.
    pub dir: PathBuf,
    /// Where an adapter's base model is.
    base: Option<PathBuf>,
}

impl Model {
    /// Finds a directory or Hub id; an adapter's base model too.
    pub fn find(hub: &Hub, name: &str, tell: &(dyn Fn(&str) + Sync)) -> Result<Self> {
        let find = |name: &str| hub.model(name, None, &announce(&tell));
        let dir = find(name)?;
        let base = match adapter_base(&dir)? {
            Some(base) => {
                let found = find(&base);
                Some(found.with_context(|| format!("{}: the adapter's base model {base:?}", dir.display()))?)
            }
            None => None,
        };
        Ok(Self { dir, base })
    }

    /// Directory of the tokenizer: an adapter's own where it has one.
    pub fn tokenizer_dir(&self) -> &PathBuf {
        let own = ["tokenizer.json", "vocab.json"].iter().any(|name| self.dir.join(name).exists());
        self.base.as_ref().filter(|_| !own).unwrap_or(&self.dir)
    }

    /// Directory of the configuration.
    pub fn config_dir(&self) -> &PathBuf {
        self.base.as_ref().unwrap_or(&self.dir)
    }

    /// Hash of configuration and weights.
    pub fn hash(&self) -> Result<String> {
        let base = self.base.as_deref().map(decoder::model_hash).transpose()?.unwrap_or_default();
        Ok(decoder::model_hash(&self.dir)? + &base)
    }

    /// Loads it; an adapter is added into the weights.
    pub fn load(&self) -> Result<Decoder> {
        let device = Device::flex();
        let Some(base) = &self.base else { return Ok(Decoder::load(&self.dir, &device)?) };
        let base = Decoder::load(base, &device)?;
        let lora = Lora::load(&self.dir, &base)?;
        Ok(base.with_lora(Some(lora)).merged())
    }
}
