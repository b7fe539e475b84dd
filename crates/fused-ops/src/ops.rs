//! The operations as a trait of backends, and the functions on tensors that dispatch to it.
//!
//! Every operation has a default composed of a backend's own ([`crate::generic`]); Flex and LibTorch replace what
//! they do better, and `Autodiff<B>` (in `graph`) adds the backward passes.

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData};
use tracing::trace_span;

use crate::generic::{self, Value};
use crate::paged::{Span, gathered};
use crate::{Activation, HeadOutput, Heads, Logits, Rotary, Scores, Segments};

/// Three tensors, such as gradients in the order of the operands.
pub(crate) type Three<B> = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);
/// Two tensors.
pub(crate) type Two<B> = (FloatTensor<B>, FloatTensor<B>);

pub(crate) fn two<B: Backend>((a, b): (Value<B>, Value<B>)) -> Two<B> {
    (a.0, b.0)
}

#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(any(feature = "wgpu", feature = "cubecl-cuda")),
    Autodiff
)]
pub(crate) trait FusedOps: Backend {
    /// Host values on the device of `like`, as `f32`.
    fn upload_floats(like: FloatTensor<Self>, values: Vec<f32>, shape: Vec<usize>) -> FloatTensor<Self> {
        Self::float_from_data(TensorData::new(values, shape), &like.device())
    }
    /// Indices on the device of `like`.
    fn upload_indices(like: FloatTensor<Self>, values: Vec<u32>, shape: Vec<usize>) -> IntTensor<Self> {
        let values: Vec<i32> = values.into_iter().map(|value| value as i32).collect();
        Self::int_from_data(TensorData::new(values, shape), &like.device())
    }
    /// A weight in the data type of `like`.
    fn weight_as(w: FloatTensor<Self>, like: FloatTensor<Self>) -> FloatTensor<Self> {
        Value::<Self>(w).cast(like.dtype()).0
    }
    /// Rounded to the nearest.
    fn fused_cast(x: FloatTensor<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        Self::float_cast(x, dtype)
    }
    fn fused_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        generic::linear::<Self>(Value(x), Value(w)).0
    }
    /// Zeros in place of `x · wᵀ`.
    fn linear_unused(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        Value::<Self>::zeros(&[x.shape()[0], w.shape()[0]], x.dtype(), &Value(x.clone())).0
    }
    /// Gradient of the input.
    fn linear_grad_input(grad: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        generic::linear_grad_input::<Self>(Value(grad), Value(w)).0
    }
    /// Gradient of the weight.
    fn linear_grad_weight(grad: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        generic::linear_grad_weight::<Self>(Value(grad), Value(x)).0
    }
    /// `base + x · wᵀ`.
    fn linear_onto(base: FloatTensor<Self>, x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_add(base, Self::fused_linear(x, w))
    }
    /// `base + grad · w`.
    fn grad_input_onto(
        base: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        w: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::float_add(base, Self::linear_grad_input(grad, w))
    }
    /// `scale · x`.
    fn scaled(x: FloatTensor<Self>, scale: f32) -> FloatTensor<Self> {
        Self::float_mul_scalar(x, scale.into())
    }
    /// Returns `x · wᵀ + inner · bᵀ` and `inner`, `scale · x · aᵀ`.
    fn fused_lora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let inner = Self::scaled(Self::fused_linear(x.clone(), a), scale);
        (Self::linear_onto(Self::fused_linear(x, w), inner.clone(), b), inner)
    }
    /// Zeros in place of the first of [`FusedOps::fused_lora`].
    fn lora_unused(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let _ = b;
        (Self::linear_unused(x.clone(), w), Self::scaled(Self::fused_linear(x, a), scale))
    }
    /// `hidden · wᵀ` of the head in `f32`, products of narrower types summed so where the backend can.
    fn head_products(hidden: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        Value::<Self>(hidden).matmul(Value(w).t()).wide().0
    }
    fn fused_rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        generic::rms_norm::<Self>(Value(x), Value(w), eps).0
    }
    fn rms_norm_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        two(generic::rms_norm_backward::<Self>(Value(grad), Value(x), Value(w), eps))
    }
    fn fused_layer_norm(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        generic::layer_norm::<Self>(Value(x), Value(w), Value(b), eps).0
    }
    fn layer_norm_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (dx, dw, db) = generic::layer_norm_backward::<Self>(Value(grad), Value(x), Value(w), eps);
        (dx.0, dw.0, db.0)
    }
    fn fused_rotary(x: FloatTensor<Self>, table: Rotary, sign: f32) -> FloatTensor<Self> {
        generic::rotary::<Self>(Value(x), &table, sign).0
    }
    fn fused_gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, kind: Activation) -> FloatTensor<Self> {
        generic::gated::<Self>(Value(gate), Value(up), kind).0
    }
    fn gated_backward(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        kind: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        two(generic::gated_backward::<Self>(Value(grad), Value(gate), Value(up), kind))
    }
    fn fused_activate(x: FloatTensor<Self>, kind: Activation) -> FloatTensor<Self> {
        generic::activate::<Self>(Value(x), kind).0
    }
    fn activate_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        kind: Activation,
    ) -> FloatTensor<Self> {
        generic::activate_backward::<Self>(Value(grad), Value(x), kind).0
    }
    /// Returns the output and the log-sum-exp of every query and head.
    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: Arc<Segments>,
        heads: Heads,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        two(generic::attention::<Self>(Value(q), Value(k), Value(v), &segments, heads, scores))
    }
    fn attention_backward(
        grad: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        segments: Arc<Segments>,
        heads: Heads,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let inputs = [q, k, v].map(Value);
        let (grad, out, lse) = (Value(grad), Value(out), Value(lse));
        let [dq, dk, dv] =
            generic::attention_backward::<Self>(grad, inputs, out, lse, &segments, heads, scores);
        (dq.0, dk.0, dv.0)
    }
    /// A weight as [`FusedOps::packed_linear`] takes it, in 16 bits where that is wanted and gains something.
    fn packed(w: FloatTensor<Self>, narrow: bool) -> FloatTensor<Self> {
        let _ = narrow;
        w
    }
    /// `x · wᵀ` for a packed weight of so many rows.
    fn packed_linear(x: FloatTensor<Self>, w: FloatTensor<Self>, rows: usize) -> FloatTensor<Self> {
        let _ = rows;
        Self::fused_linear(x, w)
    }
    /// Rows written over those of a cache, without a copy of it where nothing else holds it.
    fn write_rows(cache: FloatTensor<Self>, rows: FloatTensor<Self>, slots: Vec<u32>) -> FloatTensor<Self> {
        generic::write_rows::<Self>(Value(cache), Value(rows), &slots).0
    }
    /// Keys and values of nothing, for queries of the type of `like`.
    fn new_cache(
        like: FloatTensor<Self>,
        narrow: bool,
        slots: usize,
        heads: Heads,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let _ = narrow;
        let new =
            || Value::<Self>::zeros(&[slots, heads.kv * heads.dim], like.dtype(), &Value(like.clone())).0;
        (new(), new())
    }
    /// Returns the output, the keys and the values.
    fn paged_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        spans: Arc<Vec<Span>>,
        heads: Heads,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (writes, reads, segments) = gathered(&spans);
        let keys = Self::write_rows(keys, k, writes.clone());
        let values = Self::write_rows(values, v, writes);
        let [k, v] = [&keys, &values].map(|cache| {
            let cache = Value::<Self>(cache.clone());
            let slots = Value::indices(reads.clone(), &[reads.len()], &cache);
            Self::float_select(cache.0, 0, slots)
        });
        let (out, _) = Self::fused_attention(q, k, v, Arc::new(segments), heads, scores);
        (out, keys, values)
    }
    fn fused_sums(values: FloatTensor<Self>, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> FloatTensor<Self> {
        generic::sums::<Self>(Value(values), &plan, sums).0
    }
    fn sums_backward(
        grad: FloatTensor<Self>,
        plan: Arc<Vec<(u32, u32)>>,
        values: usize,
    ) -> FloatTensor<Self> {
        generic::sums_backward::<Self>(Value(grad), &plan, values).0
    }
    /// Returns the log-probabilities, the statistics and the log-sum-exp.
    fn fused_head(
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
        logits: Logits,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [logps, stats, lse] = generic::head::<Self>(Value(hidden), Value(w), &targets, logits);
        (logps.0, stats.0, lse.0)
    }
    /// Gradients of `hidden` and, if wanted, of `w`; otherwise the second is empty.
    fn head_backward(
        grad: FloatTensor<Self>,
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
        logits: Logits,
        of_weight: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let inputs = [grad, hidden, w, lse].map(Value);
        two(generic::head_backward::<Self>(inputs, &targets, logits, of_weight))
    }
}

