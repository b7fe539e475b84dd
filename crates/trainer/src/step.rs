//! One micro-batch: packed rows in, loss, metrics and gradients out.

use std::sync::Arc;

use apo_loss::{LabelledLogps, PairLogps, kl_estimate, length_desensitized, pair_weights};
use burn::tensor::{Tensor, TensorData, Transaction};
use decoder::{Batch, Decoder, Recompute, TokenScores};
use fused_ops::{HeadOutput, sum_into, upload};
use pref_data::{Dataset, Packed, PairTokens, Side, kl_rows};
use tracing::trace_span;

use crate::loss::{LossSettings, Winners};
use crate::metrics::{self, Metrics, PairValues, RowValues};

/// Reference log-probabilities of a row: of its two completions, or of its one completion and of the
/// mismatched one.
pub type RefLogps = [f32; 2];

/// The same of the rows of a micro-batch on the device, `[rows]` each.
pub type RefTensors = [Tensor<1>; 2];

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
    /// So many blocks are computed again instead of kept.
    pub recompute: usize,
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
        self.sum(trace_span!("forward").in_scope(|| model.score(&self.batch)), None)
    }

    /// The same, keeping only the inputs of the first blocks for the backward pass.
    fn score_recomputing(&self, model: &Decoder, blocks: usize) -> Scored {
        let (out, kept) = trace_span!("forward").in_scope(|| model.score_recomputing(&self.batch, blocks));
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

    /// Tokens of the rows that have a gradient, shared ones once.
    pub fn own_tokens(&self) -> usize {
        self.own.packed.tokens.len()
    }

    /// Tokens the model computes, shared ones once.
    pub fn computed_tokens(&self) -> usize {
        let mismatched = self.mismatched.as_ref().map_or(0, |packing| packing.packed.tokens.len());
        self.own.packed.tokens.len() + mismatched
    }

    /// Floating-point operations of its training step, at least; see [`Decoder::flops`].
    pub fn flops(&self, model: &Decoder) -> u64 {
        let mismatched = self.mismatched.as_ref().map_or(0, |packing| model.flops(&packing.batch, false));
        model.flops(&self.own.batch, true) + mismatched
    }

    /// Tokens of all sequences, as TRL counts them.
    pub fn num_tokens(&self) -> usize {
        self.own.packed.num_tokens
    }

    /// Log-probabilities of each row under a model without autodiff.
    pub fn logps(&self, model: &Decoder) -> RefTensors {
        let scored = self.own.score(model);
        let second = match &self.mismatched {
            Some(packing) => packing.score(model).chosen,
            None => scored.rejected,
        };
        [scored.chosen, second]
    }

    /// Loss and metrics; with a tracked model also the gradients, one a trained weight. Nothing is read back from
    /// the device.
    pub fn run(
        &self,
        model: &Decoder,
        loss: &LossSettings,
        reference: RefTensors,
        backward: Option<Backward>,
    ) -> (Pending, Vec<Option<Tensor<2>>>) {
        // Without gradient and before the graph of the other rows exists.
        let mismatched = self.mismatched.as_ref().map(|packing| packing.score(&model.frozen()).chosen);
        let scored = match backward {
            Some(Backward { recompute: blocks @ 1.., .. }) => self.own.score_recomputing(model, blocks),
            _ => self.own.score(model),
        };
        if self.labels.is_empty() {
            self.pairs(model, loss, reference, backward, scored)
        } else {
            self.rows(model, loss, reference, backward, scored, mismatched)
        }
    }

    fn pairs(
        &self,
        model: &Decoder,
        loss: &LossSettings,
        reference: RefTensors,
        backward: Option<Backward>,
        scored: Scored,
    ) -> (Pending, Vec<Option<Tensor<2>>>) {
        let packed = &self.own.packed;
        let weights = loss.use_weighting.then(|| self.pair_weights(&scored));
        let tokens = [scored.tokens, flat(scored.stats)];
        let [ref_chosen, ref_rejected] = reference.clone().map(|tensor| alongside(tensor, &scored.chosen));
        let pairs = PairLogps { chosen: scored.chosen, rejected: scored.rejected, ref_chosen, ref_rejected };
        let winners = Winners {
            logps: scored.whole_chosen,
            tokens: packed.completion_tokens().iter().map(|count| count[0]).sum(),
        };
        let mean = loss.total(&pairs, &self.lengths, &winners, weights.as_ref());
        let gradients = gradients(model, &mean, backward, scored.recompute);
        let values = [mean.inner(), pairs.chosen.inner(), pairs.rejected.inner()];
        let tensors = values.into_iter().chain(reference).chain(tokens).collect();
        (Pending { tensors, sides: packed.sides.clone(), labels: Vec::new(), beta: loss.beta }, gradients)
    }

    /// WPO's weight of each pair, without gradient.
    fn pair_weights(&self, scored: &Scored) -> Tensor<1> {
        let packed = &self.own.packed;
        let (n, rows) = (packed.predictors.len(), packed.rows.len());
        let squares = scored.stats.clone().narrow(1, 3, 1).reshape([n]);
        let sums = sum_into(scored.tokens.clone() - squares, &Arc::new(packed.sums()), 2 * rows);
        let counts = packed.completion_tokens();
        let count = |side: usize| counts.iter().map(move |count| count[side].max(1) as f32);
        let counts = upload(count(0).chain(count(1)).collect(), [2 * rows], &scored.stats);
        let means = sums / counts;
        let weights = pair_weights(means.clone().narrow(0, 0, rows), means.narrow(0, rows, rows));
        alongside(weights, &scored.chosen)
    }

    fn rows(
        &self,
        model: &Decoder,
        loss: &LossSettings,
        reference: RefTensors,
        backward: Option<Backward>,
        scored: Scored,
        mismatched: Option<Tensor<1>>,
    ) -> (Pending, Vec<Option<Tensor<2>>>) {
        let labels = self.labels.iter().map(|&label| f32::from(u8::from(label))).collect();
        let labels = upload(labels, [self.labels.len()], &scored.stats);
        let rows = LabelledLogps {
            ref_logps: alongside(reference[0].clone(), &scored.chosen),
            labels: alongside(labels, &scored.chosen),
            logps: scored.chosen,
        };
        let kl = match mismatched {
            Some(logps) => kl_estimate(logps, reference[1].clone()),
            None => Tensor::zeros([1], &scored.stats.device()),
        };
        let mean = loss.unpaired(&rows, alongside(kl.clone(), &rows.logps));
        let gradients = gradients(model, &mean, backward, scored.recompute);
        let [of_reference, _] = reference;
        let tokens = [scored.tokens, flat(scored.stats)];
        let values = [mean.inner(), rows.logps.inner(), kl, of_reference];
        let tensors = values.into_iter().chain(tokens).collect();
        let (sides, labels) = (self.own.packed.sides.clone(), self.labels.clone());
        (Pending { tensors, sides, labels, beta: loss.beta }, gradients)
    }
}

