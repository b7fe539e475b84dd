//! Budgets a minute: requests, tokens in, tokens out. Calls are spread evenly over time, so that a server's window of
//! whatever length is never overrun; what was reserved for a call is corrected when its reply is there.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Budgets a minute; `None` is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Budgets {
    /// Requests.
    pub requests: Option<f64>,
    /// Tokens of requests and replies together.
    pub tokens: Option<f64>,
    /// Tokens of requests.
    pub input_tokens: Option<f64>,
    /// Tokens of replies.
    pub output_tokens: Option<f64>,
}

/// Unused time that may be made up for: what is not started on time, for want of a worker, is not lost.
const SLACK: Duration = Duration::from_millis(500);

/// Longest sleep of the call that is next: replies may correct the budgets meanwhile.
const STEP: Duration = Duration::from_millis(20);

/// Tokens of a reply while none has come.
const GUESS: f64 = 300.0;

/// One budget: the time at which the next unit is free moves ahead with each unit taken.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    seconds_each: f64,
    slack: Duration,
    next: Instant,
}

impl Bucket {
    fn new(a_minute: f64, slack: Duration, now: Instant) -> Self {
        Self { seconds_each: 60.0 / a_minute, slack, next: now.checked_sub(slack).unwrap_or(now) }
    }

    /// Takes `units`.
    fn take(&mut self, units: f64, now: Instant) {
        let start = self.next.max(now.checked_sub(self.slack).unwrap_or(now));
        self.next = start + seconds(units * self.seconds_each);
    }

    /// Gives back (or takes, where negative) units.
    fn correct(&mut self, units: f64) {
        let shift = seconds(units.abs() * self.seconds_each);
        self.next =
            if units >= 0.0 { self.next.checked_sub(shift).unwrap_or(self.next) } else { self.next + shift };
    }
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::from_hours(1))
}

#[derive(Debug, Default)]
struct State {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    input: Option<Bucket>,
    output: Option<Bucket>,
    /// Replies whose tokens were counted, and those tokens.
    replies: f64,
    replied_tokens: f64,
    /// Tokens of requests for each of their bytes.
    tokens_a_byte: f64,
}

/// The budgets of one endpoint.
#[derive(Debug)]
pub struct Pace {
    state: Mutex<State>,
    /// Calls start one after the other.
    turn: tokio::sync::Mutex<()>,
    /// A budget the user gave is not replaced by what the server says.
    given: Budgets,
}

/// What a call was reserved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reserved {
    /// Tokens of the request, estimated.
    pub input: f64,
    /// Tokens of the reply, estimated.
    pub output: f64,
    bytes: f64,
}

