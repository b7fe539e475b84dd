//! The `clair-gen` command.

use std::process::ExitCode;

use clair_gen::args::Args;
use clair_gen::run::{Outcome, generate};
use clap::Parser;
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
#[allow(clippy::print_stderr)]
async fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    // Only fails when a provider is there already.
    rustls::crypto::ring::default_provider().install_default().ok();
    let interrupted = async {
        tokio::signal::ctrl_c().await.ok();
        eprintln!("interrupt: waiting for the requests in flight; press Ctrl-C again to stop at once");
        tokio::spawn(async {
            tokio::signal::ctrl_c().await.ok();
            std::process::exit(130);
        });
    };
    match generate(&args, interrupted).await {
        Ok(Outcome::Done(report)) => {
            let replies = format!(
                "{} new replies, {} recorded or stored before",
                report.from_server, report.from_store
            );
            eprintln!(
                "{} pairs, {} failed ({replies}) in {}",
                report.pairs,
                report.failed,
                args.out.display()
            );
            for (reason, count) in &report.reasons {
                eprintln!("  {reason}: {count}");
            }
            if report.pairs == 0 {
                eprintln!("error: no pair could be made; see {}", args.out.join("failed.jsonl").display());
                return ExitCode::from(1);
            }
            ExitCode::SUCCESS
        }
        Ok(Outcome::Interrupted { answered, total }) => {
            eprintln!(
                "interrupted: {answered} of {total} answered and stored; run the same command to go on"
            );
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(1)
        }
    }
}
