//! Reference log-probabilities of a run's rows: computed beforehand, or by a model that is kept.

use std::path::Path;

use anyhow::{Result, bail};
use decoder::{Decoder, SaveDtype};
use pref_data::{Batches, Bound, Dataset, Order};

use crate::data::Data;
use crate::logs::Progress;
use crate::plan::Plan;
use crate::reference;
use crate::settings::Settings;
use crate::step::{Micro, RefLogps, RefTensors, to_device};

/// Where reference log-probabilities come from.
pub enum References {
    /// Computed before training, for the training and for the test rows.
    Known {
        /// Of the training rows.
        train: Vec<RefLogps>,
        /// Of the test rows.
        test: Vec<RefLogps>,
        /// Nothing had to be computed.
        cached: bool,
    },
    /// A model runs beside the policy.
    Live(Box<Decoder>),
}

/// Which rows are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Training rows.
    Train,
    /// Test rows.
    Test,
}

impl References {
    /// From the cache, or computed with the reference model; `hash` stands for that model.
    pub fn known(
        settings: &Settings,
        model: &Decoder,
        data: &Data,
        plan: &Plan,
        hash: &str,
        say: &dyn Fn(&str),
    ) -> Result<Self> {
        let scoring = settings.scoring();
        let mut cached = true;
        let mut one = |rows: &Dataset, batches: &Batches| -> Result<Vec<RefLogps>> {
            let key = format!("{}{}", rows.hash(), scoring.key());
            let path = reference::cache_path(settings.ref_cache_dir.as_deref(), hash, &key);
            if let Some(values) = reference::read(&path, rows.len()) {
                return Ok(values);
            }
            cached = false;
            let mut progress = Progress::new("reference", rows.len(), settings.progress_bar);
            let mut done = 0;
            let values = reference::compute(model, rows, batches, scoring, &path, |rows| {
                done += rows;
                progress.set(done);
            });
            progress.finish();
            let bad = (0..rows.len()).find(|&row| values[row].iter().any(|logp| !logp.is_finite()));
            if let Some(row) = bad {
                bail!(
                    "the reference model gives the row with id {} a log-probability of {:?}: its weights or its \
                     configuration are broken",
                    rows.id(row),
                    values[row]
                );
            }
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
        Ok(Self::Known { train, test, cached })
    }

    /// Values for the rows of a micro-batch, on the device of the policy.
    pub fn of(&self, split: Split, rows: &[u32], micro: &Micro, policy: &Decoder) -> RefTensors {
        match self {
            Self::Known { train, test, .. } => {
                let all = if split == Split::Train { train } else { test };
                let values: Vec<RefLogps> = rows.iter().map(|&row| all[row as usize]).collect();
                to_device(&values, policy)
            }
            Self::Live(model) => micro.logps(model),
        }
    }

    /// Moves a live reference towards the policy: `alpha · policy + (1 - alpha) · reference`
    /// (`SyncRefModelCallback`).
    pub fn sync(&mut self, policy: &Decoder, alpha: f64) {
        if let Self::Live(reference) = self {
            for (own, new) in reference.weights_mut().iter_mut().zip(policy.weights()) {
                own.tensor = own.tensor.clone() * (1.0 - alpha) + new.tensor.clone().inner() * alpha;
            }
        }
    }

    /// Writes a live reference into a directory that it makes.
    pub fn save(&self, dir: &Path) -> Result<()> {
        if let Self::Live(model) = self {
            std::fs::create_dir_all(dir)?;
            model.save(dir, SaveDtype::F32, usize::MAX)?;
        }
        Ok(())
    }

    /// Nothing had to be computed.
    pub fn is_cached(&self) -> bool {
        matches!(self, Self::Known { cached: true, .. })
    }
}
