//! The `eval` command.

use std::cell::{Cell, RefCell};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use eval::args::{Cli, Command, MixevalArgs, SampleArgs};
use eval::sample::{INTERRUPTED, Outcome};
use eval::{choices, compare, data, mixeval, pairs, recommend, run, sample};
use indicatif::{ProgressBar, ProgressStyle};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

#[allow(clippy::print_stderr, clippy::print_stdout)]
fn main() -> ExitCode {
    allocator::keep_freed_memory();
    if std::env::args_os().any(|arg| arg == "--list-devices") {
        println!("{}", backend::devices().join("\n"));
        return ExitCode::SUCCESS;
    }
    let cli = Cli::parse();
    if let Command::Sample(SampleArgs { answering, .. }) | Command::Mixeval(MixevalArgs { answering, .. }) =
        &cli.command
        && answering.endpoint.is_some()
        && answering.device.is_given()
    {
        let reason =
            "--backend, --device and --dtype are of a local model; with --endpoint the server decides";
        Cli::command().error(ErrorKind::ArgumentConflict, reason).exit();
    }
    // A second Ctrl-C ends the process at once.
    let handler = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("interrupt: saving what is done; press Ctrl-C again to stop at once");
    });
    if let Err(error) = handler {
        eprintln!("warning: no Ctrl-C handling: {error}");
    }
    match execute(&cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if INTERRUPTED.load(Ordering::Relaxed) { 130 } else { 1 })
        }
    }
}

#[allow(clippy::print_stderr)]
fn execute(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Sample(args) => match answer(args)? {
            Outcome::Done { answers } => {
                eprintln!("{answers} answers in {}", args.out.display());
                Ok(ExitCode::SUCCESS)
            }
            Outcome::Interrupted { answers, total } => {
                eprintln!(
                    "interrupted: {answers} of {total} answers are saved; run the same command to go on"
                );
                Ok(ExitCode::from(130))
            }
        },
        Command::Mixeval(args) => {
            let progress = Progress::new();
            let told = mixeval::run(args, |done, all, tokens| progress.tell(done, all, tokens))?;
            show(told.ok(), &args.out)
        }
        Command::Choices(args) => show(Some(choices::run(args, |text| eprintln!("{text}"))?), &args.out),
        Command::Compare(args) => show(compare::run(args)?, &args.out),
        Command::Recommend(args) => {
            let progress = Progress::new();
            show(recommend::run(args, |done, all, tokens| progress.tell(done, all, tokens))?, &args.out)
        }
        Command::Pairs(args) => show(Some(pairs::run(args, |text| eprintln!("{text}"))?), &args.out),
        Command::Run(args) => {
            let out = args.out.as_ref().unwrap_or(&args.run);
            show(Some(run::run(args, |text| eprintln!("{text}"))?), out)
        }
        Command::Data(args) => show(Some(data::run(args, |text| eprintln!("{text}"))?), &args.out),
    }
}

/// Prints a result, or that the run was interrupted, and where the report is.
#[allow(clippy::print_stderr)]
fn show(told: Option<String>, out: &Path) -> Result<ExitCode> {
    let Some(text) = told else {
        eprintln!("interrupted: what is done is saved; run the same command to go on");
        return Ok(ExitCode::from(130));
    };
    writeln!(std::io::stdout(), "{text}").context("stdout")?;
    eprintln!("report: {}", out.join("report.html").display());
    Ok(ExitCode::SUCCESS)
}

fn answer(args: &SampleArgs) -> Result<Outcome> {
    let progress = Progress::new();
    sample::run(args, |done, all, tokens| progress.tell(done, all, tokens))
}

/// A bar on a terminal, a line every few seconds elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    /// When the first step was done, which reading the model is not part of, and the tokens then.
    begun: Cell<Option<(Instant, usize)>>,
    last: RefCell<Instant>,
}

impl Progress {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("sample {bar:30} {pos}/{len} [{elapsed} < {eta}] {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, begun: Cell::new(None), last: RefCell::new(Instant::now()) }
    }

    #[allow(clippy::print_stderr)]
    fn tell(&self, done: usize, all: usize, tokens: usize) {
        let (begun, before) = self.begun.get().unwrap_or_else(|| {
            let now = (Instant::now(), tokens);
            self.begun.set(Some(now));
            now
        });
        let speed = tokens.saturating_sub(before) as f64 / begun.elapsed().as_secs_f64().max(1e-3);
        if let Some(bar) = &self.bar {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
            bar.set_message(format!("{speed:.0} tokens/s"));
        } else if self.last.borrow().elapsed().as_secs() >= 5 {
            *self.last.borrow_mut() = Instant::now();
            eprintln!("sample {done}/{all} | {speed:.0} tokens/s");
        }
    }
}
