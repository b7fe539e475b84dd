//! Reference log-probabilities: computed once for a model and a tokenized data set, cached by their
//! hashes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use decoder::Decoder;
use pref_data::{Batches, Dataset, default_cache_dir, write_atomic};

use crate::step::{Micro, RefLogps};

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
/// first step policy and reference agree to the bit.
pub fn compute(
    model: &Decoder,
    rows: &Dataset,
    batches: &Batches,
    mut progress: impl FnMut(usize),
) -> Vec<RefLogps> {
    let mut values = vec![[0.0; 2]; rows.len()];
    for batch in batches.iter() {
        let micro = Micro::new(rows, batch);
        for (&row, logps) in batch.iter().zip(micro.logps(model)) {
            values[row as usize] = logps;
        }
        progress(batch.len());
    }
    values
}
