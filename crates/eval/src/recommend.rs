//! `eval recommend`: which anchor of APO fits a preference set and a model.
//!
//! APO-zero raises winners and lowers losers, APO-down lowers both, losers more (arXiv 2408.06266, section 3): the
//! first is for sets whose winners are better than what the model writes itself, the second for those whose are not.
//! So the model's own answers are compared with the winners.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use hub::Hub;
use pref_data::{Message, Record, Row, Text, layout_of, read_blocks, read_jsonl, row_id, write_jsonl};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{AnsweringArgs, RecommendArgs, SampleArgs};
use crate::bootstrap::{Estimate, mean};
use crate::compare::{Said, preferences};
use crate::judge::{Judge, Took, conversation};
use crate::report::{Page, write_json, write_page};
use crate::sample::{Outcome, Prompt, run_on, tell_line};
use crate::sampling::SamplingArgs;

/// Fewer pairs than these cannot tell.
const FEWEST: usize = 30;

/// Pairs that the report shows.
const SHOWN: usize = 100;

/// Contents of `recommend.json`.
#[derive(Debug, Serialize)]
pub struct Recommendation {
    /// Loss to train with; none where the set cannot tell.
    pub loss_type: Option<&'static str>,
    /// Why.
    pub reason: String,
    /// How often the model's own answer beats the set's winner, ties as half.
    pub own_answer_wins: Estimate,
    /// Pairs that were compared.
    pub pairs: usize,
    /// Pairs left out because a judgement could not be read.
    pub unread: usize,
    /// Model.
    pub model: Option<String>,
    /// Preference set.
    pub dataset: String,
    /// `scores`, or the judge's name.
    pub by: String,
    /// What judging took.
    pub judge: Option<Took>,
    /// Of this tool.
    pub version: String,
}

/// Runs the command; returns what it says, or nothing where it was interrupted.
pub fn run(args: &RecommendArgs, tell: impl FnMut(usize, usize, usize)) -> Result<Option<String>> {
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let found = match &args.scores {
        Some(file) => by_scores(args, file)?,
        None => by_judge(args, tell)?,
    };
    let Some((rows, took)) = found else { return Ok(None) };
    let read: Vec<f64> = rows.iter().filter_map(|row| row["own_answer_wins"].as_f64()).collect();
    let own = mean(&read).context("nothing could be compared")?;
    let (loss_type, reason) = advice(own, read.len());
    let recommendation = Recommendation {
        loss_type,
        reason,
        own_answer_wins: own,
        pairs: read.len(),
        unread: rows.len() - read.len(),
        model: args.model.clone(),
        dataset: args.dataset.clone(),
        by: args.judge.judge_model.clone().unwrap_or_else(|| "scores".into()),
        judge: took,
        version: env!("CARGO_PKG_VERSION").into(),
    };
    write_jsonl(&args.out.join("rows.jsonl"), &rows)?;
    write_json(&args.out.join("recommend.json"), &recommendation)?;
    let page = json!({"r": recommendation, "rows": rows.iter().take(SHOWN).collect::<Vec<_>>()});
    write_page(&args.out.join("report.html"), Page::Recommend, &page)?;
    let words = format!(
        "the model's own answer beats the set's winner in {:.3} of {} pairs, 95 % interval [{:.3}, {:.3}]",
        own.mean, recommendation.pairs, own.low, own.high
    );
    let choice = loss_type.map_or_else(|| "no recommendation".into(), |loss| format!("--loss-type {loss}"));
    Ok(Some(format!("{choice}\n{}\n{words}", recommendation.reason)))
}

fn advice(own: Estimate, pairs: usize) -> (Option<&'static str>, String) {
    if pairs < FEWEST {
        return (
            None,
            format!("WARNING: {pairs} pairs are too few to tell; compare at least {FEWEST} (--rows)"),
        );
    }
    if own.high < 0.5 {
        let reason = "winners are better than what the model writes itself: raise them";
        return (Some("apo_zero"), reason.into());
    }
    if own.low > 0.5 {
        let reason =
            "the model writes better answers than the winners: raising their likelihood would make it worse";
        return (Some("apo_down"), reason.into());
    }
    let reason = "WARNING: winners and the model's own answers are equally good as far as these pairs tell: compare more \
                  pairs (--rows), or train with both losses and compare the models";
    (None, reason.into())
}

/// For each pair its id and whether the model's own answer wins.
type Rows = Vec<Value>;

/// From scores that a reward model has given.
fn by_scores(args: &RecommendArgs, file: &Path) -> Result<Option<(Rows, Option<Took>)>> {
    if args.judge.judge_endpoint.is_some() || args.model.is_some() || args.rows.is_some() {
        bail!("--scores has the comparison already: --model, --rows and a judge have no effect with it");
    }
    let row = |(number, (line, row)): (usize, (usize, Value))| {
        let score = |name: &str| {
            row[name].as_f64().with_context(|| format!("{}:{line}: no number in {name:?}", file.display()))
        };
        let (own, winner) = (score("own_score")?, score("chosen_score")?);
        let win = if own > winner { 1.0 } else { f64::from(u8::from(own == winner)) / 2.0 };
        Ok(json!({"id": row_id(row.get("id"), number), "own_answer_wins": win}))
    };
    let rows = read_jsonl(file)?.into_iter().enumerate().map(row).collect::<Result<Rows>>()?;
    Ok(Some((rows, None)))
}

