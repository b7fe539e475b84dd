//! What calls cost: a table of prices, and a ledger that counts calls in flight before they are paid.

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::Usage;

/// US dollars for a million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Price {
    /// Of requests.
    pub input: f64,
    /// Of replies.
    pub output: f64,
}

impl Price {
    /// Dollars of so many tokens.
    pub fn of(self, input: f64, output: f64) -> f64 {
        (input * self.input + output * self.output) / 1e6
    }

    /// Dollars of a reply.
    pub fn of_usage(self, usage: Usage) -> f64 {
        self.of(usage.prompt_tokens as f64, usage.completion_tokens as f64)
    }
}

/// Prices by the start of a model's name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prices {
    /// When they were read.
    #[serde(default)]
    pub as_of: String,
    /// By model.
    pub models: BTreeMap<String, Price>,
}

impl Prices {
    /// The table that comes with this crate.
    pub fn bundled() -> Self {
        Self::parse(include_str!("prices.json")).expect("the bundled table is tested")
    }

    /// Reads a table in the bundled one's form: `{"models": {"name": {"input": 1.0, "output": 2.0}}}`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let prices: Self = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let bad = |price: f64| !price.is_finite() || price < 0.0;
        match prices.models.iter().find(|(_, price)| bad(price.input) || bad(price.output)) {
            Some((name, _)) => Err(format!("model {name}: a price is no number of 0 or more")),
            None => Ok(prices),
        }
    }

    /// The price of a model: of the longest name that its own starts with, before or after a provider's prefix.
    pub fn of(&self, model: &str) -> Option<Price> {
        let bare = model.rsplit('/').next().unwrap_or(model);
        let fits = |name: &str| {
            [model, bare]
                .iter()
                .any(|m| m.strip_prefix(name).is_some_and(|rest| !rest.starts_with(char::is_alphanumeric)))
        };
        let known = self.models.iter().filter(|(name, _)| fits(name));
        known.max_by_key(|(name, _)| name.len()).map(|(_, price)| *price)
    }
}

#[derive(Debug, Default)]
struct State {
    spent: f64,
    in_flight: f64,
    calls: usize,
}

/// Dollars spent and those that calls in flight will probably cost.
#[derive(Debug)]
pub struct Ledger {
    prices: HashMap<String, Price>,
    most: Option<f64>,
    state: Mutex<State>,
    settled: Notify,
}

/// Whether a call may start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Room {
    /// It may; so much is reserved for it.
    Now(f64),
    /// Perhaps, when calls in flight have cost less than was reserved for them.
    Later,
    /// No more.
    Never,
}

impl Ledger {
    /// `most`: no call starts that would pass it.
    pub fn new(prices: HashMap<String, Price>, most: Option<f64>) -> Self {
        Self { prices, most, state: Mutex::default(), settled: Notify::new() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What tokens of a model cost.
    pub fn price(&self, model: &str) -> Option<Price> {
        self.prices.get(model).copied()
    }

    /// Reserves what a call may cost.
    pub fn try_reserve(&self, model: &str, input: f64, output: f64) -> Room {
        let cost = self.price(model).map_or(0.0, |price| price.of(input, output));
        let mut state = self.state();
        if self.most.is_some_and(|most| state.spent + state.in_flight + cost > most) {
            return if state.calls > 0 { Room::Later } else { Room::Never };
        }
        state.in_flight += cost;
        state.calls += 1;
        Room::Now(cost)
    }

    /// The same; waits for calls in flight where that may help. `None` where nothing more may start.
    pub async fn reserve(&self, model: &str, input: f64, output: f64) -> Option<f64> {
        loop {
            let mut settled = pin!(self.settled.notified());
            settled.as_mut().enable();
            match self.try_reserve(model, input, output) {
                Room::Now(cost) => return Some(cost),
                Room::Never => return None,
                Room::Later => settled.await,
            }
        }
    }

    /// A call is over: what was reserved goes, and what it cost, if it was answered, is spent.
    pub fn settle(&self, model: &str, reserved: f64, usage: Usage) {
        let cost = self.price(model).map_or(0.0, |price| price.of_usage(usage));
        let mut state = self.state();
        state.in_flight = (state.in_flight - reserved).max(0.0);
        state.calls = state.calls.saturating_sub(1);
        state.spent += cost;
        drop(state);
        self.settled.notify_waiters();
    }

    /// Dollars spent so far; `None` where no price is known.
    pub fn spent(&self) -> Option<f64> {
        (!self.prices.is_empty()).then(|| self.state().spent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_fitting_name_counts() {
        let prices = Prices::bundled();
        let output = |model: &str| prices.of(model).map(|price| price.output);
        assert_eq!(output("gpt-4o-mini-2024-07-18"), Some(0.6));
        assert_eq!(output("gpt-4o-2024-08-06"), Some(10.0));
        assert_eq!(output("openai/gpt-4o"), Some(10.0));
        assert_eq!([output("gpt-4omega"), output("llama-3"), output("")], [None, None, None]);
        assert!(Prices::parse(r#"{"models": {"m": {"input": -1, "output": 0}}}"#).is_err());
    }

    #[test]
    fn calls_in_flight_count_against_the_most() {
        let prices = HashMap::from([("m".to_string(), Price { input: 1.0, output: 10.0 })]);
        let ledger = Ledger::new(prices.clone(), Some(0.02));
        let Room::Now(first) = ledger.try_reserve("m", 0.0, 1000.0) else { panic!() };
        assert!((first - 0.01).abs() < 1e-12);
        assert!(matches!(ledger.try_reserve("m", 0.0, 900.0), Room::Now(_)));
        assert_eq!(ledger.try_reserve("m", 0.0, 200.0), Room::Later);
        ledger.settle("m", first, Usage { prompt_tokens: 0, completion_tokens: 100, total_tokens: 100 });
        assert!(matches!(ledger.try_reserve("m", 0.0, 900.0), Room::Now(_)));
        assert_eq!(Ledger::new(prices, Some(0.01)).try_reserve("m", 0.0, 2000.0), Room::Never);
        assert!((ledger.spent().unwrap() - 0.001).abs() < 1e-12);
    }
}
