//! Preference-optimization losses and rewards as pure functions on Burn tensors.
//!
//! Everything takes summed completion log-probabilities, one value a pair, and returns one value a
//! pair; the caller reduces. With `c = log π(y_w|x) - log π_ref(y_w|x)`, `r` the same for the rejected
//! completion `y_l`, `δ = s(c) - s(r)` the difference of their scores under an f-divergence (`c - r` for the
//! usual reverse KL), `σ` the logistic function and `ε` the label smoothing:
//!
//! | function | per-pair loss | source |
//! |---|---|---|
//! | [`apo_zero`] | `(1 - σ(βc)) + σ(βr)` | APO, arXiv 2408.06266, eq. 7 |
//! | [`apo_down`] | `σ(βc) + (1 - σ(β(c - r)))` | APO, eq. 8 |
//! | [`sigmoid`] | `-log σ(βδ)` | DPO, arXiv 2305.18290, eq. 7 |
//! | [`sigmoid_norm`] | `-log σ(βδ)` with scores a token | TRL `sigmoid_norm` |
//! | [`hinge`] | `max(0, 1 - βδ)` | SLiC, arXiv 2305.10425 |
//! | [`ipo`] | `(δ - 1/(2β))²` with scores a token | IPO, arXiv 2310.12036, eq. 17 |
//! | [`exo_pair`] | `KL(softmax(β·scores) ‖ (1 - ε, ε))` | EXO, arXiv 2402.00856, eq. 16 |
//! | [`nca_pair`] | `-log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)` | NCA, arXiv 2402.05369 |
//! | [`robust`] | `(-(1 - ε) log σ(βδ) + ε log σ(-βδ)) / (1 - 2ε)` | Robust DPO, arXiv 2403.00409 |
//! | [`bco_pair`] | `-log σ(βc) - log σ(-βr)` | BCO, arXiv 2404.04656 |
//! | [`sppo_hard`] | `(c - 1/(2β))² + (r + 1/(2β))²` | SPPO, arXiv 2405.00675, eq. 4.7 |
//! | [`aot`] | smoothed `-log σ(β(sort(log π ratios) - sort(log π_ref ratios)))` | AOT, arXiv 2406.05882 |
//! | [`aot_unpaired`] | smoothed `-log σ(β(sort(c) - sort(r)))` | AOT |
//! | [`discopop`] | `(1 - m)·(-log σ(βδ)) + m·exp(-βδ)`, `m = σ(βδ/τ)` | DiscoPOP, arXiv 2406.08414, eq. 5 |
//! | [`sft`] | `-log π(y_w\|x)` a token | TRL `sft` |
//!
//! Single completions with a label, `x` their log-ratio, `y = ±1` their label:
//!
//! | function | per-row loss | source |
//! |---|---|---|
//! | [`kto`] | `1 - σ(yβ(x - kl))`, `kl` from [`kl_estimate`] | KTO, arXiv 2402.01306, eq. 7 |
//! | [`apo_zero_unpaired`] | `1 - σ(yβx)` | TRL `apo_zero_unpaired` |
//!
//! [`length_desensitized`] (LD-DPO) changes the log-probabilities that go in, [`pair_weights`] (WPO) multiplies what
//! comes out; several losses are added with weights of the caller's choice.
//!
//! All are the forms of TRL 1.16's `DPOTrainer._compute_loss` and `KTOTrainer._compute_loss`.
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

mod divergence;
mod margin;
mod pair;
mod unpaired;
mod weights;

use burn::tensor::Tensor;

pub use divergence::{Divergence, Scores};
pub use margin::{discopop, exo_pair, hinge, ipo, robust, sigmoid, sigmoid_norm};
pub use pair::{aot, aot_unpaired, apo_down, apo_zero, bco_pair, nca_pair, sft, sppo_hard};
pub use unpaired::{LabelWeights, LabelledLogps, apo_zero_unpaired, kl_estimate, kto};
pub use weights::{length_desensitized, pair_weights};

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

/// Implicit rewards `β · log π/π_ref` of both completions, detached, `[pairs]` each.
pub fn rewards(pairs: &PairLogps, beta: f64) -> (Tensor<1>, Tensor<1>) {
    let reward = |logratios: Tensor<1>| logratios.detach() * beta;
    (reward(pairs.chosen_logratios()), reward(pairs.rejected_logratios()))
}
