//! Comparisons that need a Python environment with the peers in it, or a real model and time.

mod greedy;
mod made;
mod pages;
mod report;
mod runs;

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::cargo::{cargo, root};

/// `check losses|resume|peft|tensorboard`: see [`runs`]; the others are here.
pub fn run(args: &[String]) -> Result<ExitCode> {
    match args.split_first() {
        Some((what, rest)) if matches!(what.as_str(), "losses" | "resume" | "peft" | "tensorboard") => {
            runs::run(what, rest)
        }
        Some((what, rest)) if what == "report" => report::run(rest),
        Some((what, rest)) if what == "pages" => pages::run(rest),
        Some((what, rest)) if what == "greedy" => greedy::run(rest),
        _ => tokens(args),
    }
}

/// `check templates`: chat templates on random conversations, rendered by transformers and by us.
/// `check tokens`: random preference rows, tokenized by TRL's trainers and by us.
fn tokens(args: &[String]) -> Result<ExitCode> {
    let [what, flag, venv, directories @ ..] = args else { bail!(USAGE) };
    if flag != "--trl" {
        bail!(USAGE);
    }
    let place = env::temp_dir().join(format!("check-{what}-{}", std::process::id()));
    let mut more: Vec<OsString> = directories.iter().map(OsString::from).collect();
    let script = match what.as_str() {
        "templates" => "chat_templates.py",
        "tokens" => {
            if more.is_empty() {
                let models =
                    ["tiny-qwen3", "tiny-qwen2", "tiny-llama", "tiny-mistral", "tiny-opt", "tiny-gemma2"];
                more = models.map(|name| root().join("fixtures/models").join(name).into()).to_vec();
            }
            "tokens.py"
        }
        _ => bail!(USAGE),
    };
    python(Path::new(venv), script, &place, &more)?;
    let example = ["run", "--release", "--quiet", "--package", "pref-data", "--example", what];
    let status = cargo(&example).arg("--").arg(&place).status().context("cannot run cargo")?;
    std::fs::remove_dir_all(&place).or_else(|_| std::fs::remove_file(&place)).ok();
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn python(venv: &Path, script: &str, place: &Path, more: &[OsString]) -> Result<()> {
    let python: PathBuf = venv.join("bin/python");
    let script = root().join("fixtures/make").join(script);
    let mut command = Command::new(&python);
    command
        .arg(script)
        .arg(place)
        .args(more)
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_DATASETS_DISABLE_PROGRESS_BARS", "1");
    let status = command.env("TRANSFORMERS_VERBOSITY", "error").env("TRL_LOG_LEVEL", "error").status();
    if !status.with_context(|| format!("cannot run {}", python.display()))?.success() {
        bail!("the Python side failed");
    }
    Ok(())
}

const USAGE: &str = "usage: cargo xtask check templates --trl VENV [DIR ...]   *.jinja files; by default those of the trl package\n\
    cargo xtask check tokens --trl VENV [MODEL_DIR ...]   by default the tokenizers of the fixtures\n\
    cargo xtask check losses --model DIR --dataset D [--steps N] [--max-length N]\n\
    cargo xtask check resume --model DIR --dataset D [--steps N] [--max-length N] [--kills N]\n\
    cargo xtask check peft --model DIR --dataset D --peft VENV [--steps N] [--max-length N]\n\
    cargo xtask check greedy --model DIR --prompts FILE --transformers VENV [--new-tokens N]\n\
    cargo xtask check report [--chromium BINARY]\n\
    cargo xtask check pages [REPORT.html …] [--shots DIR] [--chromium BINARY]\n\
    cargo xtask check tensorboard --model DIR --dataset D --tensorboard VENV";
