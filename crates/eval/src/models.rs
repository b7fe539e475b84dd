//! Models by name: a whole one, or an adapter on its base.

use std::path::PathBuf;

use anyhow::{Context, Result};
use backend::Opened;
use burn::tensor::DType;
use decoder::{Config, Decoder, Lora, adapter_base};
use hub::{Hub, announce};

use crate::args::DeviceArgs;

/// A device, checked, and the data type that models compute in there.
pub struct Target {
    opened: Opened,
    dtype: DType,
    /// Data type that matrices are held in from the beginning.
    held: DType,
}

impl Target {
    /// Opens what was asked for.
    pub fn open(args: &DeviceArgs, tell: &dyn Fn(&str)) -> Result<Self> {
        let backend = args.backend();
        if args.is_narrow() {
            backend.check_bfloat16("--dtype bfloat16")?;
        }
        let dtype = if args.is_narrow() { DType::BF16 } else { DType::F32 };
        let opened = backend.open(args.device)?;
        backend::self_check(&opened)?;
        if args.is_given() {
            tell(&format!(
                "device: {}, {}",
                opened.name,
                if args.is_narrow() { "bfloat16" } else { "float32" }
            ));
        }
        Ok(Self { opened, dtype, held: DType::F32 })
    }

    /// The same for a model that only generates.
    pub fn to_generate(args: &DeviceArgs, tell: &dyn Fn(&str)) -> Result<Self> {
        let Self { opened, dtype, held } = Self::open(args, tell)?;
        let activations = opened.backend.generates_in(dtype);
        // Where these are wider, the weights are held in 16 bits from the beginning.
        let held = if activations == dtype { held } else { dtype };
        Ok(Self { opened, dtype: activations, held })
    }
}

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

    /// Loads it onto a device; an adapter is added into the weights.
    pub fn load(&self, to: &Target) -> Result<Decoder> {
        let dir = self.config_dir();
        for weight in Config::from_file(&dir.join("config.json"))?.weights() {
            to.opened.check_tensor(&weight.name, 4 * weight.shape.iter().product::<usize>() as u64)?;
        }
        // An adapter is added in 32 bits.
        let held = if self.base.is_some() { DType::F32 } else { to.held };
        let mut model = Decoder::load_as(dir, &to.opened.device, held)?.computing_in(to.dtype);
        if self.base.is_some() {
            let lora = Lora::load(&self.dir, &model)?;
            model = model.with_lora(Some(lora)).merged();
        }
        Ok(model.held_as_computed())
    }
}
