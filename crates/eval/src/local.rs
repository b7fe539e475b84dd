//! Answers of a local model.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use decoder::{Completion, Decoder, Ends, Generator, Progress, Request, Stop, eos_ids};
use hub::Hub;
use jiff::civil::DateTime;
use pref_data::{Extras, Tokenizer, read_chat_template};
use serde_json::{Value, json};

use crate::args::DeviceArgs;
use crate::models::{Model, Target};
use crate::sample::{INTERRUPTED, Prompt, tell_line};
use crate::sampling::SamplingArgs;

/// Tokens of all sequences that run together, where nothing else is said: twice as many where each takes half.
const BATCH_TOKENS: usize = 8192;

/// A model that answers.
pub struct Local {
    found: Model,
    model: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    sampling: SamplingArgs,
    eos: Vec<u32>,
    narrow: bool,
    backend: String,
    /// The day that the chat template writes into prompts, where it does.
    day: Option<String>,
}

/// One question.
#[derive(Debug, Clone)]
pub struct Question {
    /// Whatever the caller wants back with the answer.
    pub index: usize,
    /// Name for people.
    pub id: String,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// New tokens at most.
    pub max_new_tokens: usize,
    /// The answer ends before this, where there is something before it.
    pub stop: Option<String>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The question's index.
    pub index: usize,
    /// Text, without the end-of-sequence token and without the text that ended it.
    pub text: String,
    /// `stop` or `length`, as servers say it.
    pub finish_reason: &'static str,
    /// Tokens made, without the end-of-sequence token.
    pub tokens: Vec<u32>,
}

impl Local {
    /// Finds and loads a model.
    pub fn open(
        name: &str,
        device: &DeviceArgs,
        sampling: &SamplingArgs,
        chat_template: Option<&str>,
        now: DateTime,
    ) -> Result<Self> {
        sampling.check_ranges()?;
        let found = Model::find(&Hub::from_env(), name, &|line| tell_line(line))?;
        let template = chat_template.map(read_chat_template).transpose()?;
        let tokenizer = Tokenizer::load(found.tokenizer_dir(), template.as_deref(), now)?;
        let sampling = sampling.with_defaults_of(found.config_dir())?;
        let target = Target::to_generate(device, &|line| tell_line(line))?;
        let model = found.load(&target)?;
        let mut eos = eos_ids(found.config_dir())?;
        eos.extend(tokenizer.eos_id());
        if sampling.ignore_eos {
            eos.clear();
        }
        let day = tokenizer.asks_for_date().then(|| now.date().to_string());
        let backend = device.backend().name().to_string();
        Ok(Self { found, model, tokenizer, sampling, eos, narrow: device.is_narrow(), backend, day })
    }

    /// What answers depend on, to be recorded beside them.
    pub fn record(&self) -> Result<Value> {
        Ok(json!({
            "weights": self.found.hash()?, "chat_template": self.tokenizer.template_text(),
            "sampling": self.sampling.record(), "template_date": self.day, "backend": self.backend, "dtype": if self.narrow { "bfloat16" } else { "float32" },
        }))
    }

    /// How tokens are chosen.
    pub fn sampling(&self) -> &SamplingArgs {
        &self.sampling
    }

    /// Token ids of a prompt.
    pub fn prompt(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let ids = match &prompt.text {
            Some(text) => self.tokenizer.encode_text(text),
            None => self.tokenizer.encode_chat_prompt(&prompt.messages, &Extras::default()),
        };
        let ids = ids.with_context(|| format!("prompt {}", prompt.id))?;
        if ids.is_empty() {
            bail!("prompt {}: has no tokens", prompt.id);
        }
        Ok(ids)
    }

    /// Tokens of prompt and answer that the model takes.
    pub fn longest(&self) -> usize {
        self.model.config().longest()
    }

    /// Errors where a prompt and its answer are too long, or a token is none of the model's.
    pub fn check(&self, ids: &[u32], new: usize, id: &str) -> Result<()> {
        let most = self.longest();
        if ids.len() >= most {
            bail!("prompt {id}: {} tokens, but the model has {most} positions", ids.len());
        }
        if ids.len().saturating_add(new) > most {
            bail!(
                "prompt {id}: {} tokens and {new} new ones exceed the model's {most} positions; lower --max-new-tokens",
                ids.len()
            );
        }
        let fits = self.model.check_sequence(ids, ids.len() + new);
        fits.map_err(|reason| anyhow::anyhow!("prompt {id}: {reason}"))
    }

