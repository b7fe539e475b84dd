//! The whole run, top to bottom.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use decoder::{Companions, Decoder};
use hub::{Hub, announce};
use jiff::civil::DateTime;
use pref_data::{Batches, PairTokens, TemplateSource, Tokenizer};
use serde_json::{Map, Value};

use crate::checkpoint::{self, State};
use crate::data::Data;
use crate::logs::{self, Logs, Progress};
use crate::metrics::Window;
use crate::optimizer::Optimizer;
use crate::plan::Plan;
use crate::preflight::{self, MemoryPlan};
use crate::references::References;
use crate::run_info::{COMMIT, RunInfo, peak_memory};
use crate::schedule;
use crate::settings::{Every, Resume, Settings};
use crate::step::{Micro, RefLogps};
use crate::{backend, evaluate, inspect};

/// Set by Ctrl-C: the run saves a checkpoint after the current step and ends.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Set when there is something to save: before that Ctrl-C ends the process at once.
pub static TRAINING: AtomicBool = AtomicBool::new(false);

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The trained model is in the output directory.
    Done,
    /// Stopped by the user; a checkpoint is in the output directory.
    Interrupted,
}

/// Trains, from data to the written model.
pub fn run(settings: &Settings, inspect_rows: Option<usize>) -> Result<Outcome> {
    let (device, device_name) = backend::open(settings.backend)?;
    let hub = Hub::from_env();
    let model_dir = hub.model(&settings.model, settings.model_revision.as_deref(), &announce(&say))?;
    let reference_dir =
        settings.reference.as_deref().map(|name| hub.model(name, None, &announce(&say))).transpose()?;
    let now = template_time(settings)?;
    let tokenizer = Tokenizer::load(&model_dir, settings.chat_template.as_deref(), now)?;
    if settings.template_date.is_some() && !tokenizer.asks_for_date() {
        bail!("--template-date has no effect: the chat template does not ask for the date");
    }
    let data = settings.data.load(&tokenizer, settings.evaluate != Every::Never, &say)?;
    if let Some(n) = inspect_rows {
        inspect::print(&mut std::io::stdout().lock(), &tokenizer, &data.train, n)?;
        let report = preflight::data_report(&data.train, &tokenizer);
        preflight::warnings(&report).iter().for_each(|warning| say(warning));
        return Ok(Outcome::Done);
    }
    let resume = check_output(settings, [Some(&model_dir), reference_dir.as_ref()])?;
    let plan = Plan::new(settings, &data.train);
    let model_hash = decoder::model_hash(reference_dir.as_ref().unwrap_or(&model_dir))?;
    let data_hash = data.train.hash();
    let mut fingerprint = checkpoint::fingerprint(settings, plan.total, &model_hash, &data_hash);
    if tokenizer.asks_for_date() {
        fingerprint.insert(checkpoint::TEMPLATE_DATE.into(), now.date().to_string());
    }
    let state = match &resume {
        Some(dir) => checkpoint::read_state(dir, &fingerprint)?,
        None => State { fingerprint, ..State::default() },
    };

    let model = Decoder::load(&model_dir, &device)?;
    check_fit(&model, &data)?;
    let mut companions = Companions::read(&model_dir)?;
    if tokenizer.template_source() != TemplateSource::Model {
        companions.set_chat_template(tokenizer.template_text());
    }
    let report = preflight::data_report(&data.train, &tokenizer);
    let memory = MemoryPlan::new(model.config(), plan.most_tokens());
    for line in preflight::lines(settings, &report, &memory, plan.total) {
        say(&line);
    }

    let started = Instant::now();
    let references = References::get(
        settings,
        reference_dir.as_deref(),
        &model,
        &data,
        &plan,
        &model_hash,
        &device,
        &say,
    )?;
    let reference_seconds = started.elapsed().as_secs_f64();
    let (model, optimizer) = if let Some(dir) = &resume {
        say(&format!("going on from {} (step {})", dir.display(), state.step));
        let model = Decoder::load(dir, &device)?;
        let optimizer = checkpoint::read_optimizer(dir, &model, &device)?;
        (model, optimizer)
    } else {
        let weights = model.weights().len();
        (model, Optimizer::new(weights))
    };
    let resumed_from_step = state.step;
    // Everything that can be wrong has been looked at: only now is an earlier run cleared away.
    if resume.is_none() {
        logs::clear(&settings.output_dir)?;
    }
    let mut training = Training {
        settings,
        plan: &plan,
        data: &data,
        references: &references,
        companions: &companions,
        model: model.tracked(),
        optimizer,
        logs: Logs::open(&settings.output_dir, state.step)?,
        state,
        epoch: None,
        computed_tokens: 0,
    };
    let mut info = RunInfo {
        status: "running",
        version: env!("CARGO_PKG_VERSION"),
        commit: COMMIT,
        device: device_name,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        dtype: "float32",
        dtype_reason: "the only data type of this backend with full training precision",
        settings,
        total_steps: plan.total,
        resumed_from_step,
        model_hash: &model_hash,
        data_hash: &data_hash,
        data: &report,
        dropped_ids: &data.train.dropped_ids,
        template_date: tokenizer.asks_for_date().then(|| now.date()),
        memory_plan: memory,
        reference_from_cache: references.cached,
        reference_seconds,
        train_seconds: 0.0,
        computed_tokens: 0,
        peak_memory_bytes: None,
    };
    info.write(&settings.output_dir)?;
    TRAINING.store(true, Ordering::Relaxed);
    let started = Instant::now();
    let outcome = training.all_steps().and_then(|outcome| {
        if outcome == Outcome::Done {
            checkpoint::write_model(&training.model, &companions, &settings.output_dir)?;
        }
        Ok(outcome)
    });
    info.status = match &outcome {
        Ok(Outcome::Done) => "complete",
        Ok(Outcome::Interrupted) => "interrupted",
        Err(_) => "failed",
    };
    info.train_seconds = started.elapsed().as_secs_f64();
    info.computed_tokens = training.computed_tokens;
    info.peak_memory_bytes = peak_memory();
    // A failure to write this must not hide why the run failed.
    let written = info.write(&settings.output_dir);
    let outcome = outcome?;
    written?;
    if outcome == Outcome::Done {
        let (dir, seconds) = (settings.output_dir.display(), info.train_seconds);
        say(&format!("trained model: {dir} ({} steps in {seconds:.1} s)", plan.total));
    }
    Ok(outcome)
}

