//! `eval sample`: answers to a file of prompts, resumable.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use decoder::Progress;
use pref_data::{JsonlAppender, Message, read_jsonl, row_id, write_atomic, write_jsonl};
use serde_json::{Value, json};

use crate::args::{SampleArgs, template_time};
use crate::local::{Answer, Local, Question};
use crate::sampling::SamplingArgs;
use crate::served;

/// Set by Ctrl-C.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every prompt has its answer.
    Done {
        /// Answers in the file.
        answers: usize,
    },
    /// Stopped by the user.
    Interrupted {
        /// Answers so far.
        answers: usize,
        /// All prompts.
        total: usize,
    },
}

/// One prompt.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// The `id` column, or the row's number from 0.
    pub id: String,
    /// The conversation.
    pub messages: Vec<Message>,
    /// The whole row.
    pub row: Value,
    /// Plain text to be continued instead of the conversation.
    pub text: Option<String>,
    /// An answer ends before this, where there is something before it.
    pub stop: Option<String>,
    /// A prompt that is too long for the model has an empty answer, with `too_long` as the reason why it ended, instead
    /// of being an error; new tokens are as many as there is room for.
    pub may_be_too_long: bool,
}

/// Reads rows with `prompt` (text or messages).
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let rows = read_jsonl(path)?;
    if rows.is_empty() {
        bail!("{}: holds no rows", path.display());
    }
    let mut seen = std::collections::HashSet::new();
    rows.into_iter()
        .enumerate()
        .map(|(number, (line, row))| {
            let place = || format!("{}:{line}", path.display());
            let messages = match &row["prompt"] {
                Value::String(text) => json!([{"role": "user", "content": text}]),
                list @ Value::Array(_) => list.clone(),
                _ => bail!("{}: no column \"prompt\" with text or messages", place()),
            };
            let messages: Vec<Message> = serde_json::from_value(messages)
                .with_context(|| format!("{}: column \"prompt\"", place()))?;
            let id = row_id(row.get("id"), number);
            if !seen.insert(id.clone()) {
                bail!("{}: the id {id:?} stands twice; ids must be unique", place());
            }
            Ok(Prompt { id, messages, row, text: None, stop: None, may_be_too_long: false })
        })
        .collect()
}

/// The file of answers while it grows: finished rows are appended as they come, and at the end the file is
/// written in the order of the prompts.
pub struct Answers {
    path: PathBuf,
    samples: usize,
    done: HashMap<String, Value>,
    log: JsonlAppender,
}

impl Answers {
    /// Opens the file; answers made by an earlier run with the same settings to the same prompts are kept.
    pub fn open(path: &Path, settings: &Value, prompts: &[Prompt], samples: usize) -> Result<Self> {
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            fs::create_dir_all(dir).with_context(|| format!("{}: cannot create", dir.display()))?;
        }
        let mut name = path.as_os_str().to_owned();
        name.push(".settings.json");
        let settings_path = PathBuf::from(name);
        let (log, torn) = JsonlAppender::open(path)?;
        if torn > 0 {
            tell_line(&format!(
                "WARNING: the last answer was cut off by a crash ({torn} bytes); it is made again"
            ));
        }
        let rows = read_jsonl(path)?;
        let earlier = fs::read_to_string(&settings_path).ok();
        let earlier: Option<Value> = earlier.and_then(|text| serde_json::from_str(&text).ok());
        if !rows.is_empty() && earlier.as_ref() != Some(settings) {
            bail!(
                "{}: was made with another model or other settings ({} tells); choose another --out or delete it",
                path.display(),
                settings_path.display()
            );
        }
        let text = serde_json::to_string_pretty(settings)?;
        write_atomic(&settings_path, |out| out.write_all(text.as_bytes()))?;
        let known: HashMap<&str, &Value> =
            prompts.iter().map(|prompt| (prompt.id.as_str(), &prompt.row["prompt"])).collect();
        let mut done = HashMap::new();
        let rows = rows.into_iter().flat_map(|(line, row)| apart(row, samples).map(move |row| (line, row)));
        for (line, row) in rows {
            let id = row["id"].as_str().unwrap_or_default().to_string();
            if known.get(id.as_str()) != Some(&&row["prompt"]) {
                bail!(
                    "{}:{line}: the answer with id {id:?} is to a prompt that is not in the file of prompts; choose \
                     another --out",
                    path.display()
                );
            }
            done.insert(id, row);
        }
        Ok(Self { path: path.into(), samples, done, log })
    }

    /// True when the prompt has its answer.
    pub fn has(&self, id: &str) -> bool {
        self.done.contains_key(id)
    }

    /// Number of answers.
    pub fn len(&self) -> usize {
        self.done.len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.done.is_empty()
    }

    /// Adds an answer: columns beside those of its prompt.
    pub fn push(&mut self, prompt: &Prompt, columns: Vec<(&str, Value)>) -> Result<()> {
        let mut row = prompt.row.clone();
        row["id"] = prompt.id.clone().into();
        columns.into_iter().for_each(|(name, value)| row[name] = value);
        self.log.push(&row)?;
        self.done.insert(prompt.id.clone(), row);
        Ok(())
    }

    /// Puts the file into the order of the prompts, the samples of each into one row.
    pub fn finish(self, prompts: &[Prompt]) -> Result<()> {
        let rows: Vec<&Value> = prompts.iter().filter_map(|prompt| self.done.get(&prompt.id)).collect();
        if self.samples == 1 {
            return Ok(write_jsonl(&self.path, rows)?);
        }
        let rows: Vec<Value> = rows.chunks(self.samples).map(together).collect();
        Ok(write_jsonl(&self.path, &rows)?)
    }
}

