//! Where the graph branches and joins: sums of gradients and of residuals by this crate's operations.
//!
//! Burn adds the gradients of a tensor that several operations take with the backend's own addition, which on Flex is a
//! loop of one thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, TensorMetadata};
use burn::tensor::DType;
use tracing::trace_span;

use super::{again, in_type, known};
use crate::ops::FusedOps;

/// One use of a tensor; all of them have the same flag, which says that one has given its gradient.
#[derive(Debug)]
struct Branch;

impl<B: FusedOps> Backward<B, 1> for Branch {
    type State = Arc<AtomicBool>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let _span = trace_span!("Branch backward").entered();
        let grad = grads.consume::<B>(&ops.node);
        let [Some(parent)] = ops.parents else { return };
        let is_met = ops.state.swap(true, Ordering::Relaxed);
        // The gradient of a leaf stays where it is: Burn adds to it.
        let is_leaf = parent.parents.is_empty();
        let sum = if is_met && !is_leaf { B::added(grads.consume::<B>(&parent), grad) } else { grad };
        grads.register::<B>(parent.id, sum);
    }
}

/// The sum of a residual and an update of perhaps fewer bits.
#[derive(Debug)]
struct Join;

impl<B: FusedOps> Backward<B, 2> for Join {
    /// Data type of the update.
    type State = DType;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let _span = trace_span!("Join backward").entered();
        let grad = grads.consume::<B>(&ops.node);
        let [x, update] = ops.parents;
        if let Some(node) = update {
            grads.register::<B>(node.id, in_type::<B>(grad.clone(), ops.state));
        }
        if let Some(node) = x {
            grads.register::<B>(node.id, grad);
        }
    }
}

/// See [`FusedOps::branch`].
pub fn branch<B: FusedOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    met: Arc<AtomicBool>,
) -> FloatTensor<Autodiff<B, C>> {
    let (nodes, known, id) = ([x.node()], known([&x], []), x.id());
    let x = x.into_primitive();
    match again(Branch, nodes, &known, [id], |[x]: [_; 1]| x) {
        OpsKind::Tracked(p) => p.finish(met, x),
        OpsKind::UnTracked(p) => p.finish(x),
    }
}

/// See [`FusedOps::joined`].
pub fn joined<B: FusedOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    update: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = [x.node(), update.node()];
    let (x, update) = (x.into_primitive(), update.into_primitive());
    let dtype = update.dtype();
    let out = B::joined(x, update);
    match Join.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(p) => p.finish(dtype, out),
        OpsKind::UnTracked(p) => p.finish(out),
    }
}
