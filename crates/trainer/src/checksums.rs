//! Checksums of a checkpoint's files: what a full disk, a crash or a bad copy has broken is noticed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pref_data::write_atomic;

const FILE: &str = "checksums.json";

/// The directory has checksums: a run of this program made it.
pub fn are_in(dir: &Path) -> bool {
    dir.join(FILE).exists()
}

/// Hashes every file of a directory into `checksums.json`.
pub fn write(dir: &Path) -> Result<()> {
    let mut sums = BTreeMap::new();
    for path in files(dir)? {
        let name = path.strip_prefix(dir).unwrap_or(&path).to_string_lossy().into_owned();
        sums.insert(name, hash(&path)?);
    }
    let text = serde_json::to_string_pretty(&sums)?;
    Ok(write_atomic(&dir.join(FILE), |out| out.write_all(text.as_bytes()))?)
}

/// Errors unless every file that `checksums.json` names is there as it was written.
pub fn verify(dir: &Path) -> Result<()> {
    let text = fs::read_to_string(dir.join(FILE))
        .with_context(|| format!("{}: not a whole checkpoint (no {FILE})", dir.display()))?;
    let sums: BTreeMap<String, String> =
        serde_json::from_str(&text).with_context(|| format!("{}: broken", dir.join(FILE).display()))?;
    for (name, expected) in sums {
        let path = dir.join(&name);
        if hash(&path)? != expected {
            bail!("{}: broken (its checksum is not that of {FILE})", path.display());
        }
    }
    Ok(())
}

fn hash(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_mmap(path).with_context(|| format!("{}: cannot read", path.display()))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Files below a directory, but for the checksums.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("{}: cannot list", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            all.extend(files(&path)?);
        } else if path.file_name().is_none_or(|name| name != FILE) {
            all.push(path);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_changed_cut_or_gone_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("sub/b"));
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(&a, "one").unwrap();
        fs::write(&b, "two").unwrap();
        assert!(verify(dir.path()).unwrap_err().to_string().contains("no checksums.json"));
        write(dir.path()).unwrap();
        verify(dir.path()).unwrap();
        for broken in ["onf", "on", ""] {
            fs::write(&a, broken).unwrap();
            assert!(verify(dir.path()).unwrap_err().to_string().contains("a: broken"), "{broken:?}");
        }
        fs::write(&a, "one").unwrap();
        fs::remove_file(b).unwrap();
        assert!(verify(dir.path()).unwrap_err().to_string().contains("cannot read"));
    }
}
