//! Hints for where users of preference losses are often misled; each is given once.

use serde_json::{Map, Value};

use crate::loss::LossType;
use crate::settings::Settings;

/// Entries in a row that show a trend.
const ENTRIES: usize = 3;
/// Entries after which a loss that has not moved is told of.
const PATIENCE: usize = 10;

/// Watches the training log.
pub struct Hints {
    /// The loss only looks at the difference of the two completions.
    only_difference: bool,
    adapter: bool,
    first_loss: Option<f64>,
    entries: usize,
    falling: usize,
    last_chosen: f64,
    certain: usize,
    given: [bool; 3],
}

impl Hints {
    /// Watches a run with these settings.
    pub fn new(settings: &Settings) -> Self {
        let difference =
            [LossType::Sigmoid, LossType::SigmoidNorm, LossType::Hinge, LossType::Ipo, LossType::Robust];
        let only = settings.loss.loss_type.iter().all(|loss| difference.contains(loss));
        Self::watching(only, settings.peft.is_some())
    }

    fn watching(only_difference: bool, adapter: bool) -> Self {
        Self {
            only_difference,
            adapter,
            first_loss: None,
            entries: 0,
            falling: 0,
            last_chosen: 0.0,
            certain: 0,
            given: [false; 3],
        }
    }

    /// Looks at one entry of the training log; returns what is worth saying.
    pub fn look(&mut self, entry: &Map<String, Value>) -> Option<&'static str> {
        let number = |key: &str| entry.get(key).and_then(Value::as_f64);
        let (loss, chosen) = (number("loss")?, number("rewards/chosen").unwrap_or(0.0));
        self.entries += 1;
        let first = *self.first_loss.get_or_insert(loss);
        let falls = chosen < 0.0 && chosen < self.last_chosen;
        self.falling = if falls { self.falling + 1 } else { 0 };
        self.last_chosen = chosen;
        let certain = number("rewards/accuracies").is_some_and(|accuracy| accuracy >= 0.99)
            && number("rewards/margins").is_some_and(|margin| margin < 0.01);
        self.certain = if certain { self.certain + 1 } else { 0 };
        let conditions = [
            self.only_difference && self.falling >= ENTRIES,
            self.certain >= ENTRIES,
            self.adapter && self.entries >= PATIENCE && (loss - first).abs() < 1e-3 * first.abs(),
        ];
        let texts = [
            "hint: the winners' log-probabilities keep falling (rewards/chosen below 0). This loss only widens the gap \
             to the losers; --loss-type apo_zero raises the winners, and so does adding the loss sft",
            "hint: the accuracy is 1, but the margins are tiny: nearly nothing has been learnt yet. A larger \
             --learning-rate or more steps will tell",
            "hint: the loss is where it started. Adapters need about ten times the learning rate of full training \
             (1e-5 to 1e-4)",
        ];
        let which = (0..3).find(|&i| conditions[i] && !self.given[i])?;
        self.given[which] = true;
        Some(texts[which])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entry(loss: f64, chosen: f64, accuracy: f64, margin: f64) -> Map<String, Value> {
        let entry = json!({"loss": loss, "rewards/chosen": chosen, "rewards/accuracies": accuracy, "rewards/margins": margin});
        entry.as_object().unwrap().clone()
    }

    fn said(mut hints: Hints, entries: impl Iterator<Item = Map<String, Value>>) -> Vec<&'static str> {
        entries.filter_map(|entry| hints.look(&entry)).collect()
    }

    #[test]
    fn falling_winners_are_told_of_once_and_only_where_the_loss_lets_them_fall() {
        let entries = || (0..9).map(|i| entry(0.6, -0.1 * f64::from(i), 0.8, 0.3));
        let hints = said(Hints::watching(true, false), entries());
        assert_eq!(hints.len(), 1);
        assert!(hints[0].contains("apo_zero"));
        assert!(said(Hints::watching(false, false), entries()).is_empty());
    }

    #[test]
    fn a_certain_accuracy_with_tiny_margins_is_told_of() {
        let hints = said(Hints::watching(true, false), (0..5).map(|_| entry(0.69, 0.001, 1.0, 0.002)));
        assert!(hints.len() == 1 && hints[0].contains("margins are tiny"));
    }

    #[test]
    fn an_adapter_that_does_not_move_is_told_of() {
        let still = || (0..12).map(|i| entry(1.0 - 1e-5 * f64::from(i), 0.0, 0.5, 0.02));
        assert!(said(Hints::watching(false, true), still())[0].contains("Adapters"));
        assert!(said(Hints::watching(false, false), still()).is_empty());
        let moving = (0..12).map(|i| entry(1.0 - 0.01 * f64::from(i), 0.0, 0.5, 0.02));
        assert!(said(Hints::watching(false, true), moving).is_empty());
    }
}
