//! The training loop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Result, bail};
use burn::tensor::Tensor;
use decoder::{Companions, Decoder};
use pref_data::Batches;
use serde_json::{Map, Value};
use tracing::trace_span;

use crate::best::{self, Verdict};
use crate::checkpoint::{Snapshot, State};
use crate::data::Data;
use crate::evaluate;
use crate::hints::Hints;
use crate::logs::{Logs, Progress};
use crate::memory::MemoryPlan;
use crate::metrics::Window;
use crate::optimizer::{Optimizer, Options};
use crate::pending::read;
use crate::plan::Plan;
use crate::references::{References, Split};
use crate::run::say;
use crate::samples::Samples;
use crate::schedule;
use crate::settings::{Every, Settings};
use crate::step::{Backward, Micro};

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

/// A run in progress.
pub(crate) struct Training<'a> {
    pub settings: &'a Settings,
    pub plan: &'a Plan<'a>,
    pub data: &'a Data,
    pub references: References,
    pub companions: &'a Companions,
    pub model: Decoder,
    pub optimizer: Optimizer,
    pub logs: Logs,
    pub hints: Hints,
    pub state: State,
    pub epoch: Option<(usize, Batches)>,
    pub computed_tokens: usize,
    pub flops: u64,
    pub memory: MemoryPlan,
    pub samples: Option<Samples>,
}

