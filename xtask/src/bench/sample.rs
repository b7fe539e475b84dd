//! `bench sample`: tokens a second of generation and peak memory, beside transformers and llama.cpp on the same weights,
//! prompts and cores.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::process::{tell_allocator, timed, with_tcmalloc};
use super::{count, flags, median};
use crate::backends::Build;
use crate::cargo::{build_with, root};
use crate::report;

struct Options {
    model: PathBuf,
    prompts: PathBuf,
    new_tokens: usize,
    runs: usize,
    backend: String,
    dtypes: Vec<String>,
    transformers: Option<PathBuf>,
    transformers_batches: Vec<usize>,
    llama_cpp: Option<PathBuf>,
    llama_cpp_sequences: usize,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let (mut model, mut prompts) = (None, None);
        let mut options = Self {
            model: PathBuf::new(),
            prompts: PathBuf::new(),
            new_tokens: 128,
            runs: 1,
            backend: "flex".into(),
            dtypes: vec!["float32".into(), "bfloat16".into()],
            transformers: None,
            transformers_batches: vec![16, 32, 64],
            llama_cpp: None,
            llama_cpp_sequences: 32,
        };
        for [flag, value] in flags(args)? {
            match flag.as_str() {
                "--model" => model = Some(value.into()),
                "--prompts" => prompts = Some(value.into()),
                "--new-tokens" => options.new_tokens = count(flag, value)?.max(1),
                "--runs" => options.runs = count(flag, value)?.max(1),
                "--backend" => options.backend.clone_from(value),
                "--dtypes" => options.dtypes = value.split(',').map(String::from).collect(),
                "--against-transformers" => options.transformers = Some(value.into()),
                "--transformers-batches" => {
                    options.transformers_batches =
                        value.split(',').map(|part| count(flag, part)).collect::<Result<_>>()?;
                }
                "--against-llama-cpp" => options.llama_cpp = Some(value.into()),
                "--llama-cpp-sequences" => options.llama_cpp_sequences = count(flag, value)?.max(1),
                other => bail!("unknown flag {other}"),
            }
        }
        options.model = model.context("give --model DIR")?;
        options.prompts = prompts.context("give --prompts FILE: rows with `prompt`")?;
        let given = |name: &str| args.iter().any(|arg| arg == name);
        if given("--transformers-batches") && options.transformers.is_none() {
            bail!("--transformers-batches has no effect without --against-transformers VENV");
        }
        if given("--llama-cpp-sequences") && options.llama_cpp.is_none() {
            bail!("--llama-cpp-sequences has no effect without --against-llama-cpp VENV");
        }
        if options.llama_cpp.is_some() && options.transformers.is_none() {
            bail!(
                "--against-llama-cpp needs --against-transformers VENV too: its tokenizer makes the token ids"
            );
        }
        Ok(options)
    }
}

/// One run of one of the sides.
struct Measured {
    tokens_per_second: f64,
    memory_gb: f64,
    /// The new token ids of each row.
    rows: Vec<Value>,
}

struct Side {
    name: String,
    command: Box<dyn Fn() -> Command>,
    is_ours: bool,
    runs: Vec<Measured>,
}

