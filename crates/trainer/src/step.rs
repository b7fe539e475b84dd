//! One micro-batch: packed rows in, loss, metrics and gradients out.

use std::sync::Arc;

use apo_loss::{LabelledLogps, PairLogps, kl_estimate, length_desensitized, pair_weights};
use burn::tensor::{Device, Tensor, TensorData};
use decoder::{Batch, Decoder, Recompute, TokenScores};
use fused_ops::{HeadOutput, sum_into};
use pref_data::{Dataset, Packed, PairTokens, kl_rows};

use crate::loss::{LossSettings, Winners};
use crate::metrics::{self, Metrics, PairValues, RowValues};

/// Reference log-probabilities of a row: of its two completions, or of its one completion and of the
/// mismatched one.
pub type RefLogps = [f32; 2];

/// What is summed for each row, apart from the tokens themselves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// Weight of tokens beyond the shorter completion.
    pub ld_alpha: Option<f64>,
    /// Completions are mismatched within batches of this many rows.
    pub mismatched: Option<usize>,
}

impl Scoring {
    /// Names what reference values depend on.
    pub fn key(&self) -> String {
        match self {
            Self { ld_alpha: None, mismatched: None } => String::new(),
            other => format!("{other:?}"),
        }
    }
}

/// How gradients are computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backward {
    /// Factor of the loss.
    pub scale: f64,
    /// Blocks are computed again instead of kept.
    pub recompute: bool,
}

/// Packed sequences and how their tokens are summed.
struct Packing {
    packed: Packed,
    batch: Batch,
    sums: Arc<Vec<(u32, u32)>>,
    ld_alpha: Option<f64>,
}

/// Log-probabilities of the rows, on the device: `[rows]` twice, and of each token.
struct Scored {
    chosen: Tensor<1>,
    rejected: Tensor<1>,
    /// Of the chosen completions with every token counted in full.
    whole_chosen: Tensor<1>,
    tokens: Tensor<1>,
    stats: Tensor<2>,
    recompute: Option<Recompute>,
}

impl Packing {
    fn new(packed: Packed, ld_alpha: Option<f64>) -> Self {
        let rows = packed.rows.iter().map(|row| (row.start, row.shared, row.tails));
        let batch =
            Batch::packed(&packed.tokens, &packed.positions, rows, &packed.predictors, &packed.targets);
        let sums = if ld_alpha.is_some() { packed.sums_with_tails() } else { packed.sums() };
        Self { sums: Arc::new(sums), packed, batch, ld_alpha }
    }

    fn score(&self, model: &Decoder) -> Scored {
        self.sum(model.score(&self.batch), None)
    }

    /// The same, keeping only the inputs of the blocks for the backward pass.
    fn score_recomputing(&self, model: &Decoder) -> Scored {
        let (out, kept) = model.score_recomputing(&self.batch);
        self.sum(out, Some(kept))
    }

    fn sum(&self, out: HeadOutput, recompute: Option<Recompute>) -> Scored {
        let rows = self.packed.rows.len();
        let (sums, whole) = match self.ld_alpha {
            None => {
                let sums = sum_into(out.logps.clone(), &self.sums, 2 * rows);
                (sums.clone(), sums)
            }
            Some(alpha) => {
                let sums = sum_into(out.logps.clone(), &self.sums, 4 * rows);
                let beyond = sums.clone().narrow(0, 2 * rows, 2 * rows);
                let common = sums.narrow(0, 0, 2 * rows);
                let whole = common.clone() + beyond.clone();
                (length_desensitized(common, beyond, alpha), whole)
            }
        };
        Scored {
            chosen: sums.clone().narrow(0, 0, rows),
            rejected: sums.narrow(0, rows, rows),
            whole_chosen: whole.narrow(0, 0, rows),
            tokens: out.logps.inner(),
            stats: out.stats,
            recompute,
        }
    }
}

/// A micro-batch ready for the model.
pub struct Micro {
    own: Packing,
    mismatched: Option<Packing>,
    /// Tokens of both completions of each pair.
    lengths: Vec<[usize; 2]>,
    /// Labels of single completions; empty for pairs.
    labels: Vec<bool>,
}

impl Micro {
    /// Packs rows of a data set in the given order.
    pub fn new(data: &Dataset, rows: &[u32], scoring: Scoring) -> Self {
        let prepared: Vec<_> = rows.iter().map(|&row| data.row(row as usize)).collect();
        let tokens = || prepared.iter().map(|row| &row.tokens);
        let completions =
            |pair: &PairTokens| [pair.chosen.len() - pair.context[0], pair.rejected.len() - pair.context[1]];
        let lengths = tokens().map(completions).collect();
        let unpaired = data.is_unpaired();
        let packed = if unpaired { Packed::unpaired(tokens()) } else { Packed::new(tokens()) };
        let mismatched = scoring.mismatched.map(|batch| {
            let sequences = rows.iter().map(|&row| mismatched(data, row as usize, batch));
            Packing::new(Packed::unpaired(&sequences.collect::<Vec<_>>()), None)
        });
        let labels = if unpaired { prepared.iter().map(|row| row.label).collect() } else { Vec::new() };
        Self { own: Packing::new(packed, scoring.ld_alpha), mismatched, lengths, labels }
    }

