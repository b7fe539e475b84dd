//! Data sets as token rows.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail};
use hub::{DataRequest, Hub};
use pref_data::{Dataset, Keep, TokenSet, Tokenizer, default_cache_dir, hold_out, mix};
use serde::Serialize;

/// Which rows to train and to evaluate on; the fields stand for the flags of `DataArgs`.
#[allow(missing_docs)]
#[derive(Debug, Clone, Serialize)]
pub struct DataSettings {
    /// Names with their weights.
    pub datasets: Vec<(String, Option<f64>)>,
    pub config: Option<String>,
    pub revision: Option<String>,
    pub train_split: String,
    /// `test`, or else `validation`, where not given.
    pub test_split: Option<String>,
    pub columns: BTreeMap<String, String>,
    pub skip_invalid_rows: bool,
    pub max_train_samples: Option<usize>,
    pub shuffle_seed: Option<u64>,
    /// Rows of the training split that are set aside for evaluation.
    pub test_split_size: Option<f64>,
    pub token_cache_dir: Option<PathBuf>,
    pub max_length: usize,
    pub truncation_mode: &'static str,
    #[serde(skip)]
    pub keep: Keep,
    pub seed: u64,
    /// The loss takes single completions: pairs are taken apart.
    pub unpaired: bool,
}

/// Training rows, and test rows where evaluation needs them.
#[allow(missing_docs)]
pub struct Data {
    pub train: Dataset,
    pub test: Option<Dataset>,
}

impl DataSettings {
    /// Finds, tokenizes and chooses the rows.
    pub fn load(&self, tokenizer: &Tokenizer, need_test: bool, say: &(dyn Fn(&str) + Sync)) -> Result<Data> {
        let hub = Hub::from_env();
        let cache = self.token_cache_dir.clone().unwrap_or_else(|| default_cache_dir("tokens"));
        let (mut train, mut test) = (Vec::new(), Vec::new());
        let need_test_split = need_test && self.test_split_size.is_none();
        for (name, _) in &self.datasets {
            let request = self.request(name);
            let test_names =
                self.test_split.as_deref().map_or_else(|| vec!["test", "validation"], |name| vec![name]);
            let mut wanted = vec![self.train_split.as_str()];
            if need_test_split {
                wanted.extend(test_names);
            }
            let splits = request.find(&hub, &wanted, say)?;
            let rows = |split: &str| -> Result<Arc<TokenSet>> {
                let tokens = request.tokens(&splits, split, tokenizer, &cache, say)?;
                if tokens.set.is_unpaired() && !self.unpaired {
                    bail!(
                        "{name}: holds completions with labels; this loss needs pairs (chosen and rejected); kto and \
                         apo_zero_unpaired take such rows"
                    );
                }
                Ok(Arc::new(tokens.set))
            };
            train.push(rows(&self.train_split)?);
            let test_split = self.test_split.as_deref().or_else(|| splits.held_out());
            match test_split.filter(|_| need_test_split) {
                Some(split) => test.push(rows(split)?),
                None if need_test_split => bail!(
                    "{name}: --eval-strategy needs test rows, and there is no test split; add one, set rows aside with \
                     --test-split-size, or leave the flag out"
                ),
                None => {}
            }
        }
        let chosen = self.choose(&train);
        let (chosen, aside) = match self.test_split_size.filter(|_| need_test) {
            Some(size) => hold_out(chosen, size, self.seed),
            None => (chosen, Vec::new()),
        };
        let test = match (need_test, self.test_split_size) {
            (false, _) => None,
            (true, Some(_)) => Some(self.rows(train.clone(), aside)),
            (true, None) => {
                let all = (0..test.iter().map(|set| set.len() as u32).sum()).collect();
                Some(self.rows(test, all))
            }
        };
        let data = Data { train: self.rows(train, chosen), test };
        for (what, rows) in [("training", Some(&data.train)), ("test", data.test.as_ref())] {
            if let Some(rows) = rows.filter(|rows| rows.is_empty()) {
                if rows.dropped == 0 {
                    bail!(
                        "there are no {what} rows: look at --test-split-size, --max-train-samples and weights"
                    );
                }
                bail!(
                    "there are no {what} rows left: {} were dropped because their prompts alone reach --max-length {}; raise it",
                    rows.dropped,
                    self.max_length
                );
            }
        }
        Ok(data)
    }

    fn rows(&self, sets: Vec<Arc<TokenSet>>, rows: Vec<u32>) -> Dataset {
        Dataset::new(sets, rows, Some(self.max_length), self.keep)
    }

    fn request(&self, name: &str) -> DataRequest {
        DataRequest {
            name: name.into(),
            revision: self.revision.clone(),
            config: self.config.clone(),
            columns: self.columns.clone(),
            unpaired: self.unpaired,
            skip_invalid: self.skip_invalid_rows,
        }
    }

    /// Rows of all sets in their proportions.
    fn choose(&self, sets: &[Arc<TokenSet>]) -> Vec<u32> {
        let sizes: Vec<usize> = sets.iter().map(|set| set.len()).collect();
        let weights: Option<Vec<f64>> = self.datasets.iter().map(|(_, weight)| *weight).collect();
        mix(&sizes, weights.as_deref(), self.max_train_samples, self.shuffle_seed)
    }
}
