//! Reference log-probabilities of a run's rows.

use std::path::Path;

use anyhow::Result;
use burn::tensor::Device;
use decoder::Decoder;
use pref_data::{Batches, Bound, Dataset, Order};

use crate::data::Data;
use crate::logs::Progress;
use crate::plan::Plan;
use crate::reference;
use crate::settings::Settings;
use crate::step::RefLogps;

/// Reference log-probabilities of both splits.
pub struct References {
    /// Of the training rows.
    pub train: Vec<RefLogps>,
    /// Of the test rows.
    pub test: Vec<RefLogps>,
    /// Nothing had to be computed.
    pub cached: bool,
}

impl References {
    /// From the cache, or computed with the model in `dir`, or else with the initial one.
    pub fn get(
        settings: &Settings,
        dir: Option<&Path>,
        model: &Decoder,
        data: &Data,
        plan: &Plan,
        model_hash: &str,
        device: &Device,
        say: &dyn Fn(&str),
    ) -> Result<Self> {
        let loaded = dir.map(|dir| Decoder::load(dir, device)).transpose()?;
        let model = loaded.as_ref().unwrap_or(model);
        let mut cached = true;
        let mut one = |rows: &Dataset, batches: &Batches| -> Result<Vec<RefLogps>> {
            let path = reference::cache_path(settings.ref_cache_dir.as_deref(), model_hash, &rows.hash());
            if let Some(values) = reference::read(&path, rows.len()) {
                return Ok(values);
            }
            cached = false;
            let mut progress = Progress::new("reference", rows.len(), settings.progress_bar);
            let mut done = 0;
            let values = reference::compute(model, rows, batches, &path, |rows| {
                done += rows;
                progress.set(done);
            });
            progress.finish();
            if let Err(error) = reference::write(&path, &values) {
                say(&format!("WARNING: the reference log-probabilities could not be cached: {error:#}"));
            }
            Ok(values)
        };
        let train = one(&data.train, &plan.epoch(0))?;
        let test = match &data.test {
            Some(test) => {
                let bound = Bound::Rows(settings.eval_batch);
                one(test, &Batches::new(&|_| 0, test.len(), Order::Sequential, bound, 0, 0))?
            }
            None => Vec::new(),
        };
        Ok(Self { train, test, cached })
    }
}
