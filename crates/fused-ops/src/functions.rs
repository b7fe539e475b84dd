//! The operations as functions of tensors of any backend.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use burn::backend::Dispatch;
use burn::tensor::{DType, FloatDType, Int, Tensor};
use tracing::trace_span;

use crate::ops::{FusedOps, dispatch};
use crate::{Activation, HeadOutput, Heads, Logits, Rotary, Scores, Segments};

/// Host values on the device of `like`, with its autodiff; on a CUDA device nothing waits for the copy.
pub fn upload<const D: usize>(values: Vec<f32>, shape: [usize; D], like: &Tensor<2>) -> Tensor<D> {
    let like = like.clone().into_dispatch();
    dispatch(<Dispatch as FusedOps>::upload_floats(like, values, shape.to_vec()))
}

/// A weight of 16 bits with the values that products of 16 bits take of it: rounded the same way.
pub fn narrow(weight: Tensor<2>) -> Tensor<2> {
    let like = Tensor::<2>::zeros([1, 1], (&weight.device(), DType::BF16));
    dispatch(<Dispatch as FusedOps>::weight_as(weight.into_dispatch(), like.into_dispatch()))
}

/// An activation in another data type. A narrower one is not kept for a backward pass but computed again.
pub fn cast(x: Tensor<2>, dtype: FloatDType) -> Tensor<2> {
    let _span = trace_span!("Cast").entered();
    dispatch(<Dispatch as FusedOps>::fused_cast(x.into_dispatch(), dtype))
}

/// A tensor for each of several operations that take it. Where it is not a leaf, their gradients are added in place and on
/// all cores on the CPU.
pub fn branches<const N: usize>(x: Tensor<2>) -> [Tensor<2>; N] {
    let (x, met) = (x.into_dispatch(), Arc::new(AtomicBool::new(false)));
    [(); N].map(|()| dispatch(<Dispatch as FusedOps>::branch(x.clone(), met.clone())))
}

/// `x + update` in the data type of `x`, which may be wider.
///
/// # Shapes
/// Equal.
pub fn join(x: Tensor<2>, update: Tensor<2>) -> Tensor<2> {
    let _span = trace_span!("Join").entered();
    assert_eq!(x.dims(), update.dims(), "a residual and its update have one shape");
    dispatch(<Dispatch as FusedOps>::joined(x.into_dispatch(), update.into_dispatch()))
}

/// Rows of an activation, `[rows.len(), cols]`.
pub fn select(x: Tensor<2>, rows: &[u32]) -> Tensor<2> {
    let _span = trace_span!("Select").entered();
    let like = x.clone().into_dispatch();
    let ids = <Dispatch as FusedOps>::upload_indices(like, rows.to_vec(), vec![rows.len()]);
    x.select(0, Tensor::<1, Int>::from_dispatch(ids))
}

/// Rows of a table of weights, `[rows.len(), cols]`. Their gradients are added to those that the table has, on the CPU in
/// place.
pub fn lookup(table: Tensor<2>, rows: &[u32]) -> Tensor<2> {
    let _span = trace_span!("Lookup").entered();
    dispatch(<Dispatch as FusedOps>::lookup(table.into_dispatch(), Arc::new(rows.to_vec())))
}

/// `a + b` of gradients, without autodiff and of one data type; on the CPU on all cores, and in place where nothing else
/// holds `a`.
pub fn add(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()), "both have one shape and data type");
    assert!(!a.device().is_autodiff() && !b.device().is_autodiff(), "gradients have no graph");
    dispatch(<Dispatch as FusedOps>::added(a.into_dispatch(), b.into_dispatch()))
}

/// `x · wᵀ` with the weight as checkpoints hold it, in the data type of `x`. A weight that is not trained may have
/// 16 bits (`BF16`).
///
/// # Shapes
/// - `x`: `[tokens, in]`, `w`: `[out, in]`; returns `[tokens, out]`.
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    let _span = trace_span!("Linear").entered();
    dispatch(<Dispatch as FusedOps>::fused_linear(x.into_dispatch(), w.into_dispatch()))
}

/// [`linear`] in the graph, its value zeros: for what is computed again for its gradients alone.
///
/// # Shapes
/// As for [`linear`].
pub fn linear_unused(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    dispatch(<Dispatch as FusedOps>::linear_unused(x.into_dispatch(), w.into_dispatch()))
}

/// A linear layer with a low-rank update, `x · wᵀ + scale · (x · aᵀ) · bᵀ`, whose own weight is not trained (LoRA, arXiv
/// 2106.09685, equation 3).
///
/// # Shapes
/// - `x`: `[tokens, in]`, `w`: `[out, in]`, `a`: `[rank, in]`, `b`: `[out, rank]`; returns `[tokens, out]`.
pub fn lora(x: Tensor<2>, w: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f32) -> Tensor<2> {
    let _span = trace_span!("Lora").entered();
    let [x, w, a, b] = [x, w, a, b].map(Tensor::into_dispatch);
    let (out, _inner) = <Dispatch as FusedOps>::fused_lora(x, w, a, b, scale);
    dispatch(out)
}

