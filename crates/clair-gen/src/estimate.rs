//! What a run will take, before it starts: from the lengths of its prompts and answers.

use std::fmt;
use std::sync::Arc;

use anyhow::Result;
use chat_client::Price;

use crate::args::{JudgeBy, Method};
use crate::asker::Asker;
use crate::input::Answer;
use crate::methods::Methods;

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
    /// First calls of rows that are stored already.
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
        let mut sum = Self::default();
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
        let (input, output) = (sum.input, sum.output);
        sum.cost = asker.client.price().map(|price: Price| price.of(input, output));
        Ok(sum)
    }

    fn add(&mut self, methods: &Methods, asker: &Asker, method: Method, answer: &Answer) -> Result<()> {
        let tokens = |text: &str| text.len() as f64 / BYTES;
        let own = tokens(answer.response());
        let judged = |a: &str, b: &str| -> Result<f64> {
            Ok(methods.judge.two(answer, a, b)?.iter().map(|m| tokens(&m.content)).sum())
        };
        let (request, output) = match method {
            Method::Clair => (asker.teacher(methods.clair.one(answer, answer.response())?), REASONING + own),
            Method::Stronger => (asker.teacher(answer.messages.clone()), own.max(REASONING)),
            Method::Judge | Method::JudgeOffpolicy => {
                if method == Method::JudgeOffpolicy && !answer.scores.is_empty() {
                    return Ok(());
                }
                let n = answer.responses.len() as f64;
                let (calls, each) = match methods.judge_by {
                    JudgeBy::Compare => (n * (n - 1.0), judged(answer.response(), &answer.responses[1])?),
                    JudgeBy::Score => (n, judged(answer.response(), "")?),
                };
                self.take(calls, each, REASONING);
                return Ok(());
            }
        };
        let input = request.messages.iter().map(|m| tokens(&m.content)).sum();
        if asker.client.store().has(&request.key()) {
            self.stored += 1.0;
        } else {
            self.take(1.0, input, output);
            if methods.verify.is_some() {
                self.take(2.0, judged(answer.response(), answer.response())?, REASONING);
            }
        }
        Ok(())
    }

    fn take(&mut self, calls: f64, input: f64, output: f64) {
        self.calls += calls;
        self.input += calls * input;
        self.output += calls * output;
    }
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
            write!(f, "; {stored:.0} rows have a stored reply already")?;
        }
        Ok(())
    }
}
