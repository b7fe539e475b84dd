//! Reading data sets: a JSON Lines or JSON file, or a directory with `train.*` and `test.*`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Error, Record};

const EXTENSIONS: [&str; 2] = ["jsonl", "json"];

/// The files of a data set: training rows, and test rows where a directory has them.
pub fn split_files(path: &Path) -> Result<(PathBuf, Option<PathBuf>), Error> {
    let dataset = |reason: &str| Error::Dataset { path: path.into(), reason: reason.into() };
    if path.is_file() {
        return Ok((path.into(), None));
    }
    if !path.is_dir() {
        return Err(dataset(
            "no such file or directory; expected a .jsonl or .json file, or a directory with train.jsonl",
        ));
    }
    let find =
        |split: &str| EXTENSIONS.iter().map(|e| path.join(format!("{split}.{e}"))).find(|p| p.is_file());
    // A directory that generate-clair wrote holds its rows in pairs.jsonl.
    let train = find("train").or_else(|| find("pairs"));
    let train =
        train.ok_or_else(|| dataset("no train.jsonl, train.json or pairs.jsonl in this directory"))?;
    Ok((train, find("test").or_else(|| find("validation"))))
}

/// All preference pairs of one file.
pub fn read_records(path: &Path) -> Result<Vec<Record>, Error> {
    let rows = read_rows(path)?;
    if rows.is_empty() {
        return Err(Error::Dataset { path: path.into(), reason: "holds no rows".into() });
    }
    rows.iter()
        .enumerate()
        .map(|(number, (line, row))| {
            Record::parse(row, number).map_err(|reason| Error::Record {
                path: path.into(),
                line: *line,
                reason,
            })
        })
        .collect()
}

/// Rows of a `.jsonl` file with their line numbers; blank lines are skipped.
pub fn read_jsonl(path: &Path) -> Result<Vec<(usize, Value)>, Error> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut rows = Vec::new();
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(Error::io(path))?;
        if line.trim().is_empty() {
            continue;
        }
        let row = serde_json::from_str(&line).map_err(|e| Error::Record {
            path: path.into(),
            line: i + 1,
            reason: format!("not valid JSON: {e}"),
        })?;
        rows.push((i + 1, row));
    }
    Ok(rows)
}

fn read_rows(path: &Path) -> Result<Vec<(usize, Value)>, Error> {
    if path.extension().is_none_or(|extension| extension != "json") {
        return read_jsonl(path);
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    if !text.trim_start().starts_with('[') {
        // A .json file of JSON Lines is common on the Hub.
        return read_jsonl(path);
    }
    let rows: Vec<Value> = serde_json::from_str(&text).map_err(|e| Error::Record {
        path: path.into(),
        line: e.line(),
        reason: format!("not valid JSON: {e}"),
    })?;
    Ok(rows.into_iter().enumerate().map(|(i, row)| (i + 1, row)).collect())
}