    /// Tokens the model computes, shared ones once.
    pub fn computed_tokens(&self) -> usize {
        let mismatched = self.mismatched.as_ref().map_or(0, |packing| packing.packed.tokens.len());
        self.own.packed.tokens.len() + mismatched
    }

    /// Tokens of all sequences, as TRL counts them.
    pub fn num_tokens(&self) -> usize {
        self.own.packed.num_tokens
    }

    /// Log-probabilities of each row under a model without autodiff.
    pub fn logps(&self, model: &Decoder) -> Vec<RefLogps> {
        let scored = self.own.score(model);
        let second = match &self.mismatched {
            Some(packing) => packing.score(model).chosen,
            None => scored.rejected,
        };
        host(scored.chosen).into_iter().zip(host(second)).map(|(a, b)| [a, b]).collect()
    }

    /// Loss and metrics; with a tracked model also the gradients, one a trained weight.
    pub fn run(
        &self,
        model: &Decoder,
        loss: &LossSettings,
        reference: &[RefLogps],
        backward: Option<Backward>,
    ) -> (Metrics, Vec<Option<Tensor<2>>>) {
        // Without gradient and before the graph of the other rows exists.
        let mismatched = self.mismatched.as_ref().map(|packing| packing.score(&model.frozen()).chosen);
        let scored = match backward {
            Some(Backward { recompute: true, .. }) => self.own.score_recomputing(model),
            _ => self.own.score(model),
        };
        let tokens = TokenScores::new(host(scored.tokens.clone()), &host(scored.stats.clone()));
        if self.labels.is_empty() {
            self.pairs(model, loss, reference, backward, scored, &tokens)
        } else {
            self.rows(model, loss, reference, backward, scored, mismatched, &tokens)
        }
    }

    fn pairs(
        &self,
        model: &Decoder,
        loss: &LossSettings,
        reference: &[RefLogps],
        backward: Option<Backward>,
        scored: Scored,
        tokens: &TokenScores,
    ) -> (Metrics, Vec<Option<Tensor<2>>>) {
        let device = scored.chosen.device();
        let packed = &self.own.packed;
        let pairs = PairLogps {
            chosen: scored.chosen,
            rejected: scored.rejected,
            ref_chosen: column(reference, 0, &device),
            ref_rejected: column(reference, 1, &device),
        };
        let winners = Winners {
            logps: scored.whole_chosen,
            tokens: packed.completion_tokens().iter().map(|count| count[0]).sum(),
        };
        let weights = loss.use_weighting.then(|| {
            let [chosen, rejected] = metrics::aligned(tokens, packed).map(|means| values(means, &device));
            pair_weights(chosen, rejected)
        });
        let mean = loss.total(&pairs, &self.lengths, &winners, weights.as_ref());
        let gradients = gradients(model, &mean, backward, scored.recompute);
        let values = PairValues {
            loss: f64::from(host(mean.inner())[0]),
            chosen: host(pairs.chosen.inner()),
            rejected: host(pairs.rejected.inner()),
            reference: reference.to_vec(),
        };
        (metrics::of_pairs(&values, tokens, &packed.sides, loss.beta), gradients)
    }

    fn rows(
        &self,
        model: &Decoder,
        loss: &LossSettings,
        reference: &[RefLogps],
        backward: Option<Backward>,
        scored: Scored,
        mismatched: Option<Tensor<1>>,
        tokens: &TokenScores,
    ) -> (Metrics, Vec<Option<Tensor<2>>>) {
        let device = scored.chosen.device();
        let labels = self.labels.iter().map(|&label| f32::from(u8::from(label))).collect();
        let rows = LabelledLogps {
            logps: scored.chosen,
            ref_logps: column(reference, 0, &device),
            labels: values(labels, &device),
        };
        let kl = match mismatched {
            Some(logps) => {
                let inner = kl_estimate(logps.inner(), column(reference, 1, &device).inner());
                Tensor::from_data(inner.into_data(), &device)
            }
            None => Tensor::zeros([1], &device),
        };
        let mean = loss.unpaired(&rows, kl.clone());
        let gradients = gradients(model, &mean, backward, scored.recompute);
        let values = RowValues {
            loss: f64::from(host(mean.inner())[0]),
            kl: f64::from(host(kl)[0]),
            logps: host(rows.logps.inner()),
            reference: reference.iter().map(|logps| logps[0]).collect(),
            labels: self.labels.clone(),
        };
        (metrics::of_rows(&values, tokens, &self.own.packed.sides, loss.beta), gradients)
    }
}

/// Row `row` with the completion that KTO gives it within its batch.
fn mismatched(data: &Dataset, row: usize, batch: usize) -> PairTokens {
    let start = row / batch * batch;
    let rows = batch.min(data.len() - start);
    let of = start + kl_rows(rows, batch)[row - start];
    data.mismatched(row, of)
}

fn gradients(
    model: &Decoder,
    mean: &Tensor<1>,
    backward: Option<Backward>,
    recompute: Option<Recompute>,
) -> Vec<Option<Tensor<2>>> {
    backward.map_or_else(Vec::new, |backward| model.gradients(mean.clone() * backward.scale, recompute))
}

fn values(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

fn column(reference: &[RefLogps], i: usize, device: &Device) -> Tensor<1> {
    values(reference.iter().map(|pair| pair[i]).collect(), device)
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec_as::<f32>().expect("a float tensor converts to f32")
}
