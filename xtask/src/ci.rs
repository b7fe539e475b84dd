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
        [flag, list, rest @ ..] if flag == "--backend" && (rest.is_empty() || rest == ["--all"]) => {
            let names: Vec<&str> = list.split(',').collect();
            on_backends(&names, !rest.is_empty())?;
        }
        _ => bail!("usage: cargo xtask ci [--backend NAME,NAME [--all]]"),
    }
    report(&format!("ci: all checks passed in {:.0} s", started.elapsed().as_secs_f64()));
    Ok(ExitCode::SUCCESS)
}

/// Tests, and the demo, on each of the backends.
fn on_backends(names: &[&str], all: bool) -> Result<()> {
    let build = Build::of(names)?;
    let packages: Vec<&str> = COMPUTING.iter().flat_map(|name| ["--package", name]).collect();
    let features = build.feature_flags(&COMPUTING);
    let base: Vec<&str> = packages.into_iter().chain(features.iter().map(String::as_str)).collect();
    let target = build.target.display().to_string();
    let shared = [base.as_slice(), &["--release", "--locked", "--target-dir", &target]].concat();
    let environment = |backend: &str| {
        let mut set = build.environment.clone();
        set.push(("CLAIR_BACKEND", backend.into()));
        if backend == "wgpu" {
            // Kernels of a software adapter are compiled once, and not in each of the tests' processes.
            set.push(("MESA_SHADER_CACHE_DIR", build.target.join("shaders").into()));
            if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
                set.push(("XDG_RUNTIME_DIR", std::env::temp_dir().into()));
            }
        }
        set
    };
    // It compiles everything once more: a third of the lane's time.
    if all {
        step("clippy", || {
            let args = [&["clippy"], shared.as_slice(), &["--all-targets"]].concat();
            checked(&args, &["-D", "warnings"], &environment(names[0]))
        })?;
    }
    for name in names {
        step(&format!("tests on {name}"), || {
            tests_of(name, all).into_iter().try_for_each(|tests| {
                checked(&[&["test"], shared.as_slice(), tests].concat(), &[], &environment(name))
            })
        })?;
    }
    Ok(())
}

/// Arguments of the test commands of a backend. On a software adapter of Vulkan every process compiles its kernels
/// anew and a step takes seconds: there one set of trajectories is run instead of all, and none of the tests of the
/// trainer's files and flags, in which the backend has no part. `--all` runs everything.
fn tests_of(backend: &str, all: bool) -> Vec<&'static [&'static str]> {
    if backend != "wgpu" || all {
        return vec![&[]];
    }
    vec![
        &[
            "--lib",
            "--bins",
            "--test",
            "kernels",
            "--test",
            "generation",
            "--test",
            "values",
            "--test",
            "families",
            "--test",
            "packing",
            "--test",
            "reference",
            "--test",
            "commands",
        ],
        &["--test", "trajectories", "apo_zero_on_every_family"],
    ]
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
