//! Which rows each optimizer step sees: a function of the settings and the number of rows.

use pref_data::PreparedRow;

use crate::data::micro_batches;
use crate::settings::{Every, Settings};
use crate::step::Micro;

/// Steps of the run and the rows of each.
pub struct Plan {
    rows: usize,
    batch: usize,
    accumulation: usize,
    shuffle: bool,
    seed: u64,
    /// Micro-batches and optimizer steps of an epoch.
    micros_per_epoch: usize,
    steps_per_epoch: usize,
    /// Optimizer steps of the run.
    pub total: usize,
}

impl Plan {
    pub fn new(settings: &Settings, rows: usize) -> Self {
        let micros_per_epoch = rows.div_ceil(settings.train_batch);
        let steps_per_epoch = micros_per_epoch.div_ceil(settings.accumulation);
        let by_epochs = (settings.num_train_epochs * steps_per_epoch as f64).ceil() as usize;
        Self {
            rows,
            batch: settings.train_batch,
            accumulation: settings.accumulation,
            shuffle: settings.shuffle,
            seed: settings.seed,
            micros_per_epoch,
            steps_per_epoch,
            total: settings.max_steps.unwrap_or(by_epochs).max(1),
        }
    }

    pub fn epoch(&self, epoch: usize) -> Vec<Vec<usize>> {
        micro_batches(self.rows, self.batch, self.shuffle, self.seed, epoch)
    }

    /// Micro-batches of step `step` (from 0): the last step of an epoch may have fewer. `current` keeps
    /// the order of the epoch that the step is in.
    pub fn micros(&self, step: usize, current: &mut Option<(usize, Vec<Vec<usize>>)>) -> Vec<Vec<usize>> {
        let (epoch, first) = (step / self.steps_per_epoch, step % self.steps_per_epoch * self.accumulation);
        if current.as_ref().is_none_or(|(held, _)| *held != epoch) {
            *current = Some((epoch, self.epoch(epoch)));
        }
        let batches = current.as_ref().map_or(&[][..], |(_, batches)| batches);
        batches.iter().skip(first).take(self.accumulation).cloned().collect()
    }

    /// Epochs done after `steps` steps, as transformers counts them.
    pub fn epochs_done(&self, steps: usize) -> f64 {
        let (whole, rest) = (steps / self.steps_per_epoch, steps % self.steps_per_epoch);
        whole as f64 + (rest * self.accumulation) as f64 / self.micros_per_epoch as f64
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

    /// Packed tokens of the largest micro-batch of the first epoch.
    pub fn most_tokens(&self, rows: &[PreparedRow]) -> usize {
        let tokens = |batch: &Vec<usize>| Micro::new(batch.iter().map(|&i| &rows[i])).computed_tokens();
        self.epoch(0).iter().map(tokens).max().unwrap_or(0)
    }
}
