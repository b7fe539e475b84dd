//! Rows of a table of weights in the graph. Their gradients are added to those that the table has, a tied embedding's
//! from the head, instead of a gradient of the whole table that is zero nearly everywhere.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, TensorMetadata};
use tracing::trace_span;

use super::Tracked;
use crate::generic::{self, Value};
use crate::ops::FusedOps;

#[derive(Debug)]
struct Lookup;

impl<B: FusedOps> Backward<B, 1> for Lookup {
    /// The table, a leaf that outlives the graph, by which its gradient is found; and the rows.
    type State = (Tracked<B>, Arc<Vec<u32>>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let _span = trace_span!("Lookup backward").entered();
        let grad = grads.consume::<B>(&ops.node);
        let [Some(parent)] = ops.parents else { return };
        let (table, rows) = ops.state;
        let sum = match grads.remove::<B>(&table) {
            Some(before) => B::rows_added(before, rows, grad),
            None => generic::rows_of(&table.shape().to_vec(), &rows, Value::<B>(grad)).0,
        };
        grads.register::<B>(parent.id, sum);
    }
}

/// See [`FusedOps::lookup`].
pub fn lookup<B: FusedOps, C: CheckpointStrategy>(
    table: FloatTensor<Autodiff<B, C>>,
    rows: Arc<Vec<u32>>,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = [table.node()];
    let out = B::lookup(table.primitive().clone(), rows.clone());
    match Lookup.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(p) => p.finish((table, rows), out),
        OpsKind::UnTracked(p) => p.finish(out),
    }
}
