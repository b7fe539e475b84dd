//! `ci`: what CI runs, cheapest checks first.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::backends::Build;
use crate::cargo::{cargo, root, succeed};
use crate::{demo, report, tidy};

/// Crates whose results depend on the backend.
const COMPUTING: [&str; 6] = ["fused-ops", "apo-loss", "decoder", "backend", "trainer", "eval"];

/// The packages and profile of every command.
const PLAIN: [&str; 3] = ["--workspace", "--release", "--locked"];

/// `ci`: every check on the default backend. `ci --backend LIST`: one build with these backends, and on each of them
/// the tests of everything that computes; with flex among them, every check, clippy and docs with the default features
/// all the same. The first failure ends it.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let started = Instant::now();
    match args {
        [] => Lane::of(vec!["flex"], false)?.run()?,
        [flag, list, rest @ ..] if flag == "--backend" && (rest.is_empty() || rest == ["--all"]) => {
            Lane::of(list.split(',').collect(), !rest.is_empty())?.run()?;
        }
        _ => bail!("usage: cargo xtask ci [--backend NAME,NAME [--all]]"),
    }
    report(&format!("ci: all checks passed in {:.0} s", started.elapsed().as_secs_f64()));
    Ok(ExitCode::SUCCESS)
}

/// What is checked: backends in one build, since each build compiles everything.
struct Lane<'a> {
    names: Vec<&'a str>,
    all: bool,
    build: Build,
}

impl<'a> Lane<'a> {
    fn of(names: Vec<&'a str>, all: bool) -> Result<Self> {
        Ok(Self { build: Build::of(&names)?, names, all })
    }

    fn run(&self) -> Result<()> {
        let whole = self.names.contains(&"flex");
        if whole {
            step("tidy", tidy::check)?;
            step("fmt", || checked(&["fmt", "--all"], &["--check"], &[]))?;
            step("clippy", || {
                checked(&[&["clippy"], &PLAIN[..], &["--all-targets"]].concat(), &["-D", "warnings"], &[])
            })?;
            // With the features that users build by default, and what clippy left of the dependencies.
            step("docs", || checked(&[&["doc"], &PLAIN[..], &["--no-deps"]].concat(), &[], &[]))?;
        }
        // It compiles the dependencies once more.
        if self.all && !self.build.is_default {
            step("clippy with these backends", || {
                let environment = self.environment(self.names[0]);
                self.cargo("clippy", &["--all-targets"], &["-D", "warnings"], &environment)
            })?;
        }
        for &name in &self.names {
            step(&format!("tests on {name}"), || {
                for tests in tests_of(name, self.all)? {
                    let tests: Vec<&str> = tests.iter().map(String::as_str).collect();
                    self.cargo("test", &tests, &[], &self.environment(name))?;
                }
                if name == "tch" {
                    // The library's own threads.
                    let threads = ("OMP_NUM_THREADS", "2".into());
                    let environment = [self.environment(name), vec![threads]].concat();
                    self.cargo("test", &["--test", "kernels", "--test", "reference"], &[], &environment)?;
                }
                Ok(())
            })?;
        }
        if whole { step("demo", || self.check_demo()) } else { Ok(()) }
    }

    /// A command of cargo on the whole workspace, always with the same features: other packages would be other
    /// features of what they share, and another build.
    fn cargo(
        &self,
        command: &str,
        args: &[&str],
        after: &[&str],
        environment: &[(&str, OsString)],
    ) -> Result<()> {
        let features = self.build.feature_flags(&COMPUTING);
        let target = self.build.target.display().to_string();
        let features: Vec<&str> = features.iter().map(String::as_str).collect();
        let all = [&[command], &PLAIN[..], &features, &["--target-dir", &target], args].concat();
        checked(&all, after, environment)
    }

    fn environment(&self, backend: &str) -> Vec<(&'static str, OsString)> {
        let mut set = self.build.environment.clone();
        set.push(("CLAIR_BACKEND", backend.into()));
        if backend == "tch" {
            // Tests run beside each other, one for each core: more threads of LibTorch wait for one another, spinning.
            set.push(("OMP_NUM_THREADS", "1".into()));
        }
        if backend == "wgpu" {
            // Kernels of a software adapter are compiled once, and not in each of the tests' processes.
            set.push(("MESA_SHADER_CACHE_DIR", self.build.target.join("shaders").into()));
            if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
                set.push(("XDG_RUNTIME_DIR", std::env::temp_dir().into()));
            }
        }
        set
    }

    /// The demo, with the binaries of the tests on the default backend, must show what the README says of it.
    fn check_demo(&self) -> Result<()> {
        let model = root().join("datasets/demo/model").display().to_string();
        let built =
            |name: &str| self.build.target.join(format!("release/{name}{}", std::env::consts::EXE_SUFFIX));
        let environment = self.environment("flex");
        let must = |name: &str, args: &[String]| succeed(&built(name), args, &environment);
        let score = demo::run_demo(&model, &root().join("target/ci-demo"), &must)?;
        match demo::shows_improvement(&score) {
            Some([true, true, true]) => Ok(()),
            other => bail!("the demo does not show what it should (accuracy, margin, winners): {other:?}"),
        }
    }
}

/// Arguments of the test commands of a backend: all tests on the default one; on another the integration tests of what
/// computes, and unit tests, of which those of other crates take no time. On a software adapter of Vulkan every process compiles its kernels anew and a step takes seconds: there one set of
/// trajectories is run instead of all, and none of the tests of the trainer's files and flags, in which the backend
/// has no part. `--all` runs everything.
fn tests_of(backend: &str, all: bool) -> Result<Vec<Vec<String>>> {
    const SHORT: [&str; 7] =
        ["kernels", "generation", "values", "families", "packing", "reference", "commands"];
    let strings = |args: &[&str]| args.iter().map(ToString::to_string).collect::<Vec<_>>();
    if backend == "flex" || all {
        return Ok(vec![Vec::new()]);
    }
    let short = backend == "wgpu";
    let (mut chosen, known) = (strings(&["--lib", "--bins"]), integration_tests()?);
    if let Some(gone) = SHORT.into_iter().find(|&name| !known.contains(name)) {
        bail!("ci: there is no test {gone}");
    }
    for name in known.into_iter().filter(|name| !short || SHORT.contains(&name.as_str())) {
        chosen.extend(["--test".into(), name]);
    }
    let one = strings(&["--test", "trajectories", "apo_zero_on_every_family"]);
    Ok(if short { vec![chosen, one] } else { vec![chosen] })
}

/// Names of the integration tests of the crates that compute.
fn integration_tests() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for package in COMPUTING {
        let dir = root().join("crates").join(package).join("tests");
        if !dir.exists() {
            continue;
        }
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let path = entry.with_context(|| dir.display().to_string())?.path();
            if path.extension().is_some_and(|extension| extension == "rs") {
                names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
            }
        }
    }
    Ok(names)
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
