//! Flags of the loss, and which of them go together.

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::args::boolean;
use crate::loss::LossSettings;

/// Flags of the loss.
#[derive(Debug, Args)]
pub struct LossArgs {
    /// Loss; several are added.
    #[arg(long, value_enum, num_args = 1.., action = clap::ArgAction::Set, default_value = "sigmoid")]
    pub loss_type: Vec<LossType>,
    /// Weight of each of several losses [default: 1 each].
    #[arg(long, num_args = 1.., action = clap::ArgAction::Set, value_name = "W")]
    pub loss_weights: Vec<f64>,
    /// Strength of the pull towards the reference [default: 0.1].
    #[arg(long)]
    pub beta: Option<f64>,
    /// Weight of tokens beyond the length of the shorter completion, between 0 and 1 (LD-DPO) [default: 1].
    #[arg(long, value_name = "ALPHA")]
    pub ld_alpha: Option<f64>,
    /// Weigh each pair by how likely its completions are under the policy (WPO).
    #[arg(long, value_parser = boolean, num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub use_weighting: bool,
    /// Weight of desirable completions: kto and apo_zero_unpaired [default: 1].
    #[arg(long, value_name = "W")]
    pub desirable_weight: Option<f64>,
    /// Weight of undesirable completions: kto and apo_zero_unpaired [default: 1].
    #[arg(long, value_name = "W")]
    pub undesirable_weight: Option<f64>,
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
    /// KTO, on single completions with labels; pairs are taken apart.
    Kto,
    /// APO-zero on single completions with labels; pairs are taken apart.
    ApoZeroUnpaired,
}

impl LossType {
    /// Takes single completions, not pairs.
    pub fn is_unpaired(self) -> bool {
        matches!(self, Self::Kto | Self::ApoZeroUnpaired)
    }
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
        let unpaired = self.loss_type.iter().any(|loss| loss.is_unpaired());
        let label_weights = [self.desirable_weight, self.undesirable_weight];
        let divides = any(&[Ipo, LossType::SppoHard]);
        let twice = self.loss_type.iter().enumerate().any(|(i, loss)| self.loss_type[..i].contains(loss));
        let rules = [
            (twice, "--loss-type: a loss is given twice; give it a weight with --loss-weights instead"),
            (
                unpaired && self.loss_type.len() > 1,
                "--loss-type: kto and apo_zero_unpaired take single completions and go with no other loss",
            ),
            (unpaired && !self.loss_weights.is_empty(), "--loss-weights has no effect on a single loss"),
            (
                !unpaired && label_weights.iter().any(Option::is_some),
                "--desirable-weight and --undesirable-weight have no effect without kto or apo_zero_unpaired",
            ),
            (
                label_weights.iter().flatten().any(|weight| !(weight.is_finite() && *weight >= 0.0)),
                "--desirable-weight and --undesirable-weight must be 0 or more",
            ),
            (
                self.ld_alpha.is_some_and(|alpha| !(0.0..=1.0).contains(&alpha)),
                "--ld-alpha must be in [0, 1]",
            ),
            (unpaired && self.ld_alpha.is_some(), "--ld-alpha has no effect on single completions"),
            (unpaired && self.use_weighting, "--use-weighting has no effect on single completions"),
            (
                self.use_weighting && any(&[Aot, AotUnpaired]),
                "--use-weighting does not go with aot and aot_unpaired, which sort the pairs",
            ),
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
            ld_alpha: self.ld_alpha,
            use_weighting: self.use_weighting,
            desirable_weight: self.desirable_weight.unwrap_or(1.0),
            undesirable_weight: self.undesirable_weight.unwrap_or(1.0),
        })
    }
}
