//! Asking until a reply keeps to the form, the retries are used up, or nothing more may be asked.

use anyhow::Result;
use chat_client::{ChatMessage, ChatRequest, Client, Error, Reply, Source, Usage};

use crate::output::Failed;
use crate::parse::Reason;

/// Reason of rows for which no reply could be had, though the same request may get one later.
pub const REQUEST_FAILED: &str = "request_failed";

/// What the requests for one row took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Spent {
    /// Tokens of all replies, those that could not be used among them.
    pub usage: Usage,
    /// US dollars of them, as far as the models' prices are known.
    pub cost: f64,
    /// Milliseconds of the first reply.
    pub latency_ms: u64,
    /// Replies of the server now.
    pub from_server: usize,
    /// Replies that were stored before.
    pub from_store: usize,
}

/// How a question ended.
#[derive(Debug)]
pub enum Asked<T> {
    /// With this, from that reply.
    Got(T, Reply),
    /// Without.
    Failed(Failed),
    /// The user, or the money, stopped it.
    Stopped,
}

/// What does not change from question to question.
#[derive(Debug)]
pub struct Asker {
    /// Sends and stores.
    pub client: Client,
    /// Model and sampling.
    pub request: ChatRequest,
    /// Model that judges.
    pub judge_model: String,
    /// Times to ask again.
    pub form_retries: u32,
    /// What failed in an earlier run is asked again.
    pub retry_failed: bool,
}

impl Asker {
    /// Asks for row `id` what `request` says, until `parse` takes a reply.
    pub async fn ask<T>(
        &self,
        id: &str,
        mut request: ChatRequest,
        spent: &mut Spent,
        parse: impl Fn(&Reply) -> Result<T, Reason>,
    ) -> Result<Asked<T>> {
        let (mut fresh, mut enlarged) = (0, false);
        let failed = |reason: &str, attempts: u32, last: String| {
            Asked::Failed(Failed { id: id.into(), reason: reason.into(), attempts, last_error: last })
        };
        loop {
            let stored = match self.client.complete(&request).await {
                Ok(Some(stored)) => stored,
                Ok(None) => return Ok(Asked::Stopped),
                Err(error) if error.is_setup() => return Err(explain(error)),
                Err(error) => {
                    let refused = matches!(error, Error::Refused { .. });
                    let reason = if refused { "request_refused" } else { REQUEST_FAILED };
                    return Ok(failed(reason, error.attempts(), error.to_string()));
                }
            };
            let is_new = stored.source == Source::Server;
            spent.usage += stored.reply.usage();
            spent.cost +=
                self.client.price(&request.model).map_or(0.0, |price| price.of_usage(stored.reply.usage()));
            if spent.from_server + spent.from_store == 0 {
                spent.latency_ms = stored.latency_ms;
            }
            spent.from_server += usize::from(is_new);
            spent.from_store += usize::from(!is_new);
            fresh += u32::from(is_new);
            let reason = match parse(&stored.reply) {
                Ok(got) => return Ok(Asked::Got(got, stored.reply)),
                Err(reason) => reason,
            };
            let tokens = stored.reply.usage().completion_tokens;
            // Cut off though the limit was not reached: not for its length, so that the same may come whole.
            let broke_off = enlarged && request.max_tokens.is_some_and(|limit| tokens < u64::from(limit));
            let again = reason.is_form() || reason == Reason::Length && broke_off;
            if reason == Reason::Length && !enlarged {
                enlarged = true;
                let tokens = tokens.max(256);
                let limit = request.max_tokens.map_or(tokens, u64::from).saturating_mul(2);
                request.max_tokens = Some(u32::try_from(limit).unwrap_or(u32::MAX));
                continue;
            }
            let asked = request.sample + 1;
            let goes_on = if self.retry_failed {
                fresh <= if again { self.form_retries } else { 0 }
            } else {
                again && asked <= self.form_retries
            };
            // What an earlier run with --retry-failed has bought is there.
            let mut next = request.clone();
            next.sample += 1;
            if !goes_on && !self.client.store().has(&next.key()) {
                let last = stored.reply.content().chars().take(200).collect();
                return Ok(failed(reason.name(), asked, last));
            }
            request = next;
        }
    }

    /// A request of the teacher.
    pub fn teacher(&self, messages: Vec<ChatMessage>) -> ChatRequest {
        ChatRequest { messages, ..self.request.clone() }
    }

    /// A request of the judge: as even as can be, where no temperature is given.
    pub fn judge(&self, messages: Vec<ChatMessage>) -> ChatRequest {
        let even = self.request.reasoning.is_none().then_some(0.0);
        let temperature = self.request.temperature.or(even);
        ChatRequest { model: self.judge_model.clone(), messages, temperature, ..self.request.clone() }
    }
}

fn explain(error: Error) -> anyhow::Error {
    let hint = match &error {
        Error::Refused { status: 401 | 403, .. } => {
            "check the key in the environment variable (--api-key-env)"
        }
        Error::Refused { status: 402 | 429, .. } => "the account has no credit left",
        Error::Refused { status: 404, .. } => "check --endpoint (it should end in /v1) and --model",
        Error::GaveUp { .. } => "is the server running, and is --endpoint right?",
        _ => return error.into(),
    };
    anyhow::Error::new(error).context(format!("the run cannot go on; {hint}"))
}
