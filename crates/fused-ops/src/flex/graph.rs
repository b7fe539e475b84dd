//! Graph: the backward passes as autodiff nodes.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};

use super::{FusedOps, Three, Two};
use crate::{Heads, Rotary, Segments};

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

node!(Linear<B>, 2, (FloatTensor<B>, FloatTensor<B>), |g, (x, w)| B::linear_backward(g, x, w).into());
node!(RmsNorm<B>, 2, (FloatTensor<B>, FloatTensor<B>, f32), |g, (x, w, eps)| {
    B::rms_norm_backward(g, x, w, eps).into()
});
node!(LayerNorm<B>, 3, (FloatTensor<B>, FloatTensor<B>, f32), |g, (x, w, eps)| {
    B::layer_norm_backward(g, x, w, eps).into()
});
node!(Rotate<B>, 1, Rotary, |g, table| [B::fused_rotary(g, table, -1.0)]);
node!(SwiGlu<B>, 2, (FloatTensor<B>, FloatTensor<B>), |g, (a, b)| B::swiglu_backward(g, a, b).into());
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
        f32
    ),
    |g, (q, k, v, out, lse, segments, heads, scale)| {
        B::attention_backward(g, q, k, v, out, lse, segments, heads, scale).into()
    }
);
node!(Sums<B>, 1, (Arc<Vec<(u32, u32)>>, usize), |g, (plan, values)| [B::sums_backward(g, plan, values)]);
node!(Head<B>, 2, (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, Arc<Vec<u32>>), |g,
                                                                                    (
    hidden,
    w,
    lse,
    targets,
)| B::head_backward(
    g, hidden, w, lse, targets
)
.into());

impl<B: FusedOps, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn fused_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [x.node(), w.node()];
        let (x, w) = (x.into_primitive(), w.into_primitive());
        let out = B::fused_linear(x.clone(), w.clone());
        match Linear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((x, w), out),
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

    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [gate.node(), up.node()];
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        let out = B::fused_swiglu(gate.clone(), up.clone());
        match SwiGlu.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((gate, up), out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: Arc<Segments>,
        heads: Heads,
        scale: f32,
    ) -> Two<Self> {
        let nodes = [q.node(), k.node(), v.node()];
        let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
        let (out, lse) = B::fused_attention(q.clone(), k.clone(), v.clone(), segments.clone(), heads, scale);
        let untracked = <Self as AutodiffBackend>::from_inner(lse.clone());
        let out = match Attention.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((q, k, v, out.clone(), lse, segments, heads, scale), out),
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

    fn fused_head(hidden: FloatTensor<Self>, w: FloatTensor<Self>, targets: Arc<Vec<u32>>) -> Three<Self> {
        let nodes = [hidden.node(), w.node()];
        let (hidden, w) = (hidden.into_primitive(), w.into_primitive());
        let (logps, stats, lse) = B::fused_head(hidden.clone(), w.clone(), targets.clone());
        let (stats, lse_out) = (
            <Self as AutodiffBackend>::from_inner(stats),
            <Self as AutodiffBackend>::from_inner(lse.clone()),
        );
        let logps = match Head.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(p) => p.finish((hidden, w, lse, targets), logps),
            OpsKind::UnTracked(p) => p.finish(logps),
        };
        (logps, stats, lse_out)
    }

    fn linear_backward(_: FloatTensor<Self>, _: FloatTensor<Self>, _: FloatTensor<Self>) -> Two<Self> {
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
    fn swiglu_backward(_: FloatTensor<Self>, _: FloatTensor<Self>, _: FloatTensor<Self>) -> Two<Self> {
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
        _: f32,
    ) -> Three<Self> {
        unreachable!("{SECOND_ORDER}")
    }
    fn head_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Arc<Vec<u32>>,
    ) -> Two<Self> {
        unreachable!("{SECOND_ORDER}")
    }
}

const SECOND_ORDER: &str = "backward passes are only called on the inner backend: no second-order gradients";