struct Training<'a> {
    settings: &'a Settings,
    plan: &'a Plan<'a>,
    data: &'a Data,
    references: &'a References,
    companions: &'a Companions,
    model: Decoder,
    optimizer: Optimizer,
    logs: Logs,
    state: State,
    epoch: Option<(usize, Batches)>,
    computed_tokens: usize,
}

impl Training<'_> {
    fn all_steps(&mut self) -> Result<Outcome> {
        let mut progress = Progress::new("train", self.plan.total, self.settings.progress_bar);
        progress.set(self.state.step);
        let started = Instant::now();
        while self.state.step < self.plan.total {
            let (lr, norm) = self.one_step()?;
            let step = self.state.step;
            let last = step == self.plan.total;
            progress.set(step);
            if step.is_multiple_of(self.settings.logging_steps) || last {
                let entry = self.log(lr, norm)?;
                let speed = self.computed_tokens as f64 / started.elapsed().as_secs_f64();
                progress.say(&summary(&entry, speed));
            }
            let interrupted = INTERRUPTED.load(Ordering::Relaxed) && !last;
            if self.settings.evaluate != Every::Never
                && !interrupted
                && (self.plan.is_due(self.settings.evaluate, step) || last)
            {
                self.evaluate(&progress)?;
            }
            if interrupted || self.plan.is_due(self.settings.save, step) {
                // A run that is interrupted must be able to go on, whatever its other checkpoints hold.
                let resumable = interrupted || !self.settings.save_only_model;
                let path = checkpoint::write(
                    self.settings,
                    &self.model,
                    self.companions,
                    &self.optimizer,
                    &self.state,
                    resumable,
                )?;
                if interrupted {
                    progress.finish();
                    say(&format!("interrupted after step {step}; saved {}", path.display()));
                    return Ok(Outcome::Interrupted);
                }
            }
        }
        progress.finish();
        Ok(Outcome::Done)
    }

    /// One optimizer step; returns its learning rate and gradient norm.
    fn one_step(&mut self) -> Result<(f64, f64)> {
        let micros = self.plan.micros(self.state.step, &mut self.epoch);
        let scales = self.plan.scales(&micros);
        for (rows, scale) in micros.iter().zip(scales) {
            let micro = Micro::new(&self.data.train, rows);
            let reference: Vec<RefLogps> = rows.iter().map(|&i| self.references.train[i as usize]).collect();
            let (metrics, gradients) = micro.run(&self.model, &self.settings.loss, &reference, Some(scale));
            if !metrics.loss.is_finite() {
                bail!(self.diverged("loss", metrics.loss, std::slice::from_ref(rows)));
            }
            self.optimizer.accumulate(gradients);
            self.state.window.add(&metrics);
            self.state.num_tokens += micro.num_tokens();
            self.computed_tokens += micro.computed_tokens();
        }
        let warmup = schedule::warmup(self.settings.warmup_steps, self.plan.total);
        let factor = self.settings.schedule.factor(self.state.step, warmup, self.plan.total);
        let lr = self.settings.learning_rate * factor;
        let norm = self.optimizer.step(&mut self.model, self.settings, lr, self.state.step + 1);
        if !norm.is_finite() {
            bail!(self.diverged("gradient norm", norm, &micros));
        }
        self.state.step += 1;
        Ok((lr, norm))
    }

    fn diverged(&self, what: &str, value: f64, micros: &[Vec<u32>]) -> String {
        let ids: Vec<String> = micros.iter().flatten().map(|&i| self.data.train.id(i as usize)).collect();
        format!(
            "the {what} became {value} at step {} on the rows with ids {ids:?}; lower --learning-rate, or look at these \
             rows with --inspect; the last checkpoint is untouched",
            self.state.step + 1
        )
    }

    fn log(&mut self, lr: f64, norm: f64) -> Result<Map<String, Value>> {
        let window: Window = std::mem::take(&mut self.state.window);
        let mut entry = Map::new();
        entry.insert("step".into(), self.state.step.into());
        entry.insert("epoch".into(), self.plan.epochs_done(self.state.step).into());
        entry.extend(window.means(""));
        entry.insert("grad_norm".into(), norm.into());
        entry.insert("learning_rate".into(), lr.into());
        entry.insert("num_tokens".into(), self.state.num_tokens.into());
        self.logs.train(&entry)?;
        Ok(entry)
    }

    fn evaluate(&mut self, progress: &Progress) -> Result<()> {
        let Some(test) = &self.data.test else { return Ok(()) };
        let reference = &self.references.test;
        let metrics = evaluate::run(&self.model, test, reference, self.settings, self.state.num_tokens);
        let mut entry = Map::new();
        entry.insert("step".into(), self.state.step.into());
        entry.insert("epoch".into(), self.plan.epochs_done(self.state.step).into());
        entry.extend(metrics);
        self.logs.eval(&entry)?;
        let number = |key: &str| entry[key].as_f64().unwrap_or(f64::NAN);
        progress.say(&format!(
            "eval loss {:.4}, accuracy {:.3}, margin {:.4}",
            number("eval_loss"),
            number("eval_rewards/accuracies"),
            number("eval_rewards/margins")
        ));
        Ok(())
    }
}

