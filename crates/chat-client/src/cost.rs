//! What calls cost: a table of prices, and a ledger that counts calls in flight before they are paid.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

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
}

/// Dollars spent and those that calls in flight will probably cost.
#[derive(Debug)]
pub struct Ledger {
    price: Option<Price>,
    most: Option<f64>,
    state: Mutex<State>,
}

impl Ledger {
    /// `most`: no call starts that would pass it.
    pub fn new(price: Option<Price>, most: Option<f64>) -> Self {
        Self { price, most, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves what a call may cost; `None` where that would pass the most that may be spent.
    pub fn reserve(&self, input: f64, output: f64) -> Option<f64> {
        let cost = self.price.map_or(0.0, |price| price.of(input, output));
        let mut state = self.state();
        if self.most.is_some_and(|most| state.spent + state.in_flight + cost > most) {
            return None;
        }
        state.in_flight += cost;
        Some(cost)
    }

    /// A call is over: what was reserved goes, and what it cost, if it was answered, is spent.
    pub fn settle(&self, reserved: f64, usage: Usage) {
        let cost = self.price.map_or(0.0, |price| price.of_usage(usage));
        let mut state = self.state();
        state.in_flight = (state.in_flight - reserved).max(0.0);
        state.spent += cost;
    }

    /// Dollars spent so far; `None` where no price is known.
    pub fn spent(&self) -> Option<f64> {
        self.price.map(|_| self.state().spent)
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
        let ledger = Ledger::new(Some(Price { input: 1.0, output: 10.0 }), Some(0.02));
        let first = ledger.reserve(0.0, 1000.0).unwrap();
        assert!((first - 0.01).abs() < 1e-12);
        assert!(ledger.reserve(0.0, 900.0).is_some());
        assert!(ledger.reserve(0.0, 200.0).is_none());
        ledger.settle(first, Usage { prompt_tokens: 0, completion_tokens: 100, total_tokens: 100 });
        assert!(ledger.reserve(0.0, 900.0).is_some());
        assert!((ledger.spent().unwrap() - 0.001).abs() < 1e-12);
    }
}
