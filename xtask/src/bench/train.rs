//! `bench train`: seconds a step and peak memory, beside TRL.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::median;
use crate::backends::Build;
use crate::cargo::build_with;
use crate::report;

struct Options {
    model: PathBuf,
    dataset: PathBuf,
    steps: usize,
    pairs: usize,
    runs: usize,
    length: usize,
    backend: String,
    dtype: String,
    trl: Option<PathBuf>,
    /// Flags for our trainer alone, after `--`.
    more: Vec<String>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let (mut model, mut dataset, mut trl) = (None, None, None);
        let (mut steps, mut pairs, mut runs, mut length) = (6, 2, 3, 2048);
        let (mut backend, mut dtype) = ("flex".to_string(), "float32".to_string());
        let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
        let more = args.iter().skip(end + 1).cloned().collect();
        let (chunks, rest) = args[..end].as_chunks::<2>();
        if let [odd] = rest {
            bail!("{odd} needs a value");
        }
        for [flag, value] in chunks {
            let count =
                || value.parse::<usize>().with_context(|| format!("{flag} {value}: expected a count"));
            match flag.as_str() {
                "--model" => model = Some(PathBuf::from(value)),
                "--dataset" => dataset = Some(PathBuf::from(value)),
                "--against-trl" => trl = Some(PathBuf::from(value)),
                "--steps" => steps = count()?,
                "--pairs" => pairs = count()?,
                "--runs" => runs = count()?,
                "--max-length" => length = count()?,
                "--backend" => backend.clone_from(value),
                "--dtype" => dtype.clone_from(value),
                other => bail!("unknown flag {other}"),
            }
        }
        let model = model.context("--model is required")?;
        Ok(Self {
            model,
            dataset: dataset.context("--dataset is required")?,
            steps,
            pairs,
            runs: runs.max(1),
            length,
            backend,
            dtype,
            trl,
            more,
        })
    }
}

/// Seconds a step, packed tokens a second, and peak memory in GB: of the device where it has memory of its own.
#[derive(Debug, Clone, Copy)]
struct Measured {
    seconds: f64,
    tokens: f64,
    memory: f64,
}

