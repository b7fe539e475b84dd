//! `eval pairs`: held-out preference metrics, of pairs or of completions with labels.

mod analysis;
mod metrics;
mod trajectory;

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
use crate::histogram::histogram;
use crate::models::{Model, Target};
use crate::report;
use crate::run::{learning, samples};
use crate::sample::INTERRUPTED;
use crate::score::{PairScore, score};
pub use analysis::{Calibration, LengthBias, Movement};
pub use metrics::Metric;
pub use trajectory::Point;

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
    /// Completions with labels instead of pairs.
    pub unpaired: bool,
    /// How likelihoods moved from the reference.
    pub movement: Option<Movement>,
    /// Whether rewards follow lengths.
    pub length_bias: Option<LengthBias>,
    /// Whether margins are probabilities.
    pub calibration: Option<Calibration>,
    /// Means at every checkpoint, the reference first.
    pub trajectory: Vec<Point>,
    /// Metrics with 95 % bootstrap intervals, in the order of the printed table.
    pub metrics: Vec<Metric>,
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
    if args.checkpoints && (reference.is_none() || data.is_unpaired()) {
        bail!("--checkpoints shows rewards of pairs: it needs --reference, and pairs");
    }
    let checkpoints = if args.checkpoints { trajectory::checkpoints(&model.dir)? } else { Vec::new() };
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
    let directory = model.dir.clone();
    let model = scored(&model)?;
    let reference = reference.as_ref().map(scored).transpose()?;
    let beta = args.beta.unwrap_or(BETA);
    let unpaired = data.is_unpaired();
    let metrics = if unpaired {
        metrics::of_rows(&data, &model, reference.as_deref(), beta)
    } else {
        metrics::of_pairs(&model, reference.as_deref(), beta)
    };
    let paired = reference.as_deref().filter(|_| !unpaired);
    let mut points = Vec::new();
    if let Some(reference) = paired.filter(|_| args.checkpoints) {
        points.push(trajectory::point(0, reference, reference, beta));
        for (step, dir) in &checkpoints {
            let found = find(&dir.display().to_string())?;
            points.push(trajectory::point(*step, &scored(&found)?, reference, beta));
        }
    }
    let result = Score {
        model: args.model.clone(),
        reference: args.reference.clone(),
        dataset: args.dataset.clone(),
        split,
        beta,
        pairs: data.len(),
        dropped: data.dropped,
        truncated: data.truncated,
        unpaired,
        movement: paired.map(|reference| analysis::movement(&model, reference)),
        length_bias: paired.map(|reference| analysis::length_bias(&model, reference, beta)),
        calibration: paired.map(|reference| analysis::calibration(&model, reference, beta)),
        trajectory: points,
        metrics,
    };
    let rows = metrics::rows(&data, &model, reference.as_deref(), beta);
    write_jsonl(&args.out.join("rows.jsonl"), &rows)?;
    let margins: Vec<f64> = rows.iter().filter_map(|row| row["rewards"]["margin"].as_f64()).collect();
    let run = fs::read_to_string(directory.join("run.json")).ok();
    let run: Option<Value> = run.and_then(|text| serde_json::from_str(&text).ok());
    let page = json!({
        "score": result, "rows": rows, "bars": histogram(&margins), "run": run,
        "held_out": trajectory::held_out(&result.trajectory)?, "learning": learning(&directory)?,
        "samples": samples(&directory)?,
    });
    report::write_page(&args.out.join("report.html"), report::Page::Pairs, &page)?;
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