fn summary(entry: &Map<String, Value>, speed: f64) -> String {
    let number = |key: &str| entry[key].as_f64().unwrap_or(f64::NAN);
    format!(
        "loss {:.4}, margin {:.4}, accuracy {:.2}, grad {:.3}, {speed:.0} tokens/s",
        number("loss"),
        number("rewards/margins"),
        number("rewards/accuracies"),
        number("grad_norm")
    )
}

/// Checks that the output directory can be used, and touches nothing in it; returns the checkpoint to go on
/// from.
fn check_output(settings: &Settings, sources: [Option<&PathBuf>; 2]) -> Result<Option<PathBuf>> {
    let dir = &settings.output_dir;
    let context = || format!("{}: cannot create the output directory", dir.display());
    fs::create_dir_all(dir).with_context(context)?;
    for source in sources.into_iter().flatten() {
        if is_inside(source, dir) {
            bail!(
                "{}: the model {} is inside the output directory; choose another",
                dir.display(),
                source.display()
            );
        }
    }
    let resume = match &settings.resume {
        Resume::No => None,
        Resume::Auto => checkpoint::newest(dir)?,
        Resume::From(path) => Some(path.clone()),
    };
    let text = fs::read_to_string(dir.join("run.json")).unwrap_or_default();
    let status = serde_json::from_str::<Value>(&text).map(|info| info["status"] == "complete");
    let complete = status.unwrap_or(false) || dir.join("model.safetensors").exists();
    let used = complete || dir.join("train_log.jsonl").exists() || dir.join("config.json").exists();
    if resume.is_none() && !settings.overwrite && (complete || (used && settings.resume == Resume::No)) {
        bail!(
            "{}: holds an earlier run; go on with --resume-from-checkpoint auto if it has checkpoints, replace it \
             with --overwrite-output-dir, or choose another directory",
            dir.display()
        );
    }
    let probe = dir.join(".writable.tmp");
    fs::write(&probe, b"")
        .with_context(|| format!("{}: cannot write into the output directory", dir.display()))?;
    fs::remove_file(&probe).ok();
    Ok(resume)
}

