//! Reference log-probabilities: computed once for a model and a tokenized data set, cached by their
//! hashes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use decoder::Decoder;
use pref_data::{Batches, Dataset, default_cache_dir, write_atomic};

use crate::packing::Scoring;
use crate::step::{Micro, RefLogps, to_host};

/// Time between savings of an unfinished pass.
const SAVE_EVERY: Duration = Duration::from_secs(20);

/// Reads the cache, if it holds this model and data.
pub fn read(path: &Path, rows: usize) -> Option<Vec<RefLogps>> {
    let bytes = fs::read(path).ok()?;
    let (data, checksum) = bytes.split_at_checked(rows * 8)?;
    if blake3::hash(data).as_bytes() != checksum {
        return None;
    }
    let number = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("4 bytes"));
    Some(data.chunks_exact(8).map(|pair| [number(&pair[..4]), number(&pair[4..])]).collect())
}

/// Writes the cache: the values and their checksum.
pub fn write(path: &Path, values: &[RefLogps]) -> Result<()> {
    let data: Vec<u8> = values.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("{}: cannot create", dir.display()))?;
    }
    write_atomic(path, |out| {
        out.write_all(&data)?;
        out.write_all(blake3::hash(&data).as_bytes())
    })?;
    Ok(())
}

/// The cache file for a model and data.
pub fn cache_path(dir: Option<&Path>, model_hash: &str, data_hash: &str) -> PathBuf {
    let base = dir.map_or_else(|| default_cache_dir("reference"), Path::to_path_buf);
    let key = blake3::hash(format!("{model_hash}{data_hash}").as_bytes()).to_hex();
    base.join(format!("{}.logps", &key[..32]))
}

/// Computes the log-probabilities of all rows, batched as training will batch them, so that before the
/// first step policy and reference agree to the bit (values from the cache of a run with other batches may differ by
/// rounding). What is done is kept beside the cache file now and then:
/// a run that is stopped goes on from there.
pub fn compute(
    model: &Decoder,
    rows: &Dataset,
    batches: &Batches,
    scoring: Scoring,
    cache: &Path,
    mut progress: impl FnMut(usize),
) -> Vec<RefLogps> {
    let partial = cache.with_extension("partial");
    let mut values = read(&partial, rows.len()).unwrap_or_else(|| vec![[f32::NAN; 2]; rows.len()]);
    let mut saved = Instant::now();
    for batch in batches.iter() {
        if batch.iter().any(|&row| values[row as usize][0].is_nan()) {
            let micro = Micro::new(rows, batch, scoring);
            for (&row, logps) in batch.iter().zip(to_host(micro.logps(model))) {
                values[row as usize] = logps;
            }
            if saved.elapsed() >= SAVE_EVERY {
                // A cache that cannot be written is reported at the end.
                write(&partial, &values).ok();
                saved = Instant::now();
            }
        }
        progress(batch.len());
    }
    fs::remove_file(&partial).ok();
    values
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use burn::tensor::Device;
    use pref_data::{Bound, Order, Source, Tokenizer, tokenize};

    pub fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
    }

    /// Rows of a fixture with the tokens of tiny-qwen2, which are kept in `dir`.
    pub fn rows(file: &str, unpaired: bool, dir: &Path) -> Dataset {
        let model_dir = fixtures().join("models/tiny-qwen2");
        let tokenizer = Tokenizer::load(&model_dir, None, jiff::civil::DateTime::MIN).unwrap();
        let source =
            Source { files: vec![fixtures().join("data").join(file)], unpaired, ..Source::default() };
        Dataset::whole(tokenize(&source, &tokenizer, dir, &|_| {}).unwrap().set, None)
    }

    #[test]
    fn an_unfinished_pass_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let model_dir = fixtures().join("models/tiny-qwen2");
        let rows = rows("clair_mini/test.jsonl", false, dir.path());
        let model = Decoder::load(&model_dir, &Device::flex()).unwrap();
        let batches = Batches::new(&|_| 1, rows.len(), Order::Sequential, Bound::Rows(4), 0, 0);
        let cache = dir.path().join("x.logps");
        let scoring = Scoring { ld_alpha: None, mismatched: None, part: usize::MAX };
        let whole = compute(&model, &rows, &batches, scoring, &cache, |_| {});
        // Marked values show that what is there is not computed again.
        let mut half = vec![[f32::NAN; 2]; rows.len()];
        half[..8].fill([7.0, 8.0]);
        write(&cache.with_extension("partial"), &half).unwrap();
        let resumed = compute(&model, &rows, &batches, scoring, &cache, |_| {});
        assert!(resumed[..8].iter().all(|pair| *pair == [7.0, 8.0]));
        assert_eq!(resumed[8..], whole[8..]);
        assert!(!cache.with_extension("partial").exists());
    }
}
