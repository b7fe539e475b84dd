//! Losses of single completions with a label.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid as logistic;

/// Completions with labels, each field `[rows]`.
#[derive(Debug, Clone)]
pub struct LabelledLogps {
    /// Summed log-probabilities under the policy, in nats.
    pub logps: Tensor<1>,
    /// The same under the reference.
    pub ref_logps: Tensor<1>,
    /// 1 where the completion is desirable, 0 where it is not.
    pub labels: Tensor<1>,
}

/// Weights of the two labels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LabelWeights {
    /// Of desirable completions.
    pub desirable: f64,
    /// Of undesirable ones.
    pub undesirable: f64,
}

impl Default for LabelWeights {
    fn default() -> Self {
        Self { desirable: 1.0, undesirable: 1.0 }
    }
}

/// KTO's estimate of `KL(π ‖ π_ref)` from mismatched completions: the mean of their log-ratios, at least 0,
/// detached, `[1]`. Both arguments are `[rows]`.
pub fn kl_estimate(logps: Tensor<1>, ref_logps: Tensor<1>) -> Tensor<1> {
    (logps - ref_logps).mean().detach().clamp_min(0.0)
}

/// KTO (arXiv 2402.01306, eq. 7): `1 - σ(β(x - kl))` for a desirable completion with log-ratio `x`,
/// `1 - σ(β(kl - x))` for an undesirable one, `[rows]`. `kl` is `[1]`.
pub fn kto(rows: &LabelledLogps, kl: Tensor<1>, beta: f64, weights: LabelWeights) -> Tensor<1> {
    // +1 for desirable, -1 for undesirable.
    let sign = rows.labels.clone() * 2.0 - 1.0;
    let gain = (rows.logps.clone() - rows.ref_logps.clone() - kl) * sign * beta;
    let weight = rows.labels.clone() * (weights.desirable - weights.undesirable) + weights.undesirable;
    (-logistic(gain) + 1.0) * weight
}

/// APO-zero on single completions (TRL `apo_zero_unpaired`): `1 - σ(βx)` for a desirable completion, `σ(βx)` for an
/// undesirable one, `[rows]`.
pub fn apo_zero_unpaired(rows: &LabelledLogps, beta: f64, weights: LabelWeights) -> Tensor<1> {
    let zero = Tensor::zeros([1], &rows.ref_logps.device());
    kto(rows, zero, beta, weights)
}
