//! The `trainer` command.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::Parser;
use trainer::args::{Args, kebab};
use trainer::profile::Profile;
use trainer::recipe;
use trainer::run::run;
use trainer::settings::Settings;
use trainer::train::{INTERRUPTED, Outcome, TRAINING};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

#[allow(clippy::print_stderr, clippy::print_stdout)]
fn main() -> ExitCode {
    allocator::keep_freed_memory();
    // Without what a run needs.
    if kebab(std::env::args_os()).iter().any(|arg| arg == "--list-devices") {
        println!("{}", backend::devices().join("\n"));
        return ExitCode::SUCCESS;
    }
    let args = match recipe::expand(kebab(std::env::args_os()), &mut |line| eprintln!("{line}")) {
        Ok(args) => Args::parse_from(args),
        Err(reason) => {
            eprintln!("error: {reason}");
            return ExitCode::from(2);
        }
    };
    let (inspect, profile) = (args.inspect, args.profile.clone());
    let settings = match Settings::new(args) {
        Ok(settings) => settings,
        Err(reason) => {
            eprintln!("error: {reason}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = handle_signals() {
        eprintln!("warning: no handling of Ctrl-C: {error}");
    }
    match profiled(&settings, inspect, profile.as_deref()) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => {
            eprintln!("hint: go on with --resume-from-checkpoint auto");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(1)
        }
    }
}

/// The run, with a profile where one is wanted.
#[allow(clippy::print_stderr)]
fn profiled(settings: &Settings, inspect: Option<usize>, profile: Option<&Path>) -> anyhow::Result<Outcome> {
    let profile = profile.map(Profile::start).transpose()?;
    // On one of the threads that compute: work that is handed to them from outside waits for two of them to wake up.
    let outcome = rayon::scope(|_| run(settings, inspect));
    // Whatever became of the run, and without changing it.
    match profile.map(Profile::finish).transpose() {
        Ok(lines) => lines.into_iter().flatten().for_each(|line| eprintln!("{line}")),
        Err(error) => eprintln!("WARNING: {error:#}"),
    }
    outcome
}

/// Before the first step there is nothing to save, and a second Ctrl-C ends the process at once.
#[allow(clippy::print_stderr)]
fn stop() {
    if INTERRUPTED.swap(true, Ordering::Relaxed) || !TRAINING.load(Ordering::Relaxed) {
        std::process::exit(130);
    }
    eprintln!("interrupt: finishing this step and saving; press Ctrl-C again to stop at once");
}

/// Ctrl-C, and SIGTERM, which schedulers send. SIGHUP is left as it is: `nohup` ignores it.
fn handle_signals() -> anyhow::Result<()> {
    ctrlc::set_handler(stop)?;
    #[cfg(unix)]
    {
        let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM])?;
        std::thread::spawn(move || signals.forever().for_each(|_| stop()));
    }
    Ok(())
}
