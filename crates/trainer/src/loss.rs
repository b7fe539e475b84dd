//! The losses of a run.

use apo_loss::{self as losses, Divergence, LabelWeights, LabelledLogps, PairLogps};
use burn::tensor::Tensor;
use clap::ValueEnum;
use serde::Serialize;

pub use crate::loss_args::{DivergenceType, LossType};

/// Losses with their weights and settings, as they run; the fields stand for the flags of [`crate::loss_args::LossArgs`].
#[allow(missing_docs)]
#[derive(Debug, Clone, Serialize)]
pub struct LossSettings {
    pub loss_type: Vec<LossType>,
    pub loss_weights: Vec<f64>,
    pub beta: f64,
    pub label_smoothing: f64,
    pub f_divergence_type: DivergenceType,
    pub f_alpha_divergence_coef: f64,
    pub discopop_tau: f64,
    pub ld_alpha: Option<f64>,
    pub use_weighting: bool,
    pub desirable_weight: f64,
    pub undesirable_weight: f64,
}

/// What the loss sft takes: the chosen completions with every token counted in full.
pub struct Winners {
    /// Their log-probabilities, `[pairs]`.
    pub logps: Tensor<1>,
    /// Scored tokens of a pair, on average over the micro-batch.
    pub tokens_per_pair: f64,
}

impl LossSettings {
    fn divergence(&self) -> Divergence {
        match self.f_divergence_type {
            DivergenceType::ReverseKl => Divergence::ReverseKl,
            DivergenceType::ForwardKl => Divergence::ForwardKl,
            DivergenceType::JsDivergence => Divergence::JensenShannon,
            DivergenceType::AlphaDivergence => Divergence::Alpha(self.f_alpha_divergence_coef),
        }
    }

    /// The losses take single completions with labels.
    pub fn is_unpaired(&self) -> bool {
        self.loss_type.iter().any(|loss| loss.is_unpaired())
    }

    /// The loss needs mismatched completions (KTO's estimate of the divergence).
    pub fn needs_mismatched(&self) -> bool {
        self.loss_type == [LossType::Kto]
    }

    /// A pair's loss depends on the other pairs of its micro-batch.
    pub fn compares_pairs(&self) -> bool {
        self.loss_type.iter().any(|loss| matches!(loss, LossType::Aot | LossType::AotUnpaired))
    }

    /// Mean loss of single completions, `[1]`; `kl` is `[1]`.
    pub fn unpaired(&self, rows: &LabelledLogps, kl: Tensor<1>) -> Tensor<1> {
        let weights = LabelWeights { desirable: self.desirable_weight, undesirable: self.undesirable_weight };
        let losses = match self.loss_type[0] {
            LossType::Kto => losses::kto(rows, kl, self.beta, weights),
            _ => losses::apo_zero_unpaired(rows, self.beta, weights),
        };
        losses.mean()
    }

    /// The weighted sum of the losses, each a mean over the pairs, `[1]`. `lengths` are the tokens of the two
    /// completions of each pair; `pair_weights`, `[pairs]`, multiply every loss (WPO).
    pub fn total(
        &self,
        pairs: &PairLogps,
        lengths: &[[usize; 2]],
        winners: &Winners,
        pair_weights: Option<&Tensor<1>>,
    ) -> Tensor<1> {
        let device = pairs.chosen.device();
        let terms = self.loss_type.iter().zip(&self.loss_weights);
        let terms = terms.map(|(loss, weight)| {
            let each = self.one(*loss, pairs, lengths, winners);
            let mean = match pair_weights {
                Some(weights) => (each * weights.clone()).mean(),
                None => each.mean(),
            };
            if *weight == 1.0 { mean } else { mean * *weight }
        });
        terms.reduce(|a, b| a + b).unwrap_or_else(|| Tensor::zeros([1], &device))
    }

    fn one(&self, loss: LossType, pairs: &PairLogps, lengths: &[[usize; 2]], winners: &Winners) -> Tensor<1> {
        let (beta, smoothing) = (self.beta, self.label_smoothing);
        let scores = || pairs.scores(self.divergence());
        let per_token =
            || scores().per_token(column(lengths, 0, &pairs.chosen), column(lengths, 1, &pairs.chosen));
        match loss {
            LossType::Sigmoid => losses::sigmoid(&scores(), beta),
            LossType::Hinge => losses::hinge(&scores(), beta),
            LossType::Ipo => losses::ipo(&per_token(), beta),
            LossType::ExoPair => losses::exo_pair(&scores(), beta, smoothing),
            LossType::NcaPair => losses::nca_pair(pairs, beta),
            LossType::Robust => losses::robust(&scores(), beta, smoothing),
            LossType::BcoPair => losses::bco_pair(pairs, beta),
            LossType::SppoHard => losses::sppo_hard(pairs, beta),
            LossType::Aot => losses::aot(pairs, beta, smoothing),
            LossType::AotUnpaired => losses::aot_unpaired(pairs, beta, smoothing),
            LossType::ApoZero => losses::apo_zero(pairs, beta),
            LossType::ApoDown => losses::apo_down(pairs, beta),
            LossType::Discopop => losses::discopop(&scores(), beta, self.discopop_tau),
            LossType::Sft => losses::sft(winners.logps.clone(), winners.tokens_per_pair),
            LossType::SigmoidNorm => losses::sigmoid_norm(&per_token(), beta),
            LossType::Kto | LossType::ApoZeroUnpaired => unreachable!("see LossSettings::unpaired"),
        }
    }

    /// The losses by name.
    pub fn tags(&self) -> impl Iterator<Item = String> {
        self.loss_type.iter().filter_map(|loss| Some(loss.to_possible_value()?.get_name().to_string()))
    }

    /// The losses by name with their weights, for people.
    pub fn names(&self) -> String {
        let name = |loss: &LossType| {
            loss.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
        };
        let terms = self.loss_type.iter().zip(&self.loss_weights);
        let terms = terms.map(|(loss, weight)| match weight {
            1.0 => name(loss),
            weight => format!("{weight} {}", name(loss)),
        });
        terms.collect::<Vec<_>>().join(" + ")
    }
}

/// Tokens of one side of each pair, as a constant beside `like`.
fn column(lengths: &[[usize; 2]], i: usize, like: &Tensor<1>) -> Tensor<1> {
    let values = lengths.iter().map(|pair| pair[i] as f32).collect();
    fused_ops::upload(values, [lengths.len()], &like.clone().unsqueeze())
}