fn by_judge(
    args: &RecommendArgs,
    tell: impl FnMut(usize, usize, usize),
) -> Result<Option<(Rows, Option<Took>)>> {
    let model =
        args.model.clone().context("give --model, whose own answers are compared with the set's winners")?;
    let judge = Judge::open(&args.judge, &args.out.join("judge"))?;
    let judge = judge.context("give --judge-endpoint and --judge-model, or --scores of a reward model")?;
    let records = records(args)?;
    let prompts = records.iter().map(prompt).collect::<Result<Vec<_>>>()?;
    let texts: Vec<String> = prompts.iter().map(|prompt| conversation(&prompt.row["prompt"])).collect();
    let answers = args.out.join("answers.jsonl");
    let sample = SampleArgs {
        model,
        prompts: answers.clone(),
        out: answers.clone(),
        max_new_tokens: args.max_new_tokens,
        sampling: SamplingArgs::default(),
        samples: 1,
        token_ids: false,
        answering: AnsweringArgs {
            chat_template: args.chat_template.clone(),
            template_date: args.template_date,
            device: args.device.clone(),
            ..AnsweringArgs::default()
        },
    };
    if let Outcome::Interrupted { .. } = run_on(&sample, prompts, tell)? {
        return Ok(None);
    }
    let own: Vec<String> = read_jsonl(&answers)?
        .into_iter()
        .map(|(_, row)| row["response"].as_str().unwrap_or_default().to_string())
        .collect();
    let winners: Vec<String> = records.iter().map(|record| last_words(&record.chosen)).collect();
    let triples: Vec<(&str, &str, &str)> =
        (0..records.len()).map(|i| (texts[i].as_str(), winners[i].as_str(), own[i].as_str())).collect();
    let Some((said, took)) = preferences(&judge, &triples)? else { return Ok(None) };
    let row = |(i, said): (usize, &Said)| {
        let (id, prompt, winner, own) = (&records[i].id, &texts[i], &winners[i], &own[i]);
        json!({
            "id": id, "own_answer_wins": said.both(), "prompt": prompt, "chosen": winner, "own": own, "judge": said.words,
        })
    };
    Ok(Some((said.iter().enumerate().map(row).collect(), Some(took))))
}

/// Pairs spread evenly over the split.
fn records(args: &RecommendArgs) -> Result<Vec<Record>> {
    let request = args.reading.request(&args.dataset)?;
    let split = args.split.as_deref().unwrap_or("train");
    let splits = request.find(&Hub::from_env(), &[split], &|line| tell_line(line))?;
    let files = splits.split(split)?;
    let layout = layout_of(files, &request.columns)?;
    let mut all = Vec::new();
    let mut failure = None;
    for file in files {
        read_blocks(file, Some(&layout.used_columns()), &mut |block| {
            for (line, text) in block.rows() {
                let parsed = text.value().and_then(|value| layout.parse(value, all.len()));
                let problem = match parsed {
                    Ok(Row::Pair(record)) => {
                        all.push(record);
                        continue;
                    }
                    Err(_) if args.reading.skip_invalid_rows => continue,
                    Ok(Row::Unpaired(_)) => "completions with labels are no pairs".to_string(),
                    Err(reason) => reason,
                };
                failure = failure.take().or_else(|| Some(anyhow!("{}:{line}: {problem}", file.display())));
            }
            Ok(failure.is_none())
        })?;
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    if all.is_empty() {
        bail!("{}: holds no pairs", args.dataset);
    }
    let wanted = args.rows.unwrap_or(200).clamp(1, all.len());
    let chosen: Vec<Record> = (0..wanted).map(|i| all[i * all.len() / wanted].clone()).collect();
    Ok(chosen)
}

fn prompt(record: &Record) -> Result<Prompt> {
    let messages = match &record.prompt {
        Text::Chat(messages) => messages.clone(),
        Text::Plain(text) => vec![message("user", text)],
    };
    if messages.is_empty() {
        bail!("record {}: has no prompt, which the two completions begin with", record.id);
    }
    let row = json!({"prompt": messages});
    Ok(Prompt { id: record.id.clone(), messages, row, text: None, stop: None, may_be_too_long: false })
}

fn message(role: &str, content: &str) -> Message {
    let mut message = Message::default();
    message.insert("role".into(), role.into());
    message.insert("content".into(), content.into());
    message
}

fn content(message: &Message) -> String {
    message.get("content").and_then(Value::as_str).unwrap_or_default().to_string()
}

fn last_words(text: &Text) -> String {
    match text {
        Text::Plain(text) => text.trim().to_string(),
        Text::Chat(messages) => messages.last().map(content).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_anchor_follows_who_wins_and_doubt_is_said() {
        let own = |mean: f64, low: f64, high: f64| Estimate { mean, low, high };
        assert_eq!(advice(own(0.2, 0.15, 0.26), 200).0, Some("apo_zero"));
        assert_eq!(advice(own(0.7, 0.64, 0.76), 200).0, Some("apo_down"));
        let (none, reason) = advice(own(0.52, 0.45, 0.59), 200);
        assert!(none.is_none() && reason.starts_with("WARNING"));
        assert!(advice(own(0.0, 0.0, 0.0), 10).1.contains("too few"));
    }
}