/// Metrics of a micro-batch that are still on the device.
pub struct Pending {
    tensors: Vec<Tensor<1>>,
    sides: Vec<Side>,
    labels: Vec<bool>,
    beta: f64,
}

impl Pending {
    fn metrics(self, mut values: impl Iterator<Item = Vec<f32>>) -> Metrics {
        let mut next = || values.next().unwrap_or_default();
        let loss = next().first().map_or(f64::NAN, |&loss| f64::from(loss));
        if self.labels.is_empty() {
            let (chosen, rejected, ref_chosen, ref_rejected) = (next(), next(), next(), next());
            let reference = ref_chosen.into_iter().zip(ref_rejected).map(|(a, b)| [a, b]).collect();
            let tokens = TokenScores::new(next(), &next());
            let values = PairValues { loss, chosen, rejected, reference };
            return metrics::of_pairs(&values, &tokens, &self.sides, self.beta);
        }
        let (logps, kl, reference) = (next(), next(), next());
        let kl = kl.first().map_or(f64::NAN, |&kl| f64::from(kl));
        let tokens = TokenScores::new(next(), &next());
        let values = RowValues { loss, kl, logps, reference, labels: self.labels };
        metrics::of_rows(&values, &tokens, &self.sides, self.beta)
    }
}

/// Metrics of micro-batches and the values of `more`, `[1]` each, read from the device in one go.
pub fn read(pending: Vec<Pending>, more: Vec<Tensor<1>>) -> (Vec<Metrics>, Vec<f64>) {
    let tensors = pending.iter().flat_map(|one| one.tensors.iter().cloned()).chain(more);
    let all = tensors.fold(Transaction::default(), Transaction::register);
    let mut values = all.execute().into_iter().map(floats);
    let metrics = pending
        .into_iter()
        .map(|one| {
            let count = one.tensors.len();
            one.metrics(values.by_ref().take(count))
        })
        .collect();
    (metrics, values.map(|value| value.first().map_or(f64::NAN, |&v| f64::from(v))).collect())
}

/// Log-probabilities of rows on the host.
pub fn to_host(logps: RefTensors) -> Vec<RefLogps> {
    let [first, second] = logps.map(|tensor| floats(tensor.into_data()));
    first.into_iter().zip(second).map(|(a, b)| [a, b]).collect()
}

/// Log-probabilities of rows on the device of a model.
pub fn to_device(logps: &[RefLogps], model: &Decoder) -> RefTensors {
    let like = model.weights()[0].tensor.clone().inner();
    [0, 1].map(|i| upload(logps.iter().map(|row| row[i]).collect(), [logps.len()], &like))
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
    let _span = trace_span!("backward").entered();
    backward.map_or_else(Vec::new, |backward| model.gradients(mean.clone() * backward.scale, recompute))
}

/// A tensor without autodiff, as a constant of the graph that `like` is in, if it is in one.
fn alongside(tensor: Tensor<1>, like: &Tensor<1>) -> Tensor<1> {
    if like.device().is_autodiff() { Tensor::from_inner(tensor) } else { tensor }
}

fn flat(tensor: Tensor<2>) -> Tensor<1> {
    let [rows, cols] = tensor.dims();
    tensor.reshape([rows * cols])
}

fn floats(data: TensorData) -> Vec<f32> {
    data.try_into_vec_as::<f32>().expect("a float tensor converts to f32")
}
