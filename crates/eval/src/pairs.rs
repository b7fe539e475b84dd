//! `eval pairs`: held-out preference metrics.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use decoder::Decoder;
use hub::Hub;
use pref_data::{Dataset, Tokenizer, default_cache_dir, read_chat_template, write_atomic, write_jsonl};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{PairsArgs, template_time};
use crate::bootstrap::{Estimate, mean};
use crate::models::{Model, Target};
use crate::report;
use crate::sample::INTERRUPTED;
use crate::score::{PairScore, score};

/// TRL's default.
const BETA: f64 = 0.1;

/// Contents of `score.json`.
#[derive(Debug, Serialize)]
pub struct Score {
    /// The model as it was given.
    pub model: String,
    /// The reference.
    pub reference: Option<String>,
    /// The data set as it was given.
    pub dataset: String,
    /// Its split.
    pub split: String,
    /// Factor of the rewards.
    pub beta: f64,
    /// Pairs measured.
    pub pairs: usize,
    /// Pairs whose prompt was too long.
    pub dropped: usize,
    /// Pairs of which a completion was cut.
    pub truncated: usize,
    /// Metrics with 95 % bootstrap intervals, in the order of the printed table.
    pub metrics: Vec<Metric>,
}

/// One line of the table.
#[derive(Debug, Serialize)]
pub struct Metric {
    /// Name, TRL's where it has one.
    pub name: &'static str,
    /// What it says.
    pub meaning: &'static str,
    /// Value for the reference, where there is one.
    pub reference: Option<f64>,
    /// Value for the model.
    pub model: Estimate,
}

/// Runs the command; returns the table for stdout.
pub fn run(args: &PairsArgs, tell: impl Fn(&str) + Sync) -> Result<String> {
    let hub = Hub::from_env();
    let find = |name: &str| Model::find(&hub, name, &tell);
    let model = find(&args.model)?;
    let reference = args.reference.as_deref().map(find).transpose()?;
    let template = args.chat_template.as_deref().map(read_chat_template).transpose()?;
    let tokenizer =
        Tokenizer::load(model.tokenizer_dir(), template.as_deref(), template_time(args.template_date))?;
    let (split, data) = load(args, &hub, &tokenizer, &tell)?;
    fs::create_dir_all(&args.out).with_context(|| format!("{}: cannot create", args.out.display()))?;
    let target = Target::open(&args.device, &tell)?;
    let scored = |found: &Model| -> Result<Vec<PairScore>> {
        let (model, dir) = (found.load(&target)?, &found.dir);
        check_fit(&data, &model, dir)?;
        let mut done = 0;
        let scores = score(&model, &data, args.batch_size, |rows| {
            done += rows;
            tell(&format!("{}: {done}/{} pairs", dir.display(), data.len()));
            !INTERRUPTED.load(Ordering::Relaxed)
        });
        let scores = scores.context("interrupted; nothing was written")?;
        if let Some(row) = scores.iter().position(|score| score.logps.iter().any(|logp| !logp.is_finite())) {
            bail!(
                "{}: gives the pair with id {} log-probabilities of {:?}: its weights or its configuration are broken",
                dir.display(),
                data.id(row),
                scores[row].logps
            );
        }
        Ok(scores)
    };
    let model = scored(&model)?;
    let reference = reference.as_ref().map(scored).transpose()?;
    let beta = args.beta.unwrap_or(BETA);
    let metrics = metrics(&model, reference.as_deref(), beta);
    let result = Score {
        model: args.model.clone(),
        reference: args.reference.clone(),
        dataset: args.dataset.clone(),
        split,
        beta,
        pairs: data.len(),
        dropped: data.dropped,
        truncated: data.truncated,
        metrics,
    };
    let rows = rows(&data, &model, reference.as_deref(), beta);
    write_jsonl(&args.out.join("rows.jsonl"), &rows)?;
    let html = report::html(&result, &rows)?;
    write_atomic(&args.out.join("report.html"), |out| out.write_all(html.as_bytes()))?;
    let text = serde_json::to_string_pretty(&result)?;
    write_atomic(&args.out.join("score.json"), |out| out.write_all(text.as_bytes()))?;
    Ok(report::table(&result))
}

