//! Weights of tokens and of pairs: what some methods change about the log-probabilities and the losses.

use burn::tensor::Tensor;

/// Log-probability of a completion whose tokens beyond the length of the pair's shorter completion count less
/// (LD-DPO, arXiv 2409.06411; TRL's `ld_alpha`): `common + alpha · beyond`, `[pairs]`. `common` is the sum over
/// the tokens up to that length, `beyond` over the others, both `[pairs]`.
pub fn length_desensitized(common: Tensor<1>, beyond: Tensor<1>, alpha: f64) -> Tensor<1> {
    common + beyond * alpha
}

/// Weight of each pair under the policy (WPO, arXiv 2406.11827, eq. 2; TRL's `use_weighting`):
/// `exp(chosen + rejected)`, detached, `[pairs]`. Each argument is the mean over the completion's tokens of
/// `log p(token) - log Σ p²`, the sum over the vocabulary, `[pairs]`. It multiplies the loss of the pair.
pub fn pair_weights(chosen: Tensor<1>, rejected: Tensor<1>) -> Tensor<1> {
    (chosen + rejected).detach().exp()
}
