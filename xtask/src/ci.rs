//! `ci`: what CI runs, cheapest checks first.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::backends::Build;
use crate::cargo::{cargo, root};
use crate::{demo, report, tidy};

/// Crates whose results depend on the backend.
const COMPUTING: [&str; 6] = ["fused-ops", "apo-loss", "decoder", "backend", "trainer", "eval"];

/// `ci`: every check on the default backend. `ci --backend LIST`: the tests of everything that computes, on each of
/// these backends in one build. The first failure ends it.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let started = Instant::now();
    match args {
        [] => all_checks()?,
        [flag, list] if flag == "--backend" => {
            let names: Vec<&str> = list.split(',').collect();
            on_backends(&names)?;
        }
        _ => bail!("usage: cargo xtask ci [--backend NAME,NAME]"),
    }
    report(&format!("ci: all checks passed in {:.0} s", started.elapsed().as_secs_f64()));
    Ok(ExitCode::SUCCESS)
}

/// Tests, and the demo, on each of the backends.
fn on_backends(names: &[&str]) -> Result<()> {
    let build = Build::of(names)?;
    let packages: Vec<&str> = COMPUTING.iter().flat_map(|name| ["--package", name]).collect();
    let features = build.feature_flags(&COMPUTING);
    let base: Vec<&str> = packages.into_iter().chain(features.iter().map(String::as_str)).collect();
    let target = build.target.display().to_string();
    let shared = [base.as_slice(), &["--release", "--locked", "--target-dir", &target]].concat();
    let environment = |backend: &str| {
        let mut all = build.environment.clone();
        all.push(("CLAIR_BACKEND", backend.into()));
        all
    };
    step("clippy", || {
        let args = [&["clippy"], shared.as_slice(), &["--all-targets"]].concat();
        checked(&args, &["-D", "warnings"], &environment(names[0]))
    })?;
    for name in names {
        step(&format!("tests on {name}"), || {
            checked(&[&["test"], shared.as_slice()].concat(), &[], &environment(name))
        })?;
    }
    Ok(())
}

fn all_checks() -> Result<()> {
    step("tidy", tidy::check)?;
    step("fmt", || checked(&["fmt", "--all"], &["--check"], &[]))?;
    let release = ["--workspace", "--release", "--locked"];
    step("clippy", || {
        checked(&[&["clippy"], release.as_slice(), &["--all-targets"]].concat(), &["-D", "warnings"], &[])
    })?;
    step("tests", || checked(&[&["test"], release.as_slice()].concat(), &[], &[]))?;
    step("docs", || checked(&[&["doc"], release.as_slice(), &["--no-deps"]].concat(), &[], &[]))?;
    step("demo", check_demo)
}

fn step(name: &str, check: impl FnOnce() -> Result<()>) -> Result<()> {
    let started = Instant::now();
    report(&format!("ci: {name}"));
    check().with_context(|| format!("ci: {name} failed"))?;
    report(&format!("ci: {name} passed in {:.0} s", started.elapsed().as_secs_f64()));
    Ok(())
}

fn checked(args: &[&str], after: &[&str], environment: &[(&str, OsString)]) -> Result<()> {
    let mut command = cargo(args);
    if !after.is_empty() {
        command.arg("--").args(after);
    }
    command.env("RUSTDOCFLAGS", "-D warnings").envs(environment.iter().map(|(name, value)| (name, value)));
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