    /// Answers all questions, in any order; `done` gets each answer, `tell` each step and the answers so far. An
    /// interrupt ends it early.
    pub fn answer(
        self,
        questions: Vec<Question>,
        batch_tokens: Option<usize>,
        mut done: impl FnMut(Answer) -> Result<()>,
        mut tell: impl FnMut(Progress),
    ) -> Result<()> {
        let lengths = questions.iter().map(|q| q.prompt.len() + q.max_new_tokens);
        // Never more room than all of them need.
        let all: usize = lengths.clone().map(|n| n.next_multiple_of(fused_ops::PAGE)).sum();
        let longest = lengths.max().unwrap_or(1);
        let usual = if self.narrow { 2 * BATCH_TOKENS } else { BATCH_TOKENS };
        let room = batch_tokens.unwrap_or(usual).min(all).max(longest);
        let Self { model, tokenizer, sampling, eos, narrow, .. } = self;
        let seed = sampling.seed.unwrap_or(0).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let own: HashMap<usize, String> =
            questions.iter().filter_map(|q| Some((q.index, q.stop.clone()?))).collect();
        let requests = questions.into_iter().map(|q| Request {
            seed: seed.wrapping_add(q.index as u64),
            index: q.index,
            prompt: q.prompt,
            max_new_tokens: q.max_new_tokens,
        });
        let is_end = |index: usize, tokens: &[u32]| {
            let own = own.get(&index).map(|stop| (tokens, stop.as_str()));
            ends(&tokenizer, tokens, &sampling.stop)
                || own.is_some_and(|(all, stop)| is_over(&tokenizer, all, stop))
        };
        let looks = !sampling.stop.is_empty() || !own.is_empty();
        let ends = Ends { eos, text: looks.then_some(&is_end) };
        let failure = std::cell::RefCell::new(None);
        let store = |completion: Completion| {
            if completion.stop == Stop::NotFinite {
                let reason = "the model's logits are no numbers: its weights or its configuration are broken";
                failure.borrow_mut().get_or_insert(anyhow::anyhow!("{reason}"));
                return;
            }
            let answer = tokenizer.decode(&completion.tokens).map_err(anyhow::Error::from);
            let stored = answer.and_then(|text| {
                done(Answer {
                    index: completion.index,
                    text: before(text, &sampling.stop),
                    finish_reason: if completion.stop == Stop::Length { "length" } else { "stop" },
                    tokens: completion.tokens,
                })
            });
            if let Err(error) = stored {
                failure.borrow_mut().get_or_insert(error);
            }
        };
        Generator::new(model, sampling.sampling(), room, narrow).run(requests, &ends, store, |step| {
            tell(step);
            failure.borrow().is_none() && !INTERRUPTED.load(Ordering::Relaxed)
        });
        failure.into_inner().map_or(Ok(()), Err)
    }
}

/// The text of the newest tokens holds one of the stop texts.
fn ends(tokenizer: &Tokenizer, tokens: &[u32], stops: &[String]) -> bool {
    // A token is at least a byte, but for those of a character that several tokens spell.
    let longest = stops.iter().map(String::len).max().unwrap_or(0) + 8;
    let text = tokenizer.decode(&tokens[tokens.len().saturating_sub(longest)..]).unwrap_or_default();
    stops.iter().any(|stop| text.contains(stop.as_str()))
}

/// The text ends with `stop` and has something before it.
fn is_over(tokenizer: &Tokenizer, tokens: &[u32], stop: &str) -> bool {
    if !ends(tokenizer, tokens, &[stop.to_string()]) {
        return false;
    }
    let text = tokenizer.decode(tokens).unwrap_or_default();
    text.split_once(stop).is_some_and(|(before, _)| before.contains(char::is_alphanumeric))
}

fn before(mut text: String, stops: &[String]) -> String {
    if let Some(at) = stops.iter().filter_map(|stop| text.find(stop.as_str())).min() {
        text.truncate(at);
    }
    text
}
