//! Which files of a data set directory or repository hold which rows, by the rules of `datasets`.

use std::path::Path;

use globset::{GlobBuilder, GlobMatcher};
use serde::Deserialize;

/// A split and its files, in reading order, relative to the directory.
pub type SplitFiles = (String, Vec<String>);

/// Formats by extension; `.gz` and `.zst` may follow.
const FORMATS: [&str; 5] = ["parquet", "jsonl", "json", "ndjson", "csv"];
/// Splits, and the words in file and directory names that mean them.
const KEYWORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

#[derive(Deserialize)]
struct Card {
    #[serde(default)]
    configs: Vec<Config>,
}

#[derive(Deserialize)]
struct Config {
    #[serde(rename = "config_name")]
    name: String,
    #[serde(default)]
    default: bool,
    data_dir: Option<String>,
    data_files: Option<DataFiles>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum DataFiles {
    One(String),
    Many(Vec<String>),
    Splits(Vec<SplitPaths>),
}

#[derive(Deserialize)]
struct SplitPaths {
    split: String,
    path: Paths,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Paths {
    One(String),
    Many(Vec<String>),
}

/// The splits of a data set, in order, from the names of its files (`/` between directories) and its card
/// (`README.md`), for a configuration or the default one.
pub fn resolve(
    files: &[String],
    card: Option<&str>,
    config: Option<&str>,
) -> Result<Vec<SplitFiles>, String> {
    let mut files: Vec<String> = files.to_vec();
    files.sort_unstable();
    let configs = card.map(configs).transpose()?.unwrap_or_default();
    let splits = match choose(&configs, config)? {
        Some(chosen) => {
            let inside = |path: &str| match &chosen.data_dir {
                Some(dir) => format!("{}/{path}", dir.trim_end_matches('/')),
                None => path.to_string(),
            };
            if let Some(patterns) = &chosen.data_files {
                by_patterns(&files, patterns, inside)?
            } else {
                let start = inside("");
                let files = files.iter().filter(|file| file.starts_with(&start));
                by_names(&files.cloned().collect::<Vec<_>>())
            }
        }
        None => by_names(&files),
    };
    if splits.is_empty() {
        let some: Vec<&str> = files.iter().take(12).map(String::as_str).collect();
        return Err(format!(
            "holds no data files; found {some:?}, expected train.* and perhaps test.* as .jsonl, .json, .csv or .parquet"
        ));
    }
    one_format(splits)
}

/// Whether a file name has the extension of a data format, perhaps compressed.
pub fn is_data_file(name: &str) -> bool {
    format_of(name).is_some()
}

/// Format by extension, compression aside.
pub(crate) fn format_of(name: &str) -> Option<&'static str> {
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    let extension = Path::new(name).extension()?.to_str()?;
    FORMATS.into_iter().find(|format| format.eq_ignore_ascii_case(extension))
}

/// The `configs` of the card's YAML header.
fn configs(card: &str) -> Result<Vec<Config>, String> {
    let Some(rest) = card.trim_start_matches('\u{feff}').trim_start().strip_prefix("---") else {
        return Ok(Vec::new());
    };
    let Some(end) = rest.find("\n---") else { return Ok(Vec::new()) };
    let budget = serde_saphyr::budget! { max_nodes: 2_000_000, max_events: 4_000_000 };
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        budget: budget
    };
    serde_saphyr::from_str_with_options::<Option<Card>>(&rest[..end], options)
        .map(|card| card.map(|card| card.configs).unwrap_or_default())
        .map_err(|e| format!("the header of README.md is not usable YAML: {e}"))
}

fn choose<'a>(configs: &'a [Config], wanted: Option<&str>) -> Result<Option<&'a Config>, String> {
    let names = || configs.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ");
    if let Some(wanted) = wanted {
        let found = configs.iter().find(|config| config.name == wanted);
        return found.map(Some).ok_or_else(|| match configs {
            [] => format!("has no configuration {wanted:?}: its card names none; leave --dataset-config out"),
            _ => format!("has no configuration {wanted:?}; there are {}", names()),
        });
    }
    match configs {
        [] => Ok(None),
        [only] => Ok(Some(only)),
        _ => {
            let default = configs.iter().find(|config| config.default || config.name == "default");
            let missing =
                || format!("has several configurations; choose one with --dataset-config: {}", names());
            default.map(Some).ok_or_else(missing)
        }
    }
}

