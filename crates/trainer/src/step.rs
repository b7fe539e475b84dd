//! One micro-batch: packed rows in, loss, metrics and gradients out.

use std::ops::Range;
use std::sync::Arc;

use apo_loss::{LabelledLogps, PairLogps, kl_estimate, pair_weights};
use burn::tensor::Tensor;
use decoder::{Decoder, Recompute, add_gradient};
use fused_ops::{sum_into, upload};
use pref_data::{Dataset, Packed, PairTokens, Side, kl_rows};
use tracing::trace_span;

use crate::loss::{LossSettings, Winners};
use crate::packing::{Packing, Scored, Scoring, divide};
use crate::pending::{Pending, floats};

/// Reference log-probabilities of a row: of its two completions, or of its one completion and of the
/// mismatched one.
pub type RefLogps = [f32; 2];

/// The same of the rows of a micro-batch on the device, `[rows]` each.
pub type RefTensors = [Tensor<1>; 2];

/// How gradients are computed.
#[derive(Clone, Copy)]
pub struct Backward<'a> {
    /// Factor of the loss.
    pub scale: f64,
    /// Says how many blocks are computed again, instead of kept, for so many tokens.
    pub again: &'a dyn Fn(usize) -> usize,
}

/// Rows that are computed together.
struct Part {
    rows: Range<usize>,
    packing: Packing,
}

/// A micro-batch ready for the model.
pub struct Micro {
    parts: Vec<Part>,
    /// Mismatched completions, in parts of their own; none without KTO.
    mismatched: Vec<Packing>,
    /// Tokens of both completions of each pair.
    lengths: Vec<[usize; 2]>,
    /// Labels of single completions; empty for pairs.
    labels: Vec<bool>,
}

/// Losses of one part with its log-probabilities, `[rows]` each.
type Losses = (Tensor<1>, Vec<Tensor<1>>);

impl Micro {
    /// Packs rows of a data set in the given order.
    pub fn new(data: &Dataset, rows: &[u32], scoring: Scoring) -> Self {
        let prepared: Vec<_> = rows.iter().map(|&row| data.row(row as usize)).collect();
        let completions =
            |pair: &PairTokens| [pair.chosen.len() - pair.context[0], pair.rejected.len() - pair.context[1]];
        let lengths = prepared.iter().map(|row| completions(&row.tokens)).collect();
        let unpaired = data.is_unpaired();
        let packed = |of: Range<usize>| {
            let tokens = prepared[of].iter().map(|row| &row.tokens);
            if unpaired { Packed::unpaired(tokens) } else { Packed::new(tokens) }
        };
        let sizes = rows.iter().map(|&row| data.lengths(row as usize).packed());
        let part =
            |rows: Range<usize>| Part { packing: Packing::new(packed(rows.clone()), scoring.ld_alpha), rows };
        let parts = divide(sizes, scoring.part).into_iter().map(part).collect();
        let mismatched = scoring.mismatched.map_or_else(Vec::new, |batch| {
            let sequences: Vec<_> = rows.iter().map(|&row| mismatched(data, row as usize, batch)).collect();
            let sizes = sequences.iter().map(|row| row.prompt.len() + row.chosen.len());
            let packed = |rows: Range<usize>| Packing::new(Packed::unpaired(&sequences[rows]), None);
            divide(sizes, scoring.part).into_iter().map(packed).collect()
        });
        let labels = if unpaired { prepared.iter().map(|row| row.label).collect() } else { Vec::new() };
        Self { parts, mismatched, lengths, labels }
    }

    fn packings(&self) -> impl Iterator<Item = &Packing> {
        self.parts.iter().map(|part| &part.packing)
    }

    /// Tokens the model computes, shared ones once.
    pub fn computed_tokens(&self) -> usize {
        self.packings().chain(&self.mismatched).map(|packing| packing.packed.tokens.len()).sum()
    }

    /// Floating-point operations of its training step, at least; see [`Decoder::flops`].
    pub fn flops(&self, model: &Decoder) -> u64 {
        let mismatched =
            self.mismatched.iter().map(|packing| model.flops(&packing.batch, false)).sum::<u64>();
        mismatched + self.packings().map(|packing| model.flops(&packing.batch, true)).sum::<u64>()
    }

