//! What a model costs, counted from its shape: values that a backward pass keeps, and floating-point operations.

use fused_ops::Segment;

use crate::layout::{Qkv, Role};
use crate::lora::Lora;
use crate::{Batch, Config, Decoder, Mlp, Weight};

/// Values of one block for one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Kept for the backward pass in `f32`: inputs of norms, and attention's log-sum-exp.
    pub stream: usize,
    /// Kept in the data type of the products: queries, keys, values, attention's output, inner features.
    pub products: usize,
    /// Temporaries in the data type of the products.
    pub temporary: usize,
}

/// Features inside the feed-forward network that are kept.
fn inner(config: &Config) -> usize {
    match config.mlp {
        // Burn's own ReLU: its input is kept as well as what it returns.
        Mlp::Gated(_) | Mlp::Relu => 2 * config.intermediate,
        Mlp::Plain(_) => config.intermediate,
    }
}

/// What all adapters together keep for one token.
fn adapter_values(lora: &Lora) -> usize {
    let (mut inputs, mut outputs, mut between) = (0, 0, 0);
    for weight in lora.weights() {
        match *weight.shape.as_slice() {
            [rank, features] if weight.name.contains(".lora_A.") => {
                (inputs, between) = (inputs + features, between + rank);
            }
            [features, _] => outputs += features,
            _ => {}
        }
    }
    // Dropout keeps its mask and what it lets through; a magnitude keeps what it scales.
    let dropped = if lora.settings().dropout > 0.0 { 2 * inputs } else { 0 };
    between + dropped + if lora.settings().dora { outputs } else { 0 }
}

/// Pairs of a query and a key that it sees.
fn seen(segment: &Segment, window: Option<usize>) -> usize {
    let window = window.unwrap_or(usize::MAX);
    (0..segment.len).map(|i| (segment.prefix_len + i + 1).min(window)).sum()
}

impl Decoder {
    /// What training a block keeps. Norms, activations and casts are computed again and not kept.
    pub fn footprint(&self) -> Footprint {
        let config = self.config();
        let heads = config.heads;
        let (query, kv) = (heads.query * heads.dim, heads.kv * heads.dim);
        let block = &self.structure().blocks[0];
        let norms = [block.attention_norm, block.attention_post_norm, block.mlp_norm, block.mlp_post_norm];
        let of_heads = if block.qk_norm.is_some() { query + kv } else { 0 };
        // Views of the one product keep all of it.
        let fused = if matches!(block.qkv, Qkv::Fused(_)) { query + kv } else { 0 };
        let adapters = self.lora().map_or(0, adapter_values) / config.layers.len();
        Footprint {
            stream: norms.iter().flatten().count() * config.hidden + heads.query,
            products: of_heads + fused + 2 * (query + kv) + inner(config) + adapters,
            temporary: inner(config) + 3 * config.intermediate + 3 * config.hidden,
        }
    }

    /// Floating-point operations that a training step on this batch needs at least: each product of the forward pass,
    /// and for its backward pass those with the gradient of every operand that has one. What is computed again, and
    /// everything that is not a matrix product, is not counted.
    pub fn flops(&self, batch: &Batch, training: bool) -> u64 {
        let (tokens, scored) = (batch.tokens.len() as u64, batch.predictors.len() as u64);
        let config = self.config();
        let size = |weight: &Weight| weight.shape.iter().product::<usize>() as u64;
        let trained = self.lora().is_none();
        let passes = |trained: bool| 1 + u64::from(training) * (1 + u64::from(trained));
        let linear = self.weights().iter().filter(|weight| weight.role == Role::Linear);
        let blocks = 2 * tokens * passes(trained) * linear.map(size).sum::<u64>();
        // Both factors of an adapter are trained; they have two dimensions, magnitudes one.
        let factors =
            self.lora().into_iter().flat_map(Lora::weights).filter(|weight| weight.shape.len() == 2);
        let adapters = 2 * tokens * passes(true) * factors.map(size).sum::<u64>();
        let head = 2 * scored * passes(trained) * (config.vocab * config.hidden) as u64;
        let pairs = |window| batch.segments.segments().iter().map(|s| seen(s, window) as u64).sum::<u64>();
        let width = (config.heads.query * config.heads.dim) as u64;
        let attention = |layer| 4 * passes(true) * width * pairs(config.scores(layer).window);
        blocks + adapters + head + (0..config.layers.len()).map(attention).sum::<u64>()
    }
}
