//! The `clair-gen` command.

use std::process::ExitCode;

use clair_gen::args::Args;
use clair_gen::run::{Finished, Outcome, generate};
use clap::Parser;
use tracing_subscriber::EnvFilter;

// One thread for the requests, which need little, beside this one; two would wake each other all the time.
#[tokio::main(worker_threads = 1)]
#[allow(clippy::print_stderr, clippy::print_stdout)]
async fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    // Only fails when a provider is there already.
    rustls::crypto::ring::default_provider().install_default().ok();
    match generate(&args, interrupted()).await {
        Ok(Outcome::Done(sets)) => done(&sets),
        Ok(Outcome::Planned(estimate)) => {
            println!("{estimate}");
            ExitCode::SUCCESS
        }
        Ok(Outcome::Cancelled { batches }) => {
            println!(
                "{batches} batches are being cancelled; what they have finished is fetched by the next run"
            );
            ExitCode::SUCCESS
        }
        Ok(Outcome::Stopped { done, total, cost: true }) => {
            eprintln!(
                "stopped before --max-cost would be passed: {done} of {total} rows are done and stored; run the same \
                 command with a higher --max-cost to go on"
            );
            ExitCode::from(1)
        }
        Ok(Outcome::Stopped { done, total, cost: false }) => {
            eprintln!("interrupted: {done} of {total} answered and stored; run the same command to go on");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(1)
        }
    }
}

/// Resolves at the first Ctrl-C; the second one ends the process.
#[allow(clippy::print_stderr)]
async fn interrupted() {
    tokio::signal::ctrl_c().await.ok();
    eprintln!("interrupt: waiting for the requests in flight; press Ctrl-C again to stop at once");
    tokio::spawn(async {
        tokio::signal::ctrl_c().await.ok();
        std::process::exit(130);
    });
}

#[allow(clippy::print_stderr)]
fn done(sets: &[Finished]) -> ExitCode {
    for Finished { method, dir, report } in sets {
        let cost = match (report.cost, report.cost_now) {
            (Some(all), Some(now)) => format!(", ${all:.2} in all, ${now:.2} of it now"),
            _ => String::new(),
        };
        eprintln!(
            "{}: {} pairs, {} failed ({} new replies, {} recorded or stored before{cost}) in {}",
            method.name(),
            report.pairs,
            report.failed,
            report.from_server,
            report.from_store,
            dir.display()
        );
        for (reason, count) in &report.reasons {
            eprintln!("  {reason}: {count}");
        }
        if report.pairs == 0 {
            eprintln!("error: no pair could be made; see {}", dir.join("failed.jsonl").display());
        }
    }
    if sets.iter().any(|set| set.report.pairs == 0) { ExitCode::from(1) } else { ExitCode::SUCCESS }
}