#[cfg(any(feature = "wgpu", feature = "cubecl-cuda"))]
impl FusedOps for burn::backend::Cube {}

pub(crate) fn dispatch<const D: usize>(tensor: burn::backend::DispatchTensor) -> Tensor<D> {
    Tensor::from_dispatch(tensor)
}

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

/// Rows of a table, `[rows.len(), cols]`.
pub fn select(table: Tensor<2>, rows: &[u32]) -> Tensor<2> {
    let _span = trace_span!("Select").entered();
    let like = table.clone().into_dispatch();
    let ids = <Dispatch as FusedOps>::upload_indices(like, rows.to_vec(), vec![rows.len()]);
    table.select(0, Tensor::<1, Int>::from_dispatch(ids))
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
/// On Flex and on the CPU of LibTorch each sum is taken in the order of the plan and in `f64`, so that the log-probability of a sequence
/// does not depend on what it is batched with.
///
/// # Shapes
/// - `values`: `[n]`; returns `[sums]`.
pub fn sum_into(values: Tensor<1>, plan: &Arc<Vec<(u32, u32)>>, sums: usize) -> Tensor<1> {
    let _span = trace_span!("Sums").entered();
    dispatch(<Dispatch as FusedOps>::fused_sums(values.into_dispatch(), plan.clone(), sums))
}