/// Runs alternate; medians.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let options = Options::parse(args)?;
    let dir = env::temp_dir().join(format!("bench-sample-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let mut sides = ours(&options, &dir)?;
    sides.extend(peers(&options, &dir)?);
    for i in 0..options.runs {
        for side in &mut sides {
            let measured = measure(side, &dir, options.new_tokens)?;
            report(&format!(
                "run {}: {} {:.1} new tokens/s, {:.2} GB",
                i + 1,
                side.name,
                measured.tokens_per_second,
                measured.memory_gb
            ));
            side.runs.push(measured);
        }
    }
    summary(&sides);
    fs::remove_dir_all(&dir).ok();
    Ok(ExitCode::SUCCESS)
}

fn ours(options: &Options, dir: &Path) -> Result<Vec<Side>> {
    let binary = build_with("eval", &Build::of(&[options.backend.as_str()])?)?;
    let side = |dtype: &String| {
        let (binary, out) = (binary.clone(), dir.join("answers.jsonl"));
        let flags = ["--model".into(), options.model.clone(), "--prompts".into(), options.prompts.clone()];
        let new = options.new_tokens.to_string();
        let (backend, dtype) = (options.backend.clone(), dtype.clone());
        let name = format!("ours, {backend} {dtype}:");
        let command = Box::new(move || {
            fs::remove_file(&out).ok();
            let mut command = Command::new(&binary);
            command.arg("sample").args(&flags).arg("--out").arg(&out);
            command.args([
                "--max-new-tokens",
                &new,
                "--ignore-eos",
                "--token-ids",
                "--backend",
                &backend,
                "--dtype",
                &dtype,
            ]);
            command
        });
        Side { name, command, is_ours: true, runs: Vec::new() }
    };
    Ok(options.dtypes.iter().map(side).collect())
}

fn peers(options: &Options, dir: &Path) -> Result<Vec<Side>> {
    let Some(venv) = &options.transformers else { return Ok(Vec::new()) };
    let script = root().join("xtask/src/bench/sample_peers.py");
    let ids = dir.join("ids.jsonl");
    let mut tokens = Command::new(venv.join("bin/python"));
    tokens.arg(&script).arg("tokens").arg(&options.model).arg(&options.prompts).arg(&ids);
    if !tokens.stderr(Stdio::null()).status().context("cannot run python")?.success() {
        bail!("{}: the token ids could not be made", venv.display());
    }
    tell_allocator("peers");
    let new = options.new_tokens.to_string();
    let side = |what: &'static str, venv: &Path, dtype: &'static str, batch: usize| {
        let (python, script, model, ids) =
            (venv.join("bin/python"), script.clone(), options.model.clone(), ids.clone());
        let (new, batch) = (new.clone(), batch.to_string());
        let name = format!("{what} {dtype}, {batch} together:");
        let command = Box::new(move || {
            let mut command = Command::new(&python);
            command.arg(&script).arg(what).arg(&model).arg(&ids).args([&new, dtype, &batch]);
            command.env("CUDA_VISIBLE_DEVICES", "").env("HF_HUB_OFFLINE", "1");
            with_tcmalloc(&mut command);
            command
        });
        Side { name, command, is_ours: false, runs: Vec::new() }
    };
    let mut sides = Vec::new();
    for dtype in ["float32", "bfloat16"] {
        sides.extend(
            options.transformers_batches.iter().map(|&batch| side("transformers", venv, dtype, batch)),
        );
    }
    if let Some(venv) = &options.llama_cpp {
        let sequences = options.llama_cpp_sequences;
        sides.extend(["f16", "bf16"].map(|dtype| side("llama.cpp", venv, dtype, sequences)));
    }
    Ok(sides)
}

fn measure(side: &Side, dir: &Path, new_tokens: usize) -> Result<Measured> {
    let log = dir.join("log.txt");
    let took = timed((side.command)(), &log)?;
    let text = fs::read_to_string(&log)?;
    if !took.is_success {
        bail!("{} failed: {text}", side.name);
    }
    let memory_gb = took.memory_mb * 1024.0 * 1024.0 / 1e9;
    if side.is_ours {
        let line = text.lines().find(|line| line.contains(" new tokens in ")).context("no speed was told")?;
        let after = line.split(" s, ").nth(1).and_then(|rest| rest.split(' ').next());
        let tokens_per_second = after.and_then(|n| n.parse().ok()).with_context(|| line.to_owned())?;
        let answers = fs::read_to_string(dir.join("answers.jsonl"))?;
        let ids = |line: &str| Ok(serde_json::from_str::<Value>(line)?["token_ids"].clone());
        let rows = answers.lines().map(ids).collect::<Result<_>>()?;
        return Ok(Measured { tokens_per_second, memory_gb, rows });
    }
    let line = text.lines().find(|line| line.starts_with("{\"seconds\"")).context("no result was told")?;
    let result: Value = serde_json::from_str(line)?;
    let rows = result["rows"].as_array().context("no rows")?.clone();
    if rows.iter().any(|row| row.as_array().map(Vec::len) != Some(new_tokens)) {
        bail!("{}: not all rows have {new_tokens} new tokens", side.name);
    }
    let number = |key: &str| result[key].as_f64().with_context(|| format!("no {key}"));
    Ok(Measured { tokens_per_second: number("tokens")? / number("seconds")?, memory_gb, rows })
}

fn summary(sides: &[Side]) {
    let of = |side: &Side, f: fn(&Measured) -> f64| median(side.runs.iter().map(f).collect());
    let best = sides.iter().filter(|side| side.is_ours).map(|side| of(side, |m| m.tokens_per_second));
    let best = best.fold(0.0, f64::max);
    let first =
        sides.first().and_then(|side| side.runs.first()).map(|run| run.rows.clone()).unwrap_or_default();
    for side in sides {
        let (speed, memory) = (of(side, |m| m.tokens_per_second), of(side, |m| m.memory_gb));
        let rows = side.runs.first().map(|run| &run.rows[..]).unwrap_or_default();
        let same = rows.iter().zip(&first).filter(|(a, b)| a == b).count();
        report(&format!(
            "{} median {speed:.1} new tokens/s, {memory:.2} GB; our best is {:.2}x as fast; {same} of {} rows as in the first \
             line",
            side.name,
            best / speed,
            rows.len()
        ));
    }
}
