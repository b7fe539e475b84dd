//! The whole run: read rows, make a pair of each, write.

use std::collections::VecDeque;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use chat_client::{Closed, Counts};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::args::{Args, Method};
use crate::asker::Spent;
use crate::estimate::Estimate;
use crate::input::{self, Answer};
use crate::methods::{Methods, Row};
use crate::output::{self, Failed, Pair};
use crate::progress::Progress;
use crate::replay::Replay;
use crate::report::{self, Report};
use crate::setup;

/// Rows that are begun at a time: enough to keep every call in flight busy, few enough to fit in memory.
const BEGUN: usize = 4096;

/// Rows before a failure rate means anything.
const FEW: usize = 20;

/// Calls in flight that count as if they went well: failures often come faster than replies.
const EXCUSED: usize = 200;

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The output directory is complete.
    Done(Vec<Finished>),
    /// Stopped by the user, or at the most that may be spent; everything that was answered is stored.
    Stopped {
        /// Rows that are done.
        done: usize,
        /// All rows.
        total: usize,
        /// The money was the reason.
        cost: bool,
    },
    /// `--batch-cancel`.
    Cancelled {
        /// Batches that the server was asked to cancel.
        batches: usize,
    },
    /// `--dry-run`: what the run would take.
    Planned(Estimate),
}

/// The set of one method.
#[derive(Debug)]
pub struct Finished {
    /// How it was made.
    pub method: Method,
    /// Where it is.
    pub dir: PathBuf,
    /// What it holds.
    pub report: Report,
}

/// One row of one method, done.
struct Done {
    place: (usize, usize),
    row: Row,
    spent: Spent,
}

/// Makes the pairs. `interrupted` resolves when the user wants to stop.
pub async fn generate(
    args: &Args,
    interrupted: impl Future<Output = ()> + Send + 'static,
) -> Result<Outcome> {
    let answers: Vec<Arc<Answer>> =
        input::read(&args.input, &args.method)?.into_iter().map(Arc::new).collect();
    setup::check(args, &answers)?;
    fs::create_dir_all(&args.out).with_context(|| format!("{}: cannot create", args.out.display()))?;
    let methods = setup::methods(args).await?;
    if let Some(asker) = &methods.asker {
        if args.server.batch_cancel {
            return Ok(Outcome::Cancelled { batches: asker.client.cancel_batches().await? });
        }
        let estimate = Estimate::new(&methods, asker, &args.method, &answers)?;
        if args.dry_run {
            return Ok(Outcome::Planned(estimate));
        }
        tell(&estimate.to_string());
    }
    let methods = Arc::new(methods);
    let (done, counts) = match &args.replay {
        Some(path) => (replayed(&methods, &Replay::read(path)?, answers.clone()), Counts::default()),
        None => asked(args, &methods, &answers, interrupted).await?,
    };
    let total = answers.len() * args.method.len();
    let finished = done.iter().filter(|done| !matches!(done.row, Row::Stopped)).count();
    if finished < total {
        let cost = methods.asker.as_ref().is_some_and(|asker| asker.client.closed() == Closed::Cost);
        return Ok(Outcome::Stopped { done: finished, total, cost });
    }
    write(args, done, &counts)
}

#[allow(clippy::print_stderr)]
fn tell(line: &str) {
    eprintln!("{line}");
}

fn write(args: &Args, mut done: Vec<Done>, counts: &Counts) -> Result<Outcome> {
    done.sort_unstable_by_key(|done| done.place);
    let mut sets: Vec<(Vec<Pair>, Vec<Failed>, Spent)> =
        args.method.iter().map(|_| Default::default()).collect();
    for Done { place, row, spent } in done {
        let (pairs, failed, all) = &mut sets[place.0];
        all.usage += spent.usage;
        all.cost += spent.cost;
        all.from_server += spent.from_server;
        all.from_store += spent.from_store;
        match row {
            Row::Pair(pair) => pairs.push(*pair),
            Row::Failed(failure) => failed.push(failure),
            Row::Stopped => bail!("row {} was lost; this is a bug", place.1),
        }
    }
    let mut finished = Vec::new();
    for (&method, (pairs, failed, spent)) in args.method.iter().zip(sets) {
        let dir = if args.method.len() > 1 { args.out.join(method.name()) } else { args.out.clone() };
        fs::create_dir_all(&dir).with_context(|| format!("{}: cannot create", dir.display()))?;
        // The manifest says that the rest is whole: it goes before anything is replaced.
        match fs::remove_file(dir.join("manifest.json")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("{}: cannot replace manifest.json", dir.display()));
            }
            _ => {}
        }
        let report = Report::new(method, &pairs, &failed, spent, counts);
        report::write(&dir, &report, &pairs, &failed)?;
        output::write(&dir, method, &pairs, &failed, &about(args, method))?;
        finished.push(Finished { method, dir, report });
    }
    Ok(Outcome::Done(finished))
}

