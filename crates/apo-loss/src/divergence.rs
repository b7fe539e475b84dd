//! Scores of the completions under an f-divergence between policy and reference.

use burn::tensor::Tensor;
use burn::tensor::activation::log_sigmoid;

use crate::PairLogps;

/// Largest exponent whose `exp` is finite in `f32`, with room.
pub(crate) const MAX_EXPONENT: f64 = 80.0;

/// The divergence that holds the policy near the reference (f-DPO, arXiv 2309.16240). The score of a
/// completion is `f'(π/π_ref)`, up to a constant that cancels in differences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Divergence {
    /// `log t`: DPO's own.
    ReverseKl,
    /// `1 - 1/t`.
    ForwardKl,
    /// `log(2t / (t + 1))`.
    JensenShannon,
    /// `(t^(α-1) - 1) / (α - 1)`; `log t` where α is 1.
    Alpha(f64),
}

/// Scores of both completions, `[pairs]` each.
#[derive(Debug, Clone)]
pub struct Scores {
    /// Of the chosen completions.
    pub chosen: Tensor<1>,
    /// Of the rejected ones.
    pub rejected: Tensor<1>,
}

impl PairLogps {
    /// Scores under a divergence.
    pub fn scores(&self, divergence: Divergence) -> Scores {
        let score = |logratios| divergence.score(logratios);
        Scores { chosen: score(self.chosen_logratios()), rejected: score(self.rejected_logratios()) }
    }
}

impl Scores {
    /// `δ`: chosen minus rejected.
    pub fn delta(&self) -> Tensor<1> {
        self.chosen.clone() - self.rejected.clone()
    }

    /// Scores a token of the completions, `lengths` `[pairs]` each; empty ones count as one token.
    #[must_use]
    pub fn per_token(&self, chosen: Tensor<1>, rejected: Tensor<1>) -> Self {
        Self {
            chosen: self.chosen.clone() / chosen.clamp_min(1.0),
            rejected: self.rejected.clone() / rejected.clamp_min(1.0),
        }
    }
}

impl Divergence {
    fn score(self, logratios: Tensor<1>) -> Tensor<1> {
        match self {
            Self::ReverseKl => logratios,
            // TRL has no bound here: beyond it its loss is infinite or NaN.
            Self::ForwardKl => -(-logratios).clamp_max(MAX_EXPONENT).exp() + 1.0,
            Self::JensenShannon => log_sigmoid(logratios) + std::f64::consts::LN_2,
            Self::Alpha(alpha) if (alpha - 1.0).abs() < 1e-6 => logratios,
            Self::Alpha(alpha) => {
                let exponent = (logratios * (alpha - 1.0)).clamp_max(MAX_EXPONENT);
                (exponent.exp() - 1.0) / (alpha - 1.0)
            }
        }
    }
}
