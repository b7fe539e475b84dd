//! The kernels as operations of the Flex backend, with their backward passes as autodiff nodes.
//!
//! `FusedOps` is implemented by `Flex` (values) and by `Autodiff<B>` (graph); the macro generates the
//! dispatch from Burn's run-time tensors.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Bytes, DType, Shape, Tensor};

use crate::kernels::attention::Operands;
use crate::kernels::matrix::{Mat, matmul};
use crate::kernels::{attention as attn, elementwise, head as lm_head, norm};
use crate::{HeadOutput, Heads, Rotary, Segments};

/// Three gradients, in the order of the operands.
type Three<B> = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);
/// Two tensors.
type Two<B> = (FloatTensor<B>, FloatTensor<B>);

#[backend_extension(Flex, Autodiff)]
pub(crate) trait FusedOps: Backend {
    fn fused_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self>;
    fn linear_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
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
    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    fn swiglu_backward(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// Returns the output and the log-sum-exp of every query and head.
    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: Arc<Segments>,
        heads: Heads,
        scale: f32,
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
        scale: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    fn fused_sums(values: FloatTensor<Self>, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> FloatTensor<Self>;
    fn sums_backward(grad: FloatTensor<Self>, plan: Arc<Vec<(u32, u32)>>, values: usize)
    -> FloatTensor<Self>;
    /// Returns the log-probabilities, the statistics and the log-sum-exp.
    fn fused_head(
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    fn head_backward(
        grad: FloatTensor<Self>,
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

fn flat(t: &FlexTensor) -> FlexTensor {
    t.to_contiguous()
}

fn new(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    let layout = Layout::contiguous(Shape::from(shape.to_vec()));
    FlexTensor::new(Bytes::from_elems(values), layout, DType::F32)
}

fn like(values: Vec<f32>, other: &FlexTensor) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(other.layout().shape().clone()), DType::F32)
}

fn dims(t: &FlexTensor) -> [usize; 2] {
    let shape = t.layout().shape();
    [shape[0], shape[1]]
}

impl FusedOps for Flex {
    fn fused_linear(x: FlexTensor, w: FlexTensor) -> FlexTensor {
        let (x, w) = (flat(&x), flat(&w));
        let ([tokens, inner], [outer, inner_w]) = (dims(&x), dims(&w));
        assert_eq!(inner, inner_w, "linear: x has {inner} features, the weight takes {inner_w}");
        let mut out = vec![0.0; tokens * outer];
        let (a, b) = (Mat::rows(x.storage(), inner), Mat::rows(w.storage(), inner).t());
        matmul(&mut out, false, (tokens, outer, inner), a, b);
        new(out, &[tokens, outer])
    }

    fn linear_backward(grad: FlexTensor, x: FlexTensor, w: FlexTensor) -> Two<Self> {
        let (grad, x, w) = (flat(&grad), flat(&x), flat(&w));
        let ([tokens, inner], [outer, _]) = (dims(&x), dims(&w));
        let g = Mat::rows(grad.storage(), outer);
        let mut dx = vec![0.0; tokens * inner];
        matmul(&mut dx, false, (tokens, inner, outer), g, Mat::rows(w.storage(), inner));
        let mut dw = vec![0.0; outer * inner];
        matmul(&mut dw, false, (outer, inner, tokens), g.t(), Mat::rows(x.storage(), inner));
        (like(dx, &x), like(dw, &w))
    }

    fn fused_rms_norm(x: FlexTensor, w: FlexTensor, eps: f32) -> FlexTensor {
        let (x, w) = (flat(&x), flat(&w));
        like(norm::rms_forward(x.storage(), w.storage(), eps), &x)
    }

    fn rms_norm_backward(grad: FlexTensor, x: FlexTensor, w: FlexTensor, eps: f32) -> Two<Self> {
        let (grad, x, w) = (flat(&grad), flat(&x), flat(&w));
        let (dx, dw) = norm::rms_backward(grad.storage(), x.storage(), w.storage(), eps);
        (like(dx, &x), like(dw, &w))
    }

    fn fused_layer_norm(x: FlexTensor, w: FlexTensor, b: FlexTensor, eps: f32) -> FlexTensor {
        let (x, w, b) = (flat(&x), flat(&w), flat(&b));
        like(norm::layer_forward(x.storage(), w.storage(), b.storage(), eps), &x)
    }

    fn layer_norm_backward(grad: FlexTensor, x: FlexTensor, w: FlexTensor, eps: f32) -> Three<Self> {
        let (grad, x, w) = (flat(&grad), flat(&x), flat(&w));
        let (dx, dw, db) = norm::layer_backward(grad.storage(), x.storage(), w.storage(), eps);
        (like(dx, &x), like(dw, &w), like(db, &w))
    }

    fn fused_rotary(x: FlexTensor, table: Rotary, sign: f32) -> FlexTensor {
        let x = flat(&x);
        let features = dims(&x)[1];
        like(elementwise::rotate(x.storage(), features, &table.cos, &table.sin, table.half, sign), &x)
    }

    fn fused_swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        let (gate, up) = (flat(&gate), flat(&up));
        like(elementwise::swiglu_forward(gate.storage(), up.storage()), &gate)
    }

    fn swiglu_backward(grad: FlexTensor, gate: FlexTensor, up: FlexTensor) -> Two<Self> {
        let (grad, gate, up) = (flat(&grad), flat(&gate), flat(&up));
        let (dg, du) = elementwise::swiglu_backward(grad.storage(), gate.storage(), up.storage());
        (like(dg, &gate), like(du, &up))
    }

    fn fused_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        segments: Arc<Segments>,
        heads: Heads,
        scale: f32,
    ) -> Two<Self> {
        let (q, k, v) = (flat(&q), flat(&k), flat(&v));
        let (queries, keys) = segments.extent();
        assert!(queries <= dims(&q)[0] && keys <= dims(&k)[0], "segments reach beyond the tensors");
        let x = Operands { q: q.storage(), k: k.storage(), v: v.storage(), heads, scale };
        let (out, lse) = attn::forward(x, &segments);
        (like(out, &q), new(lse, &[dims(&q)[0], heads.query]))
    }

    fn attention_backward(
        grad: FlexTensor,
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        out: FlexTensor,
        lse: FlexTensor,
        segments: Arc<Segments>,
        heads: Heads,
        scale: f32,
    ) -> Three<Self> {
        let (grad, q, k, v) = (flat(&grad), flat(&q), flat(&k), flat(&v));
        let x = Operands { q: q.storage(), k: k.storage(), v: v.storage(), heads, scale };
        let [dq, dk, dv] = attn::backward(x, &segments, grad.storage(), out.storage(), lse.storage());
        (like(dq, &q), like(dk, &k), like(dv, &v))
    }

    fn fused_sums(values: FlexTensor, plan: Arc<Vec<(u32, u32)>>, sums: usize) -> FlexTensor {
        let values = flat(&values);
        let data = values.storage::<f32>();
        let mut totals = vec![0.0_f64; sums];
        for &(value, sum) in plan.iter() {
            totals[sum as usize] += f64::from(data[value as usize]);
        }
        new(totals.into_iter().map(|total| total as f32).collect(), &[sums])
    }

    fn sums_backward(grad: FlexTensor, plan: Arc<Vec<(u32, u32)>>, values: usize) -> FlexTensor {
        let grad = flat(&grad);
        let data = grad.storage::<f32>();
        let mut out = vec![0.0; values];
        for &(value, sum) in plan.iter() {
            out[value as usize] += data[sum as usize];
        }
        new(out, &[values])
    }

    fn fused_head(hidden: FlexTensor, w: FlexTensor, targets: Arc<Vec<u32>>) -> Three<Self> {
        let (hidden, w) = (flat(&hidden), flat(&w));
        let (n, [vocab, dim]) = (targets.len(), dims(&w));
        assert!(targets.iter().all(|&id| (id as usize) < vocab), "a target id is beyond the vocabulary");
        let result = lm_head::forward(hidden.storage(), w.storage(), dim, &targets);
        (new(result.logps, &[n]), new(result.stats, &[n, 3]), new(result.lse, &[n]))
    }

    fn head_backward(
        grad: FlexTensor,
        hidden: FlexTensor,
        w: FlexTensor,
        lse: FlexTensor,
        targets: Arc<Vec<u32>>,
    ) -> Two<Self> {
        let (grad, hidden, w) = (flat(&grad), flat(&hidden), flat(&w));
        let dim = dims(&w)[1];
        let (g, h, weight) = (grad.storage(), hidden.storage(), w.storage());
        let (dh, dw) = lm_head::backward(g, h, weight, dim, &targets, lse.storage());
        (like(dh, &hidden), like(dw, &w))
    }
}

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

pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_swiglu(gate.into_dispatch(), up.into_dispatch()))
}

pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    segments: &Arc<Segments>,
    heads: Heads,
    scale: f32,
) -> Tensor<2> {
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    let (out, _lse) = <Dispatch as FusedOps>::fused_attention(q, k, v, segments.clone(), heads, scale);
    Tensor::from_dispatch(out)
}

pub fn sum_into(values: Tensor<1>, plan: &Arc<Vec<(u32, u32)>>, sums: usize) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_sums(values.into_dispatch(), plan.clone(), sums))
}

pub fn head(hidden: Tensor<2>, w: Tensor<2>, targets: &Arc<Vec<u32>>) -> HeadOutput {
    let (hidden, w) = (hidden.into_dispatch(), w.into_dispatch());
    let (logps, stats, _lse) = <Dispatch as FusedOps>::fused_head(hidden, w, targets.clone());
    HeadOutput { logps: Tensor::from_dispatch(logps), stats: Tensor::<2>::from_dispatch(stats).inner() }
}
