//! The `trainer` command.

mod allocator;

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::Parser;
use trainer::args::{Args, kebab};
use trainer::recipe;
use trainer::run::run;
use trainer::settings::Settings;
use trainer::train::{INTERRUPTED, Outcome, TRAINING};

#[allow(clippy::print_stderr)]
fn main() -> ExitCode {
    allocator::keep_freed_memory();
    let args = match recipe::expand(kebab(std::env::args_os()), &mut |line| eprintln!("{line}")) {
        Ok(args) => Args::parse_from(args),
        Err(reason) => {
            eprintln!("error: {reason}");
            return ExitCode::from(2);
        }
    };
    let inspect = args.inspect;
    let settings = match Settings::new(args) {
        Ok(settings) => settings,
        Err(reason) => {
            eprintln!("error: {reason}");
            return ExitCode::from(2);
        }
    };
    // Before the first step there is nothing to save, and a second Ctrl-C ends the process at once.
    let handler = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) || !TRAINING.load(Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("interrupt: finishing this step and saving; press Ctrl-C again to stop at once");
    });
    if let Err(error) = handler {
        eprintln!("warning: no Ctrl-C handling: {error}");
    }
    match run(&settings, inspect) {
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
