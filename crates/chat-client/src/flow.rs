//! How many calls are in flight: raised while latency is flat, cut when the server is overloaded.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Bounds of the number of calls in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InFlight {
    /// At the start.
    pub start: usize,
    /// At most.
    pub most: usize,
}

impl InFlight {
    /// So many from the start; fewer only when the server is overloaded.
    pub fn fixed(calls: usize) -> Self {
        Self { start: calls.max(1), most: calls.max(1) }
    }
}

impl Default for InFlight {
    /// Finds out: from 32 up.
    fn default() -> Self {
        Self { start: 32, most: 1024 }
    }
}

/// Latency is flat while a round's mean is below so many times the best round's.
const FLAT: f64 = 1.5;

/// Share of a round's calls that may be refused without a meaning: servers refuse single calls for other reasons.
const NOISE: f64 = 0.08;

/// Growth of a round once an overload was seen.
const GROWTH: f64 = 0.03;

#[derive(Debug)]
struct State {
    limit: f64,
    /// Calls with a permit, those that wait for their turn among them.
    taken: usize,
    /// Calls that were sent.
    in_flight: usize,
    round: Round,
    /// The round before was full.
    was_full: bool,
    /// Until the first overload the number doubles with each round.
    probing: bool,
    /// Lowest mean latency of a round, in seconds.
    best: f64,
    last_cut: Option<Instant>,
}

/// As many answers as calls may be in flight.
#[derive(Debug, Default)]
struct Round {
    replies: usize,
    seconds: f64,
    overloads: usize,
    /// All that might be in flight were.
    is_full: bool,
}

/// The gate of one endpoint.
#[derive(Debug)]
pub struct Flow {
    permits: Semaphore,
    most: usize,
    state: Mutex<State>,
}

/// A call that may be sent. How it went must be told.
#[derive(Debug)]
pub struct Passed<'a> {
    flow: &'a Flow,
    permit: Option<SemaphorePermit<'a>>,
    is_sent: bool,
}

impl Flow {
    /// Opens with the number at the start.
    pub fn new(bounds: InFlight) -> Self {
        let start = bounds.start.clamp(1, bounds.most.max(1));
        Self {
            permits: Semaphore::new(start),
            most: bounds.most.clamp(1, Semaphore::MAX_PERMITS),
            state: Mutex::new(State {
                limit: start as f64,
                taken: 0,
                in_flight: 0,
                round: Round::default(),
                was_full: false,
                probing: true,
                best: f64::INFINITY,
                last_cut: None,
            }),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls that were sent and have no answer yet.
    pub fn in_flight(&self) -> usize {
        self.state().in_flight
    }

    /// The same with those that wait for their turn.
    pub fn taken(&self) -> usize {
        self.state().taken
    }

    /// Calls that may be in flight now.
    pub fn limit(&self) -> usize {
        self.state().limit as usize
    }

    /// Waits for room; `None` after [`Flow::close`].
    pub async fn pass(&self) -> Option<Passed<'_>> {
        let permit = self.permits.acquire().await.ok()?;
        Some(self.enter(permit))
    }

    /// The same where there is room now.
    pub fn pass_now(&self) -> Option<Passed<'_>> {
        self.permits.try_acquire().ok().map(|permit| self.enter(permit))
    }

    fn enter<'a>(&'a self, permit: SemaphorePermit<'a>) -> Passed<'a> {
        let mut state = self.state();
        state.taken += 1;
        drop(state);
        Passed { flow: self, permit: Some(permit), is_sent: false }
    }

    /// Nobody passes any more.
    pub fn close(&self) {
        self.permits.close();
    }

    /// A reply came.
    fn succeeded(&self, latency: Duration) {
        let mut state = self.state();
        state.round.replies += 1;
        state.round.seconds += latency.as_secs_f64();
        self.end_of_round(&mut state);
    }

    /// The server says that it is too much. Calls that were sent before the last cut do not count again.
    fn overloaded(&self, sent: Instant) {
        let mut state = self.state();
        if state.last_cut.is_some_and(|cut| sent < cut) {
            return;
        }
        state.round.overloads += 1;
        self.end_of_round(&mut state);
    }