fn is_inside(path: &Path, dir: &Path) -> bool {
    matches!((path.canonicalize(), dir.canonicalize()), (Ok(path), Ok(dir)) if path.starts_with(&dir))
}

/// Every row must fit the model.
fn check_fit(model: &Decoder, data: &Data) -> Result<()> {
    for rows in std::iter::once(&data.train).chain(&data.test) {
        let beyond = model.check_sequence([&rows.largest_id()], 0).is_err();
        for i in 0..rows.len() {
            // Tokens are read only where one of them is known to be beyond the vocabulary.
            let tokens = if beyond { rows.row(i).tokens } else { PairTokens::default() };
            let ids = [&tokens.prompt, &tokens.chosen, &tokens.rejected].into_iter().flatten();
            if let Err(reason) = model.check_sequence(ids, rows.lengths(i).longest()) {
                bail!("record {}: {reason}; a smaller --max-length cuts long rows", rows.id(i));
            }
        }
    }
    Ok(())
}

/// The time that chat templates are told: the given day, the day of the checkpoint that the run goes on from,
/// or now.
fn template_time(settings: &Settings) -> Result<DateTime> {
    let earlier = match &settings.resume {
        Resume::No => None,
        Resume::Auto => checkpoint::newest(&settings.output_dir)?,
        Resume::From(path) => Some(path.clone()),
    };
    let earlier = earlier.and_then(|dir| checkpoint::template_date(&dir));
    // The day alone: with the time of day no two starts would have the same tokens.
    let day = settings.template_date.or(earlier).unwrap_or_else(|| jiff::ZonedDateTime::now().date());
    Ok(day.at(0, 0, 0, 0))
}

#[allow(clippy::print_stderr)]
fn say(line: &str) {
    eprintln!("{line}");
}
