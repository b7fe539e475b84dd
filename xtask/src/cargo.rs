//! Spawning cargo and the binaries it built.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::backends::Build;
use crate::report;

/// The workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// A cargo command in the user's directory, on the workspace's manifest.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).arg("--manifest-path").arg(root().join("Cargo.toml"));
    // LibTorch is found by this program alone.
    command.env_remove("LIBTORCH_USE_PYTORCH");
    command
}

/// Builds the binaries in release mode and returns the path of one.
pub fn build(binary: &str) -> Result<PathBuf> {
    build_with(binary, &Build::of(&[])?)
}

/// The same with other backends than the default.
pub fn build_with(binary: &str, build: &Build) -> Result<PathBuf> {
    let target = &build.target;
    if !build.is_default && !target.join("release").exists() {
        report(&format!("building with features of its own into {}: minutes, this once", target.display()));
    }
    // All of them each time: one choice of features for the dependencies they share, built once.
    let computing = ["trainer", "eval"];
    let mut command = cargo(&["build", "--release", "--quiet", "--package", "trainer", "--package", "eval"]);
    if build.is_default {
        command.args(["--package", "clair-gen"]);
    }
    command.args(build.feature_flags(&computing)).arg("--target-dir").arg(target);
    command.envs(build.environment.iter().map(|(name, value)| (name, value)));
    if !command.status().context("cannot run cargo")?.success() {
        bail!("building failed");
    }
    Ok(target.join("release").join(format!("{binary}{}", env::consts::EXE_SUFFIX)))
}

/// Builds a binary and becomes it, so that signals and exit codes are its own.
#[cfg(unix)]
pub fn run(binary: &str, args: &[String]) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    let path = build_with(binary, &Build::for_arguments(args)?)?;
    let error = Command::new(&path).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", path.display()))
}

/// Builds and runs a binary; its exit code is ours.
#[cfg(not(unix))]
pub fn run(binary: &str, args: &[String]) -> Result<ExitCode> {
    let path = build_with(binary, &Build::for_arguments(args)?)?;
    let status =
        Command::new(&path).args(args).status().with_context(|| format!("cannot run {}", path.display()))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Builds and runs a binary that must succeed.
pub fn must(binary: &str, args: &[String]) -> Result<()> {
    succeed(&build_with(binary, &Build::for_arguments(args)?)?, args, &[])
}

/// Runs a program that must succeed.
pub fn succeed(path: &Path, args: &[String], environment: &[(&str, OsString)]) -> Result<()> {
    let mut command = Command::new(path);
    command.args(args).envs(environment.iter().map(|(name, value)| (name, value)));
    let status = command.status().with_context(|| format!("cannot run {}", path.display()))?;
    if status.success() { Ok(()) } else { bail!("{} {} failed ({status})", path.display(), args.join(" ")) }
}