    /// Tokens of all sequences, as TRL counts them.
    pub fn num_tokens(&self) -> usize {
        self.packings().map(|packing| packing.packed.num_tokens).sum()
    }

    /// Log-probabilities of each row under a model without autodiff.
    pub fn logps(&self, model: &Decoder) -> RefTensors {
        let (chosen, rejected): (Vec<_>, Vec<_>) = self
            .packings()
            .map(|packing| packing.score(model))
            .map(|scored| (scored.chosen, scored.rejected))
            .unzip();
        [joined(chosen), self.mismatched_logps(model).unwrap_or_else(|| joined(rejected))]
    }

    fn mismatched_logps(&self, model: &Decoder) -> Option<Tensor<1>> {
        let chosen: Vec<_> = self.mismatched.iter().map(|packing| packing.score(model).chosen).collect();
        (!chosen.is_empty()).then(|| joined(chosen))
    }

    /// Loss and metrics; with a tracked model also the gradients, one a trained weight. Nothing is read back from
    /// the device.
    pub fn run(
        &self,
        model: &Decoder,
        loss: &LossSettings,
        reference: RefTensors,
        backward: Option<Backward<'_>>,
    ) -> (Pending, Vec<Option<Tensor<2>>>) {
        // Without gradient and before the graph of the other rows exists.
        let kl = match self.mismatched_logps(&model.frozen()) {
            Some(logps) => kl_estimate(logps, reference[1].clone()),
            None => Tensor::zeros([1], &reference[0].device()),
        };
        let mut totals: Vec<Option<Tensor<2>>> = Vec::new();
        let mut values: Vec<Vec<Tensor<1>>> = Vec::new();
        for (i, part) in self.parts.iter().enumerate() {
            let model = model.for_part(i);
            let (of_part, gradients) =
                self.part(part, &model, loss, [&reference[0], &reference[1], &kl], backward);
            values.resize_with(of_part.len(), Vec::new);
            values.iter_mut().zip(of_part).for_each(|(all, new)| all.push(new));
            totals.resize_with(gradients.len(), || None);
            totals.iter_mut().zip(gradients).for_each(|(total, new)| add_gradient(total, new));
        }
        let mut values = values.into_iter();
        let loss_value = values.next().into_iter().flatten().reduce(|a, b| a + b);
        let constants = if self.labels.is_empty() { reference } else { [reference[0].clone(), kl] };
        let tensors = loss_value.into_iter().chain(values.map(joined)).chain(constants).collect();
        let pending = Pending { tensors, sides: self.sides(), labels: self.labels.clone(), beta: loss.beta };
        (pending, totals)
    }

    /// One part: its share of the loss, values of each token, log-probabilities of each row; and gradients. `constants`
    /// are the reference's log-probabilities of all rows and the divergence.
    fn part(
        &self,
        part: &Part,
        model: &Decoder,
        loss: &LossSettings,
        constants: [&Tensor<1>; 3],
        backward: Option<Backward<'_>>,
    ) -> (Vec<Tensor<1>>, Vec<Option<Tensor<2>>>) {
        let packing = &part.packing;
        let again = backward.map_or(0, |backward| (backward.again)(packing.packed.tokens.len()));
        let mut scored =
            if again > 0 { packing.score_recomputing(model, again) } else { packing.score(model) };
        let recompute = scored.recompute.take();
        let values = [scored.tokens.clone(), flat(scored.stats.clone())];
        let constant = |i: usize| {
            let of_rows = constants[i].clone().narrow(0, part.rows.start, part.rows.len());
            alongside(of_rows, &scored.chosen)
        };
        let (mean, logps) = if self.labels.is_empty() {
            self.pairs(part, loss, [constant(0), constant(1)], scored)
        } else {
            let kl = alongside(constants[2].clone(), &scored.chosen);
            self.rows(part, loss, constant(0), kl, scored)
        };
        let mean = if self.parts.len() > 1 { mean * self.share(part) } else { mean };
        let gradients = gradients(model, &mean, backward, recompute);
        (std::iter::once(mean.inner()).chain(values).chain(logps).collect(), gradients)
    }

