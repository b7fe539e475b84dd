//! Whole training runs on a real model: every loss, being killed, and adapters that PEFT reads and writes.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cargo::{build, root};
use crate::report;

struct Options {
    model: String,
    dataset: String,
    venv: Option<PathBuf>,
    steps: usize,
    max_length: usize,
    kills: usize,
    place: PathBuf,
    trainer: PathBuf,
}

/// Runs one of the checks in a temporary directory.
pub fn run(what: &str, args: &[String]) -> Result<ExitCode> {
    let options = parse(what, args)?;
    fs::create_dir_all(&options.place).context("cannot make a temporary directory")?;
    let done = match what {
        "losses" => losses(&options),
        "resume" => resume(&options),
        "tensorboard" => tensorboard(&options),
        _ => peft(&options),
    };
    fs::remove_dir_all(&options.place).ok();
    done.map(|()| ExitCode::SUCCESS)
}

fn parse(what: &str, args: &[String]) -> Result<Options> {
    let (mut model, mut dataset, mut venv) = (None, None, None);
    let (mut steps, mut max_length, mut kills) = (if what == "resume" { 40 } else { 12 }, 512, 20);
    let (pairs, rest) = args.as_chunks::<2>();
    if let [odd] = rest {
        bail!("{odd} needs a value");
    }
    for [flag, value] in pairs {
        let count = || value.parse::<usize>().with_context(|| format!("{flag} {value}: expected a count"));
        match flag.as_str() {
            "--model" => model = Some(value.clone()),
            "--dataset" => dataset = Some(value.clone()),
            "--peft" if what == "peft" => venv = Some(PathBuf::from(value)),
            "--tensorboard" if what == "tensorboard" => venv = Some(PathBuf::from(value)),
            "--steps" => steps = count()?,
            "--max-length" => max_length = count()?,
            "--kills" if what == "resume" => kills = count()?,
            other => bail!("unknown flag {other}\n{}", super::USAGE),
        }
    }
    let python = matches!(what, "peft" | "tensorboard");
    ensure!(!python || venv.is_some(), "--{what} is required\n{}", super::USAGE);
    Ok(Options {
        model: model.context("--model is required")?,
        dataset: dataset.context("--dataset is required")?,
        venv,
        steps,
        max_length,
        kills,
        place: env::temp_dir().join(format!("check-{what}-{}", std::process::id())),
        trainer: build("trainer")?,
    })
}

impl Options {
    /// A training command into `place/out`.
    fn train(&self, out: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(&self.trainer);
        command.args(["--model-name-or-path", &self.model, "--dataset-name", &self.dataset]);
        command.arg("--output-dir").arg(self.place.join(out));
        command.args(["--ref-cache-dir".as_ref(), self.place.join("reference").as_os_str()]);
        let (steps, length) = (self.steps.to_string(), self.max_length.to_string());
        command.args(["--max-steps", &steps, "--max-length", &length, "--per-device-train-batch-size", "2"]);
        command.args(["--logging-steps", "1"]).args(flags).stderr(Stdio::piped());
        command
    }

    fn must(&self, out: &str, flags: &[&str]) -> Result<()> {
        let done = self.train(out, flags).output().context("cannot run the trainer")?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }

    /// Entries of a log, without the fields that tell the time.
    fn log(&self, out: &str, name: &str) -> Result<Vec<Value>> {
        let path = self.place.join(out).join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("{}: cannot read", path.display()))?;
        let rows = text.lines().map(|line| {
            let mut row: Value = serde_json::from_str(line)?;
            if let Some(row) = row.as_object_mut() {
                row.retain(|key, _| key != "eval_runtime" && key != "eval_samples_per_second");
            }
            Ok(row)
        });
        rows.collect()
    }
}

