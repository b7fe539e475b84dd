//! The whole run: read answers, get a reply to each, parse, write.

use std::collections::HashMap;
use std::fs;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use chat_client::{ChatMessage, ChatRequest, Client, Error, Reply, ReplyStore, Settings, Source, api_key};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::task::JoinSet;

use crate::args::{Args, Resume};
use crate::input::{self, Answer};
use crate::output::{self, Failed, Pair};
use crate::parse::parse_reply;
use crate::prompt::{CLAIR, Prompt};
use crate::replay::Replay;
use crate::report::{self, Report};

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The output directory is complete.
    Done(Report),
    /// Stopped by the user; everything that was answered is stored.
    Interrupted {
        /// Answers that have their reply.
        answered: usize,
        /// All answers.
        total: usize,
    },
}

/// What became of one answer.
enum Row {
    Pair(Box<Pair>),
    Failed(Failed),
    Skipped,
}

/// One answer's result with the number of replies that were new and that were stored.
struct Finished {
    index: usize,
    row: Row,
    from_server: usize,
    from_store: usize,
}

/// Makes the pairs. `interrupted` resolves when the user wants to stop.
pub async fn generate(
    args: &Args,
    interrupted: impl Future<Output = ()> + Send + 'static,
) -> Result<Outcome> {
    for (name, value) in [("temperature", args.temperature), ("top-p", args.top_p)] {
        if value.is_some_and(|value| !value.is_finite() || value < 0.0) {
            bail!("--{name} must be a number of 0 or more");
        }
    }
    let answers = input::read(&args.input)?;
    fs::create_dir_all(&args.out).with_context(|| format!("{}: cannot create", args.out.display()))?;
    let finished = match &args.replay {
        Some(path) => replayed(&Replay::read(path)?, answers.clone()),
        None => asked(args, answers.clone(), interrupted).await?,
    };
    let answered = finished.iter().filter(|f| !matches!(f.row, Row::Skipped)).count();
    if answered < answers.len() {
        return Ok(Outcome::Interrupted { answered, total: answers.len() });
    }
    let from_server = finished.iter().map(|f| f.from_server).sum();
    let from_store = finished.iter().map(|f| f.from_store).sum();
    let mut by_index: HashMap<usize, Row> = finished.into_iter().map(|f| (f.index, f.row)).collect();
    let (mut pairs, mut failed) = (Vec::new(), Vec::new());
    for index in 0..answers.len() {
        match by_index.remove(&index) {
            Some(Row::Pair(pair)) => pairs.push(*pair),
            Some(Row::Failed(failure)) => failed.push(failure),
            Some(Row::Skipped) | None => bail!("row {index} was lost; this is a bug"),
        }
    }
    // The manifest says that the rest is whole: it goes before anything is replaced.
    match fs::remove_file(args.out.join("manifest.json")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error)
                .with_context(|| format!("{}: cannot replace manifest.json", args.out.display()));
        }
        _ => {}
    }
    let report = report::summarize(&pairs, &failed, from_store, from_server);
    report::write(&args.out, &report, &pairs, &failed)?;
    let about = json!({
        "tool": concat!("clair-gen ", env!("CARGO_PKG_VERSION")),
        "method": "clair",
        "input": args.input,
        "endpoint": args.endpoint,
        "model": args.model,
        "replay": args.replay,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
    });
    output::write(&args.out, &pairs, &failed, &about)?;
    Ok(Outcome::Done(report))
}

fn replayed(replay: &Replay, answers: Vec<Answer>) -> Vec<Finished> {
    let row = |answer: Answer| match replay.get(&answer) {
        Some(reply) => judge(answer, reply, 0, 1),
        None => Row::Failed(Failed {
            id: answer.id,
            reason: "not_recorded".into(),
            attempts: 0,
            last_error: "the replay file holds no reply to this prompt and answer".into(),
        }),
    };
    let finished = |(index, answer)| Finished { index, row: row(answer), from_server: 0, from_store: 1 };
    answers.into_iter().enumerate().map(finished).collect()
}

fn judge(answer: Answer, reply: &Reply, latency_ms: u64, attempts: u32) -> Row {
    match parse_reply(reply, &answer.response) {
        Ok(revision) => Row::Pair(Box::new(Pair {
            revision,
            finish_reason: reply.finish_reason().into(),
            usage: reply.usage(),
            latency_ms,
            answer,
        })),
        Err(reason) => Row::Failed(Failed {
            id: answer.id,
            reason: reason.name().into(),
            attempts,
            last_error: reply.content().chars().take(200).collect(),
        }),
    }
}

async fn asked(
    args: &Args,
    answers: Vec<Answer>,
    interrupted: impl Future<Output = ()> + Send + 'static,
) -> Result<Vec<Finished>> {
    let teacher = Arc::new(Teacher::new(args)?);
    let stopper = teacher.clone();
    let listener = tokio::spawn(async move {
        interrupted.await;
        stopper.client.close();
    });
    let progress = Progress::new(answers.len());
    let mut tasks = JoinSet::new();
    for (index, answer) in answers.into_iter().enumerate() {
        let teacher = teacher.clone();
        tasks.spawn(async move { teacher.revise(index, answer).await });
    }
    let mut finished = Vec::new();
    let mut fatal = None;
    while let Some(result) = tasks.join_next().await {
        match result.context("a task panicked; this is a bug")? {
            Ok(done) => {
                progress.tell(&done.row);
                finished.push(done);
            }
            // One row's setup error is everyone's: stop, but let what is in flight be stored.
            Err(error) => {
                teacher.client.close();
                fatal.get_or_insert(error);
            }
        }
    }
    listener.abort();
    progress.finish();
    match fatal {
        Some(error) => Err(error),
        None => Ok(finished),
    }
}

