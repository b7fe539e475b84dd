//! Measurements that anyone can repeat.

mod data;
mod generate;
pub(crate) mod process;
mod sample;
mod shapes;
mod train;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::cargo::cargo;

/// `bench data|generate|ops|sample|train`.
pub fn run(args: &[String]) -> Result<ExitCode> {
    match args.split_first() {
        Some((what, rest)) if what == "ops" => {
            let mut command = cargo(&["bench", "--workspace", "--bench", "ops"]);
            let status = command.arg("--").args(rest).status().context("cannot run cargo")?;
            Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Some((what, rest)) if what == "train" => train::run(rest),
        Some((what, rest)) if what == "data" => data::run(rest),
        Some((what, rest)) if what == "generate" => generate::run(rest),
        Some((what, rest)) if what == "sample" => sample::run(rest),
        _ => bail!(
            "usage: cargo xtask bench ops [NAME]\n\
             cargo xtask bench train (--model DIR | --shape NAME [--vocab N]) (--dataset PATH [--max-length N] | --row-tokens N[,N …])\n\
             \x20   [--steps N] [--pairs N] [--runs N] [--backend B] [--dtype T] [--against-trl VENV [--trl-dtypes T[,T]]] [-- FLAGS OF TRAIN]\n\
             cargo xtask bench data --model DIR [--rows N] [--runs N] [--dir DIR] [--against-trl VENV]\n\
             cargo xtask bench sample --model DIR --prompts FILE [--new-tokens N] [--runs N] [--backend B] [--dtypes T[,T]]\n\
             \x20   [--against-transformers VENV [--transformers-batches N[,N …]]] [--against-llama-cpp VENV [--llama-cpp-sequences N]]\n\
             cargo xtask bench generate [--only speed,limits,faults,kills,store] [--rows N] [--latency-ms N] [--in-flight N]\n\
             \x20   [--replies N] [--kills N] [--dir DIR] [--against VENV [--peers NAME[,NAME]] [--peer-rows N]]"
        ),
    }
}

/// `--flag value` pairs of a command line.
fn flags(args: &[String]) -> Result<&[[String; 2]]> {
    match args.as_chunks::<2>() {
        (pairs, []) => Ok(pairs),
        (_, [odd, ..]) => bail!("{odd} needs a value"),
    }
}

/// A flag's value as a count.
fn count(flag: &str, value: &str) -> Result<usize> {
    value.parse().with_context(|| format!("{flag} {value}: expected a count"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
