//! `eval mixeval`: answers to MixEval or MixEval-Hard, scored by rules or by a judge.
//!
//! Nothing is drawn at random: an answer or a judgement that cannot be read counts as 0 and is reported as such.

pub mod items;
mod judged;
mod rules;
pub mod score;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pref_data::{Message, read_jsonl, write_jsonl};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{MixevalArgs, Parser, SampleArgs};
use crate::judge::{Judge, Took};
use crate::report::{Page, write_json, write_page};
use crate::sample::{Outcome, Prompt, run_on, tell_line};
use crate::sampling::SamplingArgs;
use items::{FewShot, Item, Kind, Split, Target, letter};
use judged::Said;
use score::{Part, Scored};

/// Tokens of an answer, as in the reference: fewer for base models, which go on for ever.
const NEW_TOKENS: [usize; 2] = [512, 399];

/// What a run found, `summary.json`.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Model, as it was named.
    pub model: String,
    /// Set.
    pub split: Split,
    /// Hash of the questions.
    pub data: String,
    /// `rule`, or the judge's name.
    pub parser: String,
    /// The whole, both kinds, every benchmark.
    pub parts: Vec<Part>,
    /// New tokens of the answers to distinct questions.
    pub answer_tokens: u64,
    /// Of these answers, those cut off at the token limit.
    pub cut_off: usize,
    /// What judging took.
    pub judge: Option<Took>,
    /// What answers depend on.
    pub settings: Value,
    /// Of this tool.
    pub version: String,
}

/// Answers and scores; returns the table for people, or how far an interrupted run came.
pub fn run(args: &MixevalArgs, mut tell: impl FnMut(usize, usize, usize)) -> Result<Result<String, Outcome>> {
    check(args)?;
    let items = items::read(&args.data, args.split)?;
    let few_shot = args.base_model.then(|| FewShot::read(args.few_shot.as_deref())).transpose()?;
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let answers = args.out.join("answers.jsonl");
    // Most questions stand in the sets several times: each is asked and judged once.
    let (distinct, of_item) = distinct(&items);
    let prompts = distinct.iter().map(|&item| prompt(item, few_shot.as_ref(), args)).collect();
    let sample = sample_args(args, &answers)?;
    let model = sample.model.clone();
    match run_on(&sample, prompts, &mut tell)? {
        Outcome::Done { .. } => {}
        interrupted @ Outcome::Interrupted { .. } => return Ok(Err(interrupted)),
    }
    let rows: Vec<Value> = read_jsonl(&answers)?.into_iter().map(|(_, row)| row).collect();
    let blank = |(item, row): (&&Item, &Value)| Scored {
        problem: (row["finish_reason"] == "too_long")
            .then(|| "the question is longer than the model takes".into()),
        ..blank(item, response(item, row, args.base_model))
    };
    let mut scored: Vec<Scored> = distinct.iter().zip(&rows).map(blank).collect();
    let judge = Judge::open(&args.judge, &args.out.join("judge"))?;
    let took = match &judge {
        None => {
            scored.iter_mut().zip(&distinct).for_each(|(scored, item)| by_rule(scored, item));
            None
        }
        Some(judge) => match by_judge(judge, &mut scored, &distinct)? {
            None => return Ok(Err(Outcome::Interrupted { answers: rows.len(), total: rows.len() })),
            some => some,
        },
    };
    let all = items.iter().zip(of_item).map(|(item, i)| Scored { id: item.id.clone(), ..scored[i].clone() });
    let scored: Vec<Scored> = all.collect();
    let summary = summary(args, model, &items, &rows, &scored, took)?;
    write(args, &scored, &summary)?;
    Ok(Ok(table(&summary)))
}

fn check(args: &MixevalArgs) -> Result<()> {
    if args.parser == Some(Parser::Rule) && args.judge.judge_endpoint.is_some() {
        bail!("--parser rule and a judge exclude each other");
    }
    if args.parser == Some(Parser::Judge) && args.judge.judge_endpoint.is_none() {
        bail!("--parser judge needs --judge-endpoint and --judge-model");
    }
    if args.base_model && args.answering.endpoint.is_some() {
        bail!("--base-model needs a local model: a server of chats has no plain continuation");
    }
    if args.base_model && (args.system_prompt.is_some() || args.answering.chat_template.is_some()) {
        bail!(
            "--system-prompt and --chat-template have no effect with --base-model, which has no conversation"
        );
    }
    if args.parser.is_none() && args.judge.judge_endpoint.is_none() {
        tell_line(
            "no judge: answers are read by rules, which miss some that a judge understands (--judge-endpoint)",
        );
    }
    Ok(())
}

