//! Comparisons that need a Python environment with the peers in it.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::cargo::{cargo, root};

/// `check templates`: chat templates on random conversations, rendered by transformers and by us.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let [what, flag, venv, directories @ ..] = args else { bail!(USAGE) };
    if what != "templates" || flag != "--trl" {
        bail!(USAGE);
    }
    let cases = env::temp_dir().join(format!("chat-template-cases-{}.jsonl", std::process::id()));
    let python = PathBuf::from(venv).join("bin/python");
    let script = root().join("fixtures/make/chat_templates.py");
    let made = Command::new(&python).arg(script).arg(&cases).args(directories).status();
    if !made.with_context(|| format!("cannot run {}", python.display()))?.success() {
        bail!("rendering with transformers failed");
    }
    let example = ["run", "--release", "--quiet", "--package", "pref-data", "--example", "templates"];
    let status = cargo(&example).arg("--").arg(&cases).status().context("cannot run cargo")?;
    std::fs::remove_file(&cases).ok();
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

const USAGE: &str = "usage: cargo xtask check templates --trl VENV [DIR ...]\n\
    DIR holds *.jinja files; without one the templates that the trl package ships are taken";