/// Columns of an answer, and of the list of a prompt's samples.
const COLUMNS: [(&str, &str); 4] = [
    ("response", "responses"),
    ("finish_reason", "finish_reasons"),
    ("completion_tokens", "completion_tokens"),
    ("token_ids", "token_ids"),
];

/// The rows of a prompt's samples as one.
fn together(samples: &[&Value]) -> Value {
    let mut row = samples[0].clone();
    row["id"] = row["id"]
        .as_str()
        .and_then(|id| id.rsplit_once('#'))
        .map_or_else(String::new, |(id, _)| id.into())
        .into();
    if let Some(map) = row.as_object_mut() {
        COLUMNS.iter().for_each(|(one, _)| drop(map.remove(*one)));
    }
    for (one, all) in COLUMNS.into_iter().filter(|(one, _)| samples[0].get(one).is_some()) {
        row[all] = samples.iter().map(|sample| sample[one].clone()).collect();
    }
    row
}

/// The rows of a prompt's samples again, where they are together.
fn apart(row: Value, samples: usize) -> impl Iterator<Item = Value> {
    // A row of its own has `response`, and perhaps a list that came with its prompt.
    let is_together = samples > 1 && row["responses"].is_array() && row.get("response").is_none();
    (0..if is_together { samples } else { 1 }).map(move |i| {
        let mut one = row.clone();
        if is_together {
            one["id"] = sample_id(row["id"].as_str().unwrap_or_default(), i).into();
            if let Some(map) = one.as_object_mut() {
                COLUMNS.iter().for_each(|(_, all)| drop(map.remove(*all)));
            }
            let there = COLUMNS.iter().filter(|(_, all)| row.get(all).is_some());
            there.for_each(|(name, all)| one[*name] = row[*all][i].clone());
        }
        one
    })
}

fn sample_id(id: &str, sample: usize) -> String {
    format!("{id}#{sample}")
}

/// Every prompt as often as it is to be answered.
pub fn repeated(prompts: Vec<Prompt>, samples: usize) -> Vec<Prompt> {
    if samples == 1 {
        return prompts;
    }
    let all = prompts.into_iter().flat_map(|prompt| {
        (0..samples).map(move |i| Prompt { id: sample_id(&prompt.id, i), ..prompt.clone() })
    });
    all.collect()
}

/// Answers a file of prompts. `tell` gets `(answers, all, new tokens)`.
pub fn run(args: &SampleArgs, tell: impl FnMut(usize, usize, usize)) -> Result<Outcome> {
    check(args)?;
    run_on(args, read_prompts(&args.prompts)?, tell)
}

