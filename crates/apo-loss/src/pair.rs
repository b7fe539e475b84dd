//! Losses on the log-ratios of the two completions, each for itself.

use burn::tensor::Tensor;
use burn::tensor::activation::{log_sigmoid, sigmoid as logistic};

use crate::PairLogps;

/// APO-zero: raises the winners' likelihood and lowers the losers', each against the reference. For
/// winners that are better than the model.
pub fn apo_zero(pairs: &PairLogps, beta: f64) -> Tensor<1> {
    let chosen = logistic(pairs.chosen_logratios() * beta);
    let rejected = logistic(pairs.rejected_logratios() * beta);
    (-chosen + 1.0) + rejected
}

/// APO-down: lowers both likelihoods, the loser's more. For a model that is better than the winners.
pub fn apo_down(pairs: &PairLogps, beta: f64) -> Tensor<1> {
    let chosen = pairs.chosen_logratios();
    let margin = chosen.clone() - pairs.rejected_logratios();
    logistic(chosen * beta) + (-logistic(margin * beta) + 1.0)
}

/// NCA: the winner's likelihood rises, and both are held down by noise contrast.
pub fn nca_pair(pairs: &PairLogps, beta: f64) -> Tensor<1> {
    let (chosen, rejected) = (pairs.chosen_logratios() * beta, pairs.rejected_logratios() * beta);
    -log_sigmoid(chosen.clone()) - log_sigmoid(-chosen) * 0.5 - log_sigmoid(-rejected) * 0.5
}

/// BCO on pairs, without its density weighting and reward shift, as TRL's `bco_pair`.
pub fn bco_pair(pairs: &PairLogps, beta: f64) -> Tensor<1> {
    -log_sigmoid(pairs.chosen_logratios() * beta) - log_sigmoid(-(pairs.rejected_logratios() * beta))
}

/// SPPO with hard labels: log-ratios of `±1/(2β)`.
pub fn sppo_hard(pairs: &PairLogps, beta: f64) -> Tensor<1> {
    let target = 0.5 / beta;
    (pairs.chosen_logratios() - target).square() + (pairs.rejected_logratios() + target).square()
}

/// AOT: the policy's log-ratios of chosen to rejected, sorted over the batch, above the reference's.
pub fn aot(pairs: &PairLogps, beta: f64, smoothing: f64) -> Tensor<1> {
    let policy = pairs.chosen.clone() - pairs.rejected.clone();
    let reference = pairs.ref_chosen.clone() - pairs.ref_rejected.clone();
    smoothed((policy.sort(0) - reference.sort(0)) * beta, smoothing)
}

/// AOT without pairing: the winners' log-ratios, sorted over the batch, above the losers'.
pub fn aot_unpaired(pairs: &PairLogps, beta: f64, smoothing: f64) -> Tensor<1> {
    let delta = pairs.chosen_logratios().sort(0) - pairs.rejected_logratios().sort(0);
    smoothed(delta * beta, smoothing)
}

fn smoothed(delta: Tensor<1>, smoothing: f64) -> Tensor<1> {
    log_sigmoid(delta.clone()) * -(1.0 - smoothing) - log_sigmoid(-delta) * smoothing
}

/// Cross-entropy of the chosen completions, averaged over the tokens of the batch.
///
/// `tokens_per_pair` are the scored tokens of all chosen completions of the batch (not 0) over its pairs; the mean over the
/// pairs of what this returns is the token mean, as in TRL.
pub fn sft(chosen_logps: Tensor<1>, tokens_per_pair: f64) -> Tensor<1> {
    chosen_logps * -tokens_per_pair.recip()
}
