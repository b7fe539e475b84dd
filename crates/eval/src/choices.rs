//! `eval choices`: which of several continuations a model finds most likely, as lm-evaluation-harness scores multiple
//! choice.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use decoder::{Batch, Decoder};
use fused_ops::Segments;
use hub::Hub;
use minijinja::{Environment, UndefinedBehavior, context, value::Serde};
use pref_data::{Tokenizer, read_jsonl, row_id, write_jsonl};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{ChoicesArgs, template_time};
use crate::bootstrap::{Estimate, clustered};
use crate::models::{Model, Target};
use crate::report::{Page, write_json, write_page};
use crate::sample::INTERRUPTED;

/// Context before a choice, which follows after a space.
const CONTEXT: &str = "Question: {{ question }}\nAnswer:";

/// Contents of `summary.json`.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Model, as it was named.
    pub model: String,
    /// Data, as it was named.
    pub data: String,
    /// Template of the context.
    pub context: String,
    /// Questions.
    pub questions: usize,
    /// Share of the questions whose right choice has the largest log-likelihood (`acc` of lm-evaluation-harness).
    pub acc: Estimate,
    /// The same for log-likelihoods divided by the characters of the choice (`acc_norm`).
    pub acc_norm: Estimate,
    /// Share that guessing would get.
    pub chance: f64,
    /// Of this tool.
    pub version: String,
}

struct Question {
    id: String,
    text: String,
    choices: Vec<String>,
    answer: usize,
}

/// Runs the command; returns the table for stdout.
pub fn run(args: &ChoicesArgs, tell: impl Fn(&str) + Sync) -> Result<String> {
    let questions = read(&args.data)?;
    let template = args.context_template.as_deref().unwrap_or(CONTEXT);
    let found = Model::find(&Hub::from_env(), &args.model, &tell)?;
    let tokenizer = Tokenizer::load(found.tokenizer_dir(), None, template_time(None))?;
    let model = found.load(&Target::open(&args.device, &tell)?)?;
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let (mut rows, mut hits, mut norm_hits) = (Vec::new(), Vec::new(), Vec::new());
    for (i, question) in questions.iter().enumerate() {
        if INTERRUPTED.load(Ordering::Relaxed) {
            bail!("interrupted; nothing was written");
        }
        let fields = context! { question => &question.text, choices => Serde(&question.choices) };
        let context = environment.render_str(template, fields).context("--context-template")?;
        let place = || format!("question {}", question.id);
        let sums = log_likelihoods(&model, &tokenizer, &context, &question.choices).with_context(place)?;
        let per_character = |(sum, choice): (&f64, &String)| sum / choice.chars().count().max(1) as f64;
        let norms: Vec<f64> = sums.iter().zip(&question.choices).map(per_character).collect();
        let [picked, picked_norm] = [best(&sums), best(&norms)];
        let hit = |choice: usize| f64::from(u8::from(choice == question.answer));
        hits.push(hit(picked));
        norm_hits.push(hit(picked_norm));
        rows.push(json!({
            "id": question.id, "cluster": cluster(question), "benchmark": "choices", "score": hit(picked_norm),
            "acc": hit(picked), "acc_norm": hit(picked_norm), "question": context,
            "response": question.choices[picked_norm], "target": question.choices[question.answer],
            "choices": question.choices, "loglikelihoods": sums,
        }));
        if (i + 1).is_multiple_of(100) {
            tell(&format!("{}/{} questions", i + 1, questions.len()));
        }
    }
    let clusters: Vec<String> = questions.iter().map(cluster).collect();
    let names: Vec<&str> = clusters.iter().map(String::as_str).collect();
    let chance = questions.iter().map(|q| 1.0 / q.choices.len() as f64).sum::<f64>() / questions.len() as f64;
    let summary = Summary {
        model: args.model.clone(),
        data: args.data.display().to_string(),
        context: template.into(),
        questions: questions.len(),
        acc: clustered(&hits, &names).context("no questions")?,
        acc_norm: clustered(&norm_hits, &names).context("no questions")?,
        chance,
        version: env!("CARGO_PKG_VERSION").into(),
    };
    write_jsonl(&args.out.join("items.jsonl"), &rows)?;
    write_json(&args.out.join("summary.json"), &summary)?;
    write_page(&args.out.join("report.html"), Page::Choices, &json!({"summary": summary, "items": rows}))?;
    Ok(table(&summary))
}

fn table(summary: &Summary) -> String {
    let line = |name: &str, e: &Estimate| {
        format!("{name:10} {:.4}   95 % interval [{:.4}, {:.4}]", e.mean, e.low, e.high)
    };
    [
        line("acc", &summary.acc),
        line("acc_norm", &summary.acc_norm),
        format!("{} questions; guessing would get {:.4}", summary.questions, summary.chance),
    ]
    .join("\n")
}

/// Rows with `question`, `choices` (texts, or ARC's `{"text": […], "label": […]}`) and `answer` (an index, a label, or
/// the text of a choice; also `answerKey` or `label`).
fn read(path: &Path) -> Result<Vec<Question>> {
    let rows = read_jsonl(path)?;
    if rows.is_empty() {
        bail!("{}: holds no rows", path.display());
    }
    let question = |(number, (line, row)): (usize, (usize, Value))| {
        question(number, &row).with_context(|| format!("{}:{line}", path.display()))
    };
    let all = rows.into_iter().enumerate().map(question).collect::<Result<Vec<_>>>()?;
    let mut seen = std::collections::HashSet::new();
    if let Some(twice) = all.iter().find(|question| !seen.insert(question.id.as_str())) {
        bail!("{}: the id {:?} stands twice; ids must be unique", path.display(), twice.id);
    }
    Ok(all)
}

