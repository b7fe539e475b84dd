//! A data set: its splits and files, found from a path or a pattern, and small files read whole.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::rows::{first_rows, read_blocks};
use crate::splits::{self, glob, resolve};
use crate::{Error, Layout};

/// Rows looked at to find the layout.
const LOOKED_AT: usize = 64;

/// The files of a data set by split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Splits {
    /// What the user gave.
    pub path: PathBuf,
    /// Splits in order, each with its files in reading order.
    pub splits: Vec<(String, Vec<PathBuf>)>,
}

impl Splits {
    /// Finds the files: one file, a pattern such as `data/*.jsonl`, or a directory by its card or the names in
    /// it ([`splits::resolve`]). `config` chooses among the configurations of a card.
    pub fn find(path: &Path, config: Option<&str>) -> Result<Self, Error> {
        let dataset = |reason: String| Error::Dataset { path: path.into(), reason };
        if path.is_file() {
            return Ok(Self { path: path.into(), splits: vec![("train".into(), vec![path.into()])] });
        }
        let text = path.to_string_lossy();
        if !path.is_dir() && text.contains(['*', '?', '[']) {
            let files = matching(&text).map_err(dataset)?;
            return Ok(Self { path: path.into(), splits: vec![("train".into(), files)] });
        }
        if !path.is_dir() {
            return Err(dataset(
                "no such file or directory; expected a .jsonl, .json, .csv or .parquet file (also .gz and .zst), a \
                 pattern, a directory with train.*, or the id of a data set on the Hub"
                    .into(),
            ));
        }
        let mut files = Vec::new();
        walk(path, "", &mut files).map_err(Error::io(path))?;
        let card = fs::read_to_string(path.join("README.md")).ok();
        let found = resolve(&files, card.as_deref(), config).map_err(dataset)?;
        let full = |files: Vec<String>| files.iter().map(|file| path.join(file)).collect();
        Ok(Self {
            path: path.into(),
            splits: found.into_iter().map(|(name, files)| (name, full(files))).collect(),
        })
    }

    /// The files of a split; the error lists those that there are.
    pub fn split(&self, name: &str) -> Result<&[PathBuf], Error> {
        let found = self.splits.iter().find(|(split, _)| split == name);
        found.map(|(_, files)| files.as_slice()).ok_or_else(|| Error::Dataset {
            path: self.path.clone(),
            reason: format!("has no split {name:?}; there are {:?}", self.names()),
        })
    }

    /// Names of the splits.
    pub fn names(&self) -> Vec<&str> {
        self.splits.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The split with held-out rows, if there is one: `test`, or else `validation`.
    pub fn held_out(&self) -> Option<&str> {
        ["test", "validation"].into_iter().find(|name| self.names().contains(name))
    }
}

/// The layout of files that hold rows of the same kind.
pub fn layout_of(
    files: &[PathBuf],
    columns: &std::collections::BTreeMap<String, String>,
) -> Result<Layout, Error> {
    for file in files {
        let rows = first_rows(file, LOOKED_AT)?;
        if !rows.is_empty() {
            return Layout::detect(&rows, columns)
                .map_err(|reason| Error::Dataset { path: file.clone(), reason });
        }
    }
    let path = files.first().cloned().unwrap_or_default();
    Err(Error::Dataset { path, reason: "holds no rows".into() })
}

/// All rows of a small file with their line numbers.
pub fn read_jsonl(path: &Path) -> Result<Vec<(usize, Value)>, Error> {
    let mut all = Vec::new();
    each_jsonl(path, |line, row| all.push((line, row)))?;
    Ok(all)
}

/// The same, one row after the other.
pub fn each_jsonl(path: &Path, mut take: impl FnMut(usize, Value)) -> Result<(), Error> {
    read_blocks(path, None, &mut |block| {
        for (line, row) in block.rows() {
            let row = row.value().map_err(|reason| Error::Record { path: path.into(), line, reason })?;
            take(line, row);
        }
        Ok(true)
    })
}

/// Files under a directory, with `/` between the parts.
fn walk(dir: &Path, prefix: &str, files: &mut Vec<String>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let path = entry.path();
        if path.is_dir() {
            // A link to a directory may lead back up; `datasets` does not follow it either.
            if !entry.file_type()?.is_symlink() && !entry.file_name().to_string_lossy().starts_with('.') {
                walk(&path, &format!("{name}/"), files)?;
            }
        } else {
            files.push(name);
        }
    }
    Ok(())
}

/// Files that a pattern matches, sorted.
fn matching(pattern: &str) -> Result<Vec<PathBuf>, String> {
    let fixed =
        pattern.split('/').take_while(|part| !part.contains(['*', '?', '['])).collect::<Vec<_>>().join("/");
    let root = match (fixed.is_empty(), pattern.starts_with('/')) {
        (true, true) => Path::new("/"),
        (true, false) => Path::new("."),
        _ => Path::new(&fixed),
    };
    let mut files = Vec::new();
    walk(root, "", &mut files).map_err(|e| format!("{}: {e}", root.display()))?;
    let matcher = glob(pattern.trim_start_matches("./"))?;
    let full = |file: &String| if fixed.is_empty() { PathBuf::from(file) } else { root.join(file) };
    let mut found: Vec<PathBuf> = files
        .iter()
        .filter(|file| splits::is_data_file(file))
        .map(full)
        .filter(|path| matcher.is_match(path.strip_prefix("./").unwrap_or(path)))
        .collect();
    found.sort();
    if found.is_empty() { Err("no data file matches this pattern".into()) } else { Ok(found) }
}