    fn end_of_round(&self, state: &mut State) {
        let Round { replies, seconds, overloads, is_full } = state.round;
        let all = (replies + overloads) as f64;
        // Many refusals end a round early.
        if all < state.limit && (overloads as f64) < (0.1 * state.limit).max(4.0) {
            return;
        }
        let was_full = std::mem::replace(&mut state.was_full, is_full);
        state.round = Round { is_full: state.in_flight as f64 >= 0.9 * state.limit, ..Round::default() };
        let refused = overloads as f64 / all;
        if refused > NOISE {
            state.last_cut = Some(Instant::now());
            state.probing = false;
            state.limit = (state.limit * (1.0 - refused / 2.0)).max(1.0);
            return;
        }
        let mean = seconds / replies.max(1) as f64;
        // Drifts up, so that one lucky round does not count for ever.
        state.best = (state.best * 1.01).min(mean);
        let before = state.limit as usize;
        if (is_full || was_full) && mean <= FLAT * state.best && before < self.most {
            let step = if state.probing { state.limit } else { (GROWTH * state.limit).max(1.0) };
            state.limit = (state.limit + step).min(self.most as f64);
            // Calls that a cut has left in flight beyond the limit keep their permits.
            let out = state.taken + self.permits.available_permits();
            self.permits.add_permits((state.limit as usize).saturating_sub(out.max(before)));
        }
    }
}

impl Passed<'_> {
    /// It is sent now: its turn in the budgets has come.
    pub fn sent(&mut self) {
        let mut state = self.flow.state();
        state.in_flight += 1;
        state.round.is_full |= state.in_flight as f64 >= 0.9 * state.limit;
        self.is_sent = true;
    }

    /// A reply came after so long.
    pub fn succeeded(self, latency: Duration) {
        self.flow.succeeded(latency);
    }

    /// The server answered a call sent then with 429, 503 or 529.
    pub fn overloaded(self, sent: Instant) {
        self.flow.overloaded(sent);
    }
}

impl Drop for Passed<'_> {
    fn drop(&mut self) {
        let mut state = self.flow.state();
        state.taken -= 1;
        state.in_flight -= usize::from(self.is_sent);
        // After a cut, permits go until no more are out than may be.
        let out = state.taken + self.flow.permits.available_permits();
        if out >= state.limit as usize
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds of as many calls as may be in flight.
    async fn round(flow: &Flow, latency: u64, overloaded: bool) -> usize {
        let mut passed = Vec::new();
        while flow.permits.available_permits() > 0 {
            let mut call = flow.pass().await.unwrap();
            call.sent();
            passed.push(call);
        }
        let (sent, calls) = (Instant::now(), passed.len());
        tokio::time::advance(Duration::from_millis(latency)).await;
        for call in passed {
            if overloaded { call.overloaded(sent) } else { call.succeeded(Duration::from_millis(latency)) }
        }
        calls
    }

    #[tokio::test(start_paused = true)]
    async fn grows_while_latency_is_flat_and_is_cut_once_by_an_overload() {
        let flow = Flow::new(InFlight { start: 8, most: 100 });
        assert_eq!(round(&flow, 100, false).await, 8);
        assert_eq!(round(&flow, 100, false).await, 16);
        for _ in 0..5 {
            round(&flow, 100, false).await;
        }
        assert_eq!(flow.limit(), 100);
        assert_eq!(round(&flow, 100, true).await, 100);
        assert_eq!(flow.limit(), 50, "a hundred refusals of one moment are one overload");
        assert_eq!(round(&flow, 100, false).await, 50);
        for _ in 0..2 {
            round(&flow, 100, true).await;
        }
        assert!((10..30).contains(&flow.limit()), "{}", flow.limit());
        for _ in 0..80 {
            round(&flow, 100, false).await;
        }
        assert_eq!((flow.limit(), flow.in_flight()), (100, 0));
        assert_eq!(round(&flow, 100, false).await, 100);
    }

    #[tokio::test(start_paused = true)]
    async fn single_refusals_do_not_cut() {
        let flow = Flow::new(InFlight::fixed(200));
        for _ in 0..100 {
            let mut passed = Vec::new();
            while let Some(mut call) = flow.pass_now() {
                call.sent();
                passed.push(call);
            }
            let sent = Instant::now();
            tokio::time::advance(Duration::from_millis(100)).await;
            for (i, call) in passed.into_iter().enumerate() {
                if i % 33 == 7 { call.overloaded(sent) } else { call.succeeded(Duration::from_millis(100)) }
            }
        }
        assert_eq!(flow.limit(), 200);
    }

    #[tokio::test(start_paused = true)]
    async fn does_not_grow_into_rising_latency() {
        let flow = Flow::new(InFlight { start: 8, most: 1000 });
        round(&flow, 100, false).await;
        for _ in 0..10 {
            round(&flow, 1000, false).await;
        }
        let limit = flow.limit();
        assert!(limit <= 16, "{limit}");
        flow.close();
        assert!(flow.pass().await.is_none());
    }
}
