//! Scoring that keeps only the inputs of the first blocks and computes such a block again when its gradient is needed
//! (Chen et al., arXiv 1604.06174): a chain of tapes, one for the other blocks and the head, one for each of the first
//! blocks, one for the embedding.

use std::sync::Arc;

use burn::tensor::{Gradients, Tensor};
use fused_ops::{HeadOutput, Rotary, Segments, attention, linear, linear_unused};

use crate::{Batch, Decoder};

/// What is done with what a block returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Uses {
    /// It is read.
    Value,
    /// It is computed again for its gradients alone, which do not need the value of its last product.
    Gradient,
}

impl Uses {
    /// A product in the graph, with its value where that is read.
    pub fn linear(self, x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Value => linear(x, weight),
            Self::Gradient => linear_unused(x, weight),
        }
    }
}

/// What the backward pass needs.
pub struct Recompute {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    segments: Arc<Segments>,
    tables: Vec<Rotary>,
    /// Input of each block that is computed again, without autodiff.
    inputs: Vec<Tensor<2>>,
    /// What the last of them returned: the leaf of the head's tape.
    last: Tensor<2>,
}

impl Decoder {
    /// [`Decoder::score`] of a tracked model with less memory: of the first `blocks` blocks only the inputs are kept. The
    /// same values and, from [`Decoder::gradients`], the same gradients to the bit.
    pub fn score_recomputing(&self, batch: &Batch, blocks: usize) -> (HeadOutput, Recompute) {
        let model = self.untracked();
        let tables = model.tables(&batch.positions, None);
        let mut x = model.embed(&batch.tokens, &batch.positions);
        let layers = self.config().layers.len();
        let blocks = blocks.min(layers);
        let mut inputs = Vec::with_capacity(blocks);
        for layer in 0..blocks {
            inputs.push(x.clone());
            x = model.seen(layer, x, &tables, &batch.segments, Uses::Value);
        }
        let last = x.autodiff().require_grad();
        let kept = |x, layer| self.seen(layer, x, &tables, &batch.segments, Uses::Value);
        let out = self.finish((blocks..layers).fold(last.clone(), kept), batch);
        let (tokens, positions) = (batch.tokens.clone(), batch.positions.clone());
        (out, Recompute { tokens, positions, segments: batch.segments.clone(), tables, inputs, last })
    }

    fn seen(
        &self,
        layer: usize,
        x: Tensor<2>,
        tables: &[Rotary],
        segments: &Arc<Segments>,
        uses: Uses,
    ) -> Tensor<2> {
        self.block(layer, x, tables, uses, |q, k, v| {
            attention(q, k, v, segments, self.config().heads, self.config().scores(layer))
        })
    }

    /// Gradients of the trained weights, of a loss on [`Decoder::score`]. With `recompute`, of one on
    /// [`Decoder::score_recomputing`].
    pub fn gradients(&self, loss: Tensor<1>, recompute: Option<Recompute>) -> Vec<Option<Tensor<2>>> {
        let mut gradients = loss.backward();
        let mut totals: Vec<Option<Tensor<2>>> = vec![None; self.trained().len()];
        self.collect(&mut totals, &mut gradients);
        let Some(mut kept) = recompute else { return totals };
        let Some(mut gradient) = kept.last.grad_remove(&mut gradients) else { return totals };
        while let Some(input) = kept.inputs.pop() {
            let layer = kept.inputs.len();
            let x = input.autodiff().require_grad();
            let out = self.seen(layer, x.clone(), &kept.tables, &kept.segments, Uses::Gradient);
            let mut gradients = pull(out, gradient);
            self.collect(&mut totals, &mut gradients);
            let Some(next) = x.grad_remove(&mut gradients) else { return totals };
            gradient = next;
        }
        // An adapter has nothing before the first block.
        if self.lora().is_none() {
            let mut gradients = pull(self.embed(&kept.tokens, &kept.positions), gradient);
            self.collect(&mut totals, &mut gradients);
        }
        totals
    }

    /// Adds what a tape found; a tied embedding is in two of them.
    fn collect(&self, totals: &mut [Option<Tensor<2>>], gradients: &mut Gradients) {
        for (total, weight) in totals.iter_mut().zip(self.trained()) {
            add_gradient(total, weight.tensor.grad_remove(gradients));
        }
    }
}

/// Adds a gradient to a sum; either may be missing.
pub fn add_gradient(total: &mut Option<Tensor<2>>, gradient: Option<Tensor<2>>) {
    *total = match (total.take(), gradient) {
        (Some(total), Some(gradient)) => Some(fused_ops::add(total, gradient)),
        (total, gradient) => total.or(gradient),
    };
}

/// Gradients of a tape whose output has this gradient.
fn pull(out: Tensor<2>, gradient: Tensor<2>) -> Gradients {
    (out * Tensor::from_inner(gradient)).sum().backward()
}