/// One item of each question, and for every item which of these is its.
fn distinct(items: &[Item]) -> (Vec<&Item>, Vec<usize>) {
    let mut all: Vec<&Item> = Vec::new();
    let mut known: HashMap<(&str, String), usize> = HashMap::new();
    let mut places = Vec::with_capacity(items.len());
    for item in items {
        let key = (item.cluster.as_str(), format!("{:?}", item.target));
        let place = *known.entry(key).or_insert(all.len());
        if place == all.len() {
            all.push(item);
        }
        places.push(place);
    }
    (all, places)
}

fn prompt(item: &Item, few_shot: Option<&FewShot>, args: &MixevalArgs) -> Prompt {
    let user = json!({"role": "user", "content": item.question()});
    let system = args.system_prompt.iter().map(|text| json!({"role": "system", "content": text}));
    let list: Vec<Value> = system.chain([user]).collect();
    let messages: Vec<Message> = list.iter().filter_map(|message| message.as_object().cloned()).collect();
    let target = target(item);
    let row = json!({
        "problem_type": item.kind.name(), "context": item.context, "options": item.options, "target": target,
        "benchmark_name": item.benchmark,
        // What the model sees: an answer to anything else is not kept.
        "prompt": few_shot.map_or(json!(list), |examples| examples.before(item).into()),
    });
    Prompt {
        id: item.id.clone(),
        messages,
        row,
        text: few_shot.map(|examples| examples.before(item)),
        stop: few_shot.map(|_| FewShot::end(item.kind).to_string()),
        may_be_too_long: true,
    }
}

fn target(item: &Item) -> Value {
    match &item.target {
        Target::Answers(answers) => json!(answers),
        Target::Option(index) => json!([index]),
    }
}

fn sample_args(args: &MixevalArgs, out: &Path) -> Result<SampleArgs> {
    let new = NEW_TOKENS[usize::from(args.base_model)];
    Ok(SampleArgs {
        model: match (&args.model, &args.answering.endpoint) {
            (Some(model), _) => model.clone(),
            (None, Some(endpoint)) => {
                crate::served::only_model(endpoint, args.answering.api_key_env.as_deref())?
            }
            (None, None) => bail!("give --model, or --endpoint"),
        },
        prompts: args.data.clone(),
        out: out.into(),
        max_new_tokens: args.max_new_tokens.unwrap_or(new),
        sampling: SamplingArgs::default(),
        samples: 1,
        token_ids: false,
        answering: args.answering.clone(),
    })
}

/// An answer without what a base model has gone on with.
fn response(item: &Item, row: &Value, is_base: bool) -> String {
    let text = row["response"].as_str().unwrap_or_default();
    let end = if is_base { text.find(FewShot::end(item.kind)) } else { None };
    // What begins with the end has nothing before it: it is left as it is.
    let end = end.filter(|&at| text[..at].contains(char::is_alphanumeric));
    end.map_or(text, |at| &text[..at]).to_string()
}

fn blank(item: &Item, response: String) -> Scored {
    Scored {
        id: item.id.clone(),
        cluster: item.cluster.clone(),
        benchmark: item.benchmark.clone(),
        kind: item.kind,
        score: 0.0,
        read: Value::Null,
        problem: None,
        question: item.question(),
        response,
        target: target(item),
        judgement: None,
    }
}

fn by_rule(scored: &mut Scored, item: &Item) {
    if scored.problem.is_some() {
        return;
    }
    match &item.target {
        Target::Answers(answers) => {
            let right = rules::is_right(&scored.response, answers);
            (scored.score, scored.read) = (f64::from(u8::from(right)), right.into());
        }
        Target::Option(target) => take(scored, *target, rules::option(&scored.response, &item.options)),
    }
}

fn take(scored: &mut Scored, target: usize, chosen: Option<usize>) {
    match chosen {
        Some(chosen) => {
            scored.score = f64::from(u8::from(chosen == target));
            scored.read = letter(chosen).to_string().into();
        }
        None => scored.problem = Some("the answer names no option".into()),
    }
}

