//! Tokenizes preference data into a cache directory and tells how fast: what `cargo xtask bench data` runs.

#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use pref_data::{Dataset, Error, Source, Tokenizer, tokenize};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [model, file, cache] = args.as_slice() else {
        println!("usage: tokenize MODEL FILE CACHE");
        return ExitCode::from(2);
    };
    match run(model, file, cache) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(model: &Path, file: &Path, cache: &Path) -> Result<(), Error> {
    let started = Instant::now();
    let tokenizer = Tokenizer::load(model, None, jiff::civil::DateTime::MIN)?;
    let loaded = started.elapsed().as_secs_f64();
    let source = Source { files: vec![file.into()], ..Source::default() };
    let tokenized = tokenize(&source, &tokenizer, cache, &|_| {})?;
    let dataset = Dataset::whole(tokenized.set, Some(1024));
    let seconds = started.elapsed().as_secs_f64();
    let tokens: usize = (0..dataset.len()).map(|i| dataset.lengths(i).both(false)).sum();
    println!(
        "{}",
        serde_json::json!({
            "rows": dataset.len(), "tokens": tokens, "seconds": seconds, "load_seconds": loaded,
            "rows_per_second": dataset.len() as f64 / (seconds - loaded), "cached": tokenized.cached,
            "fast": tokenizer.is_fast(), "warnings": tokenized.warnings, "peak_bytes": peak_memory(),
        })
    );
    Ok(())
}

/// Largest resident memory so far, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
