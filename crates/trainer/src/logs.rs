//! Log files and the progress line.

use std::fs;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use pref_data::{JsonlAppender, read_jsonl, write_jsonl};
use serde_json::{Map, Value};

use crate::tensorboard::EventWriter;

/// `train_log.jsonl` and `eval_log.jsonl` of a run.
pub struct Logs {
    train: JsonlAppender,
    eval: JsonlAppender,
    events: Option<EventWriter>,
}

impl Logs {
    /// Opens the logs; entries after `step` (of a run that is resumed from there) are dropped. `tensorboard`
    /// asks for event files in `runs/` too.
    pub fn open(dir: &Path, step: usize, tensorboard: bool) -> Result<Self> {
        let open = |name: &str| -> Result<JsonlAppender> {
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
        Ok(Self { train: open("train_log.jsonl")?, eval: open("eval_log.jsonl")?, events })
    }

    /// Appends a training entry.
    pub fn train(&mut self, entry: &Map<String, Value>) -> Result<()> {
        self.train.push(&Value::Object(entry.clone()))?;
        self.events.as_mut().map_or(Ok(()), |events| events.scalars("train", entry))
    }

    /// Appends an evaluation entry.
    pub fn eval(&mut self, entry: &Map<String, Value>) -> Result<()> {
        self.eval.push(&Value::Object(entry.clone()))?;
        self.events.as_mut().map_or(Ok(()), |events| events.scalars("eval", entry))
    }
}

/// Deletes what an earlier run wrote into an output directory, and nothing else.
pub fn clear(dir: &Path) -> Result<()> {
    let context = || format!("{}: cannot clear the earlier run", dir.display());
    for entry in fs::read_dir(dir).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() && is_our_directory(&path, name) {
            fs::remove_dir_all(&path).with_context(context)?;
        } else if path.is_file() && is_ours(name) {
            fs::remove_file(&path).with_context(context)?;
        }
    }
    Ok(())
}

fn is_our_directory(path: &Path, name: &str) -> bool {
    let checkpoint = name.starts_with("checkpoint-") || name.starts_with(".checkpoint-");
    checkpoint || (name == "adapter" && path.join("adapter_config.json").exists()) || name == "runs"
}

fn is_ours(name: &str) -> bool {
    matches!(
        name,
        "train_log.jsonl"
            | "eval_log.jsonl"
            | "run.json"
            | "config.json"
            | "model.safetensors.index.json"
            | "adapter_config.json"
            | "adapter_model.safetensors"
    ) || (name.starts_with("model") && name.ends_with(".safetensors"))
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

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