/// The pairs of the chosen split.
fn load(
    args: &PairsArgs,
    hub: &Hub,
    tokenizer: &Tokenizer,
    tell: &(dyn Fn(&str) + Sync),
) -> Result<(String, Dataset)> {
    let request = args.reading.request(&args.dataset)?;
    let wanted = args.split.as_deref().map_or_else(|| vec!["test", "validation", "train"], |name| vec![name]);
    let splits = request.find(hub, &wanted, tell)?;
    let split = args.split.as_deref().or_else(|| splits.held_out()).unwrap_or("train");
    let cache = args.token_cache_dir.clone().unwrap_or_else(|| default_cache_dir("tokens"));
    let tokens = request.tokens(&splits, split, tokenizer, &cache, tell)?;
    if tokens.set.is_unpaired() {
        bail!("{}: holds completions with labels; pairs (chosen and rejected) are needed", args.dataset);
    }
    let data = Dataset::whole(tokens.set, Some(args.max_length));
    if data.is_empty() {
        bail!("{}: every prompt reaches --max-length {}; raise it", args.dataset, args.max_length);
    }
    Ok((split.to_string(), data))
}

fn check_fit(data: &Dataset, model: &Decoder, dir: &Path) -> Result<()> {
    for row in data.iter() {
        let tokens = &row.tokens;
        let ids = [&tokens.prompt, &tokens.chosen, &tokens.rejected].into_iter().flatten();
        let length = tokens.prompt.len() + tokens.chosen.len().max(tokens.rejected.len());
        if let Err(reason) = model.check_sequence(ids, length) {
            bail!("{}: record {}: {reason}; a smaller --max-length cuts long rows", dir.display(), row.id);
        }
    }
    Ok(())
}

/// Rewards `β · (log π - log π_ref)` of a pair.
fn rewards(model: &PairScore, reference: &PairScore, beta: f64) -> [f64; 2] {
    [0, 1].map(|i| beta * (model.logps[i] - reference.logps[i]))
}

fn metrics(model: &[PairScore], reference: Option<&[PairScore]>, beta: f64) -> Vec<Metric> {
    let mut all = Vec::new();
    let mut push = |name, meaning, reference: Option<f64>, values: Vec<f64>| {
        if let Some(model) = mean(&values) {
            all.push(Metric { name, meaning, reference, model });
        }
    };
    let average = |scores: &[PairScore], f: &dyn Fn(&PairScore) -> f64| {
        scores.iter().map(f).sum::<f64>() / scores.len() as f64
    };
    if let Some(reference) = reference {
        let pairs: Vec<[f64; 2]> = model.iter().zip(reference).map(|(m, r)| rewards(m, r, beta)).collect();
        let of = |f: fn(&[f64; 2]) -> f64| pairs.iter().map(f).collect::<Vec<_>>();
        let hit = |p: &[f64; 2]| f64::from(u8::from(p[0] > p[1]));
        push("rewards/accuracies", "the winner's reward is above the loser's", Some(0.0), of(hit));
        push("rewards/margins", "winner's reward minus loser's", Some(0.0), of(|p| p[0] - p[1]));
        push("rewards/chosen", "winner's reward", Some(0.0), of(|p| p[0]));
        push("rewards/rejected", "loser's reward", Some(0.0), of(|p| p[1]));
    }
    let mut likelihood = |name, meaning, f: &dyn Fn(&PairScore) -> f64| {
        push(name, meaning, reference.map(|r| average(r, f)), model.iter().map(f).collect());
    };
    likelihood("logps/chosen", "log-likelihood of the winner", &|s| s.logps[0]);
    likelihood("logps/rejected", "log-likelihood of the loser", &|s| s.logps[1]);
    likelihood("logps/chosen per token", "the same a token", &|s| s.logps[0] / s.tokens[0].max(1) as f64);
    likelihood("logps/rejected per token", "the same a token", &|s| s.logps[1] / s.tokens[1].max(1) as f64);
    let prefers = |s: &PairScore| f64::from(u8::from(s.logps[0] > s.logps[1]));
    likelihood("likelihood accuracy", "the winner is more likely than the loser", &prefers);
    all
}

fn rows(data: &Dataset, model: &[PairScore], reference: Option<&[PairScore]>, beta: f64) -> Vec<Value> {
    let row = |(i, (row, score)): (usize, (pref_data::PreparedRow, &PairScore))| {
        let mut value = json!({
            "id": row.id,
            "logps": {"chosen": score.logps[0], "rejected": score.logps[1]},
            "tokens": {"chosen": score.tokens[0], "rejected": score.tokens[1]},
        });
        if let Some(reference) = reference.map(|all| &all[i]) {
            let [chosen, rejected] = rewards(score, reference, beta);
            value["ref_logps"] = json!({"chosen": reference.logps[0], "rejected": reference.logps[1]});
            value["rewards"] = json!({"chosen": chosen, "rejected": rejected, "margin": chosen - rejected});
        }
        value
    };
    data.iter().zip(model).enumerate().map(row).collect()
}
