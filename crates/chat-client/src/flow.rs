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

/// Part of the calls in flight that stays after an overload.
const CUT: f64 = 0.7;

/// Latency is flat while it is below so many times the best seen.
const FLAT: f64 = 1.5;

#[derive(Debug)]
struct State {
    limit: f64,
    in_flight: usize,
    /// Whether all that may be in flight were, in this round and in the one before.
    full: [bool; 2],
    /// Replies until this round ends.
    left: usize,
    /// Until the first overload the number doubles with each round; then it grows by one a round.
    probing: bool,
    latency: Option<f64>,
    best: f64,
    last_cut: Option<Instant>,
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
                in_flight: 0,
                full: [false; 2],
                left: start,
                probing: true,
                latency: None,
                best: f64::INFINITY,
                last_cut: None,
            }),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls in flight now.
    pub fn in_flight(&self) -> usize {
        self.state().in_flight
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
        state.in_flight += 1;
        state.full[0] |= state.in_flight as f64 >= 0.9 * state.limit;
        drop(state);
        Passed { flow: self, permit: Some(permit) }
    }

    /// Nobody passes any more.
    pub fn close(&self) {
        self.permits.close();
    }

    /// A reply came.
    fn succeeded(&self, latency: Duration) {
        let seconds = latency.as_secs_f64();
        let mut state = self.state();
        let smooth =
            state.latency.map_or(seconds, |old| old + (seconds - old) * (2.0 / state.limit).min(0.2));
        state.latency = Some(smooth);
        // Drifts up, so that a single lucky moment does not count for ever.
        state.best = (state.best * 1.0005).min(smooth);
        let full = state.full[0] || state.full[1];
        state.left -= 1;
        if state.left == 0 {
            state.full = [state.in_flight as f64 >= 0.9 * state.limit, state.full[0]];
            state.left = state.limit as usize;
        }
        if full && smooth <= FLAT * state.best && (state.limit as usize) < self.most {
            let step = if state.probing { 1.0 } else { 1.0 / state.limit };
            let before = state.limit as usize;
            state.limit = (state.limit + step).min(self.most as f64);
            self.permits.add_permits(state.limit as usize - before);
        }
    }

    /// The server says that it is too much. Calls that were sent before the last cut do not cut again.
    fn overloaded(&self, sent: Instant) {
        let mut state = self.state();
        if state.last_cut.is_some_and(|cut| sent < cut) {
            return;
        }
        state.last_cut = Some(Instant::now());
        state.probing = false;
        state.limit = (state.limit * CUT).max(1.0);
    }
}

impl Passed<'_> {
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
        state.in_flight -= 1;
        // After a cut, permits go until no more are out than may be.
        let out = state.in_flight + self.flow.permits.available_permits();
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
            passed.push(flow.pass().await.unwrap());
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
        assert!(round(&flow, 100, false).await >= 10);
        for _ in 0..60 {
            round(&flow, 100, false).await;
        }
        assert_eq!(flow.limit(), 100);
        assert_eq!(round(&flow, 100, true).await, 100);
        assert_eq!(flow.limit(), 70, "a hundred refusals of one moment are one overload");
        assert_eq!(round(&flow, 100, false).await, 70);
        for _ in 0..3 {
            round(&flow, 100, true).await;
        }
        assert!((20..30).contains(&flow.limit()), "{}", flow.limit());
        assert_eq!(flow.in_flight(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn does_not_grow_into_rising_latency() {
        let flow = Flow::new(InFlight { start: 8, most: 1000 });
        round(&flow, 100, false).await;
        for _ in 0..10 {
            round(&flow, 1000, false).await;
        }
        let limit = flow.limit();
        assert!(limit < 32, "{limit}");
        flow.close();
        assert!(flow.pass().await.is_none());
    }
}