impl Pace {
    /// Budgets that the user gave.
    pub fn new(given: Budgets) -> Self {
        let now = Instant::now();
        let bucket = |limit: Option<f64>| limit.map(|limit| Bucket::new(limit, SLACK, now));
        let state = State {
            requests: bucket(given.requests),
            tokens: bucket(given.tokens),
            input: bucket(given.input_tokens),
            output: bucket(given.output_tokens),
            tokens_a_byte: 0.25,
            ..State::default()
        };
        Self { state: Mutex::new(state), turn: tokio::sync::Mutex::new(()), given }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a request of so many bytes will probably take: tokens as the replies so far had them.
    pub fn estimate(&self, bytes: usize, max_tokens: Option<u32>) -> Reserved {
        let state = self.state();
        let most = max_tokens.map_or(f64::INFINITY, f64::from);
        let output = if state.replies > 0.0 { state.replied_tokens / state.replies } else { GUESS };
        Reserved { input: bytes as f64 * state.tokens_a_byte, output: output.min(most), bytes: bytes as f64 }
    }

    /// Reserves a call of so many bytes; waits for its turn, and until all budgets have room for it.
    pub async fn reserve(&self, bytes: usize, max_tokens: Option<u32>) -> Reserved {
        let _turn = self.turn.lock().await;
        loop {
            // Estimated anew each time: replies may have come.
            let call = self.estimate(bytes, max_tokens);
            match self.take(call) {
                None => return call,
                Some(wait) => tokio::time::sleep(wait.min(STEP)).await,
            }
        }
    }

    /// Takes a call out of the budgets, or tells how long they have no room.
    fn take(&self, call: Reserved) -> Option<Duration> {
        let mut guard = self.state();
        let now = Instant::now();
        let state = &mut *guard;
        let buckets = [
            (state.requests.as_mut(), 1.0),
            (state.tokens.as_mut(), call.input + call.output),
            (state.input.as_mut(), call.input),
            (state.output.as_mut(), call.output),
        ];
        let next = buckets.iter().filter_map(|(bucket, _)| Some(bucket.as_ref()?.next)).max();
        if let Some(next) = next.filter(|&next| next > now) {
            return Some(next - now);
        }
        for (bucket, units) in buckets {
            if let Some(bucket) = bucket {
                bucket.take(units, now);
            }
        }
        None
    }

    /// The server refused a call: what was not used is not there.
    pub fn refused(&self) {
        let mut guard = self.state();
        let (now, state) = (Instant::now(), &mut *guard);
        let buckets = [&mut state.requests, &mut state.tokens, &mut state.input, &mut state.output];
        for bucket in buckets.into_iter().flatten() {
            bucket.next = bucket.next.max(now);
            bucket.slack = SLACK;
        }
    }

    /// Corrects a reservation by what the reply says. Where it says nothing, the reservation stands.
    pub fn settle(&self, call: Reserved, input: u64, output: u64) {
        if input == 0 && output == 0 {
            return;
        }
        let (input, output) = (input as f64, output as f64);
        let mut guard = self.state();
        let state = &mut *guard;
        state.replies += 1.0;
        state.replied_tokens += output;
        if call.bytes > 0.0 {
            // Follows slowly: one odd request does not throw the next ones off.
            state.tokens_a_byte += 0.05 * (input / call.bytes - state.tokens_a_byte);
        }
        let (spared_in, spared_out) = (call.input - input, call.output - output);
        let spared = [
            (&mut state.tokens, spared_in + spared_out),
            (&mut state.input, spared_in),
            (&mut state.output, spared_out),
        ];
        for (bucket, units) in spared {
            if let Some(bucket) = bucket {
                bucket.correct(units);
            }
        }
    }

    /// Takes over a limit that the server tells in its headers: `limit` units, of which `remaining` are left and
    /// which are whole again after `reset`. That is a rate, whatever the window.
    pub fn told(&self, what: Told, limit: f64, remaining: f64, reset: Duration) {
        let used = limit - remaining;
        if !(used >= 1.0 && limit >= 1.0) || reset.is_zero() {
            return;
        }
        let given = match what {
            Told::Requests => self.given.requests,
            Told::Tokens => self.given.tokens,
            Told::Input => self.given.input_tokens,
            Told::Output => self.given.output_tokens,
        };
        if given.is_some() {
            return;
        }
        let a_minute = 60.0 * used / reset.as_secs_f64();
        let now = Instant::now();
        let mut guard = self.state();
        let state = &mut *guard;
        let bucket = match what {
            Told::Requests => &mut state.requests,
            Told::Tokens => &mut state.tokens,
            Told::Input => &mut state.input,
            Told::Output => &mut state.output,
        };
        // What is left may be used at once, but for a tenth of the limit, which absorbs wrong estimates, and at
        // most a second's worth: servers look at shorter times than they tell.
        let slack = seconds(60.0 * (remaining - 0.1 * limit).max(0.0) / a_minute);
        let slack = slack.clamp(SLACK, Duration::from_secs(1));
        match bucket {
            None => *bucket = Some(Bucket::new(a_minute, slack, now)),
            Some(bucket) => {
                // Resets are told in coarse steps: the rate follows slowly.
                bucket.seconds_each += 0.1 * (60.0 / a_minute - bucket.seconds_each);
                bucket.slack = slack;
            }
        }
    }
}

/// Which limit a header tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Requests.
    Requests,
    /// Tokens of both kinds.
    Tokens,
    /// Tokens of requests.
    Input,
    /// Tokens of replies.
    Output,
}

/// `1m30.5s`, `250ms`, `2h`, plain seconds: how OpenAI-compatible servers write the time to a reset.
pub fn span(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let (mut rest, mut total) = (text.trim(), 0.0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += value
            * match &rest[..unit] {
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                "d" => 86_400.0,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    Duration::try_from_secs_f64(total).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read() {
        let ms = |text| span(text).map(|span| span.as_millis());
        assert_eq!(ms("1m30.5s"), Some(90_500));
        assert_eq!(
            [ms("250ms"), ms("2h"), ms("7"), ms("0s")],
            [Some(250), Some(7_200_000), Some(7000), Some(0)]
        );
        assert_eq!([ms("soon"), ms("5 parsecs"), ms("-1")], [None, None, None]);
    }

    async fn took(pace: &Pace, calls: usize, settle: bool) -> f64 {
        let start = Instant::now();
        for _ in 0..calls {
            let call = pace.reserve(400, Some(1000)).await;
            if settle {
                pace.settle(call, 100, 20);
            }
        }
        start.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn calls_are_spread_over_the_minute() {
        let pace = Pace::new(Budgets { requests: Some(600.0), ..Budgets::default() });
        let took = took(&pace, 101, false).await;
        assert!((9.4..=10.0).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reservation_is_corrected_by_the_reply() {
        let pace = Pace::new(Budgets { output_tokens: Some(6000.0), ..Budgets::default() });
        // 50 replies of 20 tokens at 100 tokens a second.
        let took = took(&pace, 50, true).await;
        assert!((9.0..=10.1).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_told_by_the_server_is_kept() {
        let pace = Pace::new(Budgets::default());
        pace.told(Told::Requests, 100.0, 50.0, Duration::from_secs(30));
        // A second's worth at once, and 100 a minute from there.
        let took = took(&pace, 60, false).await;
        assert!((34.0..=36.0).contains(&took), "{took}");
        pace.refused();
        let again = took_one(&pace).await;
        assert!(again <= 0.7, "{again}");
    }

    async fn took_one(pace: &Pace) -> f64 {
        took(pace, 1, false).await
    }
}
