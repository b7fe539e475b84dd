//! Which rows each optimizer step sees: a function of the settings and the rows' lengths.

use pref_data::{Batches, Bound, Dataset};

use crate::packing::divide;
use crate::settings::{Every, Settings};

/// Steps of the run and the rows of each.
pub struct Plan<'a> {
    rows: &'a Dataset,
    settings: &'a Settings,
    /// Micro-batches and optimizer steps of an epoch.
    micros_per_epoch: usize,
    steps_per_epoch: usize,
    /// Optimizer steps of the run.
    pub total: usize,
}

impl<'a> Plan<'a> {
    pub fn new(settings: &'a Settings, rows: &'a Dataset) -> Self {
        let mut plan = Self { rows, settings, micros_per_epoch: 0, steps_per_epoch: 0, total: 0 };
        plan.micros_per_epoch = match settings.bound {
            Bound::Rows(size) => rows.len().div_ceil(size),
            Bound::Tokens(_) => plan.epoch(0).len(),
        };
        plan.steps_per_epoch = plan.micros_per_epoch.div_ceil(settings.accumulation);
        let by_epochs = (settings.num_train_epochs * plan.steps_per_epoch as f64).ceil() as usize;
        plan.total = settings.max_steps.unwrap_or(by_epochs).max(1);
        plan
    }

    pub fn epoch(&self, epoch: usize) -> Batches {
        let Settings { order, bound, seed, .. } = *self.settings;
        let length = |row: usize| self.rows.lengths(row).packed();
        Batches::new(&length, self.rows.len(), order, bound, seed, epoch)
    }

    /// Micro-batches of step `step` (from 0): the last step of an epoch may have fewer. `current` keeps
    /// the order of the epoch that the step is in.
    pub fn micros(&self, step: usize, current: &mut Option<(usize, Batches)>) -> Vec<Vec<u32>> {
        let accumulation = self.settings.accumulation;
        let (epoch, first) = (step / self.steps_per_epoch, step % self.steps_per_epoch * accumulation);
        if current.as_ref().is_none_or(|(held, _)| *held != epoch) {
            *current = Some((epoch, self.epoch(epoch)));
        }
        let batches = current.iter().flat_map(|(_, batches)| batches.iter());
        batches.skip(first).take(accumulation).map(<[u32]>::to_vec).collect()
    }

    /// Weights of the micro-batches of a step in its loss. As in TRL all weigh the same; under a token budget
    /// they differ in rows, and every row weighs the same.
    pub fn scales(&self, micros: &[Vec<u32>]) -> Vec<f64> {
        let rows: usize = micros.iter().map(Vec::len).sum();
        let scale = |micro: &Vec<u32>| match self.settings.bound {
            Bound::Rows(_) => 1.0 / micros.len() as f64,
            Bound::Tokens(_) => micro.len() as f64 / rows as f64,
        };
        micros.iter().map(scale).collect()
    }

    /// Epochs done after `steps` steps, as transformers counts them.
    pub fn epochs_done(&self, steps: usize) -> f64 {
        let (whole, rest) = (steps / self.steps_per_epoch, steps % self.steps_per_epoch);
        whole as f64 + (rest * self.settings.accumulation) as f64 / self.micros_per_epoch as f64
    }

    pub fn ends_epoch(&self, steps: usize) -> bool {
        steps.is_multiple_of(self.steps_per_epoch)
    }

    pub fn is_due(&self, every: Every, steps: usize) -> bool {
        match every {
            Every::Never => false,
            Every::Steps(n) => steps.is_multiple_of(n),
            Every::Epoch => self.ends_epoch(steps),
        }
    }

    /// Packed tokens that are computed together, of all parts of the micro-batches of the first epoch.
    pub fn part_tokens(&self) -> Vec<usize> {
        let bound = self.settings.scoring().part;
        let of_batch = |batch: &[u32]| {
            let tokens: Vec<usize> =
                batch.iter().map(|&row| self.rows.lengths(row as usize).packed()).collect();
            divide(tokens.iter().copied(), bound)
                .into_iter()
                .map(|part| tokens[part].iter().sum())
                .collect::<Vec<_>>()
        };
        self.epoch(0).iter().flat_map(of_batch).collect()
    }
}