/// Losses, flags they need, and their value where policy and reference are the same (beta 0.1).
const LN2: f64 = std::f64::consts::LN_2;
const LOSSES: [(&str, &[&str], Option<f64>); 17] = [
    ("apo_zero", &[], Some(1.0)),
    ("apo_down", &[], Some(1.0)),
    ("sigmoid", &[], Some(LN2)),
    ("sigmoid_norm", &[], Some(LN2)),
    ("hinge", &[], Some(1.0)),
    ("ipo", &[], Some(25.0)),
    // ln(1/2) - (ln(0.9) + ln(0.1)) / 2.
    ("exo_pair", &["--label-smoothing", "0.1"], Some(0.510_825_623_765_990_7)),
    ("nca_pair", &[], Some(2.0 * LN2)),
    ("robust", &["--label-smoothing", "0.1"], Some(LN2)),
    ("bco_pair", &[], Some(2.0 * LN2)),
    ("sppo_hard", &[], Some(50.0)),
    ("aot", &[], Some(LN2)),
    ("aot_unpaired", &[], Some(LN2)),
    ("discopop", &[], Some(0.5 * LN2 + 0.5)),
    ("sft", &[], None),
    ("kto", &[], Some(0.5)),
    ("apo_zero_unpaired", &[], Some(0.5)),
];

/// `check losses`: a run of each loss; its first value is that of theory, and every number is finite.
fn losses(options: &Options) -> Result<()> {
    for (loss, flags, theory) in LOSSES {
        let started = Instant::now();
        let flags = [&["--loss-type", loss, "--save-strategy", "no"], flags].concat();
        options.must(loss, &flags)?;
        let log = options.log(loss, "train_log.jsonl")?;
        ensure!(log.len() == options.steps, "{loss}: {} entries", log.len());
        for entry in &log {
            let finite = entry
                .as_object()
                .is_some_and(|entry| entry.values().all(|v| v.as_f64().is_some_and(f64::is_finite)));
            ensure!(finite, "{loss}: {entry}");
        }
        let value = |i: usize| log[i]["loss"].as_f64().unwrap_or(f64::NAN);
        if let Some(theory) = theory {
            let error = (value(0) - theory).abs();
            ensure!(
                error <= 2e-5 * theory.max(1.0),
                "{loss}: the first value is {}, theory says {theory}",
                value(0)
            );
        }
        let theory = theory.map_or("-".into(), |theory| format!("{theory:.6}"));
        report(&format!(
            "{loss:18} first {:.6} (theory {theory}), last {:.6}, {} steps in {:.0} s",
            value(0),
            value(log.len() - 1),
            log.len(),
            started.elapsed().as_secs_f64()
        ));
        fs::remove_dir_all(options.place.join(loss)).ok();
    }
    Ok(())
}

/// `check resume`: a run that is killed at random and resumed ends bitwise as one that is not.
fn resume(options: &Options) -> Result<()> {
    let flags = [
        "--loss-type",
        "apo_zero",
        "--gradient-accumulation-steps",
        "2",
        "--eval-strategy",
        "steps",
        "--eval-steps",
        "8",
        "--test-split-size",
        "4",
        "--save-steps",
        "5",
        "--save-total-limit",
        "2",
        "--resume-from-checkpoint",
        "auto",
    ];
    let started = Instant::now();
    options.must("whole", &flags)?;
    let time = started.elapsed();
    report(&format!("undisturbed: {:.1} s", time.as_secs_f64()));
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64);
    let mut state = seed | 1;
    let mut lost = Duration::ZERO;
    for kill in 1..=options.kills {
        // xorshift64.
        for shift in [13_i32, -7, 17] {
            state ^= if shift > 0 { state << shift } else { state >> -shift };
        }
        let wait = time.mul_f64(0.5 * (state >> 11) as f64 / (1_u64 << 53) as f64);
        let mut child = options.train("killed", &flags).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(wait);
        child.kill()?;
        child.wait()?;
        lost += wait;
        let names = fs::read_dir(options.place.join("killed")).into_iter().flatten();
        let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let newest = names.filter_map(|name| name.strip_prefix("checkpoint-")?.parse::<usize>().ok()).max();
        report(&format!("kill {kill} after {:.1} s; newest checkpoint {newest:?}", wait.as_secs_f64()));
    }
    options.must("killed", &flags)?;
    let model = |out: &str| fs::read(options.place.join(out).join("model.safetensors"));
    ensure!(model("whole")? == model("killed")?, "the final weights differ (seed {seed})");
    for name in ["train_log.jsonl", "eval_log.jsonl"] {
        ensure!(options.log("whole", name)? == options.log("killed", name)?, "{name} differs (seed {seed})");
    }
    report(&format!(
        "{} kills, {:.0} s of runs ended by them: weights and logs are bitwise equal",
        options.kills,
        lost.as_secs_f64()
    ));
    Ok(())
}

