//! Which losses a run minimizes, with what weights and settings.

use apo_loss::{self as losses, Divergence, PairLogps};
use burn::tensor::{Device, Tensor, TensorData};
use clap::{Args, ValueEnum};
use serde::Serialize;

/// Flags of the loss.
#[derive(Debug, Args)]
pub struct LossArgs {
    /// Loss; several are added.
    #[arg(long, value_enum, num_args = 1.., default_value = "sigmoid")]
    pub loss_type: Vec<LossType>,
    /// Weight of each of several losses [default: 1 each].
    #[arg(long, num_args = 1.., value_name = "W")]
    pub loss_weights: Vec<f64>,
    /// Strength of the pull towards the reference [default: 0.1].
    #[arg(long)]
    pub beta: Option<f64>,
    /// Share of labels taken as flipped: robust, exo_pair, aot and aot_unpaired.
    #[arg(long)]
    pub label_smoothing: Option<f64>,
    /// Divergence between policy and reference: sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust and discopop.
    #[arg(long, value_enum, default_value = "reverse_kl")]
    pub f_divergence_type: DivergenceType,
    /// Alpha of alpha_divergence [default: 0.5].
    #[arg(long, value_name = "ALPHA")]
    pub f_alpha_divergence_coef: Option<f64>,
    /// Temperature of discopop [default: 0.05].
    #[arg(long, value_name = "TAU")]
    pub discopop_tau: Option<f64>,
}

/// Loss functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// DPO.
    Sigmoid,
    /// SLiC's hinge.
    Hinge,
    /// IPO, a token.
    Ipo,
    /// EXO; needs --label-smoothing.
    ExoPair,
    /// NCA.
    NcaPair,
    /// Robust DPO.
    Robust,
    /// BCO on pairs.
    BcoPair,
    /// SPPO with hard labels.
    SppoHard,
    /// AOT.
    Aot,
    /// AOT without pairing.
    AotUnpaired,
    /// APO-zero: for winners better than the model (CLAIR).
    ApoZero,
    /// APO-down: for a model better than the winners.
    ApoDown,
    /// DiscoPOP.
    Discopop,
    /// Cross-entropy of the chosen completions.
    Sft,
    /// DPO, a token.
    SigmoidNorm,
}

/// Divergences, with TRL's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum DivergenceType {
    /// DPO's own.
    ReverseKl,
    /// Forward KL.
    ForwardKl,
    /// Jensen-Shannon.
    JsDivergence,
    /// Alpha.
    AlphaDivergence,
}

/// Losses with their weights and settings, as they run; the fields stand for the flags of [`LossArgs`].
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
}

