//! Preference-optimization losses and rewards as pure functions on Burn tensors.
//!
//! Everything takes summed completion log-probabilities, one value a pair, and returns one value a
//! pair; the caller reduces. With `c = log π(y_w|x) - log π_ref(y_w|x)` and `r` the same for the
//! rejected completion `y_l`:
//!
//! | function | per-pair loss | source |
//! |---|---|---|
//! | [`apo_zero`] | `(1 - σ(βc)) + σ(βr)` | arXiv 2408.06266, eq. 7 |
//! | [`apo_down`] | `σ(βc) + (1 - σ(β(c - r)))` | arXiv 2408.06266, eq. 8 |
//! | [`sigmoid`] | `-log σ(β(c - r))` | DPO, arXiv 2305.18290, eq. 7 |
//! | [`sft`] | `-log π(y_w\|x)` a token | TRL `loss_type="sft"` |
//!
//! ```
//! use apo_loss::{PairLogps, apo_zero};
//! use burn::tensor::{Device, Tensor};
//!
//! let device = Device::flex();
//! let logps = |values: [f32; 2]| Tensor::<1>::from_floats(values, &device);
//! let pairs = PairLogps {
//!     chosen: logps([-10.0, -20.0]),
//!     rejected: logps([-12.0, -19.0]),
//!     ref_chosen: logps([-10.0, -20.0]),
//!     ref_rejected: logps([-12.0, -19.0]),
//! };
//! // Before training the policy is the reference, and the loss is 1 for every pair.
//! let loss: Vec<f32> = apo_zero(&pairs, 0.1).into_data().try_into_vec().unwrap();
//! assert_eq!(loss, [1.0, 1.0]);
//! ```

use burn::tensor::Tensor;
use burn::tensor::activation::{log_sigmoid, sigmoid as logistic};

/// Summed completion log-probabilities, each `[pairs]`, in nats.
#[derive(Debug, Clone)]
pub struct PairLogps {
    /// Chosen completion under the policy.
    pub chosen: Tensor<1>,
    /// Rejected completion under the policy.
    pub rejected: Tensor<1>,
    /// Chosen completion under the reference.
    pub ref_chosen: Tensor<1>,
    /// Rejected completion under the reference.
    pub ref_rejected: Tensor<1>,
}

impl PairLogps {
    /// `log π/π_ref` of the chosen completions, `[pairs]`.
    pub fn chosen_logratios(&self) -> Tensor<1> {
        self.chosen.clone() - self.ref_chosen.clone()
    }

    /// `log π/π_ref` of the rejected completions, `[pairs]`.
    pub fn rejected_logratios(&self) -> Tensor<1> {
        self.rejected.clone() - self.ref_rejected.clone()
    }
}

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

/// DPO: raises the margin between the two log-ratios.
pub fn sigmoid(pairs: &PairLogps, beta: f64) -> Tensor<1> {
    -log_sigmoid((pairs.chosen_logratios() - pairs.rejected_logratios()) * beta)
}

/// Cross-entropy of the chosen completions, averaged over the tokens of the batch.
///
/// `chosen_tokens` is the number of scored tokens of all chosen completions; the mean over pairs of
/// what this returns is the token mean, as in TRL.
pub fn sft(chosen_logps: Tensor<1>, chosen_tokens: usize) -> Tensor<1> {
    let pairs = chosen_logps.dims()[0];
    chosen_logps * -(pairs as f64 / chosen_tokens.max(1) as f64)
}

/// Implicit rewards `β · log π/π_ref` of both completions, detached, `[pairs]` each.
pub fn rewards(pairs: &PairLogps, beta: f64) -> (Tensor<1>, Tensor<1>) {
    let reward = |logratios: Tensor<1>| logratios.detach() * beta;
    (reward(pairs.chosen_logratios()), reward(pairs.rejected_logratios()))
}
