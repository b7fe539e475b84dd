//! `bench data`: how fast a large preference set becomes token rows, beside TRL.

use std::env;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{count, flags, median};
use crate::cargo::{cargo, root};
use crate::report;

/// Rows that the peer tokenizes: it would take long over all of them.
const PEER_ROWS: usize = 10_000;

struct Options {
    model: PathBuf,
    rows: usize,
    runs: usize,
    dir: PathBuf,
    trl: Option<PathBuf>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self {
            model: PathBuf::new(),
            rows: 1_000_000,
            runs: 1,
            dir: env::temp_dir().join("bench-data"),
            trl: None,
        };
        for [flag, value] in flags(args)? {
            let count = || count(flag, value);
            match flag.as_str() {
                "--model" => options.model = value.into(),
                "--rows" => options.rows = count()?.max(1),
                "--runs" => options.runs = count()?.max(1),
                "--dir" => options.dir = value.into(),
                "--against-trl" => options.trl = Some(value.into()),
                other => bail!("unknown flag {other}"),
            }
        }
        if options.model.as_os_str().is_empty() {
            bail!("--model is required: the directory whose tokenizer is used");
        }
        Ok(options)
    }
}

/// Tokenizes a made-up set twice: the first time from text, the second from the cache.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let options = Options::parse(args)?;
    fs::create_dir_all(&options.dir).with_context(|| format!("{}: cannot create", options.dir.display()))?;
    let file = options.dir.join(format!("pairs-{}.jsonl", options.rows));
    if !file.exists() {
        generate(&file, options.rows)?;
    }
    let bytes = fs::metadata(&file)?.len();
    report(&format!(
        "{} pairs, {:.2} GB of JSON Lines in {}",
        options.rows,
        bytes as f64 / 1e9,
        file.display()
    ));
    let built =
        cargo(&["build", "--release", "--quiet", "--package", "pref-data", "--example", "tokenize"]).status();
    if !built.context("cannot run cargo")?.success() {
        bail!("building failed");
    }
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let binary = target.join("release/examples/tokenize");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 1..=options.runs {
        let cache = options.dir.join("cache");
        fs::remove_dir_all(&cache).ok();
        for start in ["first", "second"] {
            let figures = tokenize(&binary, &options.model, &file, &cache)?;
            let number = |key: &str| figures[key].as_f64().unwrap_or(f64::NAN);
            report(&format!(
                "run {run}, {start} start: {:.2} s, peak {:.0} MB{}",
                number("seconds"),
                number("peak_bytes") / 1e6,
                if start == "first" {
                    format!(", {:.0} rows/s", number("rows_per_second"))
                } else {
                    String::new()
                }
            ));
            if start == "first" {
                ours.push(number("rows_per_second"));
            }
        }
        if let Some(venv) = &options.trl {
            let speed = peer(venv, &options, &file)?;
            report(&format!("run {run}, TRL with 2 processes: {speed:.0} rows/s ({PEER_ROWS} rows)"));
            theirs.push(speed);
        }
    }
    fs::remove_dir_all(options.dir.join("cache")).ok();
    if !theirs.is_empty() {
        report(&format!("{:.1} times TRL's rows a second (medians)", median(ours) / median(theirs)));
    }
    Ok(ExitCode::SUCCESS)
}

fn tokenize(binary: &Path, model: &Path, file: &Path, cache: &Path) -> Result<Value> {
    let output =
        Command::new(binary).arg(model).arg(file).arg(cache).output().context("cannot run the example")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("tokenizing failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_str(&text).context("the example prints JSON")
}

fn peer(venv: &Path, options: &Options, file: &Path) -> Result<f64> {
    let script = options.dir.join("trl_tokenize.py");
    fs::write(&script, include_str!("trl_tokenize.py"))?;
    let head = options.dir.join("head.jsonl");
    // The peer would convert the whole file first.
    let text = fs::read_to_string(file)?;
    let lines: Vec<&str> = text.lines().take(PEER_ROWS).collect();
    fs::write(&head, lines.join("\n"))?;
    let mut command = Command::new(venv.join("bin/python"));
    command.arg(script).arg(&options.model).arg(head).arg(PEER_ROWS.to_string()).arg(&options.dir);
    command.env("HF_DATASETS_CACHE", options.dir.join("hf")).env("HF_HUB_OFFLINE", "1");
    let output =
        command.env("TOKENIZERS_PARALLELISM", "false").output().context("cannot run TRL's Python")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let speed = text.lines().find_map(|line| line.strip_prefix("TRL_ROWS_PER_SECOND ")?.parse().ok());
    speed.with_context(|| format!("TRL failed: {}", String::from_utf8_lossy(&output.stderr)))
}

/// Pairs of the shape of CLAIR's: a question, an answer of 60 to 260 words, and the answer with some words
/// changed. The words are those of the bundled data, some of them made up.
fn generate(file: &Path, rows: usize) -> Result<()> {
    let words = words()?;
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let partial = file.with_extension("partial");
    let mut out = BufWriter::with_capacity(1 << 20, File::create(&partial)?);
    for _ in 0..rows {
        let count = 8 + random.below(50);
        let question = random.text(&words, count);
        let count = 50 + random.below(150);
        let answer = random.text(&words, count);
        let mut revised = answer.clone();
        for _ in 0..12 {
            let at = random.below(revised.len());
            revised[at].clone_from(&words[random.below(words.len())]);
        }
        let user = json!({"role": "user", "content": question.join(" ")});
        let turn = |words: &[String]| json!([user, {"role": "assistant", "content": words.join(" ")}]);
        writeln!(out, "{}", json!({"chosen": turn(&revised), "rejected": turn(&answer)}))?;
    }
    out.flush()?;
    fs::rename(partial, file)?;
    Ok(())
}

fn words() -> Result<Vec<String>> {
    let mut words = Vec::new();
    for name in ["prompts.jsonl", "answers.jsonl", "sft.jsonl"] {
        let path = root().join("datasets/demo").join(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        for line in text.lines() {
            let row: Value = serde_json::from_str(line).with_context(|| path.display().to_string())?;
            collect(&row, &mut words);
        }
    }
    Ok(words)
}

/// Words of all texts in a value.
fn collect(value: &Value, words: &mut Vec<String>) {
    match value {
        Value::String(text) => {
            words.extend(text.split(' ').filter(|word| !word.is_empty()).map(str::to_owned));
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, words)),
        Value::Object(map) => map.values().for_each(|item| collect(item, words)),
        _ => {}
    }
}

/// A small generator (xorshift): the set is the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }

    fn text(&mut self, words: &[String], count: usize) -> Vec<String> {
        let word = |random: &mut Self| match random.below(40) {
            0 => (0..4 + random.below(8)).map(|_| char::from(b'a' + random.below(26) as u8)).collect(),
            _ => words[random.below(words.len())].clone(),
        };
        (0..count).map(|_| word(self)).collect()
    }
}
