//! The kernels as operations of the Flex backend.
//!
//! `FusedOps` is implemented by `Flex` (values) and by `Autodiff<B>` (graph); the macro generates the
//! dispatch from Burn's run-time tensors.

mod graph;
mod values;

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use crate::{Activation, HeadOutput, Heads, Logits, Rotary, Scores, Segments};

/// Three gradients, in the order of the operands.
type Three<B> = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);
/// Two tensors.
type Two<B> = (FloatTensor<B>, FloatTensor<B>);

#[backend_extension(Flex, Autodiff)]
pub(crate) trait FusedOps: Backend {
    fn fused_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self>;
    /// Gradient of the input.
    fn linear_grad_input(grad: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self>;
    /// Gradient of the weight.
    fn linear_grad_weight(grad: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
    fn rms_norm_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    fn fused_layer_norm(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self>;
    fn layer_norm_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    fn fused_rotary(x: FloatTensor<Self>, table: Rotary, sign: f32) -> FloatTensor<Self>;
    fn fused_gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, kind: Activation) -> FloatTensor<Self>;
    fn gated_backward(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        kind: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    fn fused_activate(x: FloatTensor<Self>, kind: Activation) -> FloatTensor<Self>;
    fn activate_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        kind: Activation,
    ) -> FloatTensor<Self>;
    /// Returns the output and the log-sum-exp of every query and head.
    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: Arc<Segments>,
        heads: Heads,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
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
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    fn fused_sums(values: FloatTensor<Self>, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> FloatTensor<Self>;
    fn sums_backward(grad: FloatTensor<Self>, plan: Arc<Vec<(u32, u32)>>, values: usize)
    -> FloatTensor<Self>;
    /// Returns the log-probabilities, the statistics and the log-sum-exp.
    fn fused_head(
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
        logits: Logits,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    /// Gradients of `hidden` and, if wanted, of `w`; otherwise the second is empty.
    fn head_backward(
        grad: FloatTensor<Self>,
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
        logits: Logits,
        of_weight: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_linear(x.into_dispatch(), w.into_dispatch()))
}

pub fn rms_norm(x: Tensor<2>, w: Tensor<2>, eps: f32) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_rms_norm(x.into_dispatch(), w.into_dispatch(), eps))
}

pub fn layer_norm(x: Tensor<2>, w: Tensor<2>, b: Tensor<2>, eps: f32) -> Tensor<2> {
    let (x, w, b) = (x.into_dispatch(), w.into_dispatch(), b.into_dispatch());
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_layer_norm(x, w, b, eps))
}

pub fn rotary(x: Tensor<2>, table: &Rotary) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_rotary(x.into_dispatch(), table.clone(), 1.0))
}

pub fn gated(gate: Tensor<2>, up: Tensor<2>, kind: Activation) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_gated(gate.into_dispatch(), up.into_dispatch(), kind))
}

pub fn activate(x: Tensor<2>, kind: Activation) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_activate(x.into_dispatch(), kind))
}

pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    segments: &Arc<Segments>,
    heads: Heads,
    scores: Scores,
) -> Tensor<2> {
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    let (out, _lse) = <Dispatch as FusedOps>::fused_attention(q, k, v, segments.clone(), heads, scores);
    Tensor::from_dispatch(out)
}

pub fn sum_into(values: Tensor<1>, plan: &Arc<Vec<(u32, u32)>>, sums: usize) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_sums(values.into_dispatch(), plan.clone(), sums))
}

pub fn head(hidden: Tensor<2>, w: Tensor<2>, targets: &Arc<Vec<u32>>, logits: Logits) -> HeadOutput {
    let (hidden, w) = (hidden.into_dispatch(), w.into_dispatch());
    let (logps, stats, _lse) = <Dispatch as FusedOps>::fused_head(hidden, w, targets.clone(), logits);
    HeadOutput { logps: Tensor::from_dispatch(logps), stats: Tensor::<2>::from_dispatch(stats).inner() }
}
