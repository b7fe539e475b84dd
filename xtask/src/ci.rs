//! `ci`: what CI runs, cheapest checks first.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::cargo::{cargo, root};
use crate::{demo, report, tidy};

/// Runs every check; the first failure ends it.
pub fn run(args: &[String]) -> Result<ExitCode> {
    if let Some(extra) = args.first() {
        bail!("ci takes no arguments, found {extra:?}");
    }
    let started = Instant::now();
    step("tidy", tidy::check)?;
    step("fmt", || checked(&["fmt", "--all"], &["--check"]))?;
    let release = ["--workspace", "--release", "--locked"];
    step("clippy", || {
        checked(&[&["clippy"], release.as_slice(), &["--all-targets"]].concat(), &["-D", "warnings"])
    })?;
    step("tests", || checked(&[&["test"], release.as_slice()].concat(), &[]))?;
    step("docs", || checked(&[&["doc"], release.as_slice(), &["--no-deps"]].concat(), &[]))?;
    step("demo", check_demo)?;
    report(&format!("ci: all checks passed in {:.0} s", started.elapsed().as_secs_f64()));
    Ok(ExitCode::SUCCESS)
}

fn step(name: &str, check: impl FnOnce() -> Result<()>) -> Result<()> {
    let started = Instant::now();
    report(&format!("ci: {name}"));
    check().with_context(|| format!("ci: {name} failed"))?;
    report(&format!("ci: {name} passed in {:.0} s", started.elapsed().as_secs_f64()));
    Ok(())
}

fn checked(args: &[&str], after: &[&str]) -> Result<()> {
    let mut command = cargo(args);
    if !after.is_empty() {
        command.arg("--").args(after);
    }
    command.env("RUSTDOCFLAGS", "-D warnings");
    let status = command.status().context("cannot run cargo")?;
    if status.success() { Ok(()) } else { bail!("cargo {} ended with {status}", args.join(" ")) }
}

/// The demo must show what the README says of it.
fn check_demo() -> Result<()> {
    let model = root().join("datasets/demo/model").display().to_string();
    let score = demo::run_demo(&model, &root().join("target/ci-demo"))?;
    match demo::shows_improvement(&score) {
        Some([true, true, true]) => Ok(()),
        other => bail!("the demo does not show what it should (accuracy, margin, winners): {other:?}"),
    }
}