/// `None` where it was interrupted.
fn by_judge(judge: &Judge, scored: &mut [Scored], items: &[&Item]) -> Result<Option<Took>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut total = Took::default();
    for kind in [Kind::FreeForm, Kind::MultipleChoice] {
        let asked = |&i: &usize| items[i].kind == kind && scored[i].problem.is_none();
        let which: Vec<usize> = (0..items.len()).filter(asked).collect();
        let questions = which.iter().map(|&i| judged::question(items[i], &scored[i].response));
        let questions = questions.collect::<Result<Vec<_>>>()?;
        let parse = |i: usize, reply: &str| judged::parse(kind, items[which[i]].options.len(), reply);
        let count = which.len();
        let tell = |done: usize| {
            if done.is_multiple_of(100) || done == count {
                tell_line(&format!("judged {done}/{count} {} answers", kind.name()));
            }
        };
        let Some((verdicts, took)) =
            runtime.block_on(judge.all(questions, judged::form(kind), &parse, tell))?
        else {
            return Ok(None);
        };
        for (&i, verdict) in which.iter().zip(verdicts) {
            let (scored, item) = (&mut scored[i], items[i]);
            scored.judgement = Some(verdict.text);
            match (verdict.read, &item.target) {
                (Some(Said::Score(score)), _) => (scored.score, scored.read) = (score, score.into()),
                (Some(Said::Option(chosen)), Target::Option(target)) => {
                    take(scored, *target, Some(chosen));
                }
                (Some(Said::None), _) => {
                    scored.problem = Some("the judge sees no option in the answer".into());
                }
                _ => scored.problem = Some("the judgement could not be read".into()),
            }
        }
        total += took;
    }
    Ok(Some(total))
}

fn summary(
    args: &MixevalArgs,
    model: String,
    items: &[Item],
    rows: &[Value],
    scored: &[Scored],
    took: Option<Took>,
) -> Result<Summary> {
    let mut hash = blake3::Hasher::new();
    for item in items {
        hash.update(format!("{item:?}\n").as_bytes());
    }
    let settings =
        fs::read_to_string(args.out.join("answers.jsonl.settings.json")).context("the answers' settings")?;
    Ok(Summary {
        model,
        split: args.split,
        data: hash.finalize().to_hex()[..16].to_string(),
        parser: args.judge.judge_model.clone().unwrap_or_else(|| "rule".into()),
        parts: score::parts(scored),
        answer_tokens: rows.iter().filter_map(|row| row["completion_tokens"].as_u64()).sum(),
        cut_off: rows.iter().filter(|row| row["finish_reason"] == "length").count(),
        judge: took,
        settings: serde_json::from_str(&settings)?,
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

fn write(args: &MixevalArgs, scored: &[Scored], summary: &Summary) -> Result<()> {
    write_jsonl(&args.out.join("items.jsonl"), scored)?;
    write_json(&args.out.join("score.json"), &score::reference_layout(scored))?;
    write_json(&args.out.join("summary.json"), summary)?;
    write_page(&args.out.join("report.html"), Page::Mixeval, &json!({"summary": summary, "items": scored}))
}

/// The scores as aligned text.
fn table(summary: &Summary) -> String {
    let mut lines = vec![format!(
        "{:18} {:>6} {:>9} {:>8}   95 % interval     {:>9}",
        "", "items", "distinct", "score", "unread"
    )];
    for part in &summary.parts {
        lines.push(format!(
            "{:18} {:>6} {:>9} {:>8.4}   [{:.4}, {:.4}] {:>9}",
            part.name,
            part.items,
            part.distinct,
            part.score.mean,
            part.score.low,
            part.score.high,
            part.unread
        ));
    }
    lines.push(format!(
        "{} tokens in the answers to distinct questions, {} of them cut off at the token limit; read by {}",
        summary.answer_tokens, summary.cut_off, summary.parser
    ));
    if let Some(took) = &summary.judge {
        let cost = took.cost.map_or_else(String::new, |cost| format!(", ${cost:.2}"));
        lines.push(format!(
            "judge: {} replies, {} of them bought now; {} tokens read and {} written{cost}",
            took.replies, took.bought, took.prompt_tokens, took.completion_tokens
        ));
    }
    lines.join("\n")
}
