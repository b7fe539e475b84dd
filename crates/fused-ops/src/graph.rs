//! Graph: the backward passes as autodiff nodes.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};
use burn::tensor::{DType, FloatDType};

use crate::ops::{FusedOps, Three, Two};
use crate::{Activation, Heads, Logits, Rotary, Scores, Segments};

/// Declares an autodiff node type: its saved state and the gradients of its parents.
macro_rules! node {
    ($name:ident<$b:ident>, $n:literal, $state:ty, |$grad:ident, $saved:pat_param| $gradients:expr) => {
        #[derive(Debug)]
        struct $name;
        impl<$b: FusedOps> Backward<$b, $n> for $name {
            type State = $state;
            fn backward(self, ops: Ops<Self::State, $n>, grads: &mut Gradients, _: &mut Checkpointer) {
                let $grad = grads.consume::<$b>(&ops.node);
                let $saved = ops.state;
                let gradients: [FloatTensor<$b>; $n] = $gradients;
                for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
                    if let Some(node) = parent {
                        grads.register::<$b>(node.id, gradient);
                    }
                }
            }
        }
    };
}

node!(RmsNorm<B>, 2, (FloatTensor<B>, FloatTensor<B>, f32), |g, (x, w, eps)| {
    B::rms_norm_backward(g, x, w, eps).into()
});
node!(LayerNorm<B>, 3, (FloatTensor<B>, FloatTensor<B>, f32), |g, (x, w, eps)| {
    B::layer_norm_backward(g, x, w, eps).into()
});
node!(Rotate<B>, 1, Rotary, |g, table| [B::fused_rotary(g, table, -1.0)]);
node!(Gated<B>, 2, (FloatTensor<B>, FloatTensor<B>, Activation), |g, (a, b, kind)| {
    B::gated_backward(g, a, b, kind).into()
});
node!(Activate<B>, 1, (FloatTensor<B>, Activation), |g, (x, kind)| [B::activate_backward(g, x, kind)]);
node!(
    Attention<B>,
    3,
    (
        FloatTensor<B>,
        FloatTensor<B>,
        FloatTensor<B>,
        FloatTensor<B>,
        FloatTensor<B>,
        Arc<Segments>,
        Heads,
        Scores
    ),
    |g, (q, k, v, out, lse, segments, heads, scores)| {
        B::attention_backward(g, q, k, v, out, lse, segments, heads, scores).into()
    }
);
node!(Sums<B>, 1, (Arc<Vec<(u32, u32)>>, usize), |g, (plan, values)| [B::sums_backward(g, plan, values)]);

/// A weight that is not trained has no gradient: none is computed, and what it would need is not kept.
#[derive(Debug)]
struct Linear;

impl<B: FusedOps> Backward<B, 2> for Linear {
    /// The input, kept for the weight's gradient, the weight, kept for the input's, and the weight's data type.
    type State = (Option<FloatTensor<B>>, Option<FloatTensor<B>>, DType);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (x, w, dtype) = ops.state;
        let [x_node, w_node] = ops.parents;
        if let (Some(node), Some(w)) = (x_node, w) {
            grads.register::<B>(node.id, B::linear_grad_input(grad.clone(), w));
        }
        if let (Some(node), Some(x)) = (w_node, x) {
            let gradient = B::linear_grad_weight(grad, x);
            let same = gradient.dtype() == dtype;
            let gradient = if same { gradient } else { B::float_cast(gradient, FloatDType::from(dtype)) };
            grads.register::<B>(node.id, gradient);
        }
    }
}

#[derive(Debug)]
struct Head;

impl<B: FusedOps> Backward<B, 2> for Head {
    type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, Arc<Vec<u32>>, Logits);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (hidden, w, lse, targets, logits) = ops.state;
        let [hidden_node, w_node] = ops.parents;
        let (dh, dw) = B::head_backward(grad, hidden, w, lse, targets, logits, w_node.is_some());
        if let Some(node) = hidden_node {
            grads.register::<B>(node.id, dh);
        }
        if let Some(node) = w_node {
            grads.register::<B>(node.id, dw);
        }
    }
}