fn about(args: &Args, method: Method) -> Value {
    json!({
        "tool": concat!("clair-gen ", env!("CARGO_PKG_VERSION")),
        "method": method.name(),
        "input": args.input,
        "endpoint": args.server.endpoint,
        "model": args.server.model,
        "judge_model": args.asking.judge_model,
        "replay": args.replay,
        "temperature": args.asking.temperature,
        "top_p": args.asking.top_p,
        "max_tokens": args.asking.max_tokens,
        "seed": args.asking.seed,
    })
}

fn replayed(methods: &Methods, replay: &Replay, answers: Vec<Arc<Answer>>) -> Vec<Done> {
    let done = |(index, answer): (usize, Arc<Answer>)| {
        let mut spent = Spent { from_store: 1, ..Spent::default() };
        let row = methods.gated(replay.row(answer, &mut spent));
        Done { place: (0, index), row, spent }
    };
    answers.into_iter().enumerate().map(done).collect()
}

/// Rows with their methods, in the order in which they are begun.
type Waiting = VecDeque<(usize, usize)>;

async fn asked(
    args: &Args,
    methods: &Arc<Methods>,
    answers: &[Arc<Answer>],
    interrupted: impl Future<Output = ()> + Send + 'static,
) -> Result<(Vec<Done>, Counts)> {
    let stopper = methods.clone();
    let listener = tokio::spawn(async move {
        interrupted.await;
        if let Some(asker) = &stopper.asker {
            asker.client.close();
        }
    });
    // Row by row, so that a set of every method is there for the rows that are.
    let mut waiting: Waiting =
        (0..answers.len()).flat_map(|row| (0..args.method.len()).map(move |method| (method, row))).collect();
    let mut run = Run::new(args, methods, waiting.len());
    let mut tasks = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    loop {
        let limit = run.counts().limit;
        // A few more than may be in flight keep every call busy.
        let most = if args.server.batch_api { usize::MAX } else { (limit + limit / 16 + 64).min(BEGUN) };
        while tasks.len() < most
            && let Some(place) = waiting.pop_front()
        {
            let (methods, method, answer) = (methods.clone(), args.method[place.0], answers[place.1].clone());
            tasks.spawn(async move {
                let mut spent = Spent::default();
                let row = methods.make(method, answer, &mut spent).await;
                row.map(|row| Done { place, row, spent })
            });
        }
        tokio::select! {
            joined = tasks.join_next() => match joined {
                Some(result) => run.take(result.context("a task panicked; this is a bug")?),
                None => break,
            },
            _ = ticks.tick() => run.tell(),
        }
    }
    listener.abort();
    run.finish()
}

/// What has come in so far.
struct Run<'a> {
    methods: &'a Methods,
    done: Vec<Done>,
    progress: Progress,
    most_failures: f64,
    tried: usize,
    failures: usize,
    fatal: Option<anyhow::Error>,
}

impl<'a> Run<'a> {
    fn new(args: &Args, methods: &'a Methods, total: usize) -> Self {
        Self {
            methods,
            done: Vec::with_capacity(total),
            progress: Progress::new(total),
            most_failures: args.max_failure_rate.unwrap_or(0.5),
            tried: 0,
            failures: 0,
            fatal: None,
        }
    }

    fn counts(&self) -> Counts {
        self.methods.asker.as_ref().map(|asker| asker.client.counts()).unwrap_or_default()
    }

    fn tell(&mut self) {
        let counts = self.counts();
        self.progress.tell(&counts);
    }

    fn take(&mut self, result: Result<Done>) {
        match result {
            Ok(done) => {
                self.progress.count(&done.row, done.spent.from_server > 0);
                self.watch(&done);
                self.done.push(done);
            }
            Err(error) => self.stop(error),
        }
    }

    /// One row's wrong set-up is everyone's: stop, but let what is in flight be stored.
    fn stop(&mut self, error: anyhow::Error) {
        if let Some(asker) = &self.methods.asker {
            asker.client.close();
        }
        self.fatal.get_or_insert(error);
    }

    /// Whether so many rows fail that the set-up must be wrong. Calls in flight may still go well, and what a gate or
    /// a judge refuses is no failure.
    fn watch(&mut self, done: &Done) {
        self.tried += 1;
        let Row::Failed(failed) = &done.row else { return };
        if failed.attempts == 0 {
            return;
        }
        self.failures += 1;
        let all = self.tried + self.counts().in_flight.min(EXCUSED);
        let share = self.failures as f64 / all as f64;
        if self.tried >= FEW && share > self.most_failures {
            let error = anyhow::anyhow!(
                "{} of {} rows failed, more than --max-failure-rate {} allows; the last one: {} ({}); what was \
                 answered is stored: mend the cause and run the same command again, with --retry-failed for replies \
                 that could not be used",
                self.failures,
                self.tried,
                self.most_failures,
                failed.reason,
                failed.last_error
            );
            self.stop(error);
        }
    }

    fn finish(self) -> Result<(Vec<Done>, Counts)> {
        let counts = self.counts();
        self.progress.finish();
        match self.fatal {
            Some(error) => Err(error),
            None => Ok((self.done, counts)),
        }
    }
}