/// Runs one of the scripts in `fixtures/make`.
fn python(venv: &Path, script: &str, args: &[&Path]) -> Result<()> {
    let mut command = Command::new(venv.join("bin/python"));
    command.arg(root().join("fixtures/make").join(script)).args(args).env("HF_HUB_OFFLINE", "1");
    ensure!(command.status().context("cannot run Python")?.success(), "the Python side failed");
    Ok(())
}

/// `check tensorboard`: the events of a run, of which a part was done again after a resume, are read back.
fn tensorboard(options: &Options) -> Result<()> {
    let Some(venv) = &options.venv else { bail!(super::USAGE) };
    let flags =
        ["--loss-type", "apo_zero", "--report-to", "tensorboard", "--save-steps", "5", "--eval-strategy"];
    let flags = [&flags[..], &["steps", "--eval-steps", "4", "--test-split-size", "4"]].concat();
    options.must("run", &flags)?;
    let out = options.place.join("run");
    python(venv, "tensorboard_check.py", &[&out])?;
    options.must("run", &[&flags[..], &["--resume-from-checkpoint", "auto"]].concat())?;
    python(venv, "tensorboard_check.py", &[&out])
}

/// `check peft`: an adapter trained here gives the same log-probabilities under PEFT, and one made there here.
fn peft(options: &Options) -> Result<()> {
    let Some(venv) = &options.venv else { bail!(super::USAGE) };
    let eval = build("eval")?;
    let pairs = |model: &Path, out: &str| -> Result<PathBuf> {
        let out = options.place.join(out);
        let mut command = Command::new(&eval);
        command.args(["pairs", "--dataset", &options.dataset, "--split", "train"]).arg("--model").arg(model);
        command.args(["--max-length", &options.max_length.to_string()]).arg("--out").arg(&out);
        let done = command.output().context("cannot run eval")?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Ok(out.join("rows.jsonl"))
    };
    let python = |args: &[&Path]| python(venv, "peft_check.py", args);
    let model = fs::canonicalize(&options.model).context("--model must be a directory")?;
    for (name, flags) in [
        ("lora", &["--lora-target-modules", "all-linear"][..]),
        ("dora", &["--lora-target-modules", "q_proj", "v_proj", "--use-dora"]),
    ] {
        let base =
            ["--model-name-or-path", &model.to_string_lossy(), "--save-strategy", "no"].map(str::to_string);
        let mut all: Vec<&str> = base.iter().map(String::as_str).collect();
        all.extend(["--loss-type", "apo_zero", "--use-peft", "--lora-r", "8", "--learning-rate", "1e-3"]);
        all.extend(flags);
        options.must(name, &all)?;
        let adapter = options.place.join(name);
        let rows = pairs(&adapter, &format!("{name}-rows"))?;
        // PEFT scores these rows with our adapter, trains it on, and leaves the result in `theirs`.
        let theirs = options.place.join(format!("{name}-theirs"));
        python(&[options.dataset.as_ref(), &adapter, &rows, &theirs])?;
        let rows = pairs(&theirs, &format!("{name}-their-rows"))?;
        python(&[options.dataset.as_ref(), &theirs, &rows, "-".as_ref()])?;
        // And it goes on here.
        let start = theirs.to_string_lossy().into_owned();
        let more =
            ["--model-name-or-path", &model.to_string_lossy(), "--save-strategy", "no"].map(str::to_string);
        let mut again: Vec<&str> = more.iter().map(String::as_str).collect();
        again.extend(["--loss-type", "apo_zero", "--adapter-path", &start]);
        options.must(&format!("{name}-again"), &again)?;
        report(&format!("{name}: an adapter of ours under PEFT, one of PEFT's here, and on from it"));
    }
    Ok(())
}
