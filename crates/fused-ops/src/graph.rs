//! Graph: the backward passes as autodiff nodes.
//!
//! Norms, activations and narrowing casts are cheap: what they return is not kept for the products that take it, but computed again from
//! their inputs when a weight's gradient needs it (Burn's memory-bound nodes, whatever the strategy of the tape).

mod branches;
mod products;
mod rows;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::retro_forward::RetroForward;
use burn::backend::autodiff::checkpoint::state::BackwardStates;
use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};
use burn::tensor::{DType, FloatDType};
use tracing::trace_span;

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
                let _span = trace_span!(concat!(stringify!($name), " backward")).entered();
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
node!(Cast<B>, 1, FloatDType, |g, dtype| [B::fused_cast(g, dtype)]);
node!(Sums<B>, 1, (Arc<Vec<(u32, u32)>>, usize), |g, (plan, values)| [B::sums_backward(g, plan, values)]);

/// Backward passes, which are only called on the inner backend.
macro_rules! second_order {
    ($($name:ident($($operand:ty),*) -> $result:ty;)*) => {
        $(fn $name($(_: $operand),*) -> $result {
            unreachable!("{SECOND_ORDER}")
        })*
    };
}

/// A tensor of the graph.
type Tracked<B> = FloatTensor<Autodiff<B>>;

/// How a cheap value is computed again: from the outputs of these nodes, which are given back as their last user has
/// them, and weights.
#[derive(Clone)]
struct Again<B: FusedOps, const N: usize> {
    inputs: [NodeId; N],
    compute: Arc<dyn Fn([FloatTensor<B>; N]) -> FloatTensor<B> + Send + Sync>,
}

impl<B: FusedOps, const N: usize> std::fmt::Debug for Again<B, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Again({:?})", self.inputs)
    }
}

impl<B: FusedOps, const N: usize> RetroForward for Again<B, N> {
    fn forward(&self, states: &mut BackwardStates, node: NodeId) {
        let _span = trace_span!("computed again").entered();
        let inputs = self.inputs.map(|id| states.get_state::<FloatTensor<B>>(&id));
        states.save(node, (self.compute)(inputs));
    }
}

/// The value of an input and of a weight that is tracked: what the graph must know to compute a value again.
fn known<'a, B: FusedOps>(
    inputs: impl IntoIterator<Item = &'a Tracked<B>>,
    weights: impl IntoIterator<Item = &'a Tracked<B>>,
) -> Vec<Tracked<B>> {
    inputs.into_iter().chain(weights.into_iter().filter(|w| w.is_tracked())).cloned().collect()
}

/// A gradient in the data type of its weight.
fn in_type<B: FusedOps>(gradient: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if gradient.dtype() == dtype { gradient } else { B::fused_cast(gradient, dtype.into()) }
}

#[derive(Debug)]
struct Head;

impl<B: FusedOps> Backward<B, 2> for Head {
    type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, Arc<Vec<u32>>, Logits);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let _span = trace_span!("Head backward").entered();
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

/// Prepares a node whose output is computed again from `inputs`, if all that are `known` are tracked.
fn again<
    B: FusedOps,
    O: Backward<B, N, State: Clone + Send + std::fmt::Debug>,
    const N: usize,
    const M: usize,
>(
    op: O,
    nodes: [NodeGuard; N],
    known: &[Tracked<B>],
    inputs: [NodeId; M],
    compute: impl Fn([FloatTensor<B>; M]) -> FloatTensor<B> + Send + Sync + 'static,
) -> OpsKind<O, B, O::State, BalancedCheckpointing, N> {
    let again = Again::<B, M> { inputs, compute: Arc::new(compute) };
    op.prepare::<BalancedCheckpointing>(nodes).memory_bound().retro_forward(again).parents(known).stateful()
}