fn by_patterns(
    files: &[String],
    patterns: &DataFiles,
    inside: impl Fn(&str) -> String,
) -> Result<Vec<SplitFiles>, String> {
    let find = |patterns: &[String]| -> Result<Vec<String>, String> {
        let mut found = Vec::new();
        for pattern in patterns.iter().map(|pattern| inside(pattern)) {
            let matcher = glob(&pattern)?;
            let before = found.len();
            found.extend(files.iter().filter(|file| matcher.is_match(file)).cloned());
            if found.len() == before && !pattern.contains(['*', '?', '[']) {
                return Err(format!("its card names {pattern:?}, which is not there"));
            }
        }
        Ok(found)
    };
    let splits = match patterns {
        DataFiles::One(pattern) => vec![("train".to_string(), find(std::slice::from_ref(pattern))?)],
        DataFiles::Many(patterns) => vec![("train".to_string(), find(patterns)?)],
        DataFiles::Splits(splits) => splits
            .iter()
            .map(|entry| {
                let files = match &entry.path {
                    Paths::One(pattern) => find(std::slice::from_ref(pattern)),
                    Paths::Many(patterns) => find(patterns),
                };
                files.map(|files| (entry.split.clone(), files))
            })
            .collect::<Result<_, _>>()?,
    };
    Ok(splits.into_iter().filter(|(_, files)| !files.is_empty()).collect())
}

/// A pattern of which `*` stays within a directory and `**` does not.
pub(crate) fn glob(pattern: &str) -> Result<GlobMatcher, String> {
    let glob = GlobBuilder::new(pattern).literal_separator(true).build();
    glob.map(|glob| glob.compile_matcher()).map_err(|e| format!("pattern {pattern:?}: {e}"))
}

/// Whether a file belongs to the split that a word means.
type Rule = fn(&str, &str) -> bool;

/// The splits that names alone tell: `data/train-00000-of-00002.parquet`, then directories, then files with a
/// split's name in theirs, else everything is `train`.
fn by_names(files: &[String]) -> Vec<SplitFiles> {
    let usable: Vec<&String> = files.iter().filter(|file| is_data_file(file) && !is_hidden(file)).collect();
    let sharded = sharded(&usable);
    if !sharded.is_empty() {
        return sharded;
    }
    // What generate-clair writes: its failures and replies are no data.
    if let Some(pairs) = ["pairs.parquet", "pairs.jsonl"].into_iter().find(|n| files.iter().any(|f| f == n)) {
        return vec![("train".into(), vec![pairs.into()])];
    }
    let directory: Rule = |file, word| {
        file.rsplit_once('/').is_some_and(|(dir, _)| dir.split('/').any(|part| is_word_of(part, word)))
    };
    let name: Rule = |file, word| {
        let name = file.rsplit('/').next().unwrap_or(file);
        let stem = name.split('.').next().unwrap_or(name);
        is_word_of(stem, word)
    };
    for matches in [directory, name] {
        let of_split = |words: &[&str]| -> Vec<String> {
            let mut found: Vec<String> = Vec::new();
            for word in words {
                for file in usable.iter().filter(|file| matches(file, word)) {
                    if !found.contains(*file) {
                        found.push((*file).clone());
                    }
                }
            }
            found
        };
        let splits: Vec<SplitFiles> = KEYWORDS
            .iter()
            .map(|(split, words)| ((*split).to_string(), of_split(words)))
            .filter(|(_, files)| !files.is_empty())
            .collect();
        if !splits.is_empty() {
            return splits;
        }
    }
    let all: Vec<String> = usable.into_iter().cloned().collect();
    if all.is_empty() { Vec::new() } else { vec![("train".into(), all)] }
}

/// `data/SPLIT-00000-of-00002*.*`.
fn sharded(files: &[&String]) -> Vec<SplitFiles> {
    let split_of = |file: &str| -> Option<String> {
        let name = file.strip_prefix("data/").filter(|name| !name.contains('/'))?;
        let (split, rest) = name.rsplit_once("-of-")?;
        let (split, number) = split.rsplit_once('-')?;
        let digits = |text: &str| text.len() >= 5 && text.bytes().take(5).all(|b| b.is_ascii_digit());
        (digits(number) && number.len() == 5 && digits(rest)).then(|| split.to_string())
    };
    let mut splits: Vec<SplitFiles> = Vec::new();
    for file in files {
        let Some(split) = split_of(file) else { continue };
        match splits.iter_mut().find(|(name, _)| *name == split) {
            Some((_, files)) => files.push((*file).clone()),
            None => splits.push((split, vec![(*file).clone()])),
        }
    }
    let rank = |name: &str| KEYWORDS.iter().position(|(split, _)| *split == name).unwrap_or(KEYWORDS.len());
    splits.sort_by(|(a, _), (b, _)| rank(a).cmp(&rank(b)).then_with(|| a.cmp(b)));
    splits
}

