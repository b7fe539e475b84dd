//! TRL's metrics of a micro-batch, and their mean over the micro-batches between two log entries.

use decoder::TokenScores;
use pref_data::Side;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::step::RefLogps;

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

/// Metrics of one micro-batch, with TRL's names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BatchMetrics {
    pub loss: f64,
    pub rewards_chosen: f64,
    pub rewards_rejected: f64,
    pub rewards_accuracies: f64,
    pub rewards_margins: f64,
    pub logps_chosen: f64,
    pub logps_rejected: f64,
    pub logits_chosen: f64,
    pub logits_rejected: f64,
    pub entropy: f64,
    pub mean_token_accuracy: f64,
}

impl BatchMetrics {
    /// Computes every metric as `DPOTrainer._compute_loss` does.
    pub fn new(values: &PairValues, tokens: &TokenScores, sides: &[Side], beta: f64) -> Self {
        let pairs = values.chosen.len() as f64;
        let mean = |f: &dyn Fn(usize) -> f64| (0..values.chosen.len()).map(f).sum::<f64>() / pairs;
        // In f32, as TRL compares them: equal log-probabilities must give equal rewards.
        let reward =
            |policy: &[f32], i: usize, which: usize| beta as f32 * (policy[i] - values.reference[i][which]);
        let chosen = |i: usize| reward(&values.chosen, i, 0);
        let rejected = |i: usize| reward(&values.rejected, i, 1);
        let token = TokenMeans::new(tokens, sides);
        Self {
            loss: values.loss,
            rewards_chosen: mean(&|i| f64::from(chosen(i))),
            rewards_rejected: mean(&|i| f64::from(rejected(i))),
            rewards_accuracies: mean(&|i| f64::from(u8::from(chosen(i) > rejected(i)))),
            rewards_margins: mean(&|i| f64::from(chosen(i) - rejected(i))),
            logps_chosen: mean(&|i| f64::from(values.chosen[i])),
            logps_rejected: mean(&|i| f64::from(values.rejected[i])),
            logits_chosen: token.logits_chosen,
            logits_rejected: token.logits_rejected,
            entropy: token.entropy,
            mean_token_accuracy: token.accuracy,
        }
    }

    fn fields(&self) -> [(&'static str, f64); 11] {
        [
            ("loss", self.loss),
            ("rewards/chosen", self.rewards_chosen),
            ("rewards/rejected", self.rewards_rejected),
            ("rewards/accuracies", self.rewards_accuracies),
            ("rewards/margins", self.rewards_margins),
            ("logps/chosen", self.logps_chosen),
            ("logps/rejected", self.logps_rejected),
            ("logits/chosen", self.logits_chosen),
            ("logits/rejected", self.logits_rejected),
            ("entropy", self.entropy),
            ("mean_token_accuracy", self.mean_token_accuracy),
        ]
    }
}

/// Token means: a token shared by both completions counts once for each.
struct TokenMeans {
    entropy: f64,
    logits_chosen: f64,
    logits_rejected: f64,
    accuracy: f64,
}

impl TokenMeans {
    fn new(tokens: &TokenScores, sides: &[Side]) -> Self {
        let (mut entropy, mut logits, mut counts, mut correct) = (0.0, [0.0; 2], [0.0; 2], 0.0);
        for (i, side) in sides.iter().enumerate() {
            for (which, member) in [side.chosen, side.rejected].into_iter().enumerate() {
                if member {
                    entropy += f64::from(tokens.entropy[i]);
                    logits[which] += f64::from(tokens.mean_logits[i]);
                    counts[which] += 1.0;
                }
            }
            correct += f64::from(u8::from(side.chosen && tokens.top1[i]));
        }
        let ratio = |sum: f64, count: f64| if count > 0.0 { sum / count } else { 0.0 };
        Self {
            entropy: ratio(entropy, counts[0] + counts[1]),
            logits_chosen: ratio(logits[0], counts[0]),
            logits_rejected: ratio(logits[1], counts[1]),
            accuracy: ratio(correct, counts[0]),
        }
    }
}

/// Running mean of micro-batch metrics.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    sums: Vec<f64>,
    count: usize,
}

impl Window {
    /// Adds a micro-batch.
    pub fn add(&mut self, metrics: &BatchMetrics) {
        let fields = metrics.fields();
        self.sums.resize(fields.len(), 0.0);
        for (sum, (_, value)) in self.sums.iter_mut().zip(fields) {
            *sum += value;
        }
        self.count += 1;
    }

    /// The means under their names, each behind `prefix`.
    pub fn means(&self, prefix: &str) -> Map<String, Value> {
        let names = BatchMetrics::default().fields();
        let mean = |sum: f64| Value::from(sum / self.count.max(1) as f64);
        names.iter().zip(&self.sums).map(|((name, _), &sum)| (format!("{prefix}{name}"), mean(sum))).collect()
    }
}
