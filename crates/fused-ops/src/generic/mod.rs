//! What a backend without kernels of its own runs: the same values and gradients composed of its basic
//! operations, with the same bounds on memory, and without reading anything back.

mod attention;
mod elementwise;
mod head;
mod value;

pub use attention::{attention, attention_backward};
pub use elementwise::{
    activate, activate_backward, gated, gated_backward, layer_norm, layer_norm_backward, rms_norm,
    rms_norm_backward, rotary,
};
#[cfg(feature = "tch")]
pub use head::logits_of;
pub use head::{head, head_backward};
pub use value::Value;

use std::sync::Arc;

use burn::tensor::IndexingUpdateOp;

use crate::Heads;
use crate::ops::FusedOps;

/// `x · wᵀ` in the data type of `x`.
pub fn linear<B: FusedOps>(x: Value<B>, w: Value<B>) -> Value<B> {
    let w = w.weight_for(&x);
    x.matmul(w.t())
}

/// Gradient of the input of [`linear`].
pub fn linear_grad_input<B: FusedOps>(grad: Value<B>, w: Value<B>) -> Value<B> {
    let w = w.weight_for(&grad);
    grad.matmul(w)
}

/// Gradient of the weight of [`linear`].
pub fn linear_grad_weight<B: FusedOps>(grad: Value<B>, x: Value<B>) -> Value<B> {
    grad.t().matmul(x)
}

/// Rows written over those of a cache, one run of slots after the other.
pub fn write_rows<B: FusedOps>(mut cache: Value<B>, rows: Value<B>, slots: &[u32]) -> Value<B> {
    let rows = rows.cast(cache.dtype());
    let mut row = 0;
    for run in slots.chunk_by(|a, b| a + 1 == *b) {
        let start = run[0] as usize;
        cache = cache.assign(start..start + run.len(), rows.clone().narrow(0, row..row + run.len()));
        row += run.len();
    }
    cache
}

/// A table of this shape with the sum of the values of each row, in their order: row `rows[i]` has row `i` of `values`.
pub fn rows_of<B: FusedOps>(shape: &[usize], rows: &[u32], values: Value<B>) -> Value<B> {
    let ids = Value::indices(rows.to_vec(), &[rows.len()], &values);
    let zeros = Value::<B>::zeros(shape, values.dtype(), &values);
    Value(B::float_select_assign(zeros.0, 0, ids, values.0, IndexingUpdateOp::Add))
}

/// See [`FusedOps::rows_added`].
pub fn rows_added<B: FusedOps>(base: Value<B>, rows: &[u32], values: Value<B>) -> Value<B> {
    let sums = rows_of(&base.dims(), rows, values);
    Value(B::added(base.0, sums.0))
}

/// See [`FusedOps::joined`].
pub fn joined<B: FusedOps>(x: Value<B>, update: Value<B>) -> Value<B> {
    let update = update.cast(x.dtype());
    x + update
}

/// Two caches of nothing: see [`FusedOps::new_cache`].
pub fn new_cache<B: FusedOps>(like: &Value<B>, slots: usize, heads: Heads) -> (Value<B>, Value<B>) {
    let new = || Value::zeros(&[slots, heads.kv * heads.dim], like.dtype(), like);
    (new(), new())
}

/// The 0/1 matrix `[sums, values]` of a plan.
fn plan_matrix<B: FusedOps>(plan: &[(u32, u32)], sums: usize, values: usize, like: &Value<B>) -> Value<B> {
    let mut matrix = vec![0.0; sums * values];
    for &(value, sum) in plan {
        matrix[sum as usize * values + value as usize] += 1.0;
    }
    Value::upload(matrix, &[sums, values], like)
}

/// See [`crate::sum_into`]: a product with a 0/1 matrix.
pub fn sums<B: FusedOps>(values: Value<B>, plan: &Arc<Vec<(u32, u32)>>, sums: usize) -> Value<B> {
    let n = values.dims()[0];
    let matrix = plan_matrix(plan, sums, n, &values);
    (matrix * values.reshape(&[1, n])).sum(1).reshape(&[sums])
}

/// Gradient of [`sums`].
pub fn sums_backward<B: FusedOps>(grad: Value<B>, plan: &Arc<Vec<(u32, u32)>>, values: usize) -> Value<B> {
    let sums = grad.dims()[0];
    let matrix = plan_matrix(plan, sums, values, &grad);
    (matrix * grad.reshape(&[sums, 1])).sum(0).reshape(&[values])
}
