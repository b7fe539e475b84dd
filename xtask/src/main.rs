//! Builds what a command needs and runs it: `cargo xtask <command> …`.
//!
//! Depends on no crate of the workspace, and has its own target directory (see .cargo/config.toml), so
//! that it never waits for a build.

mod backends;
mod bench;
mod cargo;
mod check;
mod ci;
mod demo;
mod fuzz;
mod libtorch;
mod tidy;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
cargo xtask demo [--model DIR]        the whole loop on bundled data: revise, train, evaluate, report
cargo xtask ci                        fmt, clippy, tests, docs, tidy and the demo
cargo xtask ci --backend B,B [--all]  tests on these backends, in one build; CI runs flex,tch,wgpu

cargo xtask sample --help             answers of a model to a file of prompts
cargo xtask generate-clair --help     preference pairs: a stronger model revises the answers
cargo xtask train --help              align a model on the pairs
cargo xtask eval pairs --help         held-out preference metrics
cargo xtask eval mixeval --help       MixEval and MixEval-Hard, by rules or by a judge
cargo xtask eval compare --help       two runs item by item, or two files of answers by a judge
cargo xtask eval choices --help       multiple choice by likelihood
cargo xtask eval recommend --help     apo_zero or apo_down for this set and this model?
cargo xtask eval data --help          how contrastive, long, repetitive and biased a preference set is
Without flags, generate-clair, train and eval run on the bundled data, one after the other.

train, sample and eval take --backend flex|tch|cuda|wgpu|cubecl-cuda, which is built when it is first asked for.

cargo xtask new-model --help          an untrained model directory
cargo xtask demo-model                makes datasets/demo/model again
cargo xtask bench ops [NAME]          each operation beside the plain composition and the machine's limits
cargo xtask bench train --model DIR --dataset PATH [--steps N] [--pairs N] [--runs N] [--max-length N]
                        [--backend B] [--dtype T] [--against-trl VENV [--trl-dtypes T[,T]]] [-- FLAGS OF TRAIN]
cargo xtask bench train --shape NAME [--vocab N] --row-tokens N[,N …] …    a model and pairs made on the spot
cargo xtask bench data --model DIR [--rows N] [--runs N] [--dir DIR] [--against-trl VENV]
cargo xtask bench generate [--only PART[,PART]] [--against VENV]  calls a second, cost of a call, faults, kills
cargo xtask bench sample --model DIR --prompts FILE [--against-transformers VENV] [--against-llama-cpp VENV]
cargo xtask fuzz [TARGET ...] [--seconds N]        readers of foreign bytes under libFuzzer (nightly, cargo-fuzz)
cargo xtask check report [--chromium BINARY]          a run's page, paged through in a browser
cargo xtask check pages REPORT.html … [--shots DIR]   reports of eval in a browser: telephone, dark, paper
cargo xtask check greedy --model DIR --prompts FILE --transformers VENV   completions token for token
cargo xtask check templates --trl VENV [DIR ...]      chat templates against transformers
cargo xtask check tokens --trl VENV [MODEL_DIR ...]   token ids against TRL's trainers
cargo xtask check losses --model DIR --dataset D      a run of every loss: first values, no NaN
cargo xtask check resume --model DIR --dataset D      random kills: the same weights and logs to the bit
cargo xtask check peft --model DIR --dataset D --peft VENV                adapters to PEFT and back
cargo xtask check tensorboard --model DIR --dataset D --tensorboard VENV  events read back";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    match run(&command, &rest) {
        Ok(code) => code,
        Err(error) => {
            report(&format!("error: {error:#}"));
            ExitCode::from(1)
        }
    }
}

fn run(command: &str, rest: &[String]) -> Result<ExitCode> {
    match command {
        "demo" => demo::demo(rest),
        "demo-model" => demo::make_model(rest),
        "ci" => ci::run(rest),
        "bench" => bench::run(rest),
        "check" => check::run(rest),
        "fuzz" => fuzz::run(rest),
        "sample" => cargo::run("eval", &[&["sample".into()], rest].concat()),
        "generate-clair" if rest.is_empty() => demo::generate(),
        "generate-clair" => cargo::run("clair-gen", rest),
        "train" if demo::is_bare(rest) => demo::train(rest),
        "train" => cargo::run("trainer", rest),
        "eval" if rest.is_empty() => demo::evaluate(),
        "eval" => cargo::run("eval", rest),
        "new-model" => cargo::run("new-model", rest),
        "" | "help" | "--help" | "-h" => {
            report(HELP);
            Ok(ExitCode::SUCCESS)
        }
        other => bail!("unknown command {other:?}\n\n{HELP}"),
    }
}

/// A line for the user, on stderr.
#[allow(clippy::print_stderr)]
pub(crate) fn report(line: &str) {
    eprintln!("{line}");
}