    /// Share of the rows.
    fn share(&self, part: &Part) -> f64 {
        part.rows.len() as f64 / self.lengths.len() as f64
    }

    fn pairs(&self, part: &Part, loss: &LossSettings, reference: RefTensors, scored: Scored) -> Losses {
        let weights = loss.use_weighting.then(|| pair_weights_of(&part.packing.packed, &scored));
        let [ref_chosen, ref_rejected] = reference;
        let pairs = PairLogps { chosen: scored.chosen, rejected: scored.rejected, ref_chosen, ref_rejected };
        let tokens: usize = self.packings().map(Packing::chosen_tokens).sum();
        let tokens_per_pair = tokens.max(1) as f64 / self.lengths.len() as f64;
        let winners = Winners { logps: scored.whole_chosen, tokens_per_pair };
        let mean = loss.total(&pairs, &self.lengths[part.rows.clone()], &winners, weights.as_ref());
        (mean, vec![pairs.chosen.inner(), pairs.rejected.inner()])
    }

    fn rows(
        &self,
        part: &Part,
        loss: &LossSettings,
        ref_logps: Tensor<1>,
        kl: Tensor<1>,
        scored: Scored,
    ) -> Losses {
        let labels = &self.labels[part.rows.clone()];
        let values = labels.iter().map(|&label| f32::from(u8::from(label))).collect();
        let labels = alongside(upload(values, [labels.len()], &scored.stats), &scored.chosen);
        let rows = LabelledLogps { ref_logps, labels, logps: scored.chosen };
        (loss.unpaired(&rows, kl), vec![rows.logps.inner()])
    }

    /// Whose the scored tokens are.
    fn sides(&self) -> Vec<Side> {
        let sides = |part: &Part| {
            let of_row = |side: &Side| Side { pair: part.rows.start as u32 + side.pair, ..*side };
            part.packing.packed.sides.iter().map(of_row).collect::<Vec<_>>()
        };
        self.parts.iter().flat_map(sides).collect()
    }
}

/// WPO's weight of each pair, without gradient.
fn pair_weights_of(packed: &Packed, scored: &Scored) -> Tensor<1> {
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
    backward: Option<Backward<'_>>,
    recompute: Option<Recompute>,
) -> Vec<Option<Tensor<2>>> {
    let _span = trace_span!("backward").entered();
    backward.map_or_else(Vec::new, |backward| model.gradients(mean.clone() * backward.scale, recompute))
}

/// A tensor without autodiff, as a constant of the graph that `like` is in, if it is in one.
fn alongside(tensor: Tensor<1>, like: &Tensor<1>) -> Tensor<1> {
    if like.device().is_autodiff() { Tensor::from_inner(tensor) } else { tensor }
}

/// Parts one after the other.
fn joined(mut parts: Vec<Tensor<1>>) -> Tensor<1> {
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 0) }
}