fn question(number: usize, row: &Value) -> Result<Question> {
    let id = row_id(row.get("id"), number);
    let text = row["question"].as_str().context("no text in \"question\"")?.to_string();
    let texts = |value: &Value| -> Option<Vec<String>> {
        value.as_array()?.iter().map(|text| text.as_str().map(String::from)).collect()
    };
    let choices = texts(&row["choices"]).or_else(|| texts(&row["choices"]["text"]));
    let choices = choices
        .filter(|choices| choices.len() > 1)
        .context("\"choices\" is no list of at least two texts")?;
    let labels = texts(&row["choices"]["label"]);
    let mut given = ["answer", "answerKey", "label"].into_iter().filter_map(|name| row.get(name));
    let answer = given.find(|value| !value.is_null()).context("no \"answer\"")?;
    let by_text = |text: &str| {
        let label = labels.as_ref().and_then(|labels| labels.iter().position(|label| label == text));
        let letter = || (0..choices.len()).find(|&i| text.len() == 1 && text.as_bytes()[0] == b'A' + i as u8);
        label.or_else(|| choices.iter().position(|choice| choice == text)).or_else(letter)
    };
    let index = match answer {
        Value::Number(index) => index.as_u64().map(|index| index as usize),
        Value::String(text) => by_text(text),
        _ => None,
    };
    let index = index.filter(|&index| index < choices.len());
    let answer = index.with_context(|| format!("the answer {answer} is none of the choices"))?;
    Ok(Question { id, text, choices, answer })
}

/// The same for the same question.
fn cluster(question: &Question) -> String {
    let whole = json!([question.text, question.choices]).to_string();
    blake3::hash(whole.as_bytes()).to_hex()[..16].to_string()
}

/// Index of the largest value, the first of equal ones.
fn best(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// Log-likelihood of each choice after the context and a space: the tokens of the whole text that are not those of the
/// context (`lm_eval.api.model.TemplateLM._encode_pair`). The context is computed once for all.
fn log_likelihoods(
    model: &Decoder,
    tokenizer: &Tokenizer,
    context: &str,
    choices: &[String],
) -> Result<Vec<f64>> {
    // Spaces at the end of the context belong to the continuation.
    let bare = context.trim_end();
    let gap = format!("{} ", &context[bare.len()..]);
    let before = tokenizer.encode_text(bare)?;
    let mut batch = Batch { tokens: before.clone(), ..Batch::default() };
    batch.positions.extend(0..before.len() as u32);
    let (mut targets, mut owners, mut tails) = (Vec::new(), Vec::new(), Vec::new());
    for (choice, text) in choices.iter().enumerate() {
        let whole = tokenizer.encode_text(&format!("{bare}{gap}{text}"))?;
        if before.is_empty() || whole.len() <= before.len() {
            bail!("choice {choice} has no tokens of its own after the context");
        }
        let most = model.config().longest();
        if whole.len() > most {
            bail!(
                "choice {choice}: {} tokens with its context, but the model has {most} positions",
                whole.len()
            );
        }
        model.check_sequence(&whole, whole.len()).map_err(anyhow::Error::msg)?;
        let tail = &whole[before.len()..];
        let first = batch.tokens.len() as u32;
        for (i, &token) in tail.iter().enumerate() {
            batch.predictors.push(if i == 0 { before.len() as u32 - 1 } else { first + i as u32 - 1 });
            targets.push(token);
            owners.push(choice);
        }
        batch.tokens.extend_from_slice(tail);
        batch.positions.extend(before.len() as u32..whole.len() as u32);
        tails.push(tail.len());
    }
    let mut segments = Segments::default();
    segments.push_row(0, before.len(), &tails);
    (batch.segments, batch.targets) = (Arc::new(segments), Arc::new(targets));
    let mut sums = vec![0.0; choices.len()];
    for (logp, &owner) in model.score_to_host(&batch).logps.iter().zip(&owners) {
        sums[owner] += f64::from(*logp);
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_given_in_every_usual_way() {
        let answer = |row: Value| question(0, &row).map(|q| q.answer);
        let choices = json!(["red", "green", "blue"]);
        let row = |answer: Value| json!({"question": "q", "choices": choices, "answer": answer});
        assert_eq!(answer(row(json!(2))).unwrap(), 2);
        assert_eq!(answer(row(json!("B"))).unwrap(), 1);
        assert_eq!(answer(row(json!("red"))).unwrap(), 0);
        assert!(answer(row(json!(3))).is_err() && answer(row(json!("black"))).is_err());
        let arc =
            json!({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"});
        assert_eq!(answer(arc).unwrap(), 1);
        let empty = json!({"question": "q", "choices": choices, "answer": null, "answerKey": "E"});
        assert!(answer(empty).unwrap_err().to_string().contains("the answer \"E\""));
    }

    #[test]
    fn the_first_of_equal_choices_is_picked() {
        assert_eq!(best(&[-3.0, -1.0, -1.0]), 1);
    }
}
