//! `bench train`: seconds a step and peak memory, beside TRL.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::process::{tell_allocator, with_tcmalloc};
use super::{count, flags, median, shapes};
use crate::backends::Build;
use crate::cargo::build_with;
use crate::report;

/// What is trained.
struct Case {
    model: PathBuf,
    dataset: PathBuf,
    length: usize,
}

struct Options {
    model: Option<PathBuf>,
    dataset: Option<PathBuf>,
    shape: Option<String>,
    vocab: Option<usize>,
    row_tokens: Vec<usize>,
    steps: usize,
    pairs: usize,
    runs: usize,
    length: Option<usize>,
    backend: String,
    dtype: String,
    trl: Option<PathBuf>,
    trl_dtypes: Option<Vec<String>>,
    /// Flags for our trainer alone, after `--`.
    more: Vec<String>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
        let mut options = Self {
            model: None,
            dataset: None,
            shape: None,
            vocab: None,
            row_tokens: Vec::new(),
            steps: 6,
            pairs: 2,
            runs: 3,
            length: None,
            backend: "flex".into(),
            dtype: "float32".into(),
            trl: None,
            trl_dtypes: None,
            more: args.iter().skip(end + 1).cloned().collect(),
        };
        for [flag, value] in flags(&args[..end])? {
            options.set(flag, value)?;
        }
        options.check()?;
        Ok(options)
    }

    fn set(&mut self, flag: &str, value: &str) -> Result<()> {
        let number = |text: &str| count(flag, text);
        match flag {
            "--model" => self.model = Some(value.into()),
            "--dataset" => self.dataset = Some(value.into()),
            "--shape" => self.shape = Some(value.into()),
            "--vocab" => self.vocab = Some(number(value)?),
            "--row-tokens" => self.row_tokens = value.split(',').map(number).collect::<Result<_>>()?,
            "--against-trl" => self.trl = Some(value.into()),
            "--trl-dtypes" => self.trl_dtypes = Some(value.split(',').map(String::from).collect()),
            "--steps" => self.steps = number(value)?.max(1),
            "--pairs" => self.pairs = number(value)?.max(1),
            "--runs" => self.runs = number(value)?.max(1),
            "--max-length" => self.length = Some(number(value)?),
            "--backend" => self.backend = value.into(),
            "--dtype" => self.dtype = value.into(),
            other => bail!("unknown flag {other}"),
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        match (&self.model, &self.shape) {
            (Some(_), Some(_)) | (None, None) => {
                bail!("give --model DIR, or --shape with one of {}", shapes::NAMES)
            }
            _ => {}
        }
        if self.dataset.is_some() != self.row_tokens.is_empty() {
            bail!("give --dataset PATH, or --row-tokens N[,N …] for pairs made on the spot");
        }
        if self.vocab.is_some() && self.shape.is_none() {
            bail!("--vocab has no effect without --shape");
        }
        if self.length.is_some() && !self.row_tokens.is_empty() {
            bail!("--max-length has no effect with --row-tokens, whose rows are kept whole");
        }
        if self.trl_dtypes.is_some() && self.trl.is_none() {
            bail!("--trl-dtypes has no effect without --against-trl");
        }
        let known = |name: &String| ["float32", "bfloat16"].contains(&name.as_str());
        if let Some(other) = self.trl_dtypes.iter().flatten().find(|name| !known(name)) {
            bail!("--trl-dtypes {other}: expected float32 or bfloat16");
        }
        Ok(())
    }

    /// It computes on an NVIDIA device.
    fn is_on_device(&self) -> bool {
        self.backend.contains("cuda")
    }

    /// What the peer is run in: nothing without a peer.
    fn peers(&self) -> Vec<String> {
        let all = || vec!["float32".into(), "bfloat16".into()];
        self.trl.as_ref().map(|_| self.trl_dtypes.clone().unwrap_or_else(all)).unwrap_or_default()
    }

    /// Makes what is not given.
    fn cases(&self, new_model: &Path, dir: &Path) -> Result<Vec<Case>> {
        let model = match (&self.model, &self.shape) {
            (Some(model), _) => model.clone(),
            (None, shape) => shapes::model(shape.as_deref().unwrap_or_default(), self.vocab, new_model, dir)?,
        };
        if let Some(dataset) = &self.dataset {
            return Ok(vec![Case { model, dataset: dataset.clone(), length: self.length.unwrap_or(2048) }]);
        }
        let case = |&tokens: &usize| {
            let dataset = shapes::pairs(self.steps * self.pairs, tokens, dir)?;
            Ok(Case { model: model.clone(), dataset, length: tokens + 64 })
        };
        self.row_tokens.iter().map(case).collect()
    }
}

