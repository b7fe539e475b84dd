//! `fuzz`: the readers of foreign bytes under libFuzzer.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::cargo::root;
use crate::report;

const TARGETS: [&str; 5] = ["rows", "parquet", "template", "tokens", "card"];

/// `fuzz [TARGET ...] [--seconds N]`: each target for so long (60 s), all of them where none is named.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let (mut seconds, mut targets) = ("60", Vec::new());
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--seconds" => seconds = rest.next().context("--seconds needs a value")?,
            target if TARGETS.contains(&target) => targets.push(target),
            other => bail!("unknown target {other:?}; there are {}", TARGETS.join(", ")),
        }
    }
    if targets.is_empty() {
        targets = TARGETS.to_vec();
    }
    for target in targets {
        report(&format!("fuzzing {target} for {seconds} s"));
        let crate_dir = root().join("crates/pref-data");
        let corpus = crate_dir.join("fuzz/corpus").join(target);
        std::fs::create_dir_all(&corpus)?;
        let mut command = Command::new("cargo");
        // The toolchain file pins a stable compiler; the fuzzer needs a nightly one.
        command.current_dir(crate_dir).env("RUSTUP_TOOLCHAIN", "nightly");
        command.args(["fuzz", "run", target, "--"]).arg(format!("-max_total_time={seconds}"));
        command.args(["-timeout=20", "-rss_limit_mb=4096", "-print_final_stats=1"]);
        let hint =
            "cannot run cargo (needs `cargo install cargo-fuzz` and `rustup toolchain install nightly`)";
        if !command.status().context(hint)?.success() {
            bail!(
                "{target}: the fuzzer found something, see crates/pref-data/fuzz/artifacts (or could not be built)"
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