/// Answers these prompts, with a local model or a server.
pub fn run_on(
    args: &SampleArgs,
    prompts: Vec<Prompt>,
    mut tell: impl FnMut(usize, usize, usize),
) -> Result<Outcome> {
    check(args)?;
    let prompts = repeated(prompts, args.samples);
    let Some(endpoint) = &args.answering.endpoint else { return locally(args, &prompts, tell) };
    // Only fails when a provider is there already.
    rustls::crypto::ring::default_provider().install_default().ok();
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    runtime.block_on(served::run(args, endpoint, &prompts, |done, all| tell(done, all, 0)))
}

fn locally(
    args: &SampleArgs,
    prompts: &[Prompt],
    mut tell: impl FnMut(usize, usize, usize),
) -> Result<Outcome> {
    let now = template_time(args.answering.template_date);
    let local = Local::open(
        &args.model,
        &args.answering.device,
        &args.sampling,
        args.answering.chat_template.as_deref(),
        now,
    )?;
    let mut settings = json!({
        "model": args.model, "max_new_tokens": args.max_new_tokens, "samples": args.samples,
        "token_ids": args.token_ids,
    });
    settings["local"] = local.record()?;
    check_samples(args, local.sampling())?;
    let mut questions = Vec::new();
    let mut too_long = Vec::new();
    for (index, asked) in prompts.iter().enumerate() {
        let Prompt { id, stop, .. } = asked;
        let prompt = local.prompt(asked)?;
        let room = local.longest().saturating_sub(prompt.len());
        if asked.may_be_too_long && room == 0 {
            too_long.push(asked);
            continue;
        }
        let new = if asked.may_be_too_long { args.max_new_tokens.min(room) } else { args.max_new_tokens };
        local.check(&prompt, new, id)?;
        questions.push(Question { index, id: id.clone(), prompt, max_new_tokens: new, stop: stop.clone() });
    }
    let mut answers = Answers::open(&args.out, &settings, prompts, args.samples)?;
    for asked in too_long {
        if !answers.has(&asked.id) {
            let columns = [
                ("response", "".into()),
                ("finish_reason", "too_long".into()),
                ("completion_tokens", 0.into()),
            ];
            answers.push(asked, columns.into())?;
        }
    }
    questions.retain(|question| !answers.has(&question.id));
    let mut total = Progress::default();
    let started = std::time::Instant::now();
    let progress = std::cell::Cell::new(answers.len());
    let store = |answer: Answer| {
        progress.set(progress.get() + 1);
        let Answer { index, text, finish_reason, tokens } = answer;
        let mut columns = vec![
            ("response", text.into()),
            ("finish_reason", finish_reason.into()),
            ("completion_tokens", tokens.len().into()),
        ];
        if args.token_ids {
            columns.push(("token_ids", tokens.into()));
        }
        answers.push(&prompts[index], columns)
    };
    local.answer(questions, args.answering.batch_tokens, store, |step| {
        total.made += step.made;
        total.read += step.read;
        total.shared += step.shared;
        tell(progress.get(), prompts.len(), total.made);
    })?;
    let seconds = started.elapsed().as_secs_f64();
    tell_line(&format!(
        "{} new tokens in {seconds:.1} s, {:.1} a second; {} tokens of prompts read, {} shared",
        total.made,
        total.made as f64 / seconds,
        total.read,
        total.shared
    ));
    finish(answers, prompts)
}

/// A line for the user.
#[allow(clippy::print_stderr)]
pub fn tell_line(line: &str) {
    eprintln!("{line}");
}

/// Ends a run: complete files are put into order.
pub fn finish(answers: Answers, prompts: &[Prompt]) -> Result<Outcome> {
    let count = answers.len();
    if count < prompts.len() {
        return Ok(Outcome::Interrupted { answers: count, total: prompts.len() });
    }
    answers.finish(prompts)?;
    Ok(Outcome::Done { answers: count })
}

/// Checks the flags that do not depend on the model.
pub fn check(args: &SampleArgs) -> Result<()> {
    args.sampling.check()?;
    if args.max_new_tokens == 0 {
        bail!("--max-new-tokens must be at least 1");
    }
    if args.samples == 0 {
        bail!("--samples must be at least 1");
    }
    if args.sampling.generation_config { Ok(()) } else { check_samples(args, &args.sampling) }
}

fn check_samples(args: &SampleArgs, sampling: &SamplingArgs) -> Result<()> {
    if sampling.is_greedy() && args.samples > 1 {
        bail!("--samples needs --temperature above 0, or all answers to a prompt would be the same");
    }
    Ok(())
}