/// Seconds a step, packed tokens and useful floating-point operations a second in the steps, peak memory in GB: of the
/// device where it has memory of its own; and the loss of each step.
#[derive(Debug, Clone)]
struct Measured {
    seconds: f64,
    /// Around the steps and the reference pass: start, reading the model, the end.
    start: f64,
    tokens: f64,
    gflops: f64,
    memory: f64,
    losses: Vec<f64>,
}

/// Runs alternate; medians.
pub fn run(args: &[String]) -> Result<ExitCode> {
    let options = &Options::parse(args)?;
    let binary = build_with("trainer", &Build::of(&[options.backend.as_str()])?)?;
    let beside = |name: &str| binary.with_file_name(format!("{name}{}", env::consts::EXE_SUFFIX));
    let dir = env::temp_dir().join("clair-apo-bench");
    fs::create_dir_all(&dir)?;
    let cases = options.cases(&beside("new-model"), &dir)?;
    let peak = peak(&beside("peak"), options)?;
    report(&format!("matrix products of {} in {}: {peak:.0} GFLOP/s", options.backend, options.dtype));
    if options.trl.is_some() && !options.is_on_device() {
        tell_allocator("TRL");
    }
    for case in &cases {
        measure(&binary, options, case, peak)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Speed of large products on this machine, now.
fn peak(binary: &Path, options: &Options) -> Result<f64> {
    let size = if options.backend.contains("cuda") { "8192" } else { "2048" };
    let flags = ["--backend", &options.backend, "--dtype", &options.dtype, "--size", size];
    let output = Command::new(binary).args(flags).output().context("cannot run peak")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().with_context(|| format!("peak failed: {}", String::from_utf8_lossy(&output.stderr)))
}

fn measure(binary: &Path, options: &Options, case: &Case, peak: f64) -> Result<()> {
    let out = env::temp_dir().join(format!("bench-train-{}", std::process::id()));
    let name = format!("ours, {} {}", options.backend, options.dtype);
    let peers = options.peers();
    let mut ours = Vec::new();
    let mut theirs = vec![Vec::new(); peers.len()];
    report(&format!("{} on {}", case.model.display(), case.dataset.display()));
    for i in 0..options.runs {
        let measured = run_ours(binary, options, case, &out)?;
        report(&format!(
            "run {}: {name} {:.2} s a step, {:.0} packed tokens/s and {:.0} GFLOP/s in the steps, {:.2} GB",
            i + 1,
            measured.seconds,
            measured.tokens,
            measured.gflops,
            measured.memory
        ));
        ours.push(measured);
        for (dtype, theirs) in peers.iter().zip(&mut theirs) {
            let venv = options.trl.as_deref().unwrap_or(Path::new(""));
            match run_trl(venv, options, case, dtype, &out)? {
                Ok(measured) => {
                    let (seconds, memory) = (measured.seconds, measured.memory);
                    report(&format!("run {}: TRL {dtype} {seconds:.2} s a step, {memory:.2} GB", i + 1));
                    theirs.push(measured);
                }
                Err(reason) => report(&format!("run {}: TRL {dtype} failed: {reason}", i + 1)),
            }
        }
    }
    fs::remove_dir_all(&out).ok();
    summary(&name, &ours);
    report(&format!("start and end around the steps: {:.2} s", median_of(&ours, |m| m.start)));
    let gflops = median_of(&ours, |m| m.gflops);
    let tokens = median_of(&ours, |m| m.tokens);
    report(&format!(
        "{tokens:.0} packed tokens/s; {gflops:.0} useful GFLOP/s, {:.0} % of {peak:.0}",
        100.0 * gflops / peak
    ));
    for (dtype, theirs) in peers.iter().zip(&theirs).filter(|(_, theirs)| !theirs.is_empty()) {
        compare(dtype, &ours, theirs, options)?;
    }
    Ok(())
}

fn compare(dtype: &str, ours: &[Measured], theirs: &[Measured], options: &Options) -> Result<()> {
    summary(&format!("TRL, {}", if dtype == "bfloat16" { "bf16 autocast" } else { "f32" }), theirs);
    let ratio = |f: fn(&Measured) -> f64| median_of(theirs, f) / median_of(ours, f);
    report(&format!("{:.2}x faster", ratio(|m| m.seconds)));
    if ours.iter().all(|m| m.memory.is_finite()) {
        report(&format!("{:.2}x less memory", ratio(|m| m.memory)));
    }
    let mut apart = 0.0_f64;
    for (ours, theirs) in ours.iter().zip(theirs) {
        if [&ours.losses, &theirs.losses].iter().any(|losses| losses.len() != options.steps) {
            bail!(
                "expected the losses of {} steps: {:?} and {:?}",
                options.steps,
                ours.losses,
                theirs.losses
            );
        }
        apart = ours.losses.iter().zip(&theirs.losses).map(|(a, b)| (a - b).abs()).fold(apart, f64::max);
    }
    report(&format!("losses of {} steps at most {apart:.1e} apart", options.steps));
    if dtype == "float32" && options.dtype == "float32" && apart > 1e-3 {
        bail!("the losses differ by more than 1e-3: the two do not train the same");
    }
    Ok(())
}

fn median_of(all: &[Measured], f: fn(&Measured) -> f64) -> f64 {
    median(all.iter().map(f).collect())
}

fn summary(name: &str, all: &[Measured]) {
    let (seconds, memory) = (median_of(all, |m| m.seconds), median_of(all, |m| m.memory));
    report(&format!("{name}: median {seconds:.2} s a step, peak {memory:.2} GB ({} runs)", all.len()));
}

/// Has the system write what it holds back for the disk: no run waits for what the one before it has written.
fn settle() {
    Command::new("sync").status().ok();
}

/// The reference pass is part of the time, as it is of the peer's.
fn run_ours(binary: &Path, options: &Options, case: &Case, out: &Path) -> Result<Measured> {
    let dir = out.join("ours");
    let mut command = Command::new(binary);
    shared_flags(&mut command, options, case);
    command
        .args(["--backend", &options.backend, "--dtype", &options.dtype])
        .args(&options.more)
        .args(["--ref-cache-dir"])
        .arg(out.join("cache"))
        .args(["--overwrite-output-dir", "--output-dir"])
        .arg(&dir);
    fs::remove_dir_all(out.join("cache")).ok();
    settle();
    let begun = Instant::now();
    let output = command.output().context("cannot run the trainer")?;
    let wall = begun.elapsed().as_secs_f64();
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
    let start = wall - number("train_seconds")? - number("reference_seconds")?;
    let tokens = number("computed_tokens")? / number("train_seconds")?;
    let memory = if options.is_on_device() {
        // Not every backend tells.
        info["device_memory_bytes"][0].as_f64().unwrap_or(f64::NAN)
    } else {
        number("peak_memory_bytes")?
    };
    let gflops = number("useful_flops")? / number("train_seconds")? / 1e9;
    let log = fs::read_to_string(dir.join("train_log.jsonl"))?;
    let losses =
        log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["loss"].as_f64()).collect();
    Ok(Measured { seconds, start, tokens, gflops, memory: memory / 1e9, losses })
}

/// Prints what Python's LibTorch reserved of the device at most.
const DEVICE_PEAK: &str = "\
import atexit, sys
def told():
    torch = sys.modules.get('torch')
    if torch and torch.cuda.is_initialized():
        print('PEAK_DEVICE', torch.cuda.max_memory_reserved(), file=sys.stderr, flush=True)
atexit.register(told)
";

/// `Ok(Err(reason))` when TRL itself fails, for example for want of memory: that is a result too.
fn run_trl(
    venv: &Path,
    options: &Options,
    case: &Case,
    dtype: &str,
    out: &Path,
) -> Result<Result<Measured, String>> {
    let mut command = Command::new("/usr/bin/time");
    command.args(["-f", "PEAK_KB %M"]).arg(venv.join("bin/trl")).arg("dpo");
    shared_flags(&mut command, options, case);
    let mixed = if dtype == "bfloat16" { "True" } else { "False" };
    command.args(["--dtype", "float32", "--bf16", mixed]);
    command.args(["--report_to", "none", "--output_dir"]).arg(out.join("trl"));
    let path = env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", venv.join("bin").display())).env("HF_HUB_OFFLINE", "1");
    let on_device = options.is_on_device();
    if on_device {
        // Python runs a module of this name when it starts: this one tells what was reserved of the device at most.
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        fs::write(out.join("sitecustomize.py"), DEVICE_PEAK)?;
        let paths = [Some(out.as_os_str().to_owned()), env::var_os("PYTHONPATH")];
        command.env("PYTHONPATH", env::join_paths(paths.iter().flatten())?);
    } else {
        command.env("CUDA_VISIBLE_DEVICES", "").args(["--use_cpu", "True"]);
    }
    // The launcher would set one thread.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    command.env("OMP_NUM_THREADS", threads.to_string()).env("TOKENIZERS_PARALLELISM", "false");
    with_tcmalloc(&mut command);
    settle();
    let output = command.output().context("cannot run /usr/bin/time (Debian: apt-get install time)")?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    if !output.status.success() {
        let last: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        return Ok(Err(last[last.len().saturating_sub(4)..].join(" | ")));
    }
    let number = |rest: &str| -> Option<f64> {
        let rest = rest.trim_start_matches([' ', '\'', ':']);
        let end = rest.find(|c: char| !c.is_ascii_digit() && !".-e".contains(c)).unwrap_or(rest.len());
        rest[..end].parse().ok()
    };
    let after = |marker: &str| number(text.split(marker).nth(1)?);
    let seconds = after("train_runtime").context("TRL printed no train_runtime")? / options.steps as f64;
    let memory = if on_device {
        after("PEAK_DEVICE").context("no device was used")? / 1e9
    } else {
        after("PEAK_KB").context("/usr/bin/time printed no peak memory")? * 1024.0 / 1e9
    };
    let losses = text.split("{'loss'").skip(1).filter_map(number).collect();
    let nan = f64::NAN;
    Ok(Ok(Measured { seconds, start: nan, tokens: nan, gflops: nan, memory, losses }))
}

fn shared_flags(command: &mut Command, options: &Options, case: &Case) {
    command.arg("--model_name_or_path").arg(&case.model).arg("--dataset_name").arg(&case.dataset);
    let (steps, pairs) = (options.steps.to_string(), options.pairs.to_string());
    command.args(["--per_device_train_batch_size", &pairs, "--max_steps", &steps]);
    command.args(["--max_length", &case.length.to_string()]);
    let line = "--loss_type apo_zero --beta 0.1 --gradient_checkpointing False --learning_rate 1e-5 --lr_scheduler_type linear --logging_steps 1 \
                --train_sampling_strategy sequential --disable_tqdm True --save_strategy no";
    command.args(line.split_whitespace());
}