impl LossArgs {
    /// Checks the flags against each other.
    pub fn settings(self) -> Result<LossSettings, String> {
        use LossType::{Aot, AotUnpaired, Discopop, ExoPair, Hinge, Ipo, Robust, Sft, Sigmoid, SigmoidNorm};
        let any = |kinds: &[LossType]| self.loss_type.iter().any(|loss| kinds.contains(loss));
        let divergent = [Sigmoid, SigmoidNorm, Hinge, Ipo, ExoPair, Robust, Discopop];
        let beta = self.beta.unwrap_or(0.1);
        let smoothing = self.label_smoothing.unwrap_or(0.0);
        let other = self.f_divergence_type != DivergenceType::ReverseKl;
        let fits =
            self.loss_type.iter().all(|loss| *loss == Sft || divergent.contains(loss)) && any(&divergent);
        let weights_fit = self.loss_weights.is_empty() || self.loss_weights.len() == self.loss_type.len();
        let divides = any(&[Ipo, LossType::SppoHard]);
        let rules = [
            (!(beta.is_finite() && beta >= 0.0), "--beta must be 0 or more"),
            (divides && beta == 0.0, "--beta must be above 0 with ipo and sppo_hard, which divide by it"),
            (!weights_fit, "--loss-weights: give as many as there are losses in --loss-type"),
            (self.loss_weights.iter().any(|weight| !weight.is_finite()), "--loss-weights must be finite"),
            (
                self.label_smoothing.is_some() && !any(&[Robust, ExoPair, Aot, AotUnpaired]),
                "--label-smoothing has no effect with this loss; robust, exo_pair, aot and aot_unpaired use it",
            ),
            (!(0.0..1.0).contains(&smoothing), "--label-smoothing must be in [0, 1)"),
            (any(&[Robust]) && smoothing >= 0.5, "--label-smoothing must be below 0.5 with robust"),
            (any(&[ExoPair]) && smoothing == 0.0, "exo_pair needs --label-smoothing above 0, such as 1e-3"),
            (
                other && !fits,
                "--f-divergence-type: only sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust and discopop have other \
                 divergences",
            ),
            (
                self.f_alpha_divergence_coef.is_some()
                    && self.f_divergence_type != DivergenceType::AlphaDivergence,
                "--f-alpha-divergence-coef has no effect without --f-divergence-type alpha_divergence",
            ),
            (
                self.f_alpha_divergence_coef.is_some_and(|alpha| !alpha.is_finite()),
                "--f-alpha-divergence-coef must be finite",
            ),
            (
                self.discopop_tau.is_some() && !any(&[Discopop]),
                "--discopop-tau has no effect without --loss-type discopop",
            ),
            (
                self.discopop_tau.is_some_and(|tau| !(tau.is_finite() && tau > 0.0)),
                "--discopop-tau must be above 0",
            ),
        ];
        if let Some((_, reason)) = rules.into_iter().find(|(broken, _)| *broken) {
            return Err(reason.into());
        }
        let weights =
            if self.loss_weights.is_empty() { vec![1.0; self.loss_type.len()] } else { self.loss_weights };
        Ok(LossSettings {
            loss_type: self.loss_type,
            loss_weights: weights,
            beta,
            label_smoothing: smoothing,
            f_divergence_type: self.f_divergence_type,
            f_alpha_divergence_coef: self.f_alpha_divergence_coef.unwrap_or(0.5),
            discopop_tau: self.discopop_tau.unwrap_or(0.05),
        })
    }
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

    /// The weighted sum of the losses, each a mean over the pairs, `[1]`. `lengths` are the tokens of the two
    /// completions of each pair, `chosen_tokens` the scored ones of all chosen completions.
    pub fn total(&self, pairs: &PairLogps, lengths: &[[usize; 2]], chosen_tokens: usize) -> Tensor<1> {
        let device = pairs.chosen.device();
        let terms = self.loss_type.iter().zip(&self.loss_weights);
        let terms = terms.map(|(loss, weight)| {
            let mean = self.one(*loss, pairs, lengths, chosen_tokens).mean();
            if *weight == 1.0 { mean } else { mean * *weight }
        });
        terms.reduce(|a, b| a + b).unwrap_or_else(|| Tensor::zeros([1], &device))
    }

    fn one(
        &self,
        loss: LossType,
        pairs: &PairLogps,
        lengths: &[[usize; 2]],
        chosen_tokens: usize,
    ) -> Tensor<1> {
        let (beta, smoothing) = (self.beta, self.label_smoothing);
        let scores = || pairs.scores(self.divergence());
        let per_token = || {
            let device = pairs.chosen.device();
            scores().per_token(column(lengths, 0, &device), column(lengths, 1, &device))
        };
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
            LossType::Sft => losses::sft(pairs.chosen.clone(), chosen_tokens),
            LossType::SigmoidNorm => losses::sigmoid_norm(&per_token(), beta),
        }
    }

    /// The losses by name, for people.
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

fn column(lengths: &[[usize; 2]], i: usize, device: &Device) -> Tensor<1> {
    let values: Vec<f32> = lengths.iter().map(|pair| pair[i] as f32).collect();
    Tensor::from_data(TensorData::new(values, [lengths.len()]), device)
}
