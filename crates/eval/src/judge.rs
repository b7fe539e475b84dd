//! A model that judges, over HTTP: every reply is stored before it is read, so that none is paid for twice.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use chat_client::{
    ChatMessage, ChatRequest, Client, Closed, InFlight, Prices, ReplyStore, Settings, Source, Usage, api_key,
};
use clap::Args;
use futures_util::StreamExt;
use serde::Serialize;
use serde_json::Value;

use crate::sample::{INTERRUPTED, tell_line};

/// Times that a judge is told again in which form it has to reply.
const REMINDERS: usize = 3;

/// Flags of a judge.
#[derive(Debug, Clone, Default, Args)]
pub struct JudgeArgs {
    /// Base URL of the judge's OpenAI-compatible server.
    #[arg(long, value_name = "URL", requires = "judge_model")]
    pub judge_endpoint: Option<String>,
    /// The judge's name on that server.
    #[arg(long, value_name = "NAME", requires = "judge_endpoint")]
    pub judge_model: Option<String>,
    /// Environment variable that holds the judge's key.
    #[arg(long, value_name = "VAR", requires = "judge_endpoint")]
    pub judge_api_key_env: Option<String>,
    /// Requests of the judge at a time [default: as many as the server takes well].
    #[arg(long, value_name = "N", requires = "judge_endpoint", value_parser = clap::value_parser!(u32).range(1..))]
    pub judge_max_in_flight: Option<u32>,
    /// Dollars that judging may cost at most; the judge's price must be known.
    #[arg(long, value_name = "USD", requires = "judge_endpoint")]
    pub max_cost: Option<f64>,
}

/// What judging took, of replies bought now and before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Took {
    /// Replies.
    pub replies: usize,
    /// Of these bought in this run.
    pub bought: usize,
    /// Tokens of the requests.
    pub prompt_tokens: u64,
    /// Tokens of the replies.
    pub completion_tokens: u64,
    /// Dollars, where the price is known.
    pub cost: Option<f64>,
}

impl std::ops::AddAssign for Took {
    fn add_assign(&mut self, other: Self) {
        self.replies += other.replies;
        self.bought += other.bought;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        if let Some(cost) = other.cost {
            *self.cost.get_or_insert(0.0) += cost;
        }
    }
}

/// What became of a question to the judge.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict<T> {
    /// What it said, where it could be read.
    pub read: Option<T>,
    /// Its last words.
    pub text: String,
    took: Took,
    /// The request failed: nothing was said.
    failed: Option<String>,
}

/// A judge.
pub struct Judge {
    client: Arc<Client>,
    model: String,
    together: usize,
}

impl Judge {
    /// `None` where no judge is named. Replies are stored in `store`.
    pub fn open(args: &JudgeArgs, store: &Path) -> Result<Option<Self>> {
        let (Some(endpoint), Some(model)) = (&args.judge_endpoint, &args.judge_model) else {
            return Ok(None);
        };
        // Only fails when a provider is there already.
        rustls::crypto::ring::default_provider().install_default().ok();
        let price = Prices::bundled().of(model);
        if args.max_cost.is_some() && price.is_none() {
            anyhow::bail!("--max-cost: the price of {model} is not known");
        }
        let (store, found) = ReplyStore::open(store)?;
        if found.torn > 0 {
            tell_line(&format!("WARNING: the last reply was cut off by a crash ({} bytes)", found.torn));
        }
        let settings = Settings {
            in_flight: args
                .judge_max_in_flight
                .map_or_else(InFlight::default, |n| InFlight::fixed(n as usize)),
            prices: price.map(|price| (model.clone(), price)).into_iter().collect(),
            max_cost: args.max_cost,
            ..Settings::to(endpoint, api_key(args.judge_api_key_env.as_deref(), endpoint)?)
        };
        let client = Arc::new(Client::new(settings, store)?);
        let together = args.judge_max_in_flight.map_or(512, |n| n as usize);
        Ok(Some(Self { client, model: model.clone(), together }))
    }

