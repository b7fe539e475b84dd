//! The whole run, top to bottom: data, models, reference, training, and what is written at the end.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Result, bail};
use decoder::{Companions, Config, Decoder, eos_ids};
use hub::{Hub, announce};
use jiff::civil::DateTime;
use pref_data::{PairTokens, TemplateSource, Tokenizer};

use crate::checkpoint::{self, State};
use crate::data::Data;
use crate::hints::Hints;
use crate::host_memory::{host_memory, peak_memory};
use crate::logs::{self, Logs};
use crate::memory::MemoryPlan;
use crate::optimizer::Optimizer;
use crate::plan::Plan;
use crate::policy::{self, Reference};
use crate::preflight;
use crate::references::References;
use crate::run_info::{COMMIT, RunInfo};
use crate::samples::Samples;
use crate::settings::{Every, Settings};
use crate::train::{Outcome, TRAINING, Training};
use crate::{card, inspect, output};

/// Trains, from data to the written model.
pub fn run(settings: &Settings, inspect_rows: Option<usize>) -> Result<Outcome> {
    let opened = settings.backend.open(settings.device)?;
    let device = opened.device.clone();
    let hub = Hub::from_env();
    let model_dir = hub.model(&settings.model, settings.model_revision.as_deref(), &announce(&say))?;
    policy::check_not_adapter(&model_dir)?;
    let reference_dir =
        settings.reference.as_deref().map(|name| hub.model(name, None, &announce(&say))).transpose()?;
    let resume = output::resume_from(settings, &say)?;
    let now = template_time(settings, resume.as_deref());
    let tokenizer = Tokenizer::load(&model_dir, settings.chat_template.as_deref(), now)?;
    if settings.template_date.is_some() && !tokenizer.asks_for_date() {
        bail!("--template-date has no effect: the chat template does not ask for the date");
    }
    let data = settings.data.load(&tokenizer, settings.evaluate != Every::Never, &say)?;
    if let Some(n) = inspect_rows {
        inspect::print(&mut std::io::stdout().lock(), &tokenizer, &data.train, n)?;
        let report = preflight::data_report(&data.train, &tokenizer);
        preflight::warnings(settings, &report).iter().for_each(|warning| say(warning));
        return Ok(Outcome::Done);
    }
    let adapters =
        settings.peft.iter().flat_map(|peft| peft.adapter_path.iter().chain(&peft.ref_adapter_path));
    let sources: Vec<&Path> =
        std::iter::once(&model_dir).chain(&reference_dir).chain(adapters).map(AsRef::as_ref).collect();
    output::check(settings, &sources, resume.as_deref())?;
    let plan = Plan::new(settings, &data.train);
    if let Some(sync) = settings.sync_reference.filter(|sync| sync.steps > plan.total) {
        bail!(
            "--sync-ref-model has no effect: the run has {} steps, and --ref-model-sync-steps is {}",
            plan.total,
            sync.steps
        );
    }

    for weight in Config::from_file(&model_dir.join("config.json"))?.weights() {
        opened.check_tensor(&weight.name, 4 * weight.shape.iter().product::<usize>() as u64)?;
    }
    backend::self_check(&opened)?;
    say(&format!("device: {}; {} ({})", opened.name, settings.precision.dtype, settings.precision.reason));
    let precision = settings.precision;
    let base = Decoder::load_as(&model_dir, &device, precision.frozen())?.computing_in(precision.compute());
    check_fit(settings, &base, &data)?;
    let parts = plan.part_tokens();
    let most_tokens = parts.iter().copied().max().unwrap_or(0);
    let widest = base.config().intermediate.max(base.config().heads.query * base.config().heads.dim);
    opened.check_tensor("an activation of the largest micro-batch", 4 * (most_tokens * widest) as u64)?;
    let reference = Reference::load(settings, reference_dir.as_deref(), &model_dir, &base, &device)?;
    let data_hash = data.train.hash();
    let mut fingerprint = checkpoint::fingerprint(settings, plan.total, &reference.hash, &data_hash);
    if tokenizer.asks_for_date() {
        fingerprint.insert(checkpoint::TEMPLATE_DATE.into(), now.date().to_string());
    }
    let state = match &resume {
        Some(dir) => checkpoint::read_state(dir, &fingerprint)?,
        None => State { fingerprint, ..State::default() },
    };
    let mut companions = Companions::read(&model_dir)?;
    if tokenizer.template_source() != TemplateSource::Model {
        companions.set_chat_template(tokenizer.template_text());
    }
    let report = preflight::data_report(&data.train, &tokenizer);
    let model = policy::policy(settings, base, resume.as_deref())?;
    let most = if settings.backend.is_on_host() {
        host_memory()
    } else {
        opened.memory().map(|(_, all)| all as usize).filter(|&all| all > 0)
    };
    let memory = MemoryPlan::new(settings, &model, &parts, most);
    for line in preflight::lines(settings, &report, &memory, plan.total) {
        say(&line);
    }

    let started = Instant::now();
    let model_hash = reference.hash.clone();
    let references = references(settings, reference, &data, &plan, resume.as_deref())?;
    let reference_seconds = started.elapsed().as_secs_f64();
    let optimizer = match &resume {
        Some(dir) => {
            say(&format!("going on from {} (step {})", dir.display(), state.step));
            checkpoint::read_optimizer(dir, &model, settings.optim)?
        }
        None => Optimizer::new(&model, settings.optim),
    };
    let resumed_from_step = state.step;
    // Everything that can be wrong has been looked at: only now is an earlier run cleared away.
    if resume.is_none() {
        logs::clear(&settings.output_dir, settings.overwrite)?;
    }
    let mut info = RunInfo {
        status: "running",
        version: env!("CARGO_PKG_VERSION"),
        commit: COMMIT,
        device: &opened.name,
        backends: backend::built(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        dtype: precision.dtype,
        dtype_reason: precision.reason,
        settings,
        total_steps: plan.total,
        steps_done: state.step,
        resumed_from_step,
        best: None,
        model_hash: &model_hash,
        data_hash: &data_hash,
        data: &report,
        dropped_ids: &data.train.dropped_ids,
        template_date: tokenizer.asks_for_date().then(|| now.date()),
        memory_plan: memory,
        trained_parameters: model.trained().iter().map(|w| w.shape.iter().product::<usize>()).sum(),
        reference_from_cache: references.is_cached(),
        reference_seconds,
        train_seconds: 0.0,
        computed_tokens: 0,
        useful_flops: 0,
        peak_memory_bytes: None,
        device_memory_bytes: None,
    };
    info.write(&settings.output_dir)?;
    // An evaluation that is still due is made again, whatever a run that went on from here has logged.
    let evaluated = state.step - usize::from(state.evaluation_due).min(state.step);
    let mut training = Training {
        settings,
        plan: &plan,
        data: &data,
        references,
        companions: &companions,
        model: model.tracked(),
        optimizer,
        logs: Logs::open(
            &settings.output_dir,
            state.step,
            evaluated,
            settings.tensorboard,
            settings.eval_samples.is_some(),
        )?,
        hints: Hints::new(settings),
        state,
        epoch: None,
        computed_tokens: 0,
        flops: 0,
        memory,
        samples: settings
            .eval_samples
            .map(|(count, tokens)| {
                Ok::<_, anyhow::Error>(Samples::new(
                    tokenizer,
                    eos_ids(&model_dir)?,
                    [count, tokens],
                    settings.backend,
                ))
            })
            .transpose()?,
    };
    TRAINING.store(true, Ordering::Relaxed);
    let started = Instant::now();
    let outcome = training.all_steps().and_then(|outcome| {
        if outcome == Outcome::Done {
            training.check_weights()?;
            policy::write_final(settings, &training.model, &companions)?;
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
    info.useful_flops = training.flops;
    info.steps_done = training.state.step;
    info.best = training.state.best;
    info.peak_memory_bytes = peak_memory();
    info.device_memory_bytes = opened.memory();
    if let Some((peak, total)) = info.device_memory_bytes.filter(|(_, total)| *total > 0) {
        let share = 100.0 * peak as f64 / total as f64;
        say(&format!("device memory: {} MiB at most, {share:.0} % of {} MiB", peak >> 20, total >> 20));
    }
    // A failure to write this must not hide why the run failed.
    let written = info.write(&settings.output_dir);
    let outcome = outcome?;
    written?;
    if outcome == Outcome::Done {
        card::write(&info, &say)?;
        let (dir, seconds) = (settings.output_dir.display(), info.train_seconds);
        say(&format!("trained model: {dir} ({} steps in {seconds:.1} s)", training.state.step));
    }
    Ok(outcome)
}

/// Where reference values come from; a reference model that is not kept is gone afterwards.
fn references(
    settings: &Settings,
    reference: Reference,
    data: &Data,
    plan: &Plan,
    resume: Option<&Path>,
) -> Result<References> {
    let Reference { model, hash } = reference;
    if !settings.live_reference {
        return References::known(settings, &model, data, plan, &hash, &say);
    }
    // One that has moved is in the checkpoint.
    let moved = resume.filter(|_| settings.sync_reference.is_some()).map(checkpoint::reference_dir);
    let model = match moved {
        Some(dir) => model.clone().with_weights_of(&dir)?,
        None => model,
    };
    Ok(References::Live(Box::new(model)))
}

/// Every row must fit the model.
fn check_fit(settings: &Settings, model: &Decoder, data: &Data) -> Result<()> {
    for rows in std::iter::once(&data.train).chain(&data.test) {
        let beyond = model.check_sequence([&rows.largest_id()], 0).is_err();
        let (mut prompt, mut completion) = (0, 0);
        for i in 0..rows.len() {
            // Tokens are read only where one of them is known to be beyond the vocabulary.
            let tokens = if beyond { rows.row(i).tokens } else { PairTokens::default() };
            let ids = [&tokens.prompt, &tokens.chosen, &tokens.rejected].into_iter().flatten();
            let lengths = rows.lengths(i);
            if let Err(reason) = model.check_sequence(ids, lengths.longest()) {
                bail!("record {}: {reason}; a smaller --max-length cuts long rows", rows.id(i));
            }
            (prompt, completion) = (prompt.max(lengths.prompt), completion.max(lengths.chosen));
        }
        if settings.loss.needs_mismatched() {
            let longest = (prompt + completion).min(rows.max_length());
            if let Err(reason) = model.check_sequence([], longest) {
                bail!("a mismatched completion of kto may have {reason}; give a smaller --max-length");
            }
        }
    }
    Ok(())
}

/// The time that chat templates are told: the given day, the day of the checkpoint that the run goes on from,
/// or now.
fn template_time(settings: &Settings, resume: Option<&Path>) -> DateTime {
    let earlier = resume.and_then(checkpoint::template_date);
    // The day alone: with the time of day no two starts would have the same tokens.
    let day = settings.template_date.or(earlier).unwrap_or_else(|| jiff::ZonedDateTime::now().date());
    day.at(0, 0, 0, 0)
}

#[allow(clippy::print_stderr)]
pub(crate) fn say(line: &str) {
    eprintln!("{line}");
}