/// The teacher: how an answer is put to it, and how often.
struct Teacher {
    client: Client,
    prompt: Prompt,
    request: ChatRequest,
    form_retries: u32,
}

impl Teacher {
    fn new(args: &Args) -> Result<Self> {
        let endpoint = args.endpoint.clone().context("--endpoint is required")?;
        let model = args.model.clone().context("--model is required with --endpoint")?;
        let source = match &args.prompt_file {
            Some(path) => {
                fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?
            }
            None => CLAIR.to_string(),
        };
        let seconds = |value: Option<f64>, default: f64, name: &str| {
            Duration::try_from_secs_f64(value.unwrap_or(default))
                .with_context(|| format!("--{name} is no duration"))
        };
        let settings = Settings {
            endpoint,
            api_key: api_key(args.api_key_env.as_deref())?,
            max_in_flight: args.max_in_flight.unwrap_or(32).max(1),
            retries: args.retries.unwrap_or(8),
            timeout: seconds(args.timeout, 600.0, "timeout")?,
            backoff: seconds(args.backoff, 0.5, "backoff")?,
        };
        let (store, torn) = ReplyStore::open(&args.out.join("replies"))?;
        if torn > 0 {
            tracing::warn!(
                "the last stored reply was cut off by a crash ({torn} bytes); it will be asked for again"
            );
        }
        if args.resume == Resume::Never && !store.is_empty() {
            bail!(
                "{}: holds {} stored replies and --resume never was given; choose another --out or leave it out",
                args.out.display(),
                store.len()
            );
        }
        let request = ChatRequest {
            model,
            messages: Vec::new(),
            temperature: args.temperature,
            top_p: args.top_p,
            max_tokens: args.max_tokens,
            seed: args.seed,
            sample: 0,
        };
        Ok(Self {
            client: Client::new(settings, store)?,
            prompt: Prompt::new(&source)?,
            request,
            form_retries: args.form_retries.unwrap_or(4),
        })
    }

    /// Asks until a reply keeps to the form, the retries are used up, or nothing more can be asked.
    async fn revise(&self, index: usize, answer: Answer) -> Result<Finished> {
        let content = self.prompt.render(&answer)?;
        let messages = vec![ChatMessage { role: "user".into(), content }];
        let mut finished = Finished { index, row: Row::Skipped, from_server: 0, from_store: 0 };
        for sample in 0..=self.form_retries {
            let request = ChatRequest { messages: messages.clone(), sample, ..self.request.clone() };
            let stored = match self.client.complete(&request).await {
                Ok(Some(stored)) => stored,
                // Interrupted before it could be asked: an earlier failure of form stands no more.
                Ok(None) => {
                    finished.row = Row::Skipped;
                    break;
                }
                Err(error) if error.is_setup() => return Err(explain(error)),
                Err(error) => {
                    finished.row = Row::Failed(Failed {
                        id: answer.id.clone(),
                        reason: "request_failed".into(),
                        attempts: error.attempts(),
                        last_error: error.to_string(),
                    });
                    break;
                }
            };
            match stored.source {
                Source::Server => finished.from_server += 1,
                Source::Store => finished.from_store += 1,
            }
            finished.row = judge(answer.clone(), &stored.reply, stored.latency_ms, sample + 1);
            let form = parse_reply(&stored.reply, &answer.response).is_err_and(crate::parse::Reason::is_form);
            if !form {
                break;
            }
        }
        Ok(finished)
    }
}

fn explain(error: Error) -> anyhow::Error {
    let hint = match &error {
        Error::Refused { status: 401 | 403, .. } => {
            "check the key in the environment variable (--api-key-env)"
        }
        Error::Refused { status: 404, .. } => "check --endpoint (it should end in /v1) and --model",
        Error::GaveUp { .. } => "is the server running, and is --endpoint right?",
        _ => return error.into(),
    };
    anyhow::Error::new(error).context(format!("the run cannot go on; {hint}"))
}

struct Progress {
    bar: Option<ProgressBar>,
    total: usize,
    counts: std::cell::Cell<(usize, usize)>,
}

impl Progress {
    fn new(total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("revise {bar:30} {pos}/{len} [{elapsed} < {eta}] {msg}");
            ProgressBar::new(total as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, total, counts: std::cell::Cell::new((0, 0)) }
    }

    #[allow(clippy::print_stderr)]
    fn tell(&self, row: &Row) {
        let (mut done, mut failed) = self.counts.get();
        match row {
            Row::Pair(_) => done += 1,
            Row::Failed(_) => failed += 1,
            Row::Skipped => {}
        }
        self.counts.set((done, failed));
        if let Some(bar) = &self.bar {
            bar.set_position((done + failed) as u64);
            bar.set_message(format!("{failed} failed"));
        } else if (done + failed).is_multiple_of((self.total / 20).max(1)) {
            eprintln!("revise {}/{} | {failed} failed", done + failed, self.total);
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
