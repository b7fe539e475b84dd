//! TRL's metrics of a micro-batch, and their mean over the micro-batches between two log entries.

use decoder::TokenScores;
use pref_data::Side;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::step::RefLogps;

/// Metrics of one micro-batch, with TRL's names; the loss first.
pub type Metrics = Vec<(&'static str, f64)>;

/// Names of the metrics of pairs, or of single completions, that an evaluation has.
pub fn names(unpaired: bool) -> &'static [&'static str] {
    const PAIRS: [&str; 11] = [
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "mean_token_accuracy",
    ];
    const ROWS: [&str; 10] = [
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "kl",
    ];
    if unpaired { &ROWS } else { &PAIRS }
}

/// Per-pair values of a micro-batch on the host.
pub struct PairValues {
    /// Mean loss.
    pub loss: f64,
    /// Chosen log-probabilities under the policy.
    pub chosen: Vec<f32>,
    /// Rejected log-probabilities under the policy.
    pub rejected: Vec<f32>,
    /// Both under the reference.
    pub reference: Vec<RefLogps>,
}

/// Values of single completions on the host.
pub struct RowValues {
    /// Mean loss.
    pub loss: f64,
    /// Estimated divergence from the reference.
    pub kl: f64,
    /// Log-probabilities under the policy.
    pub logps: Vec<f32>,
    /// The same under the reference.
    pub reference: Vec<f32>,
    /// Whether each is desirable.
    pub labels: Vec<bool>,
}

/// Metrics of pairs, as `DPOTrainer._compute_loss` computes them.
pub fn of_pairs(values: &PairValues, tokens: &TokenScores, sides: &[Side], beta: f64) -> Metrics {
    let pairs = values.chosen.len() as f64;
    let mean = |f: &dyn Fn(usize) -> f64| (0..values.chosen.len()).map(f).sum::<f64>() / pairs;
    // In f32, as TRL compares them: equal log-probabilities must give equal rewards.
    let reward =
        |policy: &[f32], i: usize, which: usize| beta as f32 * (policy[i] - values.reference[i][which]);
    let chosen = |i: usize| reward(&values.chosen, i, 0);
    let rejected = |i: usize| reward(&values.rejected, i, 1);
    let token = TokenSums::new(tokens, sides, |side| [side.chosen, side.rejected]);
    let ratio = |sum: f64, count: f64| if count > 0.0 { sum / count } else { 0.0 };
    vec![
        ("loss", values.loss),
        ("rewards/chosen", mean(&|i| f64::from(chosen(i)))),
        ("rewards/rejected", mean(&|i| f64::from(rejected(i)))),
        ("rewards/accuracies", mean(&|i| f64::from(u8::from(chosen(i) > rejected(i))))),
        ("rewards/margins", mean(&|i| f64::from(chosen(i) - rejected(i)))),
        ("logps/chosen", mean(&|i| f64::from(values.chosen[i]))),
        ("logps/rejected", mean(&|i| f64::from(values.rejected[i]))),
        ("logits/chosen", ratio(token.logits[0], token.counts[0])),
        ("logits/rejected", ratio(token.logits[1], token.counts[1])),
        ("entropy", ratio(token.entropy, token.counts[0] + token.counts[1])),
        ("mean_token_accuracy", ratio(token.correct, token.counts[0])),
    ]
}

/// Metrics of single completions, as `KTOTrainer._compute_loss` computes them: a side that has no rows in the
/// micro-batch has no metrics.
pub fn of_rows(values: &RowValues, tokens: &TokenScores, sides: &[Side], beta: f64) -> Metrics {
    let mut metrics = vec![("loss", values.loss)];
    let labels = &values.labels;
    let token = TokenSums::new(tokens, sides, |side| {
        let label = labels[side.pair as usize];
        [label, !label]
    });
    let mean_of = |label: bool, f: &dyn Fn(usize) -> f32| {
        let rows: Vec<f64> =
            (0..labels.len()).filter(|&i| labels[i] == label).map(|i| f64::from(f(i))).collect();
        (!rows.is_empty()).then(|| rows.iter().sum::<f64>() / rows.len() as f64)
    };
    let reward = |i: usize| beta as f32 * (values.logps[i] - values.reference[i]);
    let rewards = [true, false].map(|label| mean_of(label, &reward));
    let logps = [true, false].map(|label| mean_of(label, &|i| values.logps[i]));
    let logits = [0, 1].map(|i| (token.counts[i] > 0.0).then(|| token.logits[i] / token.counts[i]));
    let margin = rewards[0].zip(rewards[1]).map(|(chosen, rejected)| chosen - rejected);
    let entropy = token.entropy / (token.counts[0] + token.counts[1]).max(1.0);
    let optional = [
        ("rewards/chosen", rewards[0]),
        ("rewards/rejected", rewards[1]),
        ("rewards/margins", margin),
        ("logps/chosen", logps[0]),
        ("logps/rejected", logps[1]),
        ("logits/chosen", logits[0]),
        ("logits/rejected", logits[1]),
        ("entropy", Some(entropy)),
        ("kl", Some(values.kl)),
    ];
    metrics.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    metrics
}

/// Token sums of the two sides: a token shared by both completions counts once for each.
struct TokenSums {
    entropy: f64,
    logits: [f64; 2],
    counts: [f64; 2],
    correct: f64,
}

impl TokenSums {
    fn new(tokens: &TokenScores, sides: &[Side], members: impl Fn(&Side) -> [bool; 2]) -> Self {
        let mut sums = Self { entropy: 0.0, logits: [0.0; 2], counts: [0.0; 2], correct: 0.0 };
        for (i, side) in sides.iter().enumerate() {
            let members = members(side);
            for which in [0, 1].into_iter().filter(|&which| members[which]) {
                sums.entropy += f64::from(tokens.entropy[i]);
                sums.logits[which] += f64::from(tokens.mean_logits[i]);
                sums.counts[which] += 1.0;
            }
            sums.correct += f64::from(u8::from(members[0] && tokens.top1[i]));
        }
        sums
    }
}

/// Running mean of micro-batch metrics, each over the micro-batches that have it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    sums: Vec<(String, f64, usize)>,
}

impl Window {
    /// Adds a micro-batch.
    pub fn add(&mut self, metrics: &Metrics) {
        for &(name, value) in metrics {
            match self.sums.iter_mut().find(|(known, _, _)| known == name) {
                Some((_, sum, count)) => {
                    *sum += value;
                    *count += 1;
                }
                None => self.sums.push((name.into(), value, 1)),
            }
        }
    }

    /// The means under their names, each behind `prefix`.
    pub fn means(&self, prefix: &str) -> Map<String, Value> {
        let mean = |sum: f64, count: usize| Value::from(sum / count as f64);
        self.sums.iter().map(|(name, sum, count)| (format!("{prefix}{name}"), mean(*sum, *count))).collect()
    }
}
