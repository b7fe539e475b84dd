//! Log files and the progress line.

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use decoder::Companions;
use indicatif::{ProgressBar, ProgressStyle};
use pref_data::{JsonlAppender, read_jsonl, write_jsonl};
use serde_json::{Map, Value};

use crate::checksums;
use crate::tensorboard::EventWriter;

/// `train_log.jsonl`, `eval_log.jsonl` and `samples.jsonl` of a run.
pub struct Logs {
    train: JsonlAppender,
    eval: JsonlAppender,
    samples: Option<JsonlAppender>,
    events: Option<EventWriter>,
}

impl Logs {
    /// Opens the logs; training entries after `step` and evaluations after `evaluated` (of a run that is resumed
    /// from there) are dropped. `tensorboard`
    /// asks for event files in `runs/` too.
    pub fn open(dir: &Path, step: usize, evaluated: usize, tensorboard: bool, samples: bool) -> Result<Self> {
        let open = |name: &str, step: usize| -> Result<JsonlAppender> {
            let path = dir.join(name);
            // A line torn by a crash is cut off first.
            drop(JsonlAppender::open(&path)?);
            let keep: Vec<Value> = read_jsonl(&path)?
                .into_iter()
                .map(|(_, row)| row)
                .filter(|row| row["step"].as_u64().is_some_and(|at| at as usize <= step))
                .collect();
            write_jsonl(&path, &keep)?;
            Ok(JsonlAppender::open(&path)?.0)
        };
        let events = tensorboard.then(|| EventWriter::create(&dir.join("runs"), step)).transpose()?;
        let samples = samples.then(|| open("samples.jsonl", evaluated)).transpose()?;
        let (train, eval) = (open("train_log.jsonl", step)?, open("eval_log.jsonl", evaluated)?);
        Ok(Self { train, eval, samples, events })
    }

    /// Appends a training entry.
    pub fn train(&mut self, entry: &Map<String, Value>) -> Result<()> {
        self.train.push(&Value::Object(entry.clone()))?;
        self.events.as_mut().map_or(Ok(()), |events| events.scalars("train", entry))
    }

    /// Appends answers of the model.
    pub fn samples(&mut self, rows: &[Value]) -> Result<()> {
        let Some(log) = &mut self.samples else { return Ok(()) };
        Ok(rows.iter().try_for_each(|row| log.push(row))?)
    }

    /// Appends an evaluation entry.
    pub fn eval(&mut self, entry: &Map<String, Value>) -> Result<()> {
        self.eval.push(&Value::Object(entry.clone()))?;
        self.events.as_mut().map_or(Ok(()), |events| events.scalars("eval", entry))
    }
}

/// What a run writes from its first step on, and the page that `eval run` makes of it.
const LOGS: [&str; 5] = ["train_log.jsonl", "eval_log.jsonl", "samples.jsonl", "run.json", "report.html"];

/// What a run writes into its output directory besides checkpoints, shards and the model's companions.
const FILES: [&str; 5] = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
];

/// Files and directories that a run made: checkpoints with checksums, unfinished ones, the adapter beside a
/// merged model, event files, and single files by their names.
pub fn ours(dir: &Path) -> Result<Vec<PathBuf>> {
    let context = || format!("{}: cannot list", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let ours = if path.is_dir() {
            is_our_directory(&path, name)
        } else {
            LOGS.contains(&name)
                || FILES.contains(&name)
                || Companions::FILES.contains(&name)
                || is_shard(name)
        };
        if ours {
            found.push(path);
        } else if name == "runs" && path.is_dir() {
            found.extend(event_files(&path));
        }
    }
    Ok(found)
}

fn is_our_directory(path: &Path, name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let whole = name.strip_prefix("checkpoint-").is_some_and(number) && checksums::are_in(path);
    let half =
        name.strip_prefix(".checkpoint-").and_then(|rest| rest.strip_suffix(".tmp")).is_some_and(number);
    whole || half || (name == "adapter" && path.join("adapter_config.json").exists())
}

/// `model-00001-of-00002.safetensors`.
fn is_shard(name: &str) -> bool {
    let parts = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    parts.and_then(|parts| parts.split_once("-of-")).is_some_and(|(part, all)| {
        [part, all].iter().all(|n| n.len() == 5 && n.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

fn event_files(runs: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(runs).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "trainer")).collect()
}

/// Deletes what an earlier run wrote into an output directory, and nothing else. Unless all of it
/// is to be overwritten: a run that was stopped before its first checkpoint has written logs alone: a model or tokenizer beside them is somebody else's.
pub fn clear(dir: &Path, overwrite: bool) -> Result<()> {
    let name =
        |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_string();
    let log = |path: &PathBuf| {
        let name = name(path);
        LOGS.contains(&name.as_str())
            || name.ends_with(".tmp")
            || !path.is_dir() && path.parent() != Some(dir)
    };
    for path in ours(dir)?.into_iter().filter(|path| overwrite || log(path)) {
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("{}: cannot clear the earlier run", path.display()))?;
    }
    Ok(())
}

/// A progress bar on a terminal, plain lines elsewhere.
pub struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
    total: usize,
    done: usize,
    what: &'static str,
}

impl Progress {
    /// `total` units of work.
    pub fn new(what: &'static str, total: usize, wanted: bool) -> Self {
        let bar = (wanted && std::io::stderr().is_terminal()).then(|| {
            let style = "{prefix} {bar:30} {pos}/{len} [{elapsed} < {eta}] {msg}";
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(total as u64).with_style(style).with_prefix(what)
        });
        Self { bar, started: Instant::now(), total, done: 0, what }
    }

    /// Tells that `done` units are done.
    pub fn set(&mut self, done: usize) {
        self.done = done;
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        }
    }

    /// Tells the newest figures; without a bar this is one line on stderr.
    #[allow(clippy::print_stderr)]
    pub fn say(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_string());
        } else {
            let elapsed = self.started.elapsed().as_secs_f64();
            let left = elapsed / self.done.max(1) as f64 * (self.total - self.done.min(self.total)) as f64;
            eprintln!(
                "{} {}/{} | {text} | {elapsed:.0} s, {left:.0} s left",
                self.what, self.done, self.total
            );
        }
    }

    /// Tells something that must stay readable.
    #[allow(clippy::print_stderr)]
    pub fn tell(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
