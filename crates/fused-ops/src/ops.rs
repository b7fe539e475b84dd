//! The operations as a trait of backends.
//!
//! Every operation has a default composed of a backend's own ([`crate::generic`]); Flex and LibTorch replace what
//! they do better, and `Autodiff<B>` (in `graph`) adds the backward passes.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, backend_extension};
use burn::tensor::{FloatDType, Tensor, TensorData};

use crate::generic::{self, Value};
use crate::paged::{Span, gathered};
use crate::{Activation, Heads, Logits, Rotary, Scores, Segments};

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
    /// Rows of a table of weights.
    fn lookup(table: FloatTensor<Self>, rows: Arc<Vec<u32>>) -> FloatTensor<Self> {
        let ids = Self::upload_indices(table.clone(), rows.to_vec(), vec![rows.len()]);
        Self::float_select(table, 0, ids)
    }
    /// `base` with the sum of the values of each row, in their order, added to row `rows[i]` of it.
    fn rows_added(
        base: FloatTensor<Self>,
        rows: Arc<Vec<u32>>,
        values: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        generic::rows_added::<Self>(Value(base), &rows, Value(values)).0
    }
    /// The same tensor for one of its uses. Gradients of all uses with the same flag are added by [`FusedOps::added`].
    fn branch(x: FloatTensor<Self>, met: Arc<AtomicBool>) -> FloatTensor<Self> {
        let _ = met;
        x
    }
    /// `a + b`, of one data type.
    fn added(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_add(a, b)
    }
    /// `x + update` in the data type of `x`.
    fn joined(x: FloatTensor<Self>, update: FloatTensor<Self>) -> FloatTensor<Self> {
        generic::joined::<Self>(Value(x), Value(update)).0
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
        two(generic::new_cache::<Self>(&Value(like), slots, heads))
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