impl<B: FusedOps, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn upload_floats(like: FloatTensor<Self>, values: Vec<f32>, shape: Vec<usize>) -> FloatTensor<Self> {
        <Self as AutodiffBackend>::from_inner(B::upload_floats(like.into_primitive(), values, shape))
    }

    fn upload_indices(like: FloatTensor<Self>, values: Vec<u32>, shape: Vec<usize>) -> IntTensor<Self> {
        <Self as AutodiffBackend>::int_from_inner(B::upload_indices(like.into_primitive(), values, shape))
    }

    fn fused_cast(x: FloatTensor<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        let (nodes, known, id) = ([x.node()], known([&x], []), x.id());
        let x = x.into_primitive();
        let (before, wider) = (FloatDType::from(x.dtype()), DType::from(dtype).size() > x.dtype().size());
        let out = B::fused_cast(x, dtype);
        if wider {
            // Its input would be kept where nothing keeps what it returns.
            return match Cast.prepare::<C>(nodes).compute_bound().stateful() {
                OpsKind::Tracked(p) => p.finish(before, out),
                OpsKind::UnTracked(p) => p.finish(out),
            };
        }
        match again(Cast, nodes, &known, [id], move |[x]: [_; 1]| B::fused_cast(x, dtype)) {
            OpsKind::Tracked(p) => p.finish(before, out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn lookup(table: FloatTensor<Self>, rows: Arc<Vec<u32>>) -> FloatTensor<Self> {
        rows::lookup::<B, C>(table, rows)
    }

    fn branch(x: FloatTensor<Self>, met: Arc<AtomicBool>) -> FloatTensor<Self> {
        branches::branch::<B, C>(x, met)
    }

    fn joined(x: FloatTensor<Self>, update: FloatTensor<Self>) -> FloatTensor<Self> {
        branches::joined::<B, C>(x, update)
    }

    fn fused_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        products::linear::<B, C>(x, w, B::fused_linear)
    }

    fn linear_unused(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        products::linear::<B, C>(x, w, B::linear_unused)
    }

    fn fused_lora(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> Two<Self> {
        products::lora::<B, C>(x, [w, a, b], scale, B::fused_lora)
    }

    fn lora_unused(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> Two<Self> {
        products::lora::<B, C>(x, [w, a, b], scale, B::lora_unused)
    }

    fn fused_rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        let (nodes, known, id) = ([x.node(), w.node()], known([&x], [&w]), x.id());
        let (x, w) = (x.into_primitive(), w.into_primitive());
        let out = B::fused_rms_norm(x.clone(), w.clone(), eps);
        let weight = w.clone();
        let compute = move |[x]: [_; 1]| B::fused_rms_norm(x, weight.clone(), eps);
        match again(RmsNorm, nodes, &known, [id], compute) {
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
        let (nodes, known, id) = ([x.node(), w.node(), b.node()], known([&x], [&w, &b]), x.id());
        let (x, w, b) = (x.into_primitive(), w.into_primitive(), b.into_primitive());
        let out = B::fused_layer_norm(x.clone(), w.clone(), b.clone(), eps);
        let weight = w.clone();
        let compute = move |[x]: [_; 1]| B::fused_layer_norm(x, weight.clone(), b.clone(), eps);
        match again(LayerNorm, nodes, &known, [id], compute) {
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
        let (nodes, known, ids) = ([gate.node(), up.node()], known([&gate, &up], []), [gate.id(), up.id()]);
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        let out = B::fused_gated(gate.clone(), up.clone(), kind);
        match again(Gated, nodes, &known, ids, move |[gate, up]: [_; 2]| B::fused_gated(gate, up, kind)) {
            OpsKind::Tracked(p) => p.finish((gate, up, kind), out),
            OpsKind::UnTracked(p) => p.finish(out),
        }
    }

    fn fused_activate(x: FloatTensor<Self>, kind: Activation) -> FloatTensor<Self> {
        let (nodes, known, id) = ([x.node()], known([&x], []), x.id());
        let x = x.into_primitive();
        let out = B::fused_activate(x.clone(), kind);
        match again(Activate, nodes, &known, [id], move |[x]: [_; 1]| B::fused_activate(x, kind)) {
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

    second_order! {
        weight_as(FloatTensor<Self>, FloatTensor<Self>) -> FloatTensor<Self>;
        head_products(FloatTensor<Self>, FloatTensor<Self>) -> FloatTensor<Self>;
        scaled(FloatTensor<Self>, f32) -> FloatTensor<Self>;
        added(FloatTensor<Self>, FloatTensor<Self>) -> FloatTensor<Self>;
        rows_added(FloatTensor<Self>, Arc<Vec<u32>>, FloatTensor<Self>) -> FloatTensor<Self>;
        linear_onto(FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) -> FloatTensor<Self>;
        grad_input_onto(FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) -> FloatTensor<Self>;
        linear_grad_input(FloatTensor<Self>, FloatTensor<Self>) -> FloatTensor<Self>;
        linear_grad_weight(FloatTensor<Self>, FloatTensor<Self>) -> FloatTensor<Self>;
        rms_norm_backward(FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, f32) -> Two<Self>;
        layer_norm_backward(FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, f32) -> Three<Self>;
        gated_backward(FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, Activation) -> Two<Self>;
        activate_backward(FloatTensor<Self>, FloatTensor<Self>, Activation) -> FloatTensor<Self>;
        attention_backward(FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, Arc<Segments>, Heads, Scores) -> Three<Self>;
        head_backward(FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, Arc<Vec<u32>>, Logits, bool) -> Two<Self>;
    }
}

const SECOND_ORDER: &str = "backward passes are only called on the inner backend: no second-order gradients";
