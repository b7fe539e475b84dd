//! One micro-batch: packed rows in, loss, metrics and gradients out.

use std::sync::Arc;

use apo_loss::PairLogps;
use burn::tensor::{Device, Tensor, TensorData};
use decoder::{Batch, Decoder, TokenScores};
use fused_ops::sum_into;
use pref_data::{Dataset, Packed, PairTokens};

use crate::loss::LossSettings;
use crate::metrics::{BatchMetrics, PairValues};

/// Reference log-probabilities of the two completions of a row.
pub type RefLogps = [f32; 2];

/// A micro-batch ready for the model.
pub struct Micro {
    packed: Packed,
    batch: Batch,
    sums: Arc<Vec<(u32, u32)>>,
    /// Tokens of both completions of each pair.
    lengths: Vec<[usize; 2]>,
}

/// Sums of one micro-batch, on the device.
struct Scored {
    chosen: Tensor<1>,
    rejected: Tensor<1>,
    tokens: Tensor<1>,
    stats: Tensor<2>,
}

impl Micro {
    /// Packs rows of a data set in the given order.
    pub fn new(data: &Dataset, rows: &[u32]) -> Self {
        let tokens: Vec<PairTokens> = rows.iter().map(|&row| data.row(row as usize).tokens).collect();
        let lengths = tokens.iter().map(|pair| [pair.chosen.len(), pair.rejected.len()]).collect();
        let packed = Packed::new(&tokens);
        let rows = packed.rows.iter().map(|row| (row.start, row.shared, row.tails));
        let batch =
            Batch::packed(&packed.tokens, &packed.positions, rows, &packed.predictors, &packed.targets);
        Self { sums: Arc::new(packed.sums()), packed, batch, lengths }
    }

    fn pairs(&self) -> usize {
        self.packed.rows.len()
    }

    /// Tokens the model computes, shared ones once.
    pub fn computed_tokens(&self) -> usize {
        self.packed.tokens.len()
    }

    /// Tokens of both sequences of each pair, as TRL counts them.
    pub fn num_tokens(&self) -> usize {
        self.packed.num_tokens
    }

    fn score(&self, model: &Decoder) -> Scored {
        let out = model.score(&self.batch);
        let pairs = self.pairs();
        let sums = sum_into(out.logps.clone(), &self.sums, 2 * pairs);
        Scored {
            chosen: sums.clone().narrow(0, 0, pairs),
            rejected: sums.narrow(0, pairs, pairs),
            tokens: out.logps.inner(),
            stats: out.stats,
        }
    }

    /// Log-probabilities of both completions of each pair under a model without autodiff.
    pub fn logps(&self, model: &Decoder) -> Vec<RefLogps> {
        let scored = self.score(model);
        host(scored.chosen).into_iter().zip(host(scored.rejected)).map(|(c, r)| [c, r]).collect()
    }

    /// Loss and metrics; with a tracked model also the gradient of `loss · scale`, one a weight.
    pub fn run(
        &self,
        model: &Decoder,
        loss: &LossSettings,
        reference: &[RefLogps],
        scale: Option<f64>,
    ) -> (BatchMetrics, Vec<Option<Tensor<2>>>) {
        let scored = self.score(model);
        let device = scored.chosen.device();
        let column = |i: usize| column(reference, i, &device);
        let pairs = PairLogps {
            chosen: scored.chosen,
            rejected: scored.rejected,
            ref_chosen: column(0),
            ref_rejected: column(1),
        };
        let counts = self.packed.completion_tokens();
        let chosen_tokens = counts.iter().map(|count| count[0]).sum();
        let mean = loss.total(&pairs, &self.lengths, chosen_tokens);
        let gradients = scale.map_or_else(Vec::new, |scale| {
            let mut gradients = (mean.clone() * scale).backward();
            model.weights().iter().map(|weight| weight.tensor.grad_remove(&mut gradients)).collect()
        });
        let values = PairValues {
            loss: f64::from(host(mean.inner())[0]),
            chosen: host(pairs.chosen.inner()),
            rejected: host(pairs.rejected.inner()),
            reference: reference.to_vec(),
        };
        let tokens = TokenScores::new(host(scored.tokens), &host(scored.stats));
        (BatchMetrics::new(&values, &tokens, &self.packed.sides, loss.beta), gradients)
    }
}

fn column(reference: &[RefLogps], i: usize, device: &Device) -> Tensor<1> {
    let values: Vec<f32> = reference.iter().map(|pair| pair[i]).collect();
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec_as::<f32>().expect("a float tensor converts to f32")
}