/// [`lora`] in the graph, its value zeros: for what is computed again for its gradients alone.
///
/// # Shapes
/// As for [`lora`].
pub fn lora_unused(x: Tensor<2>, w: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f32) -> Tensor<2> {
    let _span = trace_span!("Lora").entered();
    let [x, w, a, b] = [x, w, a, b].map(Tensor::into_dispatch);
    let (out, _inner) = <Dispatch as FusedOps>::lora_unused(x, w, a, b, scale);
    dispatch(out)
}

/// Root-mean-square norm, `x / sqrt(mean(x²) + eps) * w`.
///
/// # Shapes
/// - `x`: `[tokens, n·dim]`, `w`: `[1, dim]`: each group of `dim` features is normalised by itself, so
///   that the same function serves the per-head query and key norms of Qwen3.
pub fn rms_norm(x: Tensor<2>, w: Tensor<2>, eps: f32) -> Tensor<2> {
    let _span = trace_span!("RmsNorm").entered();
    dispatch(<Dispatch as FusedOps>::fused_rms_norm(x.into_dispatch(), w.into_dispatch(), eps))
}

/// Layer norm, `(x - mean) / sqrt(var + eps) * w + b`.
///
/// # Shapes
/// - `x`: `[tokens, dim]`, `w` and `b`: `[1, dim]`.
pub fn layer_norm(x: Tensor<2>, w: Tensor<2>, b: Tensor<2>, eps: f32) -> Tensor<2> {
    let _span = trace_span!("LayerNorm").entered();
    let (x, w, b) = (x.into_dispatch(), w.into_dispatch(), b.into_dispatch());
    dispatch(<Dispatch as FusedOps>::fused_layer_norm(x, w, b, eps))
}

/// Rotary position embedding in the half-split layout of Hugging Face checkpoints
/// (`transformers.models.llama.modeling_llama.apply_rotary_pos_emb`).
///
/// # Shapes
/// - `x`: `[tokens, heads · dim]`; `table` has one row a token.
pub fn rotary(x: Tensor<2>, table: &Rotary) -> Tensor<2> {
    let _span = trace_span!("Rotate").entered();
    dispatch(<Dispatch as FusedOps>::fused_rotary(x.into_dispatch(), table.clone(), 1.0))
}

/// `activation(gate) * up` of a gated MLP.
///
/// # Shapes
/// - `gate` and `up`: equal.
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    let _span = trace_span!("Gated").entered();
    dispatch(<Dispatch as FusedOps>::fused_gated(gate.into_dispatch(), up.into_dispatch(), activation))
}

/// An activation by itself; any shape.
pub fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    let _span = trace_span!("Activate").entered();
    dispatch(<Dispatch as FusedOps>::fused_activate(x.into_dispatch(), activation))
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
    let _span = trace_span!("Attention").entered();
    let (queries, keys) = segments.extent();
    assert!(queries <= q.dims()[0] && keys <= k.dims()[0], "segments reach beyond the tensors");
    assert!(segments.is_disjoint(), "segments overlap");
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    let (out, _lse) = <Dispatch as FusedOps>::fused_attention(q, k, v, segments.clone(), heads, scores);
    dispatch(out)
}

/// Language-model head: log-probability of one target a row, in parts of the rows or of the vocabulary, so that the
/// `[n, vocab]` logits are never held. The backward pass computes each part again.
///
/// # Shapes
/// - `hidden`: `[n, features]`, `w`: `[vocab, features]`, `targets`: `n` ids below `vocab`.
pub fn head(hidden: Tensor<2>, w: Tensor<2>, targets: &Arc<Vec<u32>>, logits: Logits) -> HeadOutput {
    let _span = trace_span!("Head").entered();
    let (n, vocab) = (hidden.dims()[0], w.dims()[0]);
    assert_eq!(n, targets.len(), "one target for each row of `hidden`");
    assert!(targets.iter().all(|&id| (id as usize) < vocab), "a target id is beyond the vocabulary");
    let (hidden, w) = (hidden.into_dispatch(), w.into_dispatch());
    let (logps, stats, _lse) = <Dispatch as FusedOps>::fused_head(hidden, w, targets.clone(), logits);
    HeadOutput { logps: dispatch(logps), stats: dispatch::<2>(stats).inner() }
}

/// Adds values into sums: `plan` lists `(value, sum)` index pairs, and a value may go to several sums.
/// On the CPU each sum is taken in the order of the plan and in `f64`, so that the log-probability of a sequence
/// does not depend on what it is batched with.
///
/// # Shapes
/// - `values`: `[n]`; returns `[sums]`.
pub fn sum_into(values: Tensor<1>, plan: &Arc<Vec<(u32, u32)>>, sums: usize) -> Tensor<1> {
    let _span = trace_span!("Sums").entered();
    dispatch(<Dispatch as FusedOps>::fused_sums(values.into_dispatch(), plan.clone(), sums))
}