    /// Asks all questions, several at a time; the verdicts are in their order. `None` where the user or the money ended
    /// it: what is stored is not asked again. `tell` gets how many are done.
    pub async fn all<T>(
        &self,
        questions: Vec<Vec<ChatMessage>>,
        form: &str,
        parse: &(impl Fn(usize, &str) -> Option<T> + Sync),
        mut tell: impl FnMut(usize),
    ) -> Result<Option<(Vec<Verdict<T>>, Took)>> {
        let count = questions.len();
        let asked = questions.into_iter().enumerate().map(|(i, messages)| async move {
            (i, self.ask(messages, form, &|reply| parse(i, reply)).await)
        });
        let mut asked = futures_util::stream::iter(asked).buffer_unordered(self.together);
        let mut all: Vec<Option<Verdict<T>>> = (0..count).map(|_| None).collect();
        let (mut done, mut failure) = (0, None);
        loop {
            let next = tokio::select! {
                next = asked.next() => next,
                () = tokio::time::sleep(Duration::from_millis(200)) => {
                    if INTERRUPTED.load(Ordering::Relaxed) {
                        self.client.close();
                    }
                    continue;
                }
            };
            let Some((i, verdict)): Option<(usize, Result<Option<Verdict<T>>>)> = next else { break };
            match verdict {
                Ok(verdict) => all[i] = verdict,
                // The others that are under way are still stored.
                Err(error) => failure = failure.or(Some(error)),
            }
            if all[i].as_ref().is_some_and(|verdict| verdict.failed.is_none()) {
                done += 1;
                tell(done);
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        let failed: Vec<&String> =
            all.iter().flatten().filter_map(|verdict| verdict.failed.as_ref()).collect();
        if let Some(first) = failed.first() {
            anyhow::bail!(
                "{} of {count} judgements failed: {first}; the others are stored: run again to ask for these",
                failed.len()
            );
        }
        if self.client.closed() == Closed::Cost {
            anyhow::bail!(
                "--max-cost is reached: ${:.4} are spent and {done} of {count} judgements are stored; run again with more",
                self.client.counts().spent.unwrap_or(0.0)
            );
        }
        let Some(all) = all.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
        let mut took = Took::default();
        all.iter().for_each(|verdict| took += verdict.took);
        let usage = Usage {
            prompt_tokens: took.prompt_tokens,
            completion_tokens: took.completion_tokens,
            ..Usage::default()
        };
        took.cost = self.client.price(&self.model).map(|price| price.of_usage(usage));
        Ok(Some((all, took)))
    }

    async fn ask<T>(
        &self,
        mut messages: Vec<ChatMessage>,
        form: &str,
        parse: &(impl Fn(&str) -> Option<T> + Sync),
    ) -> Result<Option<Verdict<T>>> {
        let mut verdict = Verdict { read: None, text: String::new(), took: Took::default(), failed: None };
        for attempt in 0..=REMINDERS {
            let request = ChatRequest {
                model: self.model.clone(),
                messages: messages.clone(),
                temperature: Some(0.0),
                max_tokens: Some(1024),
                ..ChatRequest::default()
            };
            let stored = match self.client.complete(&request).await {
                Ok(Some(stored)) => stored,
                Ok(None) => return Ok(None),
                Err(error) if error.is_setup() => {
                    self.client.close();
                    return Err(anyhow::Error::new(error)).context("the judge cannot be asked");
                }
                Err(error) => {
                    verdict.failed = Some(error.to_string());
                    return Ok(Some(verdict));
                }
            };
            let usage = stored.reply.usage();
            verdict.took.replies += 1;
            verdict.took.bought += usize::from(stored.source == Source::Server);
            verdict.took.prompt_tokens += usage.prompt_tokens;
            verdict.took.completion_tokens += usage.completion_tokens;
            verdict.text = stored.reply.content().to_string();
            verdict.read = parse(&verdict.text);
            if verdict.read.is_some() || attempt == REMINDERS {
                break;
            }
            let reminder = format!("That could not be read. Reply once more and end with {form}.");
            messages.push(ChatMessage { role: "assistant".into(), content: verdict.text.clone() });
            messages.push(ChatMessage::user(reminder));
        }
        Ok(Some(verdict))
    }
}

/// A prompt as a judge reads it: the user's words alone, or all messages with their roles.
pub fn conversation(prompt: &Value) -> String {
    match prompt.as_array().map(Vec::as_slice) {
        None => prompt.as_str().unwrap_or_default().to_string(),
        Some([one]) => one["content"].as_str().unwrap_or_default().to_string(),
        Some(all) => {
            let part = |m: &Value| Some(format!("{}: {}", m["role"].as_str()?, m["content"].as_str()?));
            all.iter().filter_map(part).collect::<Vec<_>>().join("\n\n")
        }
    }
}

/// The first of what stands in `[[…]]`, or else in `[…]`, that `parse` takes.
pub fn bracketed<T>(text: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
    let first = |open: &str, close: &str| {
        let inside = text.split(open).skip(1).filter_map(|rest| rest.split_once(close));
        inside.map(|(inside, _)| inside.trim()).find_map(&parse)
    };
    first("[[", "]]").or_else(|| first("[", "]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_brackets_that_can_be_read_count() {
        let number = |text: &str| bracketed(text, |inside| inside.parse::<f64>().ok());
        assert_eq!(number("In the form [[score]]: [[0.7]], not [[0.2]]."), Some(0.7));
        assert_eq!(number("The score [0.5]"), Some(0.5));
        assert_eq!(number("none"), None);
        assert_eq!(number("[[0.1"), None);
    }
}