/// Runs alternate; medians.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let options = &Options::parse(args)?;
    let binary = build_with("trainer", &Build::of(&[options.backend.as_str()])?)?;
    let name = format!("ours, {} {}", options.backend, options.dtype);
    let out = env::temp_dir().join(format!("bench-train-{}", std::process::id()));
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for i in 0..options.runs {
        let measured = run_ours(&binary, options, &out)?;
        report(&format!(
            "run {}: {name} {:.2} s a step, {:.0} packed tokens/s in the steps, {:.2} GB",
            i + 1,
            measured.seconds,
            measured.tokens,
            measured.memory
        ));
        ours.push(measured);
        if let Some(venv) = &options.trl {
            let measured = run_trl(venv, options, &out)?;
            report(&format!(
                "run {}: TRL {:.2} s a step, {:.2} GB",
                i + 1,
                measured.seconds,
                measured.memory
            ));
            theirs.push(measured);
        }
    }
    fs::remove_dir_all(&out).ok();
    summary(&name, &ours);
    if !theirs.is_empty() {
        summary(
            &format!("TRL, {}", if options.dtype == "bfloat16" { "bf16 autocast" } else { "f32" }),
            &theirs,
        );
        let ratio = |f: fn(&Measured) -> f64| median_of(&theirs, f) / median_of(&ours, f);
        report(&format!("{:.2}x faster", ratio(|m| m.seconds)));
        if !options.backend.contains("cuda") {
            report(&format!("{:.2}x less memory", ratio(|m| m.memory)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn median_of(all: &[Measured], f: fn(&Measured) -> f64) -> f64 {
    median(all.iter().map(f).collect())
}

fn summary(name: &str, all: &[Measured]) {
    let (seconds, memory) = (median_of(all, |m| m.seconds), median_of(all, |m| m.memory));
    report(&format!("{name}: median {seconds:.2} s a step, peak {memory:.2} GB ({} runs)", all.len()));
}

/// The reference pass is part of the time, as it is of the peer's.
fn run_ours(binary: &Path, options: &Options, out: &Path) -> Result<Measured> {
    let dir = out.join("ours");
    let mut command = Command::new(binary);
    shared_flags(&mut command, options);
    command
        .args(["--backend", &options.backend, "--dtype", &options.dtype])
        .args(&options.more)
        .args(["--ref-cache-dir"])
        .arg(out.join("cache"))
        .args(["--overwrite-output-dir", "--output-dir"])
        .arg(&dir);
    fs::remove_dir_all(out.join("cache")).ok();
    let output = command.output().context("cannot run the trainer")?;
    if !output.status.success() {
        bail!("the trainer failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let info: Value = serde_json::from_str(&fs::read_to_string(dir.join("run.json"))?)?;
    let number = |key: &str| info[key].as_f64().with_context(|| format!("run.json has no {key}"));
    let rows = number("total_steps")? * options.pairs as f64;
    let all = info["data"]["rows"].as_f64().context("run.json has no data.rows")?;
    // The reference pass covers the whole data set, the steps perhaps a part of it.
    let reference = number("reference_seconds")? * (rows / all).min(1.0);
    let seconds = (number("train_seconds")? + reference) / options.steps as f64;
    let tokens = number("computed_tokens")? / number("train_seconds")?;
    let memory = info["device_memory_bytes"][0].as_f64().map_or_else(|| number("peak_memory_bytes"), Ok)?;
    Ok(Measured { seconds, tokens, memory: memory / 1e9 })
}

fn run_trl(venv: &Path, options: &Options, out: &Path) -> Result<Measured> {
    let mut command = Command::new("/usr/bin/time");
    command.args(["-f", "PEAK_KB %M"]).arg(venv.join("bin/trl")).arg("dpo");
    shared_flags(&mut command, options);
    let mixed = if options.dtype == "bfloat16" { "True" } else { "False" };
    command.args(["--dtype", "float32", "--bf16", mixed]);
    command.args(["--report_to", "none", "--output_dir"]).arg(out.join("trl"));
    let path = env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", venv.join("bin").display())).env("HF_HUB_OFFLINE", "1");
    if !options.backend.contains("cuda") {
        command.env("CUDA_VISIBLE_DEVICES", "");
    }
    // The launcher would set one thread.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    command.env("OMP_NUM_THREADS", threads.to_string()).env("TOKENIZERS_PARALLELISM", "false");
    let tcmalloc = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4";
    if Path::new(tcmalloc).exists() {
        command.env("LD_PRELOAD", tcmalloc);
    }
    let output = command.output().context("cannot run /usr/bin/time (Debian: apt-get install time)")?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    if !output.status.success() {
        bail!("TRL failed: {}", text.lines().rev().take(5).collect::<Vec<_>>().join("\n"));
    }
    let after = |marker: &str| -> Option<f64> {
        let rest = text.split(marker).nth(1)?;
        let number: String = rest
            .trim_start_matches([' ', '\'', ':'])
            .chars()
            .take_while(|c| c.is_ascii_digit() || *c == '.')
            .collect();
        number.parse().ok()
    };
    let seconds = after("train_runtime").context("TRL printed no train_runtime")? / options.steps as f64;
    let memory = after("PEAK_KB").context("/usr/bin/time printed no peak memory")? * 1024.0 / 1e9;
    Ok(Measured { seconds, tokens: f64::NAN, memory })
}

fn shared_flags(command: &mut Command, options: &Options) {
    command.arg("--model_name_or_path").arg(&options.model).arg("--dataset_name").arg(&options.dataset);
    let (steps, pairs) = (options.steps.to_string(), options.pairs.to_string());
    command.args(["--per_device_train_batch_size", &pairs, "--max_steps", &steps]);
    command.args(["--max_length", &options.length.to_string()]);
    let line = "--loss_type apo_zero --beta 0.1 --gradient_checkpointing False --learning_rate 1e-5 --lr_scheduler_type linear --logging_steps 1 \
                --train_sampling_strategy sequential --disable_tqdm True --save_strategy no";
    command.args(line.split_whitespace());
}
