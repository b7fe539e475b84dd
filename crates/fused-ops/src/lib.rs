//! Fused tensor operations for training decoder language models, on Burn.
//!
//! Every function works on plain [`Tensor`]s of any backend; those of the graph have a hand-written backward pass. On
//! the CPU, whether tensors are Flex's (the pure-Rust backend) or LibTorch's, it runs a kernel of this crate (products
//! of 16 bits are left to LibTorch where it has faster units for them), on CUDA devices those of LibTorch, and anywhere
//! else the same algorithm composed of Burn operations. In the tests all are held against the plain formula,
//! differentiated by Burn.
//!
//! Activations are always two-dimensional, `[tokens, features]`: there is no batch dimension and no
//! padding. Which tokens may attend to which is given by [`Segments`].
//!
//! `unsafe` is allowed in this crate alone: kernels write disjoint parts of one buffer from several threads, and results into
//! memory that holds nothing yet, and LibTorch is called through its C++ interface.

#[allow(deprecated)]
mod cached;
#[cfg(any(feature = "flex", feature = "tch"))]
mod cpu;
#[cfg(feature = "flex")]
mod flex;
#[allow(deprecated)]
mod functions;
mod generic;
mod graph;
#[cfg(any(feature = "flex", feature = "tch"))]
mod host;
#[cfg(any(feature = "flex", feature = "tch"))]
mod kernels;
#[cfg(feature = "tch")]
pub mod libtorch;
#[allow(deprecated)]
mod ops;
mod optim;
mod paged;
mod segments;

pub use cached::{Cache, Packed, cached_attention};
pub use functions::{
    activate, add, attention, branches, cast, gated, head, join, layer_norm, linear, linear_unused, lookup,
    lora, lora_unused, narrow, rms_norm, rotary, select, sum_into, upload,
};
pub use optim::{AdamW, Moments, Parameter, clip_factor, norm, row_norms};
pub use paged::{PAGE, Span};
pub use segments::{Segment, Segments};

use std::sync::Arc;

use burn::tensor::Tensor;

/// Names this crate's arithmetic: it changes when results do, if only by rounding, so that stored values that are compared
/// with new ones are not those of another.
pub const ARITHMETIC: &str = "5";

/// Floating-point operations of this crate's own matrix products so far, in this process: 2 for each multiply-add.
#[cfg(any(feature = "flex", feature = "tch"))]
pub fn flops() -> u64 {
    kernels::matrix::flops()
}

/// This processor multiplies 16-bit floats: products in `BF16` are faster on the CPU than in `f32`.
#[cfg(any(feature = "flex", feature = "tch"))]
pub fn has_narrow_products() -> bool {
    kernels::brain::has_narrow_products()
}

/// Without Flex and LibTorch nothing of this crate's own is computed on the processor.
#[cfg(not(any(feature = "flex", feature = "tch")))]
pub fn has_narrow_products() -> bool {
    false
}

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