impl<B: FusedOps, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn upload_floats(like: FloatTensor<Self>, values: Vec<f32>, shape: Vec<usize>) -> FloatTensor<Self> {
        <Self as AutodiffBackend>::from_inner(B::upload_floats(like.into_primitive(), values, shape))
    }

    fn upload_indices(like: FloatTensor<Self>, values: Vec<u32>, shape: Vec<usize>) -> IntTensor<Self> {
        <Self as AutodiffBackend>::int_from_inner(B::upload_indices(like.into_primitive(), values, shape))
    }

    fn fused_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [x.node(), w.node()];
        let (of_input, of_weight) = (x.is_tracked(), w.is_tracked());
        let (x, w) = (x.into_primitive(), w.into_primitive());
        let (out, dtype) = (B::fused_linear(x.clone(), w.clone()), w.dtype());
        match Linear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((of_weight.then_some(x), of_input.then_some(w), dtype), out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn fused_rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        let nodes = [x.node(), w.node()];
        let (x, w) = (x.into_primitive(), w.into_primitive());
        let out = B::fused_rms_norm(x.clone(), w.clone(), eps);
        match RmsNorm.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((x, w, eps), out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn fused_layer_norm(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), w.node(), b.node()];
        let (x, w, b) = (x.into_primitive(), w.into_primitive(), b.into_primitive());
        let out = B::fused_layer_norm(x.clone(), w.clone(), b, eps);
        match LayerNorm.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((x, w, eps), out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn fused_rotary(x: FloatTensor<Self>, table: Rotary, sign: f32) -> FloatTensor<Self> {
        let nodes = [x.node()];
        let out = B::fused_rotary(x.into_primitive(), table.clone(), sign);
        match Rotate.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish(table, out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn fused_gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, kind: Activation) -> FloatTensor<Self> {
        let nodes = [gate.node(), up.node()];
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        let out = B::fused_gated(gate.clone(), up.clone(), kind);
        match Gated.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((gate, up, kind), out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn fused_activate(x: FloatTensor<Self>, kind: Activation) -> FloatTensor<Self> {
        let nodes = [x.node()];
        let x = x.into_primitive();
        let out = B::fused_activate(x.clone(), kind);
        match Activate.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((x, kind), out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: Arc<Segments>,
        heads: Heads,
        scores: Scores,
    ) -> Two<Self> {
        let nodes = [q.node(), k.node(), v.node()];
        let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
        let (out, lse) = B::fused_attention(q.clone(), k.clone(), v.clone(), segments.clone(), heads, scores);
        let untracked = <Self as AutodiffBackend>::from_inner(lse.clone());
        let out = match Attention.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((q, k, v, out.clone(), lse, segments, heads, scores), out),
            OpsKind::UnTracked(p) => p.finish(out),
        };
        (out, untracked)
    }

    fn fused_sums(values: FloatTensor<Self>, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> FloatTensor<Self> {
        let nodes = [values.node()];
        let values = values.into_primitive();
        let n = values.shape()[0];
        let out = B::fused_sums(values, plan.clone(), sums);
        match Sums.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((plan, n), out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn sums_backward(_: FloatTensor<Self>, _: Arc<Vec<(u32, u32)>>, _: usize) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }

    fn fused_head(
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
        logits: Logits,
    ) -> Three<Self> {
        let nodes = [hidden.node(), w.node()];
        let (hidden, w) = (hidden.into_primitive(), w.into_primitive());
        let (logps, stats, lse) = B::fused_head(hidden.clone(), w.clone(), targets.clone(), logits);
        let (stats, lse_out) = (
            <Self as AutodiffBackend>::from_inner(stats),
            <Self as AutodiffBackend>::from_inner(lse.clone()),
        );
        let logps = match Head.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((hidden, w, lse, targets, logits), logps),
            OpsKind::UnTracked(p) => p.finish(logps),
        };
        (logps, stats, lse_out)
    }

    fn weight_as(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn head_products(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn linear_grad_input(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn linear_grad_weight(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn rms_norm_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f32,
    ) -> Two<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn layer_norm_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f32,
    ) -> Three<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn gated_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Activation,
    ) -> Two<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn activate_backward(_: FloatTensor<Self>, _: FloatTensor<Self>, _: Activation) -> FloatTensor<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn attention_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Arc<Segments>,
        _: Heads,
        _: Scores,
    ) -> Three<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn head_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Arc<Vec<u32>>,
        _: Logits,
        _: bool,
    ) -> Two<Self> {
        unreachable!("{SECOND_ORDER}")
    }
}

const SECOND_ORDER: &str = "backward passes are only called on the inner backend: no second-order gradients";
