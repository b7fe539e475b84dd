//! Rows of a table in the graph. Gradients of the rows are added to those that the table has, a tied embedding's from
//! the head, instead of a gradient of the whole table that is zero nearly everywhere.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, TensorMetadata};
use tracing::trace_span;

use super::Tracked;
use crate::generic::Value;
use crate::ops::FusedOps;

#[derive(Debug)]
struct Select;

impl<B: FusedOps> Backward<B, 1> for Select {
    /// The table, which names its gradient, and the rows.
    type State = (Tracked<B>, Arc<Vec<u32>>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let _span = trace_span!("Select backward").entered();
        let grad = grads.consume::<B>(&ops.node);
        let [Some(parent)] = ops.parents else { return };
        let (table, rows) = ops.state;
        let nothing = || Value::<B>::zeros(&table.shape().to_vec(), grad.dtype(), &Value(grad.clone())).0;
        let before = grads.remove::<B>(&table).unwrap_or_else(nothing);
        grads.register::<B>(parent.id, B::rows_added(before, rows, grad));
    }
}

/// See [`FusedOps::fused_select`].
pub fn select<B: FusedOps, C: CheckpointStrategy>(
    table: FloatTensor<Autodiff<B, C>>,
    rows: Arc<Vec<u32>>,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = [table.node()];
    let out = B::fused_select(table.primitive().clone(), rows.clone());
    match Select.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(p) => p.finish((table, rows), out),
        OpsKind::UnTracked(p) => p.finish(out),
    }
}
