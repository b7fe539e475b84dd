//! What a micro-batch leaves on the device, and reading it back.

use burn::tensor::{Tensor, TensorData, Transaction};
use decoder::TokenScores;
use pref_data::Side;

use crate::metrics::{self, Metrics, PairValues, RowValues};

/// Metrics of a micro-batch that are still on the device.
pub struct Pending {
    /// The loss, values of each token, log-probabilities of each row, then the reference's of pairs, or the reference's
    /// and the divergence.
    pub tensors: Vec<Tensor<1>>,
    pub sides: Vec<Side>,
    pub labels: Vec<bool>,
    pub beta: f64,
}

impl Pending {
    fn metrics(self, mut values: impl Iterator<Item = Vec<f32>>) -> Metrics {
        let mut next = || values.next().unwrap_or_default();
        let first = |values: Vec<f32>| values.first().map_or(f64::NAN, |&value| f64::from(value));
        let loss = first(next());
        let tokens = TokenScores::new(next(), &next());
        if self.labels.is_empty() {
            let (chosen, rejected, ref_chosen, ref_rejected) = (next(), next(), next(), next());
            let reference = ref_chosen.into_iter().zip(ref_rejected).map(|(a, b)| [a, b]).collect();
            let values = PairValues { loss, chosen, rejected, reference };
            return metrics::of_pairs(&values, &tokens, &self.sides, self.beta);
        }
        let (logps, reference, kl) = (next(), next(), first(next()));
        let values = RowValues { loss, kl, logps, reference, labels: self.labels };
        metrics::of_rows(&values, &tokens, &self.sides, self.beta)
    }
}

/// Metrics of micro-batches and the values of `more`, `[1]` each, read from the device in one go.
pub fn read(pending: Vec<Pending>, more: Vec<Tensor<1>>) -> (Vec<Metrics>, Vec<f64>) {
    let tensors = pending.iter().flat_map(|one| one.tensors.iter().cloned()).chain(more);
    let all = tensors.fold(Transaction::default(), Transaction::register);
    let mut values = all.execute().into_iter().map(floats);
    let metrics = pending
        .into_iter()
        .map(|one| {
            let count = one.tensors.len();
            one.metrics(values.by_ref().take(count))
        })
        .collect();
    (metrics, values.map(|value| value.first().map_or(f64::NAN, |&v| f64::from(v))).collect())
}

/// The values of a tensor.
pub fn floats(data: TensorData) -> Vec<f32> {
    data.try_into_vec_as::<f32>().expect("a float tensor converts to f32")
}
