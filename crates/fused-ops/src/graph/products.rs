//! Linear layers in the graph, with and without a low-rank update.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};
use burn::tensor::DType;
use tracing::trace_span;

use super::in_type;
use crate::ops::{FusedOps, Two};

/// A weight that is not trained has no gradient: none is computed, and what it would need is not kept.
#[derive(Debug)]
struct Linear;

impl<B: FusedOps> Backward<B, 2> for Linear {
    /// The input, kept or computed again for the weight's gradient, the weight, kept for the input's, and the weight's
    /// data type.
    type State = (Option<NodeId>, Option<FloatTensor<B>>, DType);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, kept: &mut Checkpointer) {
        let _span = trace_span!("Linear backward").entered();
        let grad = grads.consume::<B>(&ops.node);
        let (x, w, dtype) = ops.state;
        let [x_node, w_node] = ops.parents;
        if let (Some(node), Some(w)) = (x_node, w) {
            grads.register::<B>(node.id, B::linear_grad_input(grad.clone(), w));
        }
        if let (Some(node), Some(x)) = (w_node, x) {
            let gradient = B::linear_grad_weight(grad, kept.retrieve_node_output(x));
            grads.register::<B>(node.id, in_type::<B>(gradient, dtype));
        }
    }
}

/// A layer with a low-rank update; its own weight is not trained.
#[derive(Debug)]
struct LowRank;

impl<B: FusedOps> Backward<B, 3> for LowRank {
    /// The input, kept or computed again, `scale · x · aᵀ`, the three weights as the products take them, the data types
    /// of the adapter's, and the scale.
    type State = (NodeId, FloatTensor<B>, [FloatTensor<B>; 3], [DType; 2], f32);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, kept: &mut Checkpointer) {
        let _span = trace_span!("Lora backward").entered();
        let grad = grads.consume::<B>(&ops.node);
        let (x, inner, [w, a, b], types, scale) = ops.state;
        let [x_node, a_node, b_node] = ops.parents;
        let x: FloatTensor<B> = kept.retrieve_node_output(x);
        let of_inner = B::scaled(B::linear_grad_input(grad.clone(), b), scale);
        if let Some(node) = b_node {
            let gradient = B::linear_grad_weight(grad.clone(), inner);
            grads.register::<B>(node.id, in_type::<B>(gradient, types[1]));
        }
        if let Some(node) = a_node {
            let gradient = B::linear_grad_weight(of_inner.clone(), x);
            grads.register::<B>(node.id, in_type::<B>(gradient, types[0]));
        }
        if let Some(node) = x_node {
            let of_base = B::linear_grad_input(grad, w);
            grads.register::<B>(node.id, B::grad_input_onto(of_base, of_inner, a));
        }
    }
}

/// A linear layer whose value `compute` returns.
pub fn linear<B: FusedOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: FloatTensor<Autodiff<B, C>>,
    compute: impl Fn(FloatTensor<B>, FloatTensor<B>) -> FloatTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = [x.node(), w.node()];
    let (of_input, of_weight) = (x.is_tracked(), w.is_tracked());
    let w = w.into_primitive();
    let (out, dtype) = (compute(x.primitive().clone(), w.clone()), w.dtype());
    match Linear.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut p) => {
            let x = of_weight.then(|| p.checkpoint(&x));
            p.finish((x, of_input.then_some(w), dtype), out)
        }
        OpsKind::UnTracked(p) => p.finish(out),
    }
}

/// One with a low-rank update.
pub fn lora<B: FusedOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    weights: [FloatTensor<Autodiff<B, C>>; 3],
    scale: f32,
    compute: impl Fn(FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, f32) -> Two<B>,
) -> Two<Autodiff<B, C>> {
    assert!(!weights[0].is_tracked(), "the weight below an adapter is not trained");
    let nodes = [x.node(), weights[1].node(), weights[2].node()];
    let [w, a, b] = weights.map(FloatTensor::<Autodiff<B, C>>::into_primitive);
    let types = [a.dtype(), b.dtype()];
    // Rounded once for both passes.
    let [a, b] = [a, b].map(|factor| B::weight_as(factor, x.primitive().clone()));
    let (out, inner) = compute(x.primitive().clone(), w.clone(), a.clone(), b.clone(), scale);
    let untracked = <Autodiff<B, C> as AutodiffBackend>::from_inner(inner.clone());
    let out = match LowRank.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut p) => {
            let x = p.checkpoint(&x);
            p.finish((x, inner, [w, a, b], types, scale), out)
        }
        OpsKind::UnTracked(p) => p.finish(out),
    };
    (out, untracked)
}