impl Training<'_> {
    /// Every step that is left.
    pub fn all_steps(&mut self) -> Result<Outcome> {
        let mut progress = Progress::new("train", self.plan.total, self.settings.progress_bar);
        progress.set(self.state.step);
        let started = Instant::now();
        if std::mem::take(&mut self.state.evaluation_due) {
            self.evaluate(&progress)?;
        } else if self.state.step == 0 {
            self.sample()?;
        }
        while self.state.step < self.plan.total && !self.state.stopped {
            let (lr, norm) = self.one_step()?;
            let step = self.state.step;
            let last = step == self.plan.total;
            progress.set(step);
            if step.is_multiple_of(self.settings.logging_steps) || last {
                let entry = self.log(lr, norm)?;
                let speed = self.computed_tokens as f64 / started.elapsed().as_secs_f64();
                progress.say(&summary(&entry, speed));
                if let Some(hint) = self.hints.look(&entry) {
                    progress.tell(hint);
                }
            }
            let interrupted = INTERRUPTED.load(Ordering::Relaxed) && !last;
            let evaluates = self.settings.evaluate != Every::Never
                && (self.plan.is_due(self.settings.evaluate, step) || last);
            if evaluates && !interrupted {
                self.evaluate(&progress)?;
            }
            // The run that goes on from here makes up for it.
            self.state.evaluation_due = evaluates && interrupted;
            if interrupted || self.saves() {
                self.check_weights()?;
                // A run that is interrupted must be able to go on, whatever its other checkpoints hold.
                let path = self.snapshot().write(interrupted || !self.settings.save_only_model)?;
                if interrupted {
                    progress.finish();
                    say(&format!("interrupted after step {step}; saved {}", path.display()));
                    return Ok(Outcome::Interrupted);
                }
            }
        }
        progress.finish();
        if let Some(text) = best::load(self.settings, &self.state, &mut self.model) {
            say(&text);
        }
        Ok(Outcome::Done)
    }

    /// A checkpoint is due.
    fn saves(&self) -> bool {
        let ends = self.state.step == self.plan.total || self.state.stopped;
        self.plan.is_due(self.settings.save, self.state.step) || (ends && self.settings.saves_at_end())
    }

    /// Errors where a weight is not a finite number: what is saved must be of use.
    pub fn check_weights(&self) -> Result<()> {
        let all: Vec<Tensor<2>> = self.model.trained().iter().map(|w| w.tensor.clone().inner()).collect();
        let finite = |tensors: &[&Tensor<2>]| fused_ops::norm(tensors).into_scalar::<f32>().is_finite();
        if all.is_empty() || finite(&all.iter().collect::<Vec<_>>()) {
            return Ok(());
        }
        let bad = self.model.trained().iter().zip(&all).find(|(_, values)| !finite(&[values]));
        bail!(
            "{} is not finite after step {}; lower --learning-rate. Nothing was saved, earlier checkpoints are \
             untouched",
            bad.map_or("the norm of the weights", |(weight, _)| weight.name.as_str()),
            self.state.step
        )
    }

    fn snapshot(&self) -> Snapshot<'_> {
        Snapshot {
            settings: self.settings,
            model: &self.model,
            companions: self.companions,
            optimizer: &self.optimizer,
            references: &self.references,
            state: &self.state,
        }
    }

    /// One optimizer step; returns its learning rate and gradient norm.
    fn one_step(&mut self) -> Result<(f64, f64)> {
        let micros = self.plan.micros(self.state.step, &mut self.epoch);
        let scales = self.plan.scales(&micros);
        let mut pending = Vec::with_capacity(micros.len());
        let _step = trace_span!("step").entered();
        for (i, (rows, scale)) in micros.iter().zip(scales).enumerate() {
            let micro = Micro::new(&self.data.train, rows, self.settings.scoring());
            let reference = self.references.of(Split::Train, rows, &micro, &self.model);
            self.model.set_dropout(dropout_seed(self.settings.seed, self.state.step, i));
            let backward = Backward { scale, again: &|tokens| self.memory.again(tokens) };
            let (metrics, gradients) = micro.run(&self.model, &self.settings.loss, reference, Some(backward));
            trace_span!("accumulate").in_scope(|| self.optimizer.accumulate(gradients));
            pending.push(metrics);
            self.state.num_tokens += micro.num_tokens();
            self.computed_tokens += micro.computed_tokens();
            self.flops += micro.flops(&self.model);
        }
        let warmup = schedule::warmup(self.settings.warmup_steps, self.plan.total);
        let factor = self.settings.schedule.factor(self.state.step, warmup, self.plan.total);
        let options = Options {
            rule: self.settings.optim,
            lr: self.settings.learning_rate * factor,
            weight_decay: self.settings.weight_decay,
            max_norm: self.settings.max_grad_norm,
            step: self.state.step + 1,
        };
        let norm = trace_span!("optimizer").in_scope(|| self.optimizer.step(&mut self.model, options));
        // The one time in a step that anything waits for the device.
        let (metrics, norm) = read(pending, vec![norm]);
        for (metrics, rows) in metrics.iter().zip(&micros) {
            let loss = metrics[0].1;
            if !loss.is_finite() {
                bail!(self.diverged("loss", loss, std::slice::from_ref(rows)));
            }
            self.state.window.add(metrics);
        }
        let norm = norm[0];
        if !norm.is_finite() {
            bail!(self.diverged("gradient norm", norm, &micros));
        }
        self.state.step += 1;
        if let Some(sync) = self.settings.sync_reference
            && self.state.step.is_multiple_of(sync.steps)
        {
            self.references.sync(&self.model, sync.alpha);
        }
        Ok((options.lr, norm))
    }

    fn diverged(&self, what: &str, value: f64, micros: &[Vec<u32>]) -> String {
        let ids: Vec<String> = micros.iter().flatten().map(|&i| self.data.train.id(i as usize)).collect();
        format!(
            "the {what} became {value} at step {} on the rows with ids {ids:?}; lower --learning-rate, or look at these \
             rows with --inspect; the last checkpoint is untouched",
            self.state.step + 1
        )
    }

    /// The start of a log entry.
    fn entry(&self) -> Map<String, Value> {
        let mut entry = Map::new();
        entry.insert("step".into(), self.state.step.into());
        entry.insert("epoch".into(), self.plan.epochs_done(self.state.step).into());
        entry
    }

    fn log(&mut self, lr: f64, norm: f64) -> Result<Map<String, Value>> {
        let window: Window = std::mem::take(&mut self.state.window);
        let mut entry = self.entry();
        entry.extend(window.means(""));
        entry.insert("grad_norm".into(), norm.into());
        entry.insert("learning_rate".into(), lr.into());
        entry.insert("num_tokens".into(), self.state.num_tokens.into());
        self.logs.train(&entry)?;
        Ok(entry)
    }

    /// What the model answers now.
    fn sample(&mut self) -> Result<()> {
        let (Some(samples), Some(test)) = (&self.samples, &self.data.test) else { return Ok(()) };
        let rows = samples.of(&self.model, test, self.state.step)?;
        self.logs.samples(&rows)
    }

    fn evaluate(&mut self, progress: &Progress) -> Result<()> {
        let Some(test) = &self.data.test else { return Ok(()) };
        let mut entry = self.entry();
        let tokens = self.state.num_tokens;
        entry.extend(evaluate::run(&self.model, test, &self.references, self.settings, tokens)?);
        self.logs.eval(&entry)?;
        progress.tell(&format!("eval at step {}: {}", self.state.step, figures(&entry, "eval_")));
        self.sample()?;
        let saved = self.saves() || self.state.step == self.plan.total;
        if best::judge(self.settings, &mut self.state, &entry, saved)? == Verdict::Stop {
            self.state.stopped = true;
            progress
                .say(&format!("stopping early: {} evaluations without a better metric", self.state.stale));
        }
        Ok(())
    }
}

/// What a micro-batch drops depends on its place in the run alone.
fn dropout_seed(seed: u64, step: usize, micro: usize) -> u64 {
    let mut bytes = [0; 24];
    for (chunk, value) in bytes.chunks_exact_mut(8).zip([seed, step as u64, micro as u64]) {
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    u64::from_le_bytes(blake3::hash(&bytes).as_bytes()[..8].try_into().expect("8 bytes"))
}

/// The figures of a log entry that people look at.
fn figures(entry: &Map<String, Value>, prefix: &str) -> String {
    let shown =
        [("loss", "loss"), ("rewards/margins", "margin"), ("rewards/accuracies", "accuracy"), ("kl", "kl")];
    let figure = |&(key, name): &(&str, &str)| {
        let value = entry.get(&format!("{prefix}{key}"))?.as_f64()?;
        Some(format!("{name} {value:.4}"))
    };
    shown.iter().filter_map(figure).collect::<Vec<_>>().join(", ")
}

fn summary(entry: &Map<String, Value>, speed: f64) -> String {
    let norm = entry["grad_norm"].as_f64().unwrap_or(f64::NAN);
    format!("{}, grad {norm:.3}, {speed:.0} tokens/s", figures(entry, ""))
}
