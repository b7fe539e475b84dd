//! What a run will take, before it starts: from the lengths of its prompts and answers.

use std::fmt;
use std::sync::Arc;

use anyhow::Result;
use chat_client::{ChatRequest, Reply};

use crate::args::Method;
use crate::asker::Asker;
use crate::input::Answer;
use crate::methods::{Methods, clair, judge};
use crate::parse;
use crate::parse::checks::Around;

/// Bytes of a token, about.
const BYTES: f64 = 4.0;

/// Tokens of a judge's or a teacher's reasoning, about.
const REASONING: f64 = 150.0;

/// Rows that are looked at; the others are taken to be like them.
const LOOKED_AT: usize = 2000;

/// Calls and tokens of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    /// Calls that are not stored yet.
    pub calls: f64,
    /// Calls whose replies are stored already.
    pub stored: f64,
    /// Tokens of the requests.
    pub input: f64,
    /// Tokens of the replies.
    pub output: f64,
    /// Dollars; `None` where no price is known.
    pub cost: Option<f64>,
}

impl Estimate {
    /// Looks at the rows' prompts.
    pub fn new(methods: &Methods, asker: &Asker, all: &[Method], answers: &[Arc<Answer>]) -> Result<Self> {
        let mut sum = Self { cost: Some(0.0), ..Self::default() };
        let step = answers.len().div_ceil(LOOKED_AT).max(1);
        for answer in answers.iter().step_by(step) {
            for &method in all {
                sum.add(methods, asker, method, answer)?;
            }
        }
        let scale = answers.len() as f64 / answers.iter().step_by(step).count().max(1) as f64;
        for part in [&mut sum.calls, &mut sum.stored, &mut sum.input, &mut sum.output] {
            *part *= scale;
        }
        sum.cost = sum.cost.map(|cost| cost * scale);
        Ok(sum)
    }

    fn add(&mut self, methods: &Methods, asker: &Asker, method: Method, answer: &Answer) -> Result<()> {
        let own = tokens(answer.response());
        let (request, output) = match method {
            Method::Clair => {
                let request = asker.teacher(methods.clair.one(answer, answer.response())?);
                (clair::with_form(request, methods), REASONING + own)
            }
            Method::Stronger => (asker.teacher(answer.messages.clone()), own.max(REASONING)),
            Method::JudgeOffpolicy if !answer.scores.is_empty() => return Ok(()),
            Method::Judge | Method::JudgeOffpolicy => {
                for request in judge::requests(methods, asker, answer)? {
                    self.take(asker, &request, REASONING);
                }
                return Ok(());
            }
        };
        let key = request.key();
        self.take(asker, &request, output);
        if methods.verify.is_none() {
            return Ok(());
        }
        // Where the text is there, so may be what the judge said of it.
        let stored = asker.client.stored(&key)?;
        let chosen = stored.and_then(|stored| text_of(methods, method, answer, &stored.reply));
        let chosen = chosen.unwrap_or_else(|| answer.response().to_string());
        for request in judge::both(methods, asker, answer, &chosen, answer.response())? {
            self.take(asker, &request, REASONING);
        }
        Ok(())
    }

    /// Counts a call, if its reply is not stored.
    fn take(&mut self, asker: &Asker, request: &ChatRequest, output: f64) {
        if asker.client.store().has(&request.key()) {
            self.stored += 1.0;
            return;
        }
        let input: f64 = request.messages.iter().map(|message| tokens(&message.content)).sum();
        self.calls += 1.0;
        self.input += input;
        self.output += output;
        let price = asker.client.price(&request.model);
        self.cost = self.cost.zip(price).map(|(cost, price)| cost + price.of(input, output));
    }
}

fn tokens(text: &str) -> f64 {
    text.len() as f64 / BYTES
}

/// The chosen text in a stored reply.
fn text_of(methods: &Methods, method: Method, answer: &Answer, reply: &Reply) -> Option<String> {
    if method == Method::Stronger {
        return parse::answer(reply).ok();
    }
    let prompt = answer.prompt();
    let around = Around { prompt: &prompt, answer: answer.response() };
    parse::revision(reply, methods.clair.form(), around).ok().map(|revision| revision.text)
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { calls, stored, input, output, .. } = self;
        write!(f, "about {calls:.0} calls, {input:.0} tokens in and {output:.0} out")?;
        match self.cost {
            Some(cost) => write!(f, ", ${cost:.2}")?,
            None => write!(f, "; the model's price is not known (--price-input, --price-output)")?,
        }
        if *stored > 0.0 {
            write!(f, "; {stored:.0} replies are stored already")?;
        }
        Ok(())
    }
}