/// The word stands in the name, between separators or at its ends.
fn is_word_of(name: &str, word: &str) -> bool {
    let is_separator = |c: char| matches!(c, '-' | '.' | '_' | ' ') || c.is_ascii_digit();
    name.match_indices(word).any(|(at, _)| {
        let before = name[..at].chars().next_back();
        let after = name[at + word.len()..].chars().next();
        before.is_none_or(is_separator) && after.is_none_or(is_separator)
    })
}

fn is_hidden(file: &str) -> bool {
    let private = |part: &str| part.starts_with('.') || part.starts_with("__");
    let name = file.rsplit('/').next().unwrap_or(file);
    let metadata = [
        "config.json",
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "manifest.json",
        "report.json",
    ];
    file.split('/').any(private) || metadata.contains(&name)
}

/// The most frequent format is kept.
fn one_format(splits: Vec<SplitFiles>) -> Result<Vec<SplitFiles>, String> {
    let formats: Vec<&str> =
        splits.iter().flat_map(|(_, files)| files).filter_map(|f| format_of(f)).collect();
    let count = |format: &str| formats.iter().filter(|f| **f == format).count();
    // The last of equals wins: parquet stands first.
    let best =
        FORMATS.into_iter().rev().max_by_key(|format| count(format)).filter(|format| count(format) > 0);
    let Some(best) = best else {
        let some = splits.iter().flat_map(|(_, files)| files).take(5).cloned().collect::<Vec<_>>();
        return Err(format!("has files of unknown formats ({some:?}); known are {}", FORMATS.join(", ")));
    };
    let of_format =
        |files: Vec<String>| files.into_iter().filter(|f| format_of(f) == Some(best)).collect::<Vec<_>>();
    let splits = splits.into_iter().map(|(split, files)| (split, of_format(files)));
    Ok(splits.filter(|(_, files)| !files.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn splits(files: &[&str], card: Option<&str>, config: Option<&str>) -> Result<Vec<SplitFiles>, String> {
        let files: Vec<String> = files.iter().map(ToString::to_string).collect();
        resolve(&files, card, config)
    }

    fn split(name: &str, files: &[&str]) -> SplitFiles {
        (name.into(), files.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn names_tell_the_splits() {
        let files = [
            "README.md",
            "data/test-00000-of-00001.parquet",
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "data/test_prefs-00000-of-00001.parquet",
        ];
        let want = [
            split("train", &["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
            split("test", &["data/test-00000-of-00001.parquet"]),
            split("test_prefs", &["data/test_prefs-00000-of-00001.parquet"]),
        ];
        assert_eq!(splits(&files, None, None).unwrap(), want);
        let want = [split("train", &["my_train.jsonl.gz"]), split("validation", &["dev-1.jsonl"])];
        assert_eq!(splits(&["my_train.jsonl.gz", "dev-1.jsonl", "restrain.txt"], None, None).unwrap(), want);
        let want = [split("train", &["train/a.csv"])];
        assert_eq!(splits(&["train.csv", "train/a.csv"], None, None).unwrap(), want);
        let want = [split("train", &["a.jsonl", "b.jsonl"])];
        assert_eq!(splits(&["b.jsonl", "a.jsonl", ".hidden.jsonl", "c.csv"], None, None).unwrap(), want);
        assert_eq!(
            splits(&["pairs.jsonl", "failed.jsonl", "report.json"], None, None).unwrap(),
            [split("train", &["pairs.jsonl"])]
        );
        assert!(splits(&["model.bin"], None, None).unwrap_err().contains("model.bin"));
    }

    #[test]
    fn the_card_decides_where_it_says_something() {
        let card = "---\nlicense: mit\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: x/*.jsonl\n  - split: test\n    path: [y.jsonl]\n- config_name: b\n  default: true\n  data_dir: z\n---\n# Card";
        let files = ["x/2.jsonl", "x/1.jsonl", "x/deep/3.jsonl", "y.jsonl", "z/test.jsonl", "z/train.jsonl"];
        let want = [split("train", &["x/1.jsonl", "x/2.jsonl"]), split("test", &["y.jsonl"])];
        assert_eq!(splits(&files, Some(card), Some("a")).unwrap(), want);
        let want = [split("train", &["z/train.jsonl"]), split("test", &["z/test.jsonl"])];
        assert_eq!(splits(&files, Some(card), None).unwrap(), want);
        assert!(splits(&files, Some(card), Some("c")).unwrap_err().contains("a, b"));
        assert!(splits(&["q.jsonl"], Some(card), Some("a")).unwrap_err().contains("y.jsonl"));
        assert!(splits(&files, Some("---\nlicense: mit\n---\n"), None).is_ok());
    }
}
