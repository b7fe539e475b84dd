//! Flags that say which rows to use.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hub::{columns, name_and_weight};
use pref_data::Keep;

use crate::args::boolean;
use crate::data::DataSettings;

/// Flags of the data.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// Preference pairs: a file (.jsonl, .json, .csv, .parquet, also .gz and .zst), a pattern, a directory, or a
    /// Hub id. Several are used together; `=WEIGHT` after each gives their proportions.
    #[arg(long, value_name = "D[=WEIGHT]", num_args = 1.., required = true, action = clap::ArgAction::Append)]
    pub dataset_name: Vec<String>,
    /// Configuration of the data set's card.
    #[arg(long, value_name = "NAME")]
    pub dataset_config: Option<String>,
    /// Revision of the data set on the Hub.
    #[arg(long, value_name = "REV")]
    pub dataset_revision: Option<String>,
    /// Split to train on.
    #[arg(long, value_name = "NAME", default_value = "train")]
    pub dataset_train_split: String,
    /// Split to evaluate on [default: test, or else validation].
    #[arg(long, value_name = "NAME")]
    pub dataset_test_split: Option<String>,
    /// Columns with other names than their roles, such as chosen=better; an empty name takes a column out of use.
    #[arg(long, value_name = "ROLE=COLUMN", num_args = 1.., action = clap::ArgAction::Append)]
    pub columns: Vec<String>,
    /// Leave out rows that cannot be used (nulls, malformed messages) and count them, instead of stopping.
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub skip_invalid_rows: bool,
    /// Train on at most so many rows, of several data sets in their proportions.
    #[arg(long, value_name = "N")]
    pub max_train_samples: Option<usize>,
    /// Take random rows for weights and --max-train-samples; without it the first ones are taken, as in TRL.
    #[arg(long, value_name = "SEED")]
    pub dataset_shuffle_seed: Option<u64>,
    /// Set training rows aside for evaluation: a share below 1, or a count. Which ones, --seed decides.
    #[arg(long, value_name = "SIZE")]
    pub test_split_size: Option<f64>,
    /// Where tokenized data is cached.
    #[arg(long, value_name = "DIR")]
    pub token_cache_dir: Option<PathBuf>,
    /// Chat template instead of the model's: `simple`, `chatml`, or a file.
    #[arg(long, value_name = "simple|chatml|FILE")]
    pub chat_template: Option<String>,
    /// The day that chat templates are told (some write it into the prompt) [default: today].
    #[arg(long, value_name = "YYYY-MM-DD")]
    pub template_date: Option<jiff::civil::Date>,
    /// Longest sequence in tokens; longer ones are cut, and rows whose prompt alone reaches it dropped.
    #[arg(long, default_value_t = 1024)]
    pub max_length: usize,
    /// Which end is kept of a sequence that is too long.
    #[arg(long, value_enum, default_value = "keep_start")]
    pub truncation_mode: Truncation,
}

/// Truncation of long sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Truncation {
    /// Keep the start.
    KeepStart,
    /// Keep the end; no row is dropped.
    KeepEnd,
}

impl DataArgs {
    /// Checks the flags; `evaluates` says that test rows are needed, `unpaired` that pairs are to
    /// be taken apart.
    pub fn settings(self, seed: u64, evaluates: bool, unpaired: bool) -> Result<DataSettings, String> {
        let datasets: Vec<(String, Option<f64>)> =
            self.dataset_name.iter().map(|given| name_and_weight(given)).collect::<Result<_, _>>()?;
        let weighted = datasets.iter().filter(|(_, weight)| weight.is_some()).count();
        let unseen = || (weighted == 0 || datasets.len() == 1) && self.max_train_samples.is_none();
        let end = self.truncation_mode == Truncation::KeepEnd;
        let rules = [
            (
                end && unpaired,
                "--truncation-mode keep_end does not go with kto and apo_zero_unpaired, whose trainer has no such choice",
            ),
            (
                weighted > 0 && weighted < datasets.len(),
                "--dataset-name: give all data sets a weight, or none",
            ),
            (
                weighted > 0 && datasets.len() == 1,
                "--dataset-name: a weight has no effect on a single data set",
            ),
            (
                weighted > 0 && !(datasets.iter().filter_map(|(_, weight)| *weight).sum::<f64>().is_normal()),
                "--dataset-name: the weights must have a sum above 0",
            ),
            (
                self.dataset_shuffle_seed.is_some() && unseen(),
                "--dataset-shuffle-seed has no effect without weights or --max-train-samples",
            ),
            (
                self.test_split_size.is_some() && !evaluates,
                "--test-split-size has no effect without --eval-strategy; --max-train-samples trains on fewer rows",
            ),
            (
                self.test_split_size.is_some() && self.dataset_test_split.is_some(),
                "--test-split-size and --dataset-test-split contradict each other",
            ),
            (
                self.dataset_test_split.is_some() && !evaluates,
                "--dataset-test-split has no effect without --eval-strategy",
            ),
            (
                self.test_split_size.is_some_and(|size| !(size > 0.0 && (size < 1.0 || size.fract() == 0.0))),
                "--test-split-size must be a share between 0 and 1, or a count",
            ),
            (self.max_train_samples == Some(0), "--max-train-samples must be at least 1"),
            (self.max_length == 0, "--max-length must be at least 1"),
        ];
        if let Some((_, reason)) = rules.into_iter().find(|(broken, _)| *broken) {
            return Err(reason.into());
        }
        Ok(DataSettings {
            columns: columns(&self.columns).map_err(|reason| format!("--columns {reason}"))?,
            datasets,
            config: self.dataset_config,
            revision: self.dataset_revision,
            train_split: self.dataset_train_split,
            test_split: self.dataset_test_split,
            skip_invalid_rows: self.skip_invalid_rows,
            max_train_samples: self.max_train_samples,
            shuffle_seed: self.dataset_shuffle_seed,
            test_split_size: self.test_split_size,
            token_cache_dir: self.token_cache_dir,
            max_length: self.max_length,
            truncation_mode: if end { "keep_end" } else { "keep_start" },
            keep: if end { Keep::End } else { Keep::Start },
            seed,
            unpaired,
        })
    }
}
