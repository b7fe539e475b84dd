//! Data sets as token rows, and the order in which training visits them.

use anyhow::{Context, Result, bail};
use pref_data::{Prepared, Tokenizer, prepare, read_records, split_files};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::settings::Settings;

/// Training rows, and test rows where the data set has them.
pub struct Data {
    pub train: Prepared,
    pub test: Option<Prepared>,
}

/// Reads and tokenizes what the settings ask for.
pub fn load(settings: &Settings, tokenizer: &Tokenizer, need_test: bool) -> Result<Data> {
    let (train, test) = split_files(&settings.dataset)?;
    let tokens = |path: &std::path::Path| -> Result<Prepared> {
        let prepared = prepare(tokenizer, &read_records(path)?, Some(settings.max_length))
            .with_context(|| format!("{}: cannot tokenize", path.display()))?;
        if prepared.rows.is_empty() {
            bail!(
                "{}: all {} rows were dropped, their prompts alone reach --max-length {}; raise it",
                path.display(),
                prepared.dropped.len(),
                settings.max_length
            );
        }
        Ok(prepared)
    };
    let train = tokens(&train)?;
    let test = match (need_test, test) {
        (false, _) => None,
        (true, Some(path)) => Some(tokens(&path)?),
        (true, None) => bail!(
            "{}: --eval-strategy needs test rows, and there is no test.jsonl; add one or leave the flag out",
            settings.dataset.display()
        ),
    };
    Ok(Data { train, test })
}

/// Micro-batches of one epoch, as row indices. The order depends on the seed and the epoch alone.
pub fn micro_batches(rows: usize, batch: usize, shuffle: bool, seed: u64, epoch: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..rows).collect();
    if shuffle {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch as u64);
        order.shuffle(&mut rng);
    }
    order.chunks(batch).map(<[usize]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_visits_every_row_once_and_epochs_differ() {
        let epoch = |n| micro_batches(23, 4, true, 1, n).concat();
        let mut sorted = epoch(0);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..23).collect::<Vec<_>>());
        assert_eq!(epoch(3), epoch(3));
        assert_ne!(epoch(0), epoch(1));
        assert_eq!(micro_batches(5, 2, false, 1, 0), [vec![0, 1], vec![2, 3], vec![4]]);
    }
}
