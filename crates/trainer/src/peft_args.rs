//! Flags of low-rank adapters, with the names of TRL's `ModelConfig`.

use std::path::PathBuf;

use clap::Args;
use decoder::{Lora, LoraSettings, Targets};
use serde::Serialize;

use crate::args::boolean;

/// Flags of the adapter.
#[derive(Debug, Args)]
pub struct PeftArgs {
    /// Train a low-rank adapter (LoRA) instead of all weights; the reference is the model without it.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub use_peft: bool,
    /// Start from this adapter in PEFT's layout instead of a new one.
    #[arg(long, value_name = "DIR")]
    pub adapter_path: Option<PathBuf>,
    /// The reference is the model with this adapter; without it the model alone.
    #[arg(long, value_name = "DIR")]
    pub ref_adapter_path: Option<PathBuf>,
    /// Rank of the adapter [default: 16].
    #[arg(long, value_name = "R")]
    pub lora_r: Option<usize>,
    /// The adapter's update is multiplied by alpha / rank [default: 32].
    #[arg(long, value_name = "ALPHA")]
    pub lora_alpha: Option<f64>,
    /// Share of the adapter's inputs dropped; needs --disable-dropout False, without which TRL drops nothing
    /// either [default: 0].
    #[arg(long, value_name = "P")]
    pub lora_dropout: Option<f64>,
    /// Projections to adapt, by the ends of their names, or all-linear [default: queries and values].
    #[arg(long, value_name = "NAME", num_args = 1.., action = clap::ArgAction::Set)]
    pub lora_target_modules: Vec<String>,
    /// Multiply by alpha / sqrt(rank) instead.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_missing_value = "true")]
    pub use_rslora: Option<bool>,
    /// Decompose the adapted weights into magnitude and direction (DoRA).
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_missing_value = "true")]
    pub use_dora: Option<bool>,
    /// Write the model with the adapter added into its weights; the adapter goes into `adapter/`.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub merge: bool,
    /// Drop nothing in training, as TRL does unless told otherwise.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "true", default_missing_value = "true")]
    pub disable_dropout: bool,
}

/// The adapter of a run; fields stand for the flags of [`PeftArgs`], `None` where not given.
#[allow(missing_docs)]
#[derive(Debug, Clone, Serialize)]
pub struct PeftSettings {
    pub adapter_path: Option<PathBuf>,
    pub ref_adapter_path: Option<PathBuf>,
    pub lora_r: Option<usize>,
    pub lora_alpha: Option<f64>,
    pub lora_dropout: f64,
    pub lora_target_modules: Vec<String>,
    pub use_rslora: Option<bool>,
    pub use_dora: Option<bool>,
    pub merge: bool,
}

impl PeftArgs {
    /// Checks the flags against each other; `None` where all weights are trained.
    pub fn settings(self) -> Result<Option<PeftSettings>, String> {
        let wanted = self.use_peft || self.adapter_path.is_some();
        let given = [
            ("--lora-r", self.lora_r.is_some()),
            ("--lora-alpha", self.lora_alpha.is_some()),
            ("--lora-dropout", self.lora_dropout.is_some()),
            ("--lora-target-modules", !self.lora_target_modules.is_empty()),
            ("--use-rslora", self.use_rslora.is_some()),
            ("--use-dora", self.use_dora.is_some()),
            ("--merge", self.merge),
            ("--ref-adapter-path", self.ref_adapter_path.is_some()),
        ];
        if let Some((flag, _)) = given.iter().find(|(_, given)| *given && !wanted) {
            return Err(format!("{flag} has no effect without --use-peft or --adapter-path"));
        }
        let dropout = self.lora_dropout.unwrap_or(0.0);
        let rules = [
            (
                self.lora_r.is_some_and(|r| !(1..=1 << 16).contains(&r)),
                "--lora-r must be between 1 and 65536",
            ),
            (
                self.lora_alpha.is_some_and(|alpha| !(alpha.is_finite() && alpha > 0.0)),
                "--lora-alpha must be above 0",
            ),
            (!(0.0..1.0).contains(&dropout), "--lora-dropout must be in [0, 1)"),
            (
                dropout > 0.0 && self.disable_dropout,
                "--lora-dropout has no effect: --disable-dropout is True unless told otherwise, and in TRL it reaches \
                 adapters too. Give --disable-dropout False to drop, or leave --lora-dropout out",
            ),
            (
                !self.disable_dropout && dropout == 0.0,
                "--disable-dropout False has no effect without --lora-dropout: only adapters drop inputs here",
            ),
        ];
        if let Some((_, reason)) = rules.into_iter().find(|(broken, _)| *broken) {
            return Err(reason.into());
        }
        Ok(wanted.then_some(PeftSettings {
            adapter_path: self.adapter_path,
            ref_adapter_path: self.ref_adapter_path,
            lora_r: self.lora_r,
            lora_alpha: self.lora_alpha,
            lora_dropout: dropout,
            lora_target_modules: self.lora_target_modules,
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            merge: self.merge,
        }))
    }
}

impl PeftSettings {
    /// Settings of a new adapter.
    pub fn new_adapter(&self) -> LoraSettings {
        LoraSettings {
            rank: self.lora_r.unwrap_or(16),
            alpha: self.lora_alpha.unwrap_or(32.0),
            rank_stabilized: self.use_rslora.unwrap_or(false),
            dora: self.use_dora.unwrap_or(false),
            dropout: self.lora_dropout,
        }
    }

    /// Which projections a new adapter is for.
    pub fn targets(&self) -> Targets {
        match self.lora_target_modules.as_slice() {
            [] => Targets::Default,
            [only] if only == "all-linear" => Targets::AllLinear,
            names => Targets::Named(names.to_vec()),
        }
    }

    /// Errors where a flag asks for something else than the adapter of `--adapter-path` is.
    pub fn check_loaded(&self, lora: &Lora) -> Result<(), String> {
        let adapter = lora.settings();
        let all = self.lora_target_modules.iter().any(|name| name == "all-linear");
        let stray = lora.modules().find(|module| {
            let fits = |name: &String| {
                module.strip_suffix(name.as_str()).is_some_and(|r| r.is_empty() || r.ends_with('.'))
            };
            !all && !self.lora_target_modules.is_empty() && !self.lora_target_modules.iter().any(fits)
        });
        let rules = [
            (self.lora_r.is_some_and(|r| r != adapter.rank), "--lora-r", adapter.rank.to_string()),
            (self.lora_alpha.is_some_and(|a| a != adapter.alpha), "--lora-alpha", adapter.alpha.to_string()),
            (
                self.use_rslora.is_some_and(|s| s != adapter.rank_stabilized),
                "--use-rslora",
                adapter.rank_stabilized.to_string(),
            ),
            (self.use_dora.is_some_and(|d| d != adapter.dora), "--use-dora", adapter.dora.to_string()),
            (stray.is_some(), "--lora-target-modules", stray.unwrap_or_default().to_string()),
        ];
        match rules.into_iter().find(|(broken, _, _)| *broken) {
            Some((_, flag, has)) => Err(format!(
                "{flag} contradicts the adapter of --adapter-path, which has {has}; leave the flag out"
            )),
            None => Ok(()),
        }
    }
}