fn flat(tensor: Tensor<2>) -> Tensor<1> {
    let [rows, cols] = tensor.dims();
    tensor.reshape([rows * cols])
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use decoder::{Lora, LoraSettings, Targets};

    use super::*;
    use crate::loss_args::LossArgs;
    use crate::metrics::Metrics;
    use crate::pending::read;
    use crate::reference;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        loss: LossArgs,
    }

    /// Metrics and gradients of the first rows of a data set, computed in parts of at most so many tokens.
    fn run(data: &Dataset, model: &Decoder, flags: &str, part: usize) -> (Metrics, Vec<Vec<f32>>, usize) {
        run_rows(data, &[0, 1, 2, 3, 4, 5, 6, 7], model, flags, part)
    }

    fn run_rows(
        data: &Dataset,
        rows: &[u32],
        model: &Decoder,
        flags: &str,
        part: usize,
    ) -> (Metrics, Vec<Vec<f32>>, usize) {
        let line = format!("x {flags}");
        let loss = Line::parse_from(line.split_whitespace()).loss.settings().unwrap();
        let mismatched = loss.needs_mismatched().then_some(8);
        let scoring = Scoring { ld_alpha: loss.ld_alpha, mismatched, part };
        let micro = Micro::new(data, rows, scoring);
        assert!(mismatched.is_none() || (part < usize::MAX) == (micro.mismatched.len() > 1));
        let reference = micro.logps(&model.frozen()).map(|logps| logps.sub_scalar(1.5));
        let backward = Backward { scale: 0.5, again: &|tokens| usize::from(tokens > 250) };
        let (pending, gradients) = micro.run(model, &loss, reference, Some(backward));
        let gradients = gradients.into_iter().map(|g| floats(g.expect("a gradient").into_data()));
        let gradients = gradients.collect();
        (read(vec![pending], Vec::new()).0.remove(0), gradients, micro.parts.len())
    }

    fn with_adapter(model: &Decoder, dora: bool, dropout: f64) -> Decoder {
        let settings = LoraSettings { rank: 4, alpha: 8.0, rank_stabilized: false, dora, dropout };
        let lora = Lora::new(model, settings, &Targets::AllLinear, 1).unwrap();
        let mut model = model.clone().with_lora(Some(lora)).tracked();
        model.set_dropout(3);
        model
    }

    #[test]
    fn parts_have_the_losses_metrics_and_gradients_of_the_whole() {
        let (dir, model_dir) =
            (tempfile::tempdir().unwrap(), reference::tests::fixtures().join("models/tiny-qwen2"));
        let [pairs, rows] = [false, true]
            .map(|unpaired| reference::tests::rows("clair_mini/train.jsonl", unpaired, dir.path()));
        let opened = backend::under_test();
        let tolerance = 1e-5 * opened.backend.tolerance().training;
        let base = Decoder::load(&model_dir, &opened.device).unwrap();
        let [all, lora, dora] =
            [base.clone().tracked(), with_adapter(&base, false, 0.0), with_adapter(&base, true, 0.0)];
        for (model, data, flags) in [
            (&all, &pairs, "--loss-type apo_zero"),
            (&lora, &pairs, "--loss-type apo_zero"),
            (&dora, &pairs, "--loss-type apo_zero"),
            (&all, &pairs, "--loss-type apo_down sft --loss-weights 1 0.3"),
            (&all, &pairs, "--loss-type sigmoid --ld-alpha 0.5 --use-weighting"),
            (&all, &pairs, "--loss-type sigmoid_norm"),
            (&lora, &rows, "--loss-type kto"),
            (&lora, &rows, "--loss-type apo_zero_unpaired"),
        ] {
            let (whole, of_whole, one) = run(data, model, flags, usize::MAX);
            let (parts, of_parts, many) = run(data, model, flags, 400);
            assert!(one == 1 && (2..8).contains(&many), "{many} parts");
            assert_eq!(whole.len(), parts.len());
            for ((name, a), (of, b)) in whole.iter().zip(&parts) {
                assert!(
                    name == of && (a - b).abs() < tolerance * a.abs().max(1.0),
                    "{flags}: {name} is {b}, not {a}"
                );
            }
            assert_eq!(of_whole.len(), model.trained().len());
            for (a, b) in of_whole.iter().zip(&of_parts) {
                let top = a.iter().fold(1e-3_f32, |top, x| top.max(x.abs()));
                let apart = a.iter().zip(b).fold(0.0_f32, |apart, (a, b)| apart.max((a - b).abs()));
                assert!(
                    a.len() == b.len() && f64::from(apart / top) <= tolerance,
                    "{flags}: {apart} of {top}"
                );
            }
        }
        // Each part drops other elements, in every run the same.
        let dropping = with_adapter(&base, false, 0.3);
        let run = |part| run(&pairs, &dropping, "--loss-type apo_zero", part);
        assert_eq!(run(400).1, run(400).1);
        // Two parts that drop the same would be one.
        let twice = |part| run_rows(&pairs, &[0, 0], &dropping, "--loss-type apo_zero", part);
        let [one, two] = [1, usize::MAX].map(|part| twice(part).1);
        let alone = run_rows(&pairs, &[0], &dropping, "--loss-type apo_zero", 1).1;
        let apart = |a: &[Vec<f32>]| {
            a.iter().flatten().zip(alone.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let top = alone.iter().flatten().fold(0.0_f32, |top, x| top.max(x.abs()));
        assert!(
            apart(&one) > 1e-3 * top && apart(&two) > 1e-3 * top,
            "{} {} of {top}",
            apart(&one),
            apart(&two)
        );
    }
}
