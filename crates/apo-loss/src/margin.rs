//! Losses on the difference of the two completions' scores.

use burn::tensor::Tensor;
use burn::tensor::activation::{log_sigmoid, relu, sigmoid as logistic};

use crate::Scores;
use crate::divergence::MAX_EXPONENT;

/// DPO: raises the margin between the two scores.
pub fn sigmoid(scores: &Scores, beta: f64) -> Tensor<1> {
    -log_sigmoid(scores.delta() * beta)
}

/// DPO on scores a token ([`Scores::per_token`]).
pub fn sigmoid_norm(per_token: &Scores, beta: f64) -> Tensor<1> {
    sigmoid(per_token, beta)
}

/// Hinge: no more than a margin of `1/β` is asked for.
pub fn hinge(scores: &Scores, beta: f64) -> Tensor<1> {
    relu(-(scores.delta() * beta) + 1.0)
}

/// IPO on scores a token ([`Scores::per_token`]): a margin of `1/(2β)`, no less and no more.
pub fn ipo(per_token: &Scores, beta: f64) -> Tensor<1> {
    (per_token.delta() - 1.0 / (2.0 * beta)).square()
}

/// EXO: reverse KL between the policy's preference and the smoothed label; `smoothing` above 0.
pub fn exo_pair(scores: &Scores, beta: f64, smoothing: f64) -> Tensor<1> {
    let delta = scores.delta() * beta;
    let side = |delta: Tensor<1>, target: f64| logistic(delta.clone()) * (log_sigmoid(delta) - target.ln());
    side(delta.clone(), 1.0 - smoothing) + side(-delta, smoothing)
}

/// Robust DPO: unbiased when a share `smoothing` (below 0.5) of the labels is flipped.
pub fn robust(scores: &Scores, beta: f64, smoothing: f64) -> Tensor<1> {
    let delta = scores.delta() * beta;
    let clean = log_sigmoid(delta.clone()) * -(1.0 - smoothing);
    let flipped = log_sigmoid(-delta) * -smoothing;
    (clean - flipped) / (1.0 - 2.0 * smoothing)
}

/// DiscoPOP: between logistic and exponential loss, by the margin itself; `tau` is its temperature.
pub fn discopop(scores: &Scores, beta: f64, tau: f64) -> Tensor<1> {
    let delta = scores.delta() * beta;
    let mix = logistic(delta.clone() / tau);
    let logistic_part = -log_sigmoid(delta.clone());
    logistic_part * (-mix.clone() + 1.0) + (-delta).clamp_max(MAX_EXPONENT).exp() * mix
}
