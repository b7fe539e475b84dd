//! Fused tensor operations for training decoder language models, on Burn.
//!
//! Every function works on plain [`Tensor`]s of any backend. On Flex (the pure-Rust CPU backend) and
//! `f32` it runs a kernel of this crate with a hand-written backward pass; anywhere else it is the same
//! formula composed of Burn operations ([`plain`]), differentiated by Burn. The two are held against
//! each other in the tests.
//!
//! Activations are always two-dimensional, `[tokens, features]`: there is no batch dimension and no
//! padding. Which tokens may attend to which is given by [`Segments`].
//!
//! `unsafe` is allowed in this crate alone: the matrix products write disjoint blocks of one buffer
//! from several threads.

#[cfg(feature = "flex")]
mod flex;
mod kernels;
mod optim;
mod segments;

pub mod plain;

pub use optim::{AdamW, Moments, sum_of_squares};
pub use segments::{Segment, Segments};

use std::sync::Arc;

use burn::tensor::{DType, Tensor};

/// Attention head layout of a `[tokens, heads * dim]` activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Number of query heads.
    pub query: usize,
    /// Number of key/value heads; divides `query` (grouped-query attention).
    pub kv: usize,
    /// Features of one head.
    pub dim: usize,
}

/// Cosines and sines of the rotary embedding, one row of `half` values a token.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// `[tokens, half]` cosines, row-major.
    pub cos: Arc<[f32]>,
    /// `[tokens, half]` sines, row-major.
    pub sin: Arc<[f32]>,
    /// Half of the features that are rotated.
    pub half: usize,
    /// Features of a head; those beyond `2 · half` stay as they are.
    pub dim: usize,
}

/// How attention turns products of queries and keys into scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// Factor of the products.
    pub scale: f32,
    /// Scores become `cap · tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// A query sees this many positions at most, its own included.
    pub window: Option<usize>,
}

impl Scores {
    /// Scaled products of everything before a query.
    pub fn scaled(scale: f32) -> Self {
        Self { scale, softcap: None, window: None }
    }
}

/// How the head turns products into logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logits {
    /// Factor of the products.
    pub scale: f32,
    /// Logits become `cap · tanh(logit / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

impl Default for Logits {
    fn default() -> Self {
        Self { scale: 1.0, softcap: None }
    }
}

/// Activation of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x / 2 · (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`, the `gelu_pytorch_tanh` and `gelu_new` of transformers.
    GeluTanh,
}

/// What [`head`] returns for each of its `n` positions.
pub struct HeadOutput {
    /// Log-probability of the target, `[n]`, differentiable.
    pub logps: Tensor<1>,
    /// Entropy (nats), mean logit over the vocabulary, 1 where the target is the arg-max, and the log of
    /// the sum of the squared probabilities: `[n, 4]`, never differentiated.
    pub stats: Tensor<2>,
}

/// True when `tensor` is handled by this crate's own kernels.
fn fused<const D: usize>(tensor: &Tensor<D>) -> bool {
    #[cfg(feature = "flex")]
    {
        use burn::backend::DispatchDevice;
        let device = tensor.device().inner();
        matches!(device.as_dispatch(), DispatchDevice::Flex(_)) && tensor.dtype() == DType::F32
    }
    #[cfg(not(feature = "flex"))]
    {
        let _ = (tensor, DType::F32);
        false
    }
}

macro_rules! route {
    ($x:ident => $fused:expr, $plain:expr) => {{
        #[cfg(feature = "flex")]
        if fused(&$x) {
            return $fused;
        }
        $plain
    }};
}

/// `x · wᵀ` with the weight as checkpoints hold it. A weight that is not trained may have 16 bits (`BF16`).
///
/// # Shapes
/// - `x`: `[tokens, in]`, `w`: `[out, in]`; returns `[tokens, out]`.
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    route!(x => flex::linear(x, w), plain::linear(x, w))
}

/// Root-mean-square norm, `x / sqrt(mean(x²) + eps) * w`.
///
/// # Shapes
/// - `x`: `[tokens, n·dim]`, `w`: `[1, dim]`: each group of `dim` features is normalised by itself, so
///   that the same function serves the per-head query and key norms of Qwen3.
pub fn rms_norm(x: Tensor<2>, w: Tensor<2>, eps: f32) -> Tensor<2> {
    route!(x => flex::rms_norm(x, w, eps), plain::rms_norm(x, w, eps))
}

/// Layer norm, `(x - mean) / sqrt(var + eps) * w + b`.
///
/// # Shapes
/// - `x`: `[tokens, dim]`, `w` and `b`: `[1, dim]`.
pub fn layer_norm(x: Tensor<2>, w: Tensor<2>, b: Tensor<2>, eps: f32) -> Tensor<2> {
    route!(x => flex::layer_norm(x, w, b, eps), plain::layer_norm(x, w, b, eps))
}

/// Rotary position embedding in the half-split layout of Hugging Face checkpoints
/// (`transformers.models.llama.modeling_llama.apply_rotary_pos_emb`).
///
/// # Shapes
/// - `x`: `[tokens, heads · dim]`; `table` has one row a token.
pub fn rotary(x: Tensor<2>, table: &Rotary) -> Tensor<2> {
    route!(x => flex::rotary(x, table), plain::rotary(x, table))
}

/// `activation(gate) * up` of a gated MLP.
///
/// # Shapes
/// - `gate` and `up`: equal.
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    route!(gate => flex::gated(gate, up, activation), plain::gated(gate, up, activation))
}

/// An activation by itself; any shape.
pub fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    route!(x => flex::activate(x, activation), plain::activate(x, activation))
}

/// Scaled dot-product attention over [`Segments`], without ever storing a `[tokens, tokens]` matrix.
///
/// # Shapes
/// - `q`: `[queries, heads.query · dim]`; `k` and `v`: `[keys, heads.kv · dim]`; returns the shape of `q`.
///   Rows of `q` outside every segment are zero.
pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    segments: &Arc<Segments>,
    heads: Heads,
    scores: Scores,
) -> Tensor<2> {
    route!(q => flex::attention(q, k, v, segments, heads, scores), plain::attention(q, k, v, segments, heads, scores))
}

/// Language-model head: log-probability of one target a row, in chunks of rows, so that the
/// `[n, vocab]` logits are never held. The backward pass computes each chunk again.
///
/// # Shapes
/// - `hidden`: `[n, features]`, `w`: `[vocab, features]`, `targets`: `n` ids below `vocab`.
pub fn head(hidden: Tensor<2>, w: Tensor<2>, targets: &Arc<Vec<u32>>, logits: Logits) -> HeadOutput {
    assert_eq!(hidden.dims()[0], targets.len(), "one target for each row of `hidden`");
    route!(hidden => flex::head(hidden, w, targets, logits), plain::head(hidden, w, targets, logits))
}

/// Adds values into sums: `plan` lists `(value, sum)` index pairs, and a value may go to several sums.
/// Each sum is taken in the order of the plan and in `f64`, so that the log-probability of a sequence
/// does not depend on what it is batched with.
///
/// # Shapes
/// - `values`: `[n]`; returns `[sums]`.
pub fn sum_into(values: Tensor<1>, plan: &Arc<Vec<(u32, u32)>>, sums: usize) -> Tensor<1> {
    route!(values => flex::sum_into(values, plan, sums), plain::sum_into(values, plan, sums))
}
