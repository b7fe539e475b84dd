//! `run.json`: what ran, on what, and what it cost.

use std::path::Path;

use anyhow::Result;
use pref_data::write_atomic;
use serde::Serialize;

use crate::checkpoint::BestSoFar;
use crate::memory::MemoryPlan;
use crate::preflight::DataReport;
use crate::settings::Settings;

/// Contents of `run.json`.
#[derive(Debug, Serialize)]
pub struct RunInfo<'a> {
    pub status: &'static str,
    pub version: &'static str,
    pub commit: &'static str,
    pub device: &'a str,
    /// Backends that the binary was built with.
    pub backends: Vec<&'static str>,
    pub threads: usize,
    pub dtype: &'static str,
    pub dtype_reason: &'static str,
    pub settings: &'a Settings,
    pub total_steps: usize,
    pub steps_done: usize,
    pub resumed_from_step: usize,
    pub best: Option<BestSoFar>,
    pub model_hash: &'a str,
    pub data_hash: &'a str,
    pub data: &'a DataReport,
    pub dropped_ids: &'a [String],
    pub template_date: Option<jiff::civil::Date>,
    pub memory_plan: MemoryPlan,
    pub trained_parameters: usize,
    pub reference_from_cache: bool,
    pub reference_seconds: f64,
    pub train_seconds: f64,
    pub computed_tokens: usize,
    /// Floating-point operations that the steps needed at least (products of the packed rows).
    pub useful_flops: u64,
    pub peak_memory_bytes: Option<u64>,
    /// Of a device with memory of its own: the most in use, and all of it.
    pub device_memory_bytes: Option<(u64, u64)>,
}

impl RunInfo<'_> {
    /// Writes `run.json` into the output directory, atomically.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        Ok(write_atomic(&dir.join("run.json"), |out| out.write_all(text.as_bytes()))?)
    }
}

/// Commit the binary was built from.
pub const COMMIT: &str = env!("BUILD_COMMIT");
